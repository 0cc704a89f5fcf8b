"""Opening a manifest of ten million lines and sharing it among 64 ranks: `python -m benchmarks.batches`.

Goals: open in 60 s and 2 GB per rank; 2 % of the ranks' time idle, 3 % of what the encoder computes padding.
"""

# N utterances · K optimizer steps · slots: ranks x accumulation

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, cpu_name, write_result
from rwkv_speech.data.epoch import Cut, Epoch, EpochPlan, Floats
from rwkv_speech.data.loader import BatchSampler
from rwkv_speech.data.sources import open_source

RECORDINGS = 1_000
BYTES_PER_LINE = 400  # of manifest and table, generously
CHUNK = 100_000
# A micro batch costs its padded seconds, or this many seconds more: the text, the launches.
OVERHEAD = 10.0
LIMITS: list[tuple[int, float | None]] = [(4, None), (16, None), (4, 60.0), (4, 240.0)]
RANKS = (1, 8, 64)


def durations_like_librispeech(count: int) -> Floats:
    """Seconds (N,), 12.3 on average: two thirds about 14, the others from 1.5 up, a few to 35."""
    rng = np.random.default_rng(0)
    kind = rng.random(count, np.float32)
    seconds = np.where(kind < 0.65, rng.normal(14.2, 1.4, count), rng.uniform(1.5, 16, count))
    seconds[kind > 0.998] = rng.uniform(17, 35, int((kind > 0.998).sum()))
    return np.round(seconds.clip(1.5, 35), 2).astype(np.float32)


def write_manifest(folder: Path, durations: Floats, with_ids: bool) -> Path:
    """A manifest of segments of RECORDINGS empty files, with ids, or such that ids have to be made."""
    for number in range(RECORDINGS):
        (folder / f"{number:04d}.flac").touch()
    manifest = folder / f"{'with' if with_ids else 'without'}-ids.jsonl"
    with manifest.open("w") as file:
        for start in range(0, len(durations), CHUNK):
            seconds = durations[start : start + CHUNK].astype(str).tolist()
            for i, length in enumerate(seconds, start=start):
                given = f', "id": "u{i}"' if with_ids else ""
                file.write(
                    f'{{"audio_filepath": "{i % RECORDINGS:04d}.flac", "offset": {i // RECORDINGS * 20}.5, '
                    f'"duration": {length}, "text": "he hoped there would be stew for dinner {i}"{given}}}\n'
                )
    return manifest


def peak_mb() -> int:
    """The most memory that this process has held so far, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def open_as_a_rank(manifest: str) -> dict[str, Any]:
    """What one of 64 ranks does before its first batch; in a process of its own, for the sake of the memory."""
    row: dict[str, Any] = {"start_mb": peak_mb()}
    start = time.perf_counter()
    source = open_source(manifest)
    row |= {"open_s": round(time.perf_counter() - start, 2), "open_mb": peak_mb()}
    start = time.perf_counter()
    sampler = BatchSampler(source.durations(), Cut(4, 60.0, rank=63, world_size=64))
    next(iter(sampler))
    row |= {"plan_s": round(time.perf_counter() - start, 2), "plan_mb": peak_mb(), "lines": len(source)}
    return row


def measure_opening(folder: Path, durations: Floats) -> list[dict[str, Any]]:
    """One row each for the first and the second opening of a manifest without ids and one with them."""
    rows = []
    for with_ids in (False, True):
        manifest = write_manifest(folder, durations, with_ids)
        size = manifest.stat().st_size
        for opening in ("first", "second"):
            command = [sys.executable, "-m", "benchmarks.batches", "--open", str(manifest)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            row = {"ids": with_ids, "opening": opening, "manifest_mb": size >> 20} | json.loads(said.splitlines()[-1])
            assert row["lines"] == len(durations)
            rows.append(row)
            print(
                f"{'given' if with_ids else 'made':6} {opening:8} {row['open_s']:8.2f} s {row['open_mb']:8} MB "
                f"{row['plan_s']:8.2f} s {row['plan_mb']:8} MB"
            )
        manifest.unlink()
        for table in folder.glob(f".{manifest.name}.*.arrow"):
            table.unlink()
    return rows


def longest_of_batches(durations: Floats, epoch: Epoch) -> NDArray[np.float64]:
    """Seconds of the longest utterance of every micro batch, 0 for an empty one."""
    longest = np.zeros(len(epoch.bounds) - 1)
    filled = np.flatnonzero(np.diff(epoch.bounds))
    longest[filled] = np.maximum.reduceat(durations[epoch.order], epoch.bounds[filled])
    return longest


def idle_share(costs: NDArray[np.float64], epoch: Epoch) -> float:
    """Share of all ranks' time that is spent waiting for the slowest of each step."""
    times = costs[epoch.steps]
    return float(1 - times.mean(axis=1).sum() / times.max(axis=1).sum())


def simulate(durations: Floats, micro_batch: int, batch_seconds: float | None, ranks: int) -> dict[str, Any]:
    """Plan one epoch and go through its steps, each as long as its costliest micro batch."""
    start = time.perf_counter()
    plan = EpochPlan(durations, Cut(micro_batch, batch_seconds, world_size=ranks))
    epoch = plan.epoch(1)
    spent = time.perf_counter() - start
    padded = longest_of_batches(durations, epoch) * np.diff(epoch.bounds)
    return {
        "micro_bsz": None if batch_seconds else micro_batch,
        "batch_seconds": batch_seconds,
        "ranks": ranks,
        "steps": plan.steps,
        "plan_s": round(spent, 2),
        "idle": idle_share(padded, epoch),
        "idle_with_overhead": idle_share(padded + OVERHEAD, epoch),
        "padding": float(1 - durations.sum(dtype=np.float64) / padded.sum()),
        "every_line_once": bool((np.bincount(epoch.order, minlength=len(durations)) == 1).all()),
    }


def measure_sharing(durations: Floats) -> list[dict[str, Any]]:
    """One row for every limit of a batch and number of ranks."""
    rows = []
    for micro_batch, batch_seconds in LIMITS:
        for ranks in RANKS:
            row = simulate(durations, micro_batch, batch_seconds, ranks)
            rows.append(row)
            limit = f"{batch_seconds:.0f} s" if batch_seconds else f"{micro_batch} utterances"
            print(
                f"{limit:14} {ranks:6} {row['steps']:9,} {row['plan_s']:7.2f} s {row['idle']:8.3%} "
                f"{row['idle_with_overhead']:8.3%} {row['padding']:8.3%}  {'yes' if row['every_line_once'] else 'NO'}"
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints two tables and writes them, with their circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=10_000_000, help="lines of the manifest (default: %(default)s)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where there is room (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    parser.add_argument("--open", metavar="MANIFEST", help="only open this manifest; what the benchmark itself calls")
    flags = parser.parse_args(argv)
    if flags.open:
        print(json.dumps(open_as_a_rank(flags.open)))
        return
    needed, free = flags.lines * BYTES_PER_LINE, shutil.disk_usage(flags.folder).free
    if free < needed:
        parser.error(f"--folder: {flags.folder} has {free >> 20} MB free, needs {needed >> 20}; or give fewer --lines")
    durations = durations_like_librispeech(flags.lines)
    print(f"{flags.lines:,} lines, {durations.mean():.1f} s on average")
    print(f"{'ids':6} {'opening':8} {'opened':>10} {'peak':>11} {'planned':>10} {'peak':>11}")
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        opening = measure_opening(Path(folder), durations)
    with_overhead = f"+ {OVERHEAD:.0f} s"
    print(
        f"{'batch':14} {'ranks':>6} {'steps':>9} {'planned':>9} {'idle':>8} {with_overhead:>8} {'padding':>8}  all once"
    )
    sharing = measure_sharing(durations)
    command = ["python", "-m", "benchmarks.batches", "--lines", str(flags.lines)]
    circumstances = {"numpy": np.__version__, "mean_seconds": round(float(durations.mean()), 2)}
    print(
        write_result("batches-cpu", flags.output, command, cpu_name(), **circumstances, overhead_seconds=OVERHEAD,
                     opening=opening, sharing=sharing)
    )  # fmt: skip


if __name__ == "__main__":
    main()
