from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from rwkv_speech.audio import Framing
from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import Fit, SpeechDataset, normalise
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import collate
from rwkv_speech.data.source import Utterance
from rwkv_speech.errors import UserError
from rwkv_speech.models import encoder
from rwkv_speech.tasks import Naming
from rwkv_speech.tokenizer import WorldTokenizer

HOPS = Framing((320,), (320,), 0.0)  # a frame of each 320 samples


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    rng = np.random.default_rng(0)
    utterances = []
    for i, samples in enumerate((800, 1_600, 500)):
        soundfile.write(tmp_path / f"{i}.wav", rng.uniform(-0.5, 0.5, samples), 16_000)
        utterances.append(Utterance(f"u{i}", str(tmp_path / f"{i}.wav"), f"  Text  {i}"))
    (tmp_path / "bad.wav").write_text("not audio")
    return FileSource([*utterances, Utterance("bad", str(tmp_path / "bad.wav"), "x")])


def test_dataset_gives_samples(source: FileSource, tokenizer: WorldTokenizer):
    dataset = SpeechDataset(source, tokenizer, label_mode="lower")
    sample = dataset[1]
    assert isinstance(sample, Sample) and len(dataset) == 4
    assert (sample.id, sample.text, sample.index, sample.duration) == ("u1", "text 1", 1, 0.1)
    assert torch.equal(sample.waveform, source.load(1))
    assert sample.ids == [byte + 1 for byte in b"text 1"]


def test_dataset_reports_broken_and_long_recordings(source: FileSource, tokenizer: WorldTokenizer):
    dataset = SpeechDataset(source, tokenizer, fit=Fit(ctx_len=9, stack=1, framing=HOPS))
    broken = dataset[3]
    assert isinstance(broken, BadSample) and broken.id == "bad" and not broken.too_long
    assert "bad.wav" in broken.reason
    assert isinstance(dataset[0], Sample)
    long = dataset[1]
    assert (
        isinstance(long, BadSample)
        and long.too_long
        and "0.10 s" in long.reason
        and "the limit is 9 (--ctx_len)" in long.reason
    )


def test_dataset_trusts_a_known_duration_before_decoding(tokenizer: WorldTokenizer):
    dataset = SpeechDataset(FileSource([Utterance("a", "/gone.wav", "", 31.0)]), tokenizer, fit=Fit(300, 5, HOPS))
    found = dataset[0]
    assert isinstance(found, BadSample) and found.too_long


def test_dataset_rejects_an_unknown_label_mode(source: FileSource, tokenizer: WorldTokenizer):
    with pytest.raises(UserError, match="label mode"):
        SpeechDataset(source, tokenizer, label_mode="upper")


def test_normalised_waveforms_are_the_encoders(source: FileSource, tokenizer: WorldTokenizer):
    plain, normalised = (
        collate([SpeechDataset(source, tokenizer, normalise=flag)[i] for i in range(3)]) for flag in (False, True)
    )
    assert normalised.normalised and not plain.normalised
    expected = encoder.normalise(plain.waveforms, plain.num_samples)
    torch.testing.assert_close(normalised.waveforms, expected, rtol=1e-6, atol=1e-6)
    assert normalised.waveforms.dtype == torch.float32


@pytest.mark.parametrize("waveform", [torch.zeros(500), torch.ones(1), torch.rand(300_000) * 1e-4 + 0.9])
def test_normalise_of_silence_offsets_and_single_samples(waveform: torch.Tensor):
    kept = waveform.clone()
    expected = encoder.normalise(waveform[None], torch.tensor([len(waveform)]))[0]
    torch.testing.assert_close(normalise(waveform), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(waveform, kept)


def test_augmented_samples_depend_on_the_epoch(source: FileSource, tokenizer: WorldTokenizer):
    augmenter = Augmenter(Augment(speed=(0.9, 1.1), volume_db=(-6.0, 6.0)), seed=1)
    dataset = SpeechDataset(source, tokenizer, augment=augmenter)
    samples = [dataset[epoch, 1] for epoch in range(6)]
    assert all(torch.allclose(s.waveform, augmenter(source.load(1), e, 1)) for e, s in enumerate(samples))
    assert {len(s.waveform) for s in samples} == {1_455, 1_778}
    assert all(s.duration == len(s.waveform) / 16_000 for s in samples)
    assert torch.equal(dataset[1].waveform, samples[0].waveform)  # a plain index is epoch 0


def test_what_is_too_long_is_counted_before_it_is_decoded(tokenizer: WorldTokenizer):
    def dataset(*seconds: float | None, ctx_len: int = 11, speed: tuple[float, ...] = ()) -> SpeechDataset:
        source = FileSource([Utterance("a", "/gone.wav", "", duration) for duration in seconds])
        return SpeechDataset(source, tokenizer, fit=Fit(ctx_len, 5, HOPS), augment=Augmenter(Augment(speed=speed), 0))

    # 10 audio tokens of 0.1 s each and the end of text.
    assert dataset(1.0, 1.05, None).count_too_long() == ""
    assert dataset(1.2, 1.05, None, 3.0).count_too_long() == "2 of 4 utterances are too long for --ctx_len 11"
    assert dataset(1.2, 1.05, speed=(0.5, 1.5)).count_too_long() == ""
    assert dataset(9.0, None).count_too_long()  # one may fit
    with pytest.raises(UserError, match=r"--ctx_len: 11 is less than each of the 2 .* 1.20 s; 1.10 s are the most"):
        dataset(1.2, 3.0).count_too_long()


def test_fit_counts_the_changed_duration(source: FileSource, tokenizer: WorldTokenizer):
    # 0.1 s are 5 frames; at half the speed they are 10.
    fit = Fit(ctx_len=5 + 1 + 6, stack=1, framing=HOPS)
    slow = Augmenter(Augment(speed=(0.5,)), 0)
    assert isinstance(SpeechDataset(source, tokenizer, fit=fit)[1], Sample)
    long = SpeechDataset(source, tokenizer, fit=fit, augment=slow)[1]
    assert isinstance(long, BadSample) and long.too_long and "0.20 s" in long.reason
    known = FileSource([Utterance("a", "/gone.wav", "Text 1", 0.1)])  # before anything is decoded
    assert isinstance(SpeechDataset(known, tokenizer, fit=fit, augment=slow)[0], BadSample)
    assert SpeechDataset(known, tokenizer, fit=fit, augment=slow)[0].too_long


def test_durations_are_the_longest_that_may_come(tokenizer: WorldTokenizer):
    source = FileSource([Utterance("a", "/a.wav", "", 3.0), Utterance("b", "/b.wav", "")])
    for speed, seconds in (((), 3.0), ((0.75, 1.5), 4.0), ((1.5,), 2.0)):
        found = SpeechDataset(source, tokenizer, augment=Augmenter(Augment(speed=speed), 0)).durations()
        assert found.dtype == np.float32 and found[0] == seconds and np.isnan(found[1])


def test_noise_that_cannot_be_decoded_stops(tokenizer: WorldTokenizer, tmp_path: Path):
    soundfile.write(tmp_path / "noise.wav", np.ones(8_000) / 2, 16_000)
    augmenter = Augmenter(Augment(noise_dir=str(tmp_path)), 0)
    (tmp_path / "noise.wav").write_text("broken since")
    with pytest.raises(UserError, match="cannot be decoded"):
        SpeechDataset(_Memory(), tokenizer, augment=augmenter)[0]


class _Memory:
    """One second of a constant."""

    def __len__(self) -> int:
        return 1

    def utterance(self, index: int) -> Utterance:
        return Utterance("memory", None, "text")

    def load(self, index: int) -> torch.Tensor:
        return torch.full((16_000,), 0.5)


def test_collate_pads_with_zeros_and_packs_text(source: FileSource, tokenizer: WorldTokenizer):
    dataset = SpeechDataset(source, tokenizer)
    batch = collate([dataset[i] for i in range(4)])
    assert len(batch) == 3 and batch.ids == ["u0", "u1", "u2"] and [b.id for b in batch.bad] == ["bad"]
    assert batch.num_samples.tolist() == [800, 1_600, 500] and batch.waveforms.shape == (3, 1_600)
    for i, length in enumerate(batch.num_samples.tolist()):
        assert torch.equal(batch.waveforms[i, :length], source.load(i))
        assert not batch.waveforms[i, length:].any()
    texts = [tokenizer.decode(part.tolist()) for part in batch.text_ids.split(batch.text_lengths.tolist())]
    assert texts == batch.texts == ["Text 0", "Text 1", "Text 2"]


def test_collate_of_bad_samples_only_is_empty():
    batch = collate([BadSample(0, "a", "broken")])
    assert len(batch) == 0 and batch.waveforms.shape == (0, 0) and batch.text_ids.shape == (0,)
    assert batch.waveforms.dtype == torch.float32
    for tensor in (batch.num_samples, batch.text_ids, batch.text_lengths):
        assert tensor.dtype == torch.int64 and tensor.shape == (0,)


def test_batch_to_moves_audio_and_leaves_lengths_and_text(source: FileSource, tokenizer: WorldTokenizer):
    dataset = SpeechDataset(source, tokenizer)
    moved = collate([dataset[0]]).to("meta")
    devices = {name: value.device.type for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert devices == {"waveforms": "meta", "num_samples": "cpu", "text_ids": "cpu", "text_lengths": "cpu"}
    assert moved.ids == ["u0"] and moved.indices == [0] and moved.tasks == ["asr"] and moved.langs == [None]


def test_batch_pins_every_tensor(source: FileSource, tokenizer: WorldTokenizer, monkeypatch: pytest.MonkeyPatch):
    # Memory can be pinned only beside an accelerator; which tensors are asked to is the same everywhere.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    pinned = collate([SpeechDataset(source, tokenizer)[0]]).pin_memory()
    tensors = [value for value in vars(pinned).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4 and all(tensor.device.type == "meta" for tensor in tensors)


def test_dataset_works_in_data_workers(source: FileSource, tokenizer: WorldTokenizer):
    loader = DataLoader(SpeechDataset(source, tokenizer), batch_size=2, num_workers=1, collate_fn=collate)
    batches = list(loader)
    assert all(isinstance(batch, Batch) for batch in batches)
    assert [batch.ids for batch in batches] == [["u0", "u1"], ["u2"]]


def test_task_and_language_reach_the_batch(source: FileSource, tokenizer: WorldTokenizer):
    file = source.utterance(0).audio
    named = FileSource([Utterance("a", file, "x", lang="de", task="translate"), Utterance("b", file, "x")])
    for task in ("asr", "caption"):
        batch = collate([SpeechDataset(named, tokenizer, naming=Naming(task))[i] for i in (1, 0)])
        assert (batch.indices, batch.tasks, batch.langs) == ([1, 0], [task, "translate"], [None, "de"])


def test_fit_counts_the_frames_of_the_encoder_s_own_rate():
    # 2 s at 25 Hz are 50 frames, 25 audio tokens; at 50 Hz twice as many.
    slow = Fit(ctx_len=25 + 1 + 4, stack=2, framing=Framing((640,), (640,), 0.0))
    assert slow.fault(2.0, 4) is None and slow.fault(2.0, 5) and slow.longest == 2.4
    assert Fit(30, 2, HOPS).fault(2.0, 4) and Fit(30, 2, HOPS).longest == 1.2


def test_what_is_said_of_texts_goes_into_the_batch(source: FileSource, tokenizer: WorldTokenizer):
    plain = source.utterance(0)
    rows = [
        replace(plain, text="four", answers=("four", "4"), prompt="Answer:", source_text="2 + 2"),
        replace(plain, text="vier", source_lang="en", source_text="four"),
    ]
    samples = [SpeechDataset(FileSource(rows), tokenizer)[i] for i in range(2)]
    batch = collate(samples)
    assert batch.answers == [("four", "4"), ()] and batch.texts == ["four", "vier"]
    assert (batch.source_langs, batch.source_texts) == ([None, "en"], ["2 + 2", "four"])
    assert batch.prompt_ids == [tuple(tokenizer.encode("Answer:")), ()]
    for one, sample in zip(batch.samples(), samples, strict=True):
        assert isinstance(sample, Sample)
        assert replace(one, waveform=sample.waveform) == sample


def test_a_prompt_takes_room_like_a_text(source: FileSource, tokenizer: WorldTokenizer):
    row = replace(source.utterance(0), text="ab", prompt="abc")  # 0.05 s: 2 frames, 1 position for rounding
    for ctx_len, fits in ((7, False), (8, True)):
        found = SpeechDataset(FileSource([row]), tokenizer, fit=Fit(ctx_len, 1, HOPS))[0]
        assert isinstance(found, Sample) == fits


def test_answers_to_transcripts_ask_the_frozen_model(source: FileSource, tokenizer: WorldTokenizer):
    asked = replace(source.utterance(0), text="four", answers=("four", "4"), prompt="Sum.", source_text="2 + 2")
    rows = [asked, replace(asked, answers=()), replace(asked, source_text=None)]
    found = [SpeechDataset(FileSource(rows), tokenizer, teacher_form="user").plain()[i] for i in range(3)]
    samples = [sample for sample in found if isinstance(sample, Sample)]
    assert tokenizer.decode(samples[0].teacher_ids) == "User: Sum.\n2 + 2\n\nAssistant:"
    assert [tokenizer.decode(sample.ids) for sample in samples] == [" four", "four", "four"]
    assert [bool(sample.teacher_ids) for sample in samples] == [True, False, False]
    batch = collate(samples)
    assert batch.teacher_ids == [sample.teacher_ids for sample in samples]
    untaught = SpeechDataset(FileSource(rows), tokenizer)[0]
    assert isinstance(untaught, Sample) and untaught.teacher_ids == () and untaught.ids == tokenizer.encode("four")


def test_texts_take_the_place_of_audio(source: FileSource, tokenizer: WorldTokenizer):
    plain = source.utterance(0)
    rows = [
        replace(plain, text="vier", task="st", source_text="FOUR"),
        replace(plain, text="four"),
        replace(plain, text="vier", task="st"),
        replace(plain, text="4", answers=("4",), source_text="2 + 2", prompt="Say:"),
        Utterance("no audio", None, "vier", task="st", input_text="FOUR"),
    ]
    dataset = SpeechDataset(FileSource(rows), tokenizer, "lower", fit=Fit(10, 1, HOPS), reads_text=True)
    ids = [tuple(tokenizer.encode(text)) for text in ("FOUR", "four")]
    first, second, bad, answer, silent = (dataset[i] for i in range(5))
    assert isinstance(bad, BadSample) and "has no source_text" in bad.reason
    assert isinstance(answer, BadSample) and answer.too_long  # 4 of the prompt, 5, 1 and the separator
    assert [x.input_ids for x in (first, second, silent) if isinstance(x, Sample)] == [ids[0], ids[1], ids[0]]
    batch = collate([first, silent])
    assert batch.waveforms.shape == (2, 0) and batch.num_samples.tolist() == [0, 0]
    assert dataset.count_too_long() == ""  # however long the audio is that nobody hears
    # Beside audio a text is read only where there is no audio.
    dataset = SpeechDataset(FileSource(rows), tokenizer, "lower")
    found = [dataset[i] for i in range(5)]
    assert [isinstance(x, Sample) and x.input_ids for x in found] == [None] * 4 + [ids[0]]


def test_what_is_spoken_and_the_separator_come_before_the_texts_of_tasks_that_transcribe_first(
    source: FileSource, tokenizer: WorldTokenizer
):
    plain = source.utterance(0)
    rows = [
        replace(plain, text="Four", answers=("Four", "4"), task="qa", source_text="2 # two # IS"),
        replace(plain, text="vier", task="st", lang="de", source_text="FOUR"),
        replace(plain, text="four", task="asr", source_text="four"),
        replace(plain, text="four", task="qa"),
        Utterance("no audio", None, "vier", task="st", lang="de", input_text="FOUR"),
    ]
    first = {"transcribes": ("qa", "st_de"), "separator": "#"}
    dataset = SpeechDataset(FileSource(rows), tokenizer, "lower", **first)
    asked, translated, heard, bad, read = (dataset[i] for i in range(5))
    [separator] = tokenizer.encode("#")
    spoken = [token for token in tokenizer.encode("2 # two # is") if token != separator]
    assert isinstance(asked, Sample) and asked.ids == [*spoken, separator, *tokenizer.encode("four")]
    assert asked.ids.count(separator) == 1 and asked.text == "four" and asked.answers == ("Four", "4")
    expected = [*tokenizer.encode("four"), separator, *tokenizer.encode("vier")]
    assert [x.ids for x in (translated, read) if isinstance(x, Sample)] == [expected, expected]
    assert isinstance(heard, Sample) and heard.ids == tokenizer.encode("four")
    assert isinstance(bad, BadSample) and "has no source_text" in bad.reason and not bad.too_long
    # 0.05 s: 2 frames, 1 position for rounding.
    for ctx_len, fits in ((3 + len(expected), True), (2 + len(expected), False)):
        found = SpeechDataset(FileSource(rows), tokenizer, "lower", Fit(ctx_len, 1, HOPS), **first)[1]
        assert isinstance(found, Sample) == fits
