"""The portable WKV-6 against the step-by-step definition on a CPU: `python -m benchmarks.wkv6`.

Both run in turn, so that whatever else the machine does meets both alike; medians of the times and of the ratios.
"""

# B batch · T time · H heads · N head size

import argparse
import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.ops.wkv6 import wkv6
from rwkv_speech.ops.wkv6_ref import wkv6_ref

RESULTS = Path(__file__).parent / "results"
N = 64
SHAPES = [(4, 256, 8), (1, 200, 40), (16, 60, 3), (1, 1, 40)]
# Audio and text of a CPU batch: B = 16 sequences, T near 60.
PACKED = (16, 60, 3)

Operator = Callable[..., tuple[Tensor, Tensor]]


def random_inputs(B: int, T: int, H: int, lengths: list[int] | None) -> tuple[list[Tensor], Tensor | None]:
    """r, k, v, w, u, state in float64, and the bounds of a packed batch of these lengths."""
    torch.manual_seed(0)
    S = B
    if lengths:
        B, T = 1, sum(lengths)
    r, k, v, w = (torch.randn(B, T, H, N, dtype=torch.float64) for _ in range(4))
    bounds = torch.tensor([0, *lengths]).cumsum(0) if lengths else None
    inputs = [r, k, v, w - 1, torch.randn(H, N, dtype=torch.float64), torch.randn(S, H, N, N, dtype=torch.float64)]
    return inputs, bounds


def forward(op: Operator, inputs: list[Tensor], bounds: Tensor | None) -> list[Tensor]:
    """y and the last state."""
    with torch.no_grad():
        return list(op(*inputs, bounds))


def forward_backward(op: Operator, inputs: list[Tensor], bounds: Tensor | None) -> list[Tensor]:
    """The six gradients of the outputs' sum of squares."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = sum((x.square().sum() for x in op(*inputs, bounds)), torch.zeros(()))
    return list(torch.autograd.grad(loss, inputs))


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst relative RMS error among the tensors."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def measure(B: int, T: int, H: int, packed: bool, rounds: int) -> list[dict[str, Any]]:
    """One row each for the forward pass and for forward and backward."""
    lengths = [T // 2 + i * T // B for i in range(B)] if packed else None
    inputs, bounds = random_inputs(B, T, H, lengths)
    narrow = [x.float() for x in inputs]
    rows = []
    for name, run in (("forward", forward), ("forward+backward", forward_backward)):
        error = relative_error(run(wkv6, narrow, bounds), run(wkv6_ref, inputs, bounds))
        pairs = []
        for i in range(rounds + 1):
            reference = seconds(functools.partial(run, wkv6_ref, narrow, bounds), 1)
            portable = seconds(functools.partial(run, wkv6, narrow, bounds), 5)
            if i > 0:  # the first round warms up
                pairs.append((reference, portable))
        reference, portable = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(
            {
                "shape": f"{B}x{T}x{H}x{N}" + (" packed" if packed else ""),
                "pass": name,
                "reference_ms": round(reference * 1e3, 3),
                "portable_ms": round(portable * 1e3, 3),
                "ratio": round(statistics.median(a / b for a, b in pairs), 2),
                "relative_rms_error": error,
            }
        )
    return rows


def cpu_name() -> str:
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """The short hash of the checked-out commit, marked if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it, with its circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    print(f"{'B x T x H x N':18} {'pass':17} {'reference':>10} {'portable':>10} {'ratio':>7} {'error':>9}")
    rows = []
    for shape, packed in [*((shape, False) for shape in SHAPES), (PACKED, True)]:
        for row in measure(*shape, packed, flags.rounds):
            rows.append(row)
            print(
                f"{row['shape']:18} {row['pass']:17} {row['reference_ms']:7.2f} ms {row['portable_ms']:7.2f} ms "
                f"{row['ratio']:6.1f}x {row['relative_rms_error']:9.1e}"
            )
    now = datetime.now(UTC)
    result = {
        "command": f"python -m benchmarks.wkv6 --threads {flags.threads} --rounds {flags.rounds}",
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "device": cpu_name(),
        "threads": flags.threads,
        "torch": torch.__version__,
        "rows": rows,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    path = flags.output / f"wkv6-cpu-{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
