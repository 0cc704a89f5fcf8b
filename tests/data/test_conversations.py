"""Conversations from the manifest to the batch: cached, changed, too long, broken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import write_audio, write_manifest

from rwkv_speech.audio import Framing
from rwkv_speech.batch import BadSample, Sample
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import Fit, SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.feature_fill import fill
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import collate
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.tables import open_table
from rwkv_speech.tokenizer import WorldTokenizer

HOPS = Framing((320,), (320,), 0.0)  # a frame of each 320 samples


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for i, samples in enumerate((800, 1_600, 2_400)):
        write_audio(tmp_path / f"{i}.wav", samples)
    heard: list[dict[str, Any]] = [
        {"audio_filepath": f"{i}.wav", "duration": 0.05 * (i + 1), "answer": f"a{i}"} for i in range(3)
    ]
    alone = {"audio_filepath": "1.wav", "text": "alone", "duration": 0.1}
    typed = {"input": "hello", "answer": "hi"}
    return write_manifest(
        tmp_path / "m.jsonl", {"id": "x", "task": "chat", "turns": [heard[0], typed, heard[2]]}, alone,
        {"id": "y", "task": "chat", "turns": [typed, heard[1]]},
    )  # fmt: skip


@pytest.fixture
def source(manifest: Path) -> FileSource:
    return FileSource(read_manifest(manifest))


def test_turns_are_the_rows_of_a_batch(source: FileSource, tokenizer: WorldTokenizer):
    dataset = SpeechDataset(source, tokenizer)
    batch = collate([dataset[i] for i in range(3)])
    assert batch.ids == ["x#1", "x#2", "x#3", "1.wav", "y#1", "y#2"] and batch.indices == [0, 0, 0, 1, 2, 2]
    assert batch.turns == [1, 2, 3, 0, 1, 2] and batch.tasks == ["chat"] * 3 + ["asr"] + ["chat"] * 2
    assert batch.num_samples.tolist() == [800, 0, 2_400, 1_600, 0, 1_600]
    hello = tuple(byte + 1 for byte in b"hello")
    assert batch.input_ids == [None, hello, None, None, hello, None]
    assert batch.texts == ["a0", "hi", "a2", "alone", "hi", "a1"]
    assert torch.equal(batch.waveforms[2], source.load(0)) is False and batch.waveforms[2].any()
    assert source.durations().tolist() == pytest.approx([0.2 + 5 / 15, 0.1, 0.1 + 5 / 15])
    assert [[turn.id for turn in talk] for talk in batch.conversations()] == [
        ["x#1", "x#2", "x#3"], ["1.wav"], ["y#1", "y#2"],
    ]  # fmt: skip


def test_a_table_gives_the_same_conversations(manifest: Path, source: FileSource):
    table = open_table(manifest)
    assert [table.utterance(i) for i in range(3)] == [source.utterance(i) for i in range(3)]
    assert table.durations().tolist() == pytest.approx(source.durations().tolist())
    assert torch.equal(table.load(0), source.load(0))


def test_all_turns_count_for_the_limit(source: FileSource, tokenizer: WorldTokenizer):
    # Frames of all audio, texts 2, 2, 2 and the input 5, three separators, two breaks of two bytes.
    needed = 10 + 6 + 5 + 3 + 4
    for limit in (needed, needed - 1):
        sample = SpeechDataset(source, tokenizer, fit=Fit(limit, 1, HOPS))[0]
        assert isinstance(sample, Sample if limit == needed else BadSample)
    assert isinstance(sample, BadSample) and sample.too_long and f"{needed - 1} (--ctx_len)" in sample.reason


def test_a_broken_turn_leaves_its_conversation_out(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    (tmp_path / "2.wav").write_text("no audio")
    bad = SpeechDataset(source, tokenizer)[0]
    assert isinstance(bad, BadSample) and bad.id == "x#3" and "2.wav" in bad.reason and not bad.too_long


def test_each_turn_is_changed_by_its_own_draws(source: FileSource, tokenizer: WorldTokenizer):
    augmented = SpeechDataset(source, tokenizer, augment=Augmenter(Augment(volume_db=(-20.0, 20.0)), 1))
    plain = SpeechDataset(source, tokenizer)
    gains = [
        [float(turn.waveform.abs().max()) / 0.5 for turn in (found, *found.then) if len(turn.waveform)]
        for found in (augmented[epoch, 0] for epoch in (0, 0, 1))
        if isinstance(found, Sample)
    ]
    assert gains[0] == gains[1] and gains[0][0] != gains[0][1] and gains[2][0] != gains[0][0]
    assert isinstance(plain[0], Sample) and float(plain[0].then[1].waveform.abs().max()) == pytest.approx(0.5, abs=1e-3)


def test_frames_are_kept_for_each_recording(source: FileSource, tokenizer: WorldTokenizer, tmp_path: Path):
    cache = FeatureCache(tmp_path / "cache", "encoder", "float32")
    plain = SpeechDataset(source, tokenizer).plain()

    def encode(waveforms: torch.Tensor, num_samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = waveforms[:, : waveforms.shape[1] // 320 * 320].view(len(waveforms), -1, 320)
        return frames, num_samples // 320

    # 0.wav and 2.wav once, 1.wav of the same seconds in two lines once.
    assert fill(cache, plain, encode, 50 * 320, Cut(2)) == 3 and fill(cache, plain, encode, 50 * 320, Cut(2)) == 0
    batch = collate([plain.with_cache(cache)[i] for i in range(3)])
    assert batch.frames is not None and batch.frame_lengths is not None
    assert batch.frame_lengths.tolist() == [2, 0, 7, 5, 0, 5] and batch.num_samples.tolist()[2] == 2_400
    plain_batch = collate([plain[i] for i in range(3)])
    assert torch.equal(batch.frames[2, :7].flatten(), plain_batch.waveforms[2, : 7 * 320])
