"""The operators as the CUDA kernels' source computes them on a CPU, under the sanitizers."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_speech.ops import build

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PASSES = {"forward": 0, "backward": 1, "step": 2}
GENERATIONS = {"steps": 1, "tiles": 2}
# In the program's order: what each token has, and all that gets a gradient.
ROWS = ("r", "k", "v", "w", "a", "b")
ALL = (*ROWS, "u", "state")


def host_program() -> Path:
    """The compiled program; skips the test where there is no compiler."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler")
    return build.compiled(build.host_run())


def without_barrier(file: str, after: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program of sources that lack the barrier before the line of `file` that begins with `after`."""
    sources = folder / "cuda"
    shutil.copytree(build.SOURCES, sources)
    source = (sources / file).read_text()
    whole = f"        barrier();\n        {after}"
    assert source.count(whole) == 1
    (sources / file).write_text(source.replace(whole, f"        {after}"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "CACHE", folder / "build")
    return host_program()


def _bytes(x: Tensor) -> bytes:
    """The memory of x, from its first to its last element, in whatever order its strides say."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = x.as_strided((span,), (1,), x.storage_offset())
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


class HostRun:
    """An operator whose arguments have these names, as the program runs it; `order` is that of a block's threads."""

    def __init__(self, program: Path, folder: Path, form: str, order: int = 0, *, names: Sequence[str]) -> None:
        self.program, self.folder, self.names = program, folder, names
        self.generation, self.order = GENERATIONS[form], order

    def __call__(self, *inputs: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _HostRunFunction.apply(self, cu_seqlens, *inputs)  # type: ignore[return-value]

    def run(
        self,
        which: str,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        upstream: list[Tensor],
        like: list[Tensor],
    ) -> list[Tensor]:
        """Fills new tensors like these with what the program gives."""
        given = dict(zip(self.names, inputs, strict=True)) | dict(zip(("dy", "dlast"), upstream, strict=False))
        r, w, state, u = given["r"], given["w"], given["state"], given.get("u")
        B, T, H, N = r.shape
        spans = [
            [len(_bytes(x)) // x.element_size(), *x.stride()[:3]] if (x := given.get(name)) is not None else [0] * 4
            for name in (*ROWS, "dy")
        ]
        header = [
            7 if u is None else 6, PASSES[which], self.generation, self.order, B, T, H, N, len(state),
            TYPES[r.dtype], TYPES[w.dtype], 0 if u is None else TYPES[u.dtype], cu_seqlens is not None,
            *(number for span in spans for number in span),
        ]  # fmt: skip
        parts = [torch.tensor(header, dtype=torch.int64), *([] if cu_seqlens is None else [cu_seqlens])]
        parts += [given[name] for name in ("u", *ROWS, "state", "dy", "dlast") if name in given]
        cases, answers = self.folder / "cases", self.folder / "results"
        cases.write_bytes(b"".join(_bytes(x) for x in parts))
        done = subprocess.run([self.program, cases, answers], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        content, filled, offset = answers.read_bytes(), [], 0
        for x in like:
            size = x.numel() * x.element_size()
            chunk = bytearray(content[offset : offset + size])
            filled.append(torch.frombuffer(chunk, dtype=x.dtype).view(x.shape) if size else torch.empty_like(x))
            offset += size
        assert offset == len(content)
        return filled


class _HostRunFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, host: HostRun, cu_seqlens: Tensor | None, *inputs: Tensor):  # type: ignore[no-untyped-def]
        ctx.host, ctx.cu_seqlens = host, cu_seqlens
        ctx.save_for_backward(*inputs)
        like = [inputs[0].new_empty(inputs[0].shape), inputs[-1].new_empty(inputs[-1].shape)]
        return tuple(host.run("forward", inputs, cu_seqlens, [], like))

    @staticmethod
    def backward(ctx, dy: Tensor, dlast: Tensor):  # type: ignore[no-untyped-def]
        given = dict(zip(ctx.host.names, ctx.saved_tensors, strict=True))
        like = {name: given[name].new_empty(given[name].shape) for name in ALL if name in given}
        if "u" in like:  # each sequence's part by itself
            like["u"] = given["state"].new_empty(len(given["state"]), *given["u"].shape)
        filled = ctx.host.run("backward", ctx.saved_tensors, ctx.cu_seqlens, [dy, dlast], list(like.values()))
        found = dict(zip(like, filled, strict=True))
        if "u" in found:
            found["u"] = found["u"].sum(0).to(given["u"].dtype)
        return None, None, *(found[name] for name in ctx.host.names)
