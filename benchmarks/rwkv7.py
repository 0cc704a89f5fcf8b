"""RWKV-7 on a CPU, one thread: WKV-7 against the loop of pip `rwkv`, a training step against RWKV-6's, and a decoding
step in one native call against the same in PyTorch's operations.
"""

# B batch · T time · H heads · N head size

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import RESULTS, cpu_name, relative_rms, write_result
from benchmarks.peers import pip_rwkv7
from rwkv_speech.models.base import LMSizes, RWKV6Sizes, RWKV7Sizes
from rwkv_speech.models.families import lm_of
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.state import Packing, State
from rwkv_speech.ops.wkv7 import wkv7_backward, wkv7_forward
from rwkv_speech.ops.wkv7_ref import wkv7_ref

N = 64
SHAPES = [(1, 200, 40), (1, 60, 4), (1, 1, 40)]
# Of about equal size: RWKV-7's feed-forward part is wider, for want of a receptance, and it has no matrix of the gate.
PAIRS = {
    "4 x 256": (RWKV6Sizes(1000, 4, 256, 4, 896, 32, 64), RWKV7Sizes(1000, 4, 256, 4, 1024, 64, 64, 32, 128)),
    "12 x 768": (RWKV6Sizes(1000, 12, 768, 12, 2688, 32, 64), RWKV7Sizes(1000, 12, 768, 12, 3072, 64, 64, 32, 128)),
}
UTTERANCES, TOKENS = 4, 60

Row = dict[str, Any]


def processor_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median processor time of each call, turn about; one round warms up. It says more than the clock on busy cores."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def random_inputs(B: int, T: int, H: int) -> list[Tensor]:
    """r, w, k, v, a, b and the state, float32, as RWKV-7 makes them: a = -kk, b = kk times a rate."""
    torch.manual_seed(0)
    r, k, v, kk, w, rate = (torch.randn(B, T, H, N) for _ in range(6))
    kk = F.normalize(kk, dim=-1)
    return [r, F.logsigmoid(w) - 0.5, k, v, -kk, kk * torch.sigmoid(rate), torch.randn(B, H, N, N)]


def recurrence(rounds: int) -> list[Row]:
    """The kernel and the PyTorch form, forward and backward, and pip's loop, which has a forward pass alone."""
    peer, rows = pip_rwkv7(), []
    names = "native", "PyTorch", "pip rwkv", "backward"
    print(f"{'B x T x H':11}" + "".join(f"{name:>10}" for name in names) + f" {'pip / native':>13} {'error':>8}")
    for shape in SHAPES:
        inputs = random_inputs(*shape)
        dy, dstate = torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])
        times = processor_seconds(
            {
                "native": functools.partial(wkv7_forward, *inputs, None, "auto"),
                "torch": functools.partial(wkv7_forward, *inputs, None, "torch"),
                "pip_rwkv": functools.partial(peer, inputs),
                "native_backward": functools.partial(wkv7_backward, dy, dstate, *inputs, None, "auto"),
            },
            rounds,
        )
        y = wkv7_forward(*inputs, None, "auto")[0]
        same = relative_rms(peer(inputs).view_as(y), y.double())
        if same > 1e-5:
            raise ValueError(f"the peer does not compute the same: relative difference {same:.1e}, expected 1e-5")
        error = relative_rms(y, wkv7_ref(*(x.double() for x in inputs))[0])
        row: Row = {"shape": "x".join(map(str, shape)), "processor_seconds": times, "error": error}
        row["ratio"] = times["pip_rwkv"] / times["native"]
        rows.append(row)
        cells = "".join(f"{1e3 * times[n]:9.3f}m" for n in ("native", "torch", "pip_rwkv", "native_backward"))
        print(f"{row['shape']:11}{cells} {row['ratio']:12.1f}x {error:8.1e}")
    return rows


def random_lm(sizes: LMSizes) -> RWKV:
    """Weights of an ordinary size, frozen."""
    torch.manual_seed(0)
    model = lm_of(sizes).requires_grad_(False).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.5 * p.shape[-1] ** -0.5)
    return model


def train_step(model: RWKV, x: Tensor, targets: Tensor) -> None:
    """Forward and backward to the embeddings and the initial state, packed, as adapter and state are trained."""
    bounds = torch.arange(UTTERANCES + 1) * TOKENS
    zero = model.zero_state(UTTERANCES)
    state = State(zero.wkv.requires_grad_(), *zero[1:])
    hidden, _ = model.hidden(x.requires_grad_(), state, Packing.of(bounds), keep_state=False)
    model.head(hidden[0], targets).backward()


def training(rounds: int) -> list[Row]:
    """A step of each family at about equal size."""
    rows = []
    print(f"{'L x C':9} {'RWKV-6':>9} {'RWKV-7':>9} {'ratio':>6} {'parameters of the layers, M':>28}")
    for name, pair in PAIRS.items():
        models = dict(zip(("x060", "x070"), map(random_lm, pair), strict=True))
        x = torch.randn(1, UTTERANCES * TOKENS, pair[0].C)
        targets = torch.randint(pair[0].vocab, (UTTERANCES * TOKENS,))
        steps: dict[str, Callable[[], Any]] = {
            key: functools.partial(train_step, model, x, targets) for key, model in models.items()
        }
        times = processor_seconds(steps, rounds)
        millions = {key: sum(p.numel() for p in m.blocks.parameters()) / 1e6 for key, m in models.items()}
        ratio = times["x070"] / times["x060"]
        rows.append({"model": name, "processor_seconds": times, "ratio": ratio, "millions": millions})
        one, other = millions.values()
        print(f"{name:9} {times['x060']:8.3f}s {times['x070']:8.3f}s {ratio:6.2f} {one:22.1f}, {other:.1f}")
    return rows


@torch.no_grad()
def decoding(rounds: int) -> list[Row]:
    """A token of each of some slots: the native step against PyTorch's operations, and RWKV-6's native step."""
    rows = []
    print(f"{'L x C':9} {'slots':>5} {'native':>9} {'PyTorch':>9} {'ratio':>6} {'RWKV-6':>9} {'difference':>11}")
    for name, (six, seven) in PAIRS.items():
        native, peer = random_lm(seven), random_lm(six)
        plain = type(native)(seven, "torch").requires_grad_(False).eval()
        plain.load_state_dict(native.state_dict())
        for slots in (1, 4):
            ids = torch.arange(slots)
            states = {model: model.zero_state(slots) for model in (native, plain, peer)}
            calls: dict[str, Callable[[], Any]] = {
                key: functools.partial(model.step, ids, states[model])
                for key, model in (("native", native), ("torch", plain), ("x060", peer))
            }
            error = relative_rms(calls["native"](), calls["torch"]())
            if error > 1e-4:
                raise ValueError(f"the native step does not compute the same: relative difference {error:.1e}")
            times = processor_seconds(calls, 4 * rounds)
            ratio = times["torch"] / times["native"]
            rows.append({"model": name, "slots": slots, "processor_seconds": times, "ratio": ratio, "error": error})
            cells = f"{1e3 * times['native']:8.2f}m {1e3 * times['torch']:8.2f}m {ratio:6.2f}"
            print(f"{name:9} {slots:5} {cells} {1e3 * times['x060']:8.2f}m {error:11.1e}")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints the tables and writes them, with their circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = list(itertools.chain(recurrence(flags.rounds), training(flags.rounds), decoding(flags.rounds)))
    loads = [load, os.getloadavg()[0]]
    command = ["python", "-m", "benchmarks.rwkv7", f"--rounds={flags.rounds}"]
    print(write_result("rwkv7-cpu", flags.output, command, cpu_name(), threads=1, rows=rows, load=loads))


if __name__ == "__main__":
    main()
