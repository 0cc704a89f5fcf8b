import torch

from rwkv_speech.batch import Batch


def batch() -> Batch:
    return Batch(
        indices=[4, 7],
        ids=["a", "b"],
        tasks=["asr", "asr"],
        langs=[None, "de"],
        waveforms=torch.zeros(2, 5),
        num_samples=torch.tensor([5, 3]),
        text_ids=torch.tensor([1, 2, 3]),
        text_lengths=torch.tensor([3, 0]),
        texts=["abc", ""],
        bad=[],
    )


def test_targets_are_the_texts_and_the_end_of_each():
    assert len(batch()) == 2 and batch().num_targets == 3 + 2


def test_audio_goes_to_the_device_and_lengths_stay_on_the_host():
    moved = batch().to("meta")
    assert moved.waveforms.device.type == "meta"
    assert {x.device.type for x in (moved.num_samples, moved.text_ids, moved.text_lengths)} == {"cpu"}
    assert (moved.indices, moved.tasks, moved.langs) == ([4, 7], ["asr", "asr"], [None, "de"])
