from dataclasses import replace

import torch

from rwkv_speech.batch import Batch


def batch() -> Batch:
    return Batch(
        indices=[4, 7],
        ids=["a", "b"],
        tasks=["asr", "asr"],
        langs=[None, "de"],
        source_langs=[None, "en"],
        source_texts=[None, "the weather"],
        answers=[(), ("das Wetter", "Wetter")],
        waveforms=torch.zeros(2, 5),
        num_samples=torch.tensor([5, 3]),
        text_ids=torch.tensor([1, 2, 3]),
        text_lengths=torch.tensor([3, 0]),
        prompt_ids=[(), (8, 9)],
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


def test_samples_are_the_utterances_one_by_one():
    made = replace(batch(), waveforms=torch.arange(10.0).view(2, 5))
    first, second = made.samples()
    assert (first.id, first.index, first.lang, first.ids, first.text) == ("a", 4, None, [1, 2, 3], "abc")
    assert (second.id, second.index, second.lang, second.ids, second.duration) == ("b", 7, "de", [], 3 / 16_000)
    assert (first.source_lang, first.source_text, first.answers, first.prompt_ids) == (None, None, (), ())
    assert (second.source_lang, second.source_text, second.prompt_ids) == ("en", "the weather", (8, 9))
    assert second.answers == ("das Wetter", "Wetter")
    assert first.waveform.tolist() == [0, 1, 2, 3, 4] and second.waveform.tolist() == [5, 6, 7]
    frames = torch.arange(12.0).view(2, 3, 2)
    cached = replace(made, waveforms=torch.empty(2, 0), frames=frames, frame_lengths=torch.tensor([1, 3]))
    assert [sample.frames.tolist() for sample in cached.samples()] == [[[0, 1]], frames[1].tolist()]
