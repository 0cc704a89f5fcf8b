import itertools

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.batch import Batch
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut, Floats
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import BatchSampler
from rwkv_speech.data.source import Utterance
from rwkv_speech.errors import UserError
from rwkv_speech.tokenizer import WorldTokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer: WorldTokenizer) -> SpeechDataset:
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    utterances = []
    for i in range(7):
        file = folder / f"{i}.wav"
        soundfile.write(file, rng.uniform(-0.5, 0.5, 1_600 + 160 * i), 16_000)
        utterances.append(Utterance(f"u{i}", str(file), f"text {i}"))
    changes = Augment(speed=(0.9, 1.0, 1.1), volume_db=(-6.0, 6.0), time_masks=1, freq_masks=1, noise_dir=str(folder))
    return SpeechDataset(FileSource(utterances), tokenizer, normalise=True, augment=Augmenter(changes, 5))


def epochs(dataset: SpeechDataset, workers: int = 0, **share: int) -> list[list[Batch]]:
    """Two epochs of one loader, told apart as Lightning does it."""
    loader = dataset.loader(Cut(2, seed=3, **share), workers=workers)
    found = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        found.append([batch for step in loader for batch in step])
        assert len(found[-1]) == len(loader)
    return found


def by_id(batches: list[Batch]) -> dict[str, bytes]:
    return {
        name: row[:size].numpy().tobytes()
        for batch in batches
        for name, row, size in zip(batch.ids, batch.waveforms, batch.num_samples.tolist(), strict=True)
    }


def test_epochs_have_their_own_changes(dataset: SpeechDataset):
    first, second = map(by_id, epochs(dataset))
    assert set(first) == set(second) == {f"u{i}" for i in range(7)}
    assert all(first[name] != second[name] for name in first)


def test_workers_and_ranks_change_no_sample(dataset: SpeechDataset):
    alone = epochs(dataset)
    # Persistent workers: the second epoch reaches processes that began with the first.
    in_processes = epochs(dataset, workers=1)
    for want, got in zip(alone, in_processes, strict=True):
        assert [batch.ids for batch in got] == [batch.ids for batch in want]
        assert all(torch.equal(a.waveforms, b.waveforms) for a, b in zip(got, want, strict=True))
        assert all(torch.equal(a.text_ids, b.text_ids) for a, b in zip(got, want, strict=True))
    ranks = [epochs(dataset, rank=rank, world_size=3) for rank in range(3)]
    for epoch, want in enumerate(map(by_id, alone)):
        shares = {name: row for rank in ranks for name, row in by_id(rank[epoch]).items()}
        assert shares == want


def test_items_are_what_a_step_accumulates_and_resume_where_a_run_stopped(dataset: SpeechDataset):
    loader = dataset.loader(Cut(1, accumulate=2))
    assert len(loader) == 4 and [len(step) for step in loader] == [2, 2, 2, 2]
    short = dataset.loader(Cut(1, accumulate=2), steps=3)
    short.set_state(0, 1)
    assert len(short) == 3
    assert [[b.ids for b in step] for step in short] == [[b.ids for b in step] for step in loader][1:3]
    with pytest.raises(UserError, match="--epoch_steps: given 5, but 7 utterances in batches of 1 .* make 4"):
        dataset.loader(Cut(1, accumulate=2), steps=5)
    with pytest.raises(UserError, match="given 2, but 7 utterances in batches of 900 s on 1 device.* make 1"):
        BatchSampler(seconds(7), Cut(1, 900.0), steps=2)


LIMITS: list[tuple[int, float | None]] = [(1, None), (4, None), (4, 30.0)]


def seconds(count: int) -> Floats:
    return np.random.default_rng(0).uniform(1, 20, count).astype(np.float32)


def batches(sampler: BatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    assert {number for batch in sampler for number, _ in batch} == {epoch}
    found = [[index for _, index in batch] for batch in sampler]
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_an_epoch_disjointly(limit: tuple[int, float | None], world_size: int, shuffle: bool):
    for count, accumulate in ((64, 1), (97, 2), (301, 1)):
        shards = [
            batches(
                BatchSampler(
                    seconds(count),
                    Cut(*limit, shuffle=shuffle, rank=rank, world_size=world_size, accumulate=accumulate),
                )
            )
            for rank in range(world_size)
        ]
        assert len({len(shard) for shard in shards}) == 1 and len(shards[0]) % accumulate == 0
        assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(count))


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_steps_are_the_same_however_they_are_dealt(limit: tuple[int, float | None]):
    def steps(world_size: int, accumulate: int) -> list[list[list[int]]]:
        """For every step its micro batches."""
        shards = [
            batches(BatchSampler(seconds(203), Cut(*limit, rank=rank, world_size=world_size, accumulate=accumulate)), 5)
            for rank in range(world_size)
        ]
        number = len(shards[0]) // accumulate
        return [
            sorted(itertools.chain(*(shard[step * accumulate : (step + 1) * accumulate] for shard in shards)))
            for step in range(number)
        ]

    alone = steps(1, 4)
    assert len(alone) > 3 and steps(2, 2) == alone and steps(4, 1) == alone
    # Slot a * world_size + rank.
    dealt = batches(BatchSampler(seconds(203), Cut(*limit, rank=1, world_size=2, accumulate=2)), 5)
    whole = batches(BatchSampler(seconds(203), Cut(*limit, accumulate=4)), 5)
    assert dealt == whole[1::2]


def test_set_state_continues_where_a_run_stopped():
    whole = batches(BatchSampler(seconds(100), Cut(3, rank=1, world_size=2, accumulate=2)), 4)
    resumed = BatchSampler(seconds(100), Cut(3, rank=1, world_size=2, accumulate=2))
    resumed.set_state(4, step=3)
    resumed.set_epoch(4)  # as Lightning does when it continues
    assert [[index for _, index in batch] for batch in resumed] == whole[6:] and len(resumed) == len(whole)
    resumed.set_epoch(5)
    assert len(list(resumed)) == len(whole)
    resumed.set_state(4, step=resumed.steps)
    assert list(resumed) == []
    with pytest.raises(ValueError, match=f"step {resumed.steps + 1} of"):
        resumed.set_state(4, resumed.steps + 1)


def test_every_epoch_has_its_own_batches_and_the_same_length():
    sampler = BatchSampler(seconds(100), Cut(4, 40.0))
    found = [batches(sampler, epoch) for epoch in range(4)]
    assert len({str(epoch) for epoch in found}) == 4
    assert len({len(epoch) for epoch in found}) == 1 and sampler.steps == len(sampler)
    assert all(type(i) is int for batch in found[0] for i in batch)


def test_sampler_rejects_what_cannot_be_shared():
    with pytest.raises(UserError, match="3 utterances cannot be shared among 4 processes"):
        BatchSampler(seconds(3), Cut(1, world_size=4))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        BatchSampler(seconds(3), Cut(1, rank=2, world_size=2))
    with pytest.raises(ValueError, match="accumulate 0"):
        BatchSampler(seconds(3), Cut(1, accumulate=0))
