"""What the benchmarks share: where they ran, how long a call takes, how a result is kept."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.reports.record import commit

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Median time of a call on the CPU."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Median seconds of each call, measured turn about, so that a noisy minute hits all alike; one round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds(call, repeats)
            if number:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def gpu_seconds(call: Callable[[], Any], rounds: int, calls: int = 20) -> float:
    """Median time of a call on the GPU: replays of a CUDA graph of `calls` calls, so that launches cost nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    times = []
    for number in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def relative_rms(got: Tensor, want: Tensor) -> float:
    """RMS of the difference as a share of that of `want`."""
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def _shown(word: str) -> str:
    """A word of a command, its absolute paths without what is of one machine alone: all folders but the last."""
    return re.sub(r"(?<![^=,])/[^,]*", lambda path: "/".join(Path(path[0]).parts[1:][-2:]), word)


def write_result(name: str, folder: Path, command: Sequence[str], device: str, **content: Any) -> Path:
    """Keep a result with its circumstances as JSON, named by `name` and time; returns its path."""
    now = datetime.now(UTC)
    result = {
        "command": " ".join(map(_shown, command)),
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "torch": torch.__version__,
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
