import os
import pickle
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv_speech.audio import Framing, load_audio
from rwkv_speech.batch import BadSample, Sample
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import Fit, SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.feature_cache import FeatureCache, recording_key
from rwkv_speech.data.feature_fill import fill
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import collate
from rwkv_speech.data.source import Utterance
from rwkv_speech.errors import UserError
from rwkv_speech.tokenizer import WorldTokenizer

WIDTH, HOP = 8, 320
HOPS = Framing((HOP,), (HOP,), 0.0)  # a frame of each 320 samples


class Encoder:
    """Frames that name their utterance; counts what it was given."""

    def __init__(self) -> None:
        self.encoded = 0

    def __call__(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded += len(num_samples)
        frames = waveforms[:, : waveforms.shape[1] // HOP * HOP]
        frames = frames.reshape(len(waveforms), -1, HOP)[..., :WIDTH]
        return frames, num_samples // HOP


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    rng = np.random.default_rng(0)
    folder = tmp_path / "audio"
    folder.mkdir()
    utterances = []
    for i in range(9):
        size = 3_200 + 320 * i
        soundfile.write(folder / f"{i}.flac", rng.uniform(-0.5, 0.5, size), 16_000)
        utterances.append(Utterance(f"u{i}", str(folder / f"{i}.flac"), f"text {i}", size / 16_000))
    return FileSource(utterances)


def waveform_of(source: FileSource, index: int) -> Tensor:
    return load_audio(source.utterance(index).audio)


def filled(folder: Path, dataset: SpeechDataset, dtype: str = "float32", workers: int = 0) -> tuple[FeatureCache, int]:
    """A cache, filled, and the number of utterances that were encoded for it."""
    cache, encoder = FeatureCache(folder, "encoder", dtype, shard_bytes=1_000), Encoder()
    assert fill(cache, dataset, encoder, 50 * WIDTH, Cut(2), workers) == encoder.encoded
    return cache, encoder.encoded


def check_samples(source: FileSource, dataset: SpeechDataset, dtype: torch.dtype = torch.float32) -> None:
    batch = collate([dataset[3, i] for i in range(9)])
    assert batch.ids == [f"u{i}" for i in range(9)] and batch.waveforms.shape == (9, 0)
    assert batch.frames.shape == (9, 18, WIDTH) and batch.frames.dtype == dtype
    for i in range(9):
        waveform = waveform_of(source, i)
        frames, length = Encoder()(waveform[None], torch.tensor([len(waveform)]))
        assert (batch.num_samples[i], batch.frame_lengths[i]) == (len(waveform), length)
        assert torch.equal(batch.frames[i, :length], frames[0].to(dtype)) and not batch.frames[i, length:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_samples_hold_the_encoders_frames(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path, dtype: str):
    cache, encoded = filled(tmp_path / "cache", SpeechDataset(source, tokenizer), dtype)
    assert encoded == 9 and len(list(cache.folder.glob("*.safetensors"))) > 1
    for found in (cache, FeatureCache(tmp_path / "cache", "encoder", dtype)):  # as filled, and as read again
        check_samples(source, SpeechDataset(source, tokenizer, cache=found), getattr(torch, dtype))
    assert filled(tmp_path / "cache", SpeechDataset(source, tokenizer), dtype)[1] == 0
    assert FeatureCache(tmp_path / "cache", "another encoder", dtype).get(recording_key(source.utterance(0))) is None


def test_kept_recordings_are_not_decoded(
    source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    twice = FileSource([*(source.utterance(i) for i in range(9)), replace(source.utterance(4), id="again", text="x")])
    cache, encoded = filled(tmp_path / "cache", SpeechDataset(twice, tokenizer))
    assert encoded == 9
    monkeypatch.setattr(FileSource, "load", None)
    check_samples(source, SpeechDataset(twice, tokenizer, cache=cache))
    assert torch.equal(*(SpeechDataset(twice, tokenizer, cache=cache)[i].frames for i in (4, 9)))
    assert filled(tmp_path / "cache", SpeechDataset(twice, tokenizer))[1] == 0


def test_changed_audio_is_encoded_again(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    filled(tmp_path / "cache", SpeechDataset(source, tokenizer))
    soundfile.write(source.utterance(2).audio, np.full(3_840, 0.25), 16_000)
    cache, encoded = filled(tmp_path / "cache", SpeechDataset(source, tokenizer))
    assert encoded == 1
    check_samples(source, SpeechDataset(source, tokenizer, cache=cache))


def test_a_killed_run_keeps_its_whole_shards(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    dataset = SpeechDataset(source, tokenizer)
    cache = FeatureCache(tmp_path / "cache", "encoder", "float32", shard_bytes=1_000)

    class Killed(Encoder):
        def __call__(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
            if self.encoded >= 6:
                raise KeyboardInterrupt
            return super().__call__(waveforms, num_samples)

    with pytest.raises(KeyboardInterrupt):
        fill(cache, dataset, Killed(), WIDTH, Cut(2))
    (cache.folder / ".0000-x.safetensors.abc").write_bytes(b"what a kill leaves of a shard")
    again, encoded = filled(tmp_path / "cache", dataset)
    assert 3 <= encoded < 9  # the killed run had written some of its six
    assert not list(cache.folder.glob(".0000-*"))
    check_samples(source, SpeechDataset(source, tokenizer, cache=again))
    reopened = FeatureCache(tmp_path / "cache", "encoder", "float32")
    check_samples(source, SpeechDataset(source, tokenizer, cache=reopened))


def test_ranks_fill_disjoint_parts(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    dataset = SpeechDataset(source, tokenizer)
    encoded = []
    caches = [FeatureCache(tmp_path / "cache", "encoder", "float32", writer=rank) for rank in range(4)]
    for rank, cache in enumerate(caches):
        encoded.append(fill(cache, dataset, Encoder(), WIDTH, Cut(2, rank=rank, world_size=4)))
    assert encoded == [3, 2, 2, 2]
    caches[0].refresh()
    check_samples(source, SpeechDataset(source, tokenizer, cache=caches[0]))


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_shard_is_named_and_computed_again(
    source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    cache, _ = filled(tmp_path / "cache", SpeechDataset(source, tokenizer))
    shard = min(cache.folder.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes({"cut": content[:-7], "header": content[:9] + b"~" + content[10:], "empty": b""}[damage])
    again, encoded = filled(tmp_path / "cache", SpeechDataset(source, tokenizer))
    assert f"{shard}: is damaged" in caplog.text and 0 < encoded < 9
    check_samples(source, SpeechDataset(source, tokenizer, cache=again))


def test_flipped_bits_are_found_when_read(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    cache, _ = filled(tmp_path / "cache", SpeechDataset(source, tokenizer))
    shard = min(cache.folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    dataset = SpeechDataset(source, tokenizer, cache=FeatureCache(tmp_path / "cache", "encoder", "float32"))
    with pytest.raises(UserError, match=rf"{shard.name}: is damaged, .* start again"):
        [dataset[i] for i in range(9)]
    again, encoded = filled(tmp_path / "cache", SpeechDataset(source, tokenizer))
    assert 0 < encoded < 9
    check_samples(source, SpeechDataset(source, tokenizer, cache=again))


def test_what_is_broken_or_too_long_is_left_out(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    (tmp_path / "bad.wav").write_text("not audio")
    soundfile.write(tmp_path / "long.wav", np.zeros(160_000), 16_000)
    extra = [Utterance("bad", str(tmp_path / "bad.wav"), "x"), Utterance("long", str(tmp_path / "long.wav"), "x")]
    source = FileSource([*(source.utterance(i) for i in range(9)), *extra])
    fit = Fit(ctx_len=40, stack=1, framing=HOPS)
    cache, encoded = filled(tmp_path / "cache", SpeechDataset(source, tokenizer, fit=fit))
    assert encoded == 9
    dataset = SpeechDataset(source, tokenizer, fit=fit, cache=cache)
    bad, long = dataset[9], dataset[10]
    assert isinstance(bad, BadSample) and "cannot be decoded" in bad.reason and not bad.too_long
    assert isinstance(long, BadSample) and long.too_long


def test_a_recording_is_kept_for_the_text_that_fits(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    found = source.utterance(0)
    for texts in (("x", "long " * 9), ("long " * 9, "x")):
        both = FileSource([replace(found, text=text) for text in texts])
        fit = Fit(ctx_len=20, stack=1, framing=HOPS)
        cache, encoded = filled(tmp_path / texts[0], SpeechDataset(both, tokenizer, fit=fit))
        dataset = SpeechDataset(both, tokenizer, fit=fit, cache=cache)
        assert encoded == 1 and isinstance(dataset[texts.index("x")], Sample)


def test_lacking_frames_and_changes_of_audio_are_refused(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    empty = FeatureCache(tmp_path / "cache", "encoder", "float32")
    with pytest.raises(UserError, match=r"--feature_cache: .* lacks the frames of u3"):
        SpeechDataset(source, tokenizer, cache=empty)[3]
    with pytest.raises(UserError, match="--feature_cache: .*--speed and --time_masks"):
        SpeechDataset(source, tokenizer, cache=empty, augment=Augmenter(Augment(speed=(0.9,), time_masks=1), 0))
    assert len(SpeechDataset(source, tokenizer, cache=empty, augment=Augmenter(Augment(), 0))) == 9


def test_estimate_is_what_is_written_and_must_fit_the_disk(
    source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = FeatureCache(tmp_path / "cache", "encoder", "bfloat16")
    estimated = cache.estimate(source.durations(), 50 * WIDTH)
    assert estimated == sum(10 + i for i in range(9)) * WIDTH * 2
    assert cache.estimate(np.array([np.nan, 2.0, 4.0], np.float32), 50 * 1_024) == 3 * 3 * 50 * 1_024 * 2
    unknown = FileSource([Utterance(f"u{i}", source.utterance(i).audio, "") for i in range(9)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(estimated - 1))
    for data in (source, unknown):
        with pytest.raises(UserError, match=r"--feature_cache: 0\.0 h of audio .* free in .*cache"):
            fill(cache, SpeechDataset(data, tokenizer), Encoder(), 50 * WIDTH, Cut(2))
    monkeypatch.undo()
    fill(cache, SpeechDataset(source, tokenizer), Encoder(), 50 * WIDTH, Cut(2))
    (shard,) = cache.folder.glob("*.safetensors")
    assert estimated < shard.stat().st_size < estimated + 2_000


def test_filling_and_reading_in_workers(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    cache, encoded = filled(tmp_path / "cache", SpeechDataset(source, tokenizer), workers=1)
    assert encoded == 9
    dataset = SpeechDataset(source, tokenizer, cache=cache)
    dataset[0]  # a shard is open when the data set is pickled
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[5].frames, dataset[5].frames)
    (batch,) = DataLoader(dataset, batch_size=9, num_workers=1, collate_fn=collate)
    assert torch.equal(batch.frames, collate([dataset[i] for i in range(9)]).frames)


def test_keys_name_file_segment_size_and_time(source: FileSource):
    path, key = source.utterance(0).audio, recording_key(source.utterance(0))
    same = FileSource([Utterance("other id", path, "other text", source.utterance(0).duration)])
    assert recording_key(same.utterance(0)) == key
    others = [Utterance("a", path, "", 0.1), Utterance("a", path, "", source.utterance(0).duration, 0.1)]
    assert len({recording_key(other) for other in others} | {key}) == 3
    os.utime(path, (1, 1))
    assert recording_key(source.utterance(0)) != key
    assert recording_key(Utterance("gone", "/gone.wav", "")) is None
    assert recording_key(Utterance("kept elsewhere", None, "")) is None
    assert recording_key(Utterance("kept elsewhere", None, "", identity="x"))
