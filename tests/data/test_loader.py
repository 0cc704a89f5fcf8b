import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.batch import Batch
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import make_loader
from rwkv_speech.data.source import Utterance
from rwkv_speech.tokenizer import WorldTokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SpeechDataset:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "vocab.txt").write_text(
        "".join(f"{i + 1} {(chr(i) if i < 128 else bytes([i]))!r} 1\n" for i in range(256))
    )
    rng = np.random.default_rng(0)
    utterances = []
    for i in range(7):
        file = folder / f"{i}.wav"
        soundfile.write(file, rng.uniform(-0.5, 0.5, 1_600 + 160 * i), 16_000)
        utterances.append(Utterance(f"u{i}", str(file), f"text {i}"))
    changes = Augment(speed=(0.9, 1.0, 1.1), volume_db=(-6.0, 6.0), time_masks=1, freq_masks=1, noise_dir=str(folder))
    return SpeechDataset(
        FileSource(utterances), WorldTokenizer(folder / "vocab.txt"), normalise=True, augment=Augmenter(changes, 5)
    )


def epochs(dataset: SpeechDataset, **options: int) -> list[list[Batch]]:
    """Two epochs of one loader, told apart as Lightning does it."""
    loader = make_loader(dataset, 2, shuffle=True, seed=3, **options)
    found = []
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)
        found.append(list(loader))
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
