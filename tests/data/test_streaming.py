import functools
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.batch import Batch
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.loader import StepLoader
from rwkv_speech.data.source import Columns
from rwkv_speech.data.sources import open_source
from rwkv_speech.data.streaming import StreamedData, open_stream
from rwkv_speech.errors import UserError
from rwkv_speech.tokenizer import WorldTokenizer

NUM_ROWS = 33
# Reading several files side by side, datasets sleeps for five seconds at their end.
SMALL = {"buffer": 5, "window": 8, "files": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Parquet files of 9, 11 and 13 rows."""
    datasets.disable_progress_bars()
    folder, rng, number = tmp_path_factory.mktemp("stream"), np.random.default_rng(0), 0
    for name, count in (("a", 9), ("b", 11), ("c", 13)):
        rows = []
        for _ in range(count):
            file = io.BytesIO()
            soundfile.write(file, rng.uniform(-0.5, 0.5, 800 + 80 * number), 16_000, format="FLAC")
            audio = {"bytes": file.getvalue(), "path": None}
            rows.append({"audio": audio, "text": f"text {number}", "duration": 0.05 + 0.005 * number})
            number += 1
        made = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
        made.cast_column("audio", datasets.Audio()).to_parquet(folder / f"{name}.parquet")
    datasets.enable_progress_bars()
    return folder


@pytest.fixture(scope="module")
def build(tokenizer: WorldTokenizer) -> functools.partial[SpeechDataset]:
    return functools.partial(SpeechDataset, tokenizer=tokenizer, normalise=True)


def loader(
    folder: Path,
    build: functools.partial[SpeechDataset],
    cut: Cut | None = None,
    steps: int = 20,
    workers: int = 0,
    **options: Any,
) -> StepLoader:
    stream = open_stream(f"hf-stream:{folder}:train", Columns())
    return StreamedData(stream, build, **{**SMALL, **options}).loader(cut or Cut(3, seed=1), steps, workers)


def batches_of(found: StepLoader) -> list[Batch]:
    return [batch for step in found for batch in step]


def texts(batches: list[Batch]) -> list[str]:
    return [text for batch in batches for text in batch.texts]


def test_an_epoch_gives_every_row_once_and_then_empty_batches(folder: Path, build: functools.partial[SpeechDataset]):
    batches = batches_of(loader(folder, build))
    assert len(batches) == 20 and all(len(batch) <= 3 for batch in batches)
    assert sorted(texts(batches)) == sorted(f"text {i}" for i in range(NUM_ROWS))
    assert all(len(batch) == 0 for batch in batches[15:]) and all(len(batch) for batch in batches[:11])
    filled = batches[0]
    assert filled.normalised and filled.waveforms[0, : filled.num_samples[0]].std() == pytest.approx(1, abs=1e-3)


def test_seed_and_epoch_choose_the_order(folder: Path, build: functools.partial[SpeechDataset]):
    def order(seed: int, epoch: int) -> tuple[str, ...]:
        found = loader(folder, build, Cut(3, seed=seed))
        found.sampler.set_epoch(epoch)
        return tuple(texts(batches_of(found)))

    orders = {(seed, epoch): order(seed, epoch) for seed in range(2) for epoch in range(2)}
    assert len(set(orders.values())) == 4 and all(order(*key) == value for key, value in orders.items())


def test_files_are_read_side_by_side(
    folder: Path, build: functools.partial[SpeechDataset], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    orders = [texts(batches_of(loader(folder, build, files=3))) for _ in range(3)]
    assert orders[0] == orders[1] == orders[2] and sorted(orders[0]) == sorted(f"text {i}" for i in range(NUM_ROWS))
    first = [int(text.split()[1]) for text in orders[0][:8]]
    assert min(first) < 9 and max(first) >= 20  # the first window has rows of the first file and of the last


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_rows_and_stop_together(folder: Path, build: functools.partial[SpeechDataset], world_size: int):
    ranks = [
        batches_of(loader(folder, build, Cut(3, seed=1, rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {20}
    assert sorted(text for batches in ranks for text in texts(batches)) == sorted(f"text {i}" for i in range(NUM_ROWS))


def test_too_few_steps_leave_rows_out_but_repeat_none(folder: Path, build: functools.partial[SpeechDataset]):
    ranks = [loader(folder, build, Cut(3, seed=1, rank=rank, world_size=2), steps=4) for rank in range(2)]
    seen = texts([batch for rank in ranks for batch in batches_of(rank)])
    assert len(seen) == len(set(seen)) > 15


def test_a_resumed_epoch_is_the_rest_of_it(folder: Path, build: functools.partial[SpeechDataset]):
    augment = Augmenter(Augment(speed=(0.9, 1.1), volume_db=(-6.0, 6.0)), 0)
    cut = Cut(3, seed=1, accumulate=2)
    unbroken = loader(folder, build, cut, steps=7, augment=augment)
    unbroken.sampler.set_epoch(1)
    expected = batches_of(unbroken)
    resumed = loader(folder, build, cut, steps=7, augment=augment)
    resumed.set_state(1, 3)
    resumed.sampler.set_epoch(1)  # as Lightning does; the step stays
    found = batches_of(resumed)
    assert len(expected) == 2 * len(resumed) == 14 and len(found) == 8
    assert all(torch.equal(a.waveforms, b.waveforms) for a, b in zip(found, expected[6:], strict=True))
    assert [batch.ids for batch in found] == [batch.ids for batch in expected[6:]]


def test_workers_share_the_rows_and_hear_of_the_epoch(folder: Path, build: functools.partial[SpeechDataset]):
    found = loader(folder, build, steps=24, workers=2)
    epochs = []
    for epoch in range(2):
        found.sampler.set_epoch(epoch)
        epochs.append(texts(batches_of(found)))
        assert sorted(epochs[-1]) == sorted(f"text {i}" for i in range(NUM_ROWS))
    assert epochs[0] != epochs[1]
    found.set_state(1, 4)
    rest = texts(batches_of(found))
    assert 0 < len(rest) < NUM_ROWS and rest == epochs[1][-len(rest) :]


def test_windows_are_changed_differently(folder: Path, build: functools.partial[SpeechDataset]):
    augment = Augmenter(Augment(speed=tuple(x / 100 for x in range(50, 150))), 0)
    batches = batches_of(loader(folder, build, augment=augment))
    plain = {f"text {i}": 800 + 80 * i for i in range(NUM_ROWS)}
    speeds = {
        round(plain[text] / size, 1)
        for batch in batches
        for text, size in zip(batch.texts, batch.num_samples.tolist(), strict=True)
    }
    assert len(speeds) > 8  # one window has eight rows


def test_batches_may_be_measured_in_seconds(folder: Path, build: functools.partial[SpeechDataset]):
    batches = batches_of(loader(folder, build, Cut(100, batch_seconds=0.5, seed=1), window=30))
    sizes = {len(batch) for batch in batches if len(batch)}
    assert len(sizes) > 1 and all(batch.waveforms.numel() <= 8_000 for batch in batches)


def test_faults_are_named(folder: Path, build: functools.partial[SpeechDataset], tmp_path: Path):
    stream = open_stream(f"hf-stream:{folder}:train", Columns())
    with pytest.raises(UserError, match="--epoch_steps: found nothing, but the length of hf-stream:"):
        StreamedData(stream, build).loader(Cut(3))
    with pytest.raises(UserError, match=r"has no text column 'said'; found: audio .*, text \(string\)"):
        open_stream(f"hf-stream:{folder}:train", Columns(text="said"))
    with pytest.raises(UserError, match="cannot be streamed .*Bad split: valid"):
        open_stream(f"hf-stream:{folder}:valid", Columns())
    with pytest.raises(UserError, match="cannot be streamed .*FileNotFoundError"):
        open_stream(f"hf-stream:{tmp_path / 'gone'}:train", Columns())
    with pytest.raises(UserError, match="is a stream; expected it as the whole of --train_data only"):
        open_source(f"hf-stream:{folder}:train")
    with pytest.raises(UserError, match="1 parts after 'hf-stream:'"):
        open_stream("hf-stream:name", Columns())


def test_a_broken_row_is_the_same_one_in_every_epoch(tmp_path: Path, build: functools.partial[SpeechDataset]):
    cells = [{"bytes": b"broken %d" % i, "path": None} for i in range(4)]
    datasets.Dataset.from_list([{"audio": cell, "text": "x"} for cell in cells]).to_parquet(tmp_path / "a.parquet")
    found = loader(tmp_path, build, Cut(1, seed=1), steps=4)
    epochs = []
    for epoch in range(2):
        found.set_epoch(epoch)
        epochs.append([bad.index for batch in batches_of(found) for bad in batch.bad])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 4
