"""The data loader against libsndfile alone, from 16 kHz FLAC: `python -m benchmarks.loader`.

Times real time per core: seconds of audio by seconds of CPU time of all processes. Both run in turn, so that whatever
else the machine does meets both alike; medians of the times and of the ratios. The recordings are made up: noise with
the spectrum and the syllables of speech, which FLAC packs as it packs LibriSpeech (0.54 of 16-bit PCM).
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.common import RESULTS, cpu_name, write_result
from rwkv_speech.audio import SAMPLE_RATE, Framing
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import Fit, SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import StepLoader
from rwkv_speech.data.source import Utterance
from rwkv_speech.tokenizer import WorldTokenizer

MICRO_BATCH = 16
WORDS = "the of and to in a was he that his it had for with as her she you not be at on by said which".split()


@dataclass(frozen=True)
class Work:
    """What the loader does beside decoding and tokenising."""

    name: str
    normalise: bool = True
    augment: Augment | None = None


def works(noise_dir: str) -> list[Work]:
    """Plain, normalised as training wants it, each change alone, and all together."""
    speed, volume = (0.9, 1.1), (-6.0, 6.0)
    return [
        Work("decode, tokenise", normalise=False),
        Work("+ normalise"),
        Work("+ speed", augment=Augment(speed=speed)),
        Work("+ noise (WAV)", augment=Augment(noise_dir=noise_dir)),
        Work("+ volume", augment=Augment(volume_db=volume)),
        Work("+ time masks", augment=Augment(time_masks=2)),
        Work("+ frequency masks", augment=Augment(freq_masks=2)),
        Work("+ all of these", augment=Augment(speed, volume, noise_dir, time_masks=2, freq_masks=2)),
    ]


def speech_like(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Noise falling with frequency, in syllables of a quarter second, over the noise floor of a room."""
    size = round(seconds * SAMPLE_RATE)
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(size)) / (1 + (hertz / 300) ** 2)
    voiced = np.fft.irfft(spectrum, size)
    syllables = np.sin(np.arange(size) / SAMPLE_RATE * np.pi * 4 + rng.uniform(0, 6)) ** 4
    waveform: np.ndarray = 0.5 * voiced / np.abs(voiced).max() * syllables + 0.0006 * rng.standard_normal(size)
    return waveform


def write_corpus(folder: Path, count: int) -> list[Utterance]:
    """`count` FLAC files of 12 s in the mean, with texts of 2.7 words a second."""
    rng = np.random.default_rng(0)
    utterances = []
    for i in range(count):
        seconds = rng.uniform(6.0, 18.0)
        path = folder / f"{i}.flac"
        soundfile.write(path, speech_like(seconds, rng), SAMPLE_RATE)
        text = " ".join(rng.choice(WORDS, round(2.7 * seconds)))
        utterances.append(Utterance(f"u{i}", str(path), text, seconds))
    return utterances


def write_noise(folder: Path) -> Path:
    """Eight WAV files of 30 s."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(8):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(30 * SAMPLE_RATE), SAMPLE_RATE)
    return folder


def cpu_seconds() -> float:
    """CPU time of this process and of its living children."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def timed_epochs(loader: StepLoader, epochs: int) -> tuple[float, float]:
    """Elapsed seconds and CPU seconds of some epochs."""
    started, used = time.perf_counter(), cpu_seconds()
    for _ in range(epochs):
        for (batch,) in loader:
            assert not batch.bad
    return time.perf_counter() - started, cpu_seconds() - used


def timed_decode(paths: list[str]) -> float:
    """CPU seconds of libsndfile alone on the same files, to float32."""
    used = time.process_time()
    for path in paths:
        soundfile.read(path, dtype="float32")
    return time.process_time() - used


def measure(utterances: list[Utterance], work: Work, workers: int, rounds: int, epochs: int) -> dict[str, Any]:
    """One row of the table."""
    augment = Augmenter(work.augment, seed=0) if work.augment else None
    dataset = SpeechDataset(
        FileSource(utterances),
        WorldTokenizer(),
        "lower",
        Fit(4096, 5, Framing((320,), (320,), 0.0)),
        normalise=work.normalise,
        augment=augment,
    )
    loader = dataset.loader(Cut(MICRO_BATCH), workers=workers)
    timed_epochs(loader, 1)  # starts the workers and warms up
    paths = [found.audio for found in utterances if found.audio]
    audio = sum(found.duration or 0.0 for found in utterances)
    rates = []
    for _ in range(rounds):
        alone = timed_decode(paths)
        elapsed, used = timed_epochs(loader, epochs)
        rates.append((audio / alone, audio * epochs / used, audio * epochs / elapsed))
    alone, per_core, overall = (statistics.median(values) for values in zip(*rates, strict=True))
    return {
        "work": work.name,
        "workers": workers,
        "libsndfile_per_core": round(alone),
        "per_core": round(per_core),
        "overall": round(overall),
        "share_of_libsndfile": round(statistics.median(rate[1] / rate[0] for rate in rates), 3),
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it, with its circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=96, help="recordings of 12 s (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs in a measurement (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in a worker
    rows = []
    with tempfile.TemporaryDirectory() as name:
        utterances = write_corpus(Path(name), flags.files)
        packed = sum(os.path.getsize(found.audio) for found in utterances if found.audio)
        seconds = sum(found.duration or 0.0 for found in utterances)
        ratio = packed / (2 * SAMPLE_RATE * seconds)
        print(f"{seconds / 60:.1f} min of FLAC, {ratio:.2f} of its PCM; times real time per core:")
        print(f"{'work':20} {'workers':>7} {'libsndfile':>11} {'loader':>8} {'share':>6} {'all cores':>10}")
        for work in works(str(write_noise(Path(name) / "noise"))):
            for workers in (0, 1, 2):
                row = measure(utterances, work, workers, flags.rounds, flags.epochs)
                rows.append(row)
                print(
                    f"{row['work']:20} {workers:7} {row['libsndfile_per_core']:10}x {row['per_core']:7}x "
                    f"{row['share_of_libsndfile']:6.2f} {row['overall']:9}x"
                )
    command = ["python -m benchmarks.loader"]
    command += [f"--{name} {getattr(flags, name)}" for name in ("files", "rounds", "epochs")]
    content = {"cores": os.cpu_count(), "libsndfile": soundfile.__libsndfile_version__, "packed": round(ratio, 3)}
    circumstances = {**content, "minutes": round(seconds / 60, 1), "micro_batch": MICRO_BATCH}
    print(write_result("loader-cpu", flags.output, command, cpu_name(), **circumstances, rows=rows))


if __name__ == "__main__":
    main()
