"""WKV-6: time against other implementations and the memory floor, error against float64, on a CPU or a GPU."""

# B batch · T time · H heads · N head size

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    cpu_name,
    gpu_seconds,
    interleaved,
    relative_rms,
    write_result,
)
from benchmarks.peers import flash_linear_attention, pip_rwkv
from rwkv_speech.ops.wkv6 import wkv6, wkv6_backward, wkv6_forward, wkv6_step
from rwkv_speech.ops.wkv6_ref import wkv6_ref

N = 64
CPU_SHAPES = [(1, 200, 40), (4, 256, 8), (16, 60, 3), (1, 1, 40)]
GPU_SHAPES = [(4, 200, 40), (4, 256, 40), (16, 256, 40), (16, 512, 40), (16, 1024, 40), (4, 1, 40)]
ERROR_SHAPE = (2, 100, 2)
DECAYS = {"ordinary": (-1.5, 1.5), "strong": (1.0, 3.0)}
_CALLS = 1000
NAMES = ("y", "state", "dr", "dk", "dv", "dw", "du", "dstate")

Row = dict[str, Any]


def random_inputs(
    B: int, T: int, H: int, dtype: torch.dtype, device: str, decay: tuple[float, float] = DECAYS["ordinary"]
) -> list[Tensor]:
    """r, k, v, w, u in `dtype` and a state in float32 (float64 if `dtype` is)."""
    torch.manual_seed(0)
    r, k, v, w = (torch.randn(B, T, H, N, dtype=torch.float64) for _ in range(4))
    w = (decay[0] + decay[1] * w).clamp(max=8.0)
    state = torch.randn(B, H, N, N, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u = torch.randn(H, N, dtype=torch.float64)
    return [*(x.to(device, dtype) for x in (r, k, v, w, u)), state.to(device, wide)]


def passes(inputs: list[Tensor]) -> dict[str, Callable[[str], Any]]:
    """By the kernel's form: the forward pass, and the backward pass with a gradient of the state, none of frozen u."""
    dy, dstate = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    return {
        "forward": lambda form: wkv6_forward(*inputs, None, form),
        "backward": lambda form: wkv6_backward(dy, dstate, *inputs, None, False, form),
    }


def floor_bytes(which: str, B: int, T: int, H: int, size: int) -> int:
    """What a pass must read and write: r k v w y, or twice that less y; and the states."""
    tokens, states = B * T * H * N * size, B * H * N * N * 4
    return 5 * tokens + 2 * states if which == "forward" else 9 * tokens + 3 * states


def errors(form: str, dtype: torch.dtype, device: str) -> list[Row]:
    """Relative RMS error of every output and gradient against the definition in float64."""
    rows = []
    for name, decay in DECAYS.items():
        results = []
        for op, kind in ((functools.partial(wkv6, form=form), dtype), (wkv6_ref, torch.float64)):
            inputs = [x.to(kind if i < 5 else torch.float32) for i, x in enumerate(random_inputs(
                *ERROR_SHAPE, dtype, device, decay))]  # fmt: skip
            if kind == torch.float64:
                inputs = [x.double() for x in inputs]
            inputs = [x.requires_grad_() for x in inputs]
            outputs = op(*inputs)
            torch.manual_seed(1)
            upstream = [torch.randn(x.shape).bfloat16().to(x) for x in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
        found = {n: relative_rms(a, b) for n, a, b in zip(NAMES, *results, strict=True)}
        rows.append({"form": form, "type": str(dtype).removeprefix("torch."), "decay": name, **found})
    return rows


def print_errors(rows: list[Row]) -> None:
    print(
        f"\nrelative RMS error against float64\n{'form':7} {'type':9} {'decay':9}" + "".join(f"{n:>9}" for n in NAMES)
    )
    for row in rows:
        numbers = "".join(f"{row[n]:9.1e}" for n in NAMES)
        print(f"{row['form']:7} {row['type']:9} {row['decay']:9}{numbers}")


def measure_cpu(rounds: int, threads: int) -> list[Row]:
    """Native against PyTorch forms, one thread and several; against pip `rwkv` where that has such a shape."""
    peer, rows = pip_rwkv(), []
    print(f"{'B x T x H':11} {'pass':9} {'native':>9} {'PyTorch':>9} {'pip rwkv':>9} {'ratios':>15} {'threads':>8}")
    for shape in CPU_SHAPES:
        inputs = random_inputs(*shape, torch.float32, "cpu")
        for which, call in passes(inputs).items():
            torch.set_num_threads(1)
            calls: dict[str, Callable[[], Any]] = {
                "native": functools.partial(call, "auto"),
                "torch": functools.partial(call, "torch"),
            }
            if shape[0] == 1 and which == "forward":
                calls["pip_rwkv"] = functools.partial(peer, inputs)
            repeats = 3 if shape[1] > 1 else 50
            times = interleaved(calls, rounds, repeats)
            several = [_scaling(functools.partial(call, "auto"), threads) for _ in range(rounds)]
            row: Row = {"shape": "x".join(map(str, shape)), "pass": which, "seconds": times,
                        f"speedup_{threads}_threads": statistics.median(several)}  # fmt: skip
            row["ratios"] = {name: times[name] / times["native"] for name in times if name != "native"}
            rows.append(row)
            cells = "".join(
                f"{1e3 * times[n]:8.3f}m" if n in times else " " * 9 for n in ("native", "torch", "pip_rwkv")
            )
            ratios = " ".join(f"{ratio:.1f}x" for ratio in row["ratios"].values())
            print(f"{row['shape']:11} {which:9} {cells} {ratios:>15} {statistics.median(several):7.2f}x")
        forward, backward = (row["seconds"]["native"] for row in rows[-2:])
        print(f"{'':11} backward / forward: {backward / forward:.2f}")
    return rows


def measure_calls(rounds: int) -> Row:
    """Seconds of this thread that a call takes beside the kernel, which has one head of one token to do."""
    r, k, v, w, u, state = random_inputs(1, 1, 1, torch.float32, "cpu")
    token = (r[:, 0], k[:, 0], v[:, 0], w[:, 0], u, state)
    calls: dict[str, Callable[[], Any]] = {
        "wkv6": functools.partial(wkv6, r, k, v, w, u, state),
        "wkv6_step": functools.partial(wkv6_step, *token),
    }
    times: dict[str, float] = {}
    for name, call in calls.items():
        taken = []
        for _ in range(rounds + 1):
            start = time.thread_time()
            for _ in range(_CALLS):
                call()
            taken.append((time.thread_time() - start) / _CALLS)
        times[name] = statistics.median(taken[1:])
    print("a call of " + ", of ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in times.items()))
    return times


def _scaling(call: Callable[[], Any], threads: int) -> float:
    """How much faster several threads are, measured one right after the other."""
    taken = []
    for count in (1, threads):
        torch.set_num_threads(count)
        taken.append(min(interleaved({"": call}, 3, 3).values()))
    return taken[0] / taken[1]


def copy_rate() -> float:
    """Bytes per second, read and written, of a plain copy on the GPU."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_seconds(lambda: target.copy_(source), 10)


def measure_gpu(rounds: int) -> tuple[list[Row], float]:
    """Every form in bfloat16, and flash-linear-attention if it is installed; the rate of a copy in the same run."""
    rate, peer, rows = copy_rate(), flash_linear_attention(), []
    print(f"copy: {rate / 1e12:.2f} TB/s; flash-linear-attention: {'yes' if peer else 'not installed'}")
    print(f"{'B x T x H':12} {'pass':9} {'form':6} {'us':>9} {'GB/s':>7} {'floors':>7}")
    for shape in GPU_SHAPES:
        inputs = random_inputs(*shape, torch.bfloat16, "cuda")
        for which, call in passes(inputs).items():
            size = floor_bytes(which, *shape, 2)
            times = {form: gpu_seconds(functools.partial(call, form), rounds) for form in ("tiles", "steps")}
            times["torch"] = gpu_seconds(functools.partial(call, "torch"), rounds, calls=1)
            if peer:
                times["fla"] = _peer_seconds(peer, inputs, which, rounds)
            for form, taken in times.items():
                rows.append({"shape": "x".join(map(str, shape)), "pass": which, "form": form, "seconds": taken,
                             "bytes_per_second": size / taken, "floors": taken / (size / rate)})  # fmt: skip
                print(f"{rows[-1]['shape']:12} {which:9} {form:6} {1e6 * taken:9.1f} {size / taken / 1e9:7.0f} "
                      f"{taken / (size / rate):6.1f}x")  # fmt: skip
    return rows, rate


def _peer_seconds(
    peer: Callable[[list[Tensor]], tuple[Tensor, Tensor]], inputs: list[Tensor], which: str, rounds: int
) -> float:
    """Backward: both passes less the forward one, for it has no way to run backward alone."""
    forward = gpu_seconds(lambda: peer(inputs), rounds)
    if which == "forward":
        return forward
    tracked = [x.detach().requires_grad_(i != 4) for i, x in enumerate(inputs)]
    upstream = [torch.randn_like(inputs[0]), torch.randn_like(inputs[5])]
    wanted = [x for x in tracked if x.requires_grad]
    return gpu_seconds(lambda: torch.autograd.grad(peer(tracked), wanted, upstream), rounds) - forward


def main(argv: list[str] | None = None) -> None:
    """Prints the tables and writes them, with their circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads beside one (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    flags = parser.parse_args(argv)
    content: dict[str, Any]
    if flags.device == "cuda":
        rows, rate = measure_gpu(flags.rounds)
        content = {"rows": rows, "copy_bytes_per_second": rate, "cuda": torch.version.cuda}
        found = [row for form in ("steps", "tiles", "torch") for row in errors(form, torch.bfloat16, "cuda")]
        found += errors("steps", torch.float32, "cuda")
        device = torch.cuda.get_device_name()
    else:
        rows = measure_cpu(flags.rounds, flags.threads)
        content = {"rows": rows, "threads": flags.threads, "call_seconds": measure_calls(flags.rounds)}
        found = [row for form in ("auto", "torch") for t in (torch.float32, torch.bfloat16)
                 for row in errors(form, t, "cpu")]  # fmt: skip
        device = cpu_name()
    print_errors(found)
    command = ["python", "-m", "benchmarks.wkv6", *(f"--{k}={v}" for k, v in vars(flags).items() if k != "output")]
    print(write_result(f"wkv6-{flags.device}", flags.output, command, device, **content, errors=found))


if __name__ == "__main__":
    main()
