"""The CUDA kernels without a GPU: their source run on the CPU under the sanitizers, and compiled for every GPU."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from torch import Tensor
from wkv6_cases import DW_TOLERANCES, PACKED, TOLERANCES, Operator, compare, random_inputs, run

from rwkv_speech.ops import build
from rwkv_speech.ops.wkv6_ref import wkv6_ref

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PASSES = {"forward": 0, "backward": 1, "step": 2}
GENERATIONS = {"steps": 1, "tiles": 2}
BFLOAT16 = torch.bfloat16


@pytest.fixture(scope="session")
def program() -> Path:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler")
    return build.compiled(build.host_run())


def _bytes(x: Tensor) -> bytes:
    """The memory of x, from its first to its last element, in whatever order its strides say."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = x.as_strided((span,), (1,), x.storage_offset())
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


class HostRun:
    """The operator as the program runs it; `order` is the order in which a block's threads take turns."""

    def __init__(self, program: Path, folder: Path, form: str, order: int = 0) -> None:
        self.program, self.folder = program, folder
        self.generation, self.order = GENERATIONS[form], order

    def __call__(
        self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return _HostRunFunction.apply(self, cu_seqlens, r, k, v, w, u, state)  # type: ignore[return-value]

    def run(
        self, which: str, inputs: list[Tensor], cu_seqlens: Tensor | None, upstream: list[Tensor], results: list[Tensor]
    ) -> list[Tensor]:
        """Fills new tensors like `results` with what the program gives."""
        r, _, _, w, u, state = inputs
        B, T, H, N = r.shape
        rows = [*inputs[:4], *upstream[:1]]
        spans = [[len(_bytes(x)) // x.element_size(), *x.stride()[:3]] for x in rows]
        header = [
            PASSES[which], self.generation, self.order, B, T, H, N, len(state),
            TYPES[r.dtype], TYPES[w.dtype], TYPES[u.dtype], cu_seqlens is not None,
            *(number for span in spans + [[0] * 4] * (5 - len(rows)) for number in span),
        ]  # fmt: skip
        parts = [torch.tensor(header, dtype=torch.int64)]
        if cu_seqlens is not None:
            parts.append(cu_seqlens)
        parts += [u, *inputs[:4], state, *upstream]
        cases, answers = self.folder / "cases", self.folder / "results"
        cases.write_bytes(b"".join(_bytes(x) for x in parts))
        done = subprocess.run([self.program, cases, answers], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        content, filled, offset = answers.read_bytes(), [], 0
        for like in results:
            size = like.numel() * like.element_size()
            chunk = bytearray(content[offset : offset + size])
            filled.append(
                torch.frombuffer(chunk, dtype=like.dtype).view(like.shape) if size else torch.empty_like(like)
            )
            offset += size
        assert offset == len(content)
        return filled


class _HostRunFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, host: HostRun, cu_seqlens: Tensor | None, *inputs: Tensor):  # type: ignore[no-untyped-def]
        ctx.host, ctx.cu_seqlens = host, cu_seqlens
        ctx.save_for_backward(*inputs)
        like = [inputs[0].new_empty(inputs[0].shape), inputs[5].new_empty(inputs[5].shape)]
        return tuple(host.run("forward", list(inputs), cu_seqlens, [], like))

    @staticmethod
    def backward(ctx, dy: Tensor, dlast: Tensor):  # type: ignore[no-untyped-def]
        inputs = list(ctx.saved_tensors)
        like = [x.new_empty(x.shape) for x in inputs]
        like[4] = inputs[5].new_empty(len(inputs[5]), *inputs[4].shape)
        dr, dk, dv, dw, du, dstate = ctx.host.run("backward", inputs, ctx.cu_seqlens, [dy, dlast], like)
        return None, None, dr, dk, dv, dw, du.sum(0).to(inputs[4].dtype), dstate


@pytest.fixture(params=GENERATIONS)
def host(request: pytest.FixtureRequest, program: Path, tmp_path: Path) -> functools.partial[HostRun]:
    """A HostRun of each generation, still to be given an order."""
    return functools.partial(HostRun, program, tmp_path, request.param)


def check(host: functools.partial[HostRun], inputs: list[Tensor], bounds: list[int] | None = None) -> None:
    compare(host(), inputs, bounds, form=host.args[-1])


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 63, 64, 100, 257])
def test_source_equals_reference(host: functools.partial[HostRun], T: int):
    check(host, random_inputs(3, T, 1, 64, BFLOAT16))


def test_source_equals_reference_for_many_heads_and_a_long_sequence(host: functools.partial[HostRun]):
    check(host, random_inputs(1, 17, 5, 64, BFLOAT16))
    check(host, random_inputs(1, 1000, 1, 64, BFLOAT16))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("N", [32, 64, 128])
def test_source_equals_reference_in_each_type_and_head_size(
    host: functools.partial[HostRun], N: int, dtype: torch.dtype
):
    check(host, random_inputs(2, 50, 1, N, dtype))


def test_source_packed_equals_reference(host: functools.partial[HostRun]):
    for bounds in (PACKED, [0, 1], [0, 0, 0], [0, 33, 34, 35], [0, 64, 128]):
        check(host, random_inputs(1, bounds[-1], 1, 64, BFLOAT16, sequences=len(bounds) - 1), bounds)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("decay", [(1.0, 3.0), (8.0, 0.0), (-20.0, 1.0), (0.0, 20.0)], ids=str)
def test_source_stays_exact_for_any_decay(
    host: functools.partial[HostRun], decay: tuple[float, float], dtype: torch.dtype
):
    check(host, random_inputs(2, 100, 1, 64, dtype, decay=decay))


@pytest.mark.parametrize("raw", [50.0, torch.inf])
def test_source_is_finite_for_an_instant_decay(host: functools.partial[HostRun], raw: float):
    inputs = random_inputs(2, 40, 1, 64, BFLOAT16)
    inputs[3][:, ::3] = raw
    got = run(host(), inputs)
    assert all(x.isfinite().all() for x in got.values())
    assert (got["dw"][:, ::3] == 0).all()


def test_source_takes_a_float32_decay_beside_bfloat16(host: functools.partial[HostRun]):
    inputs = random_inputs(2, 70, 1, 64, BFLOAT16)
    inputs[3] = inputs[3].float() + 1e-3
    got, want = run(host(), inputs), run(wkv6_ref, [x.double() for x in inputs])
    assert_rms_close("dw", got["dw"], want["dw"], DW_TOLERANCES[BFLOAT16])
    assert_rms_close("y", got["y"], want["y"], TOLERANCES[BFLOAT16])


def test_source_takes_strides(host: functools.partial[HostRun]):
    B, T, H, N = 2, 37, 2, 64
    inputs = random_inputs(B, T, H, N, BFLOAT16)
    want = run(host(), inputs)
    r, k, v, w, u, state = inputs
    strided = [
        r.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((k, k), 3)[..., :N],
        torch.stack((v, v), 2)[:, :, 1],
        w.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    assert not any(x.is_contiguous() for x in strided)
    got = run(host(), [*strided, u, state])
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("order", [1, 2])
def test_source_does_not_depend_on_the_order_of_threads(host: functools.partial[HostRun], order: int):
    inputs = random_inputs(1, PACKED[-1], 1, 64, BFLOAT16, sequences=len(PACKED) - 1)
    bounds = torch.tensor(PACKED)
    want, got = run(host(), inputs, bounds), run(host(order=order), inputs, bounds)
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("N", [32, 64, 128])
def test_decode_source_equals_reference(program: Path, tmp_path: Path, N: int, dtype: torch.dtype):
    inputs = random_inputs(5, 1, 3, N, dtype)
    host = HostRun(program, tmp_path, "steps")
    y, last = host.run("step", inputs, None, [], [inputs[0], inputs[5]])
    want_y, want_last = wkv6_ref(*(x.double() for x in inputs))
    assert_rms_close("y", y, want_y, TOLERANCES[dtype])
    assert_rms_close("state", last, want_last, TOLERANCES[torch.float32])


def test_bounds_out_of_range_touch_no_foreign_memory(host: functools.partial[HostRun]):
    inputs = random_inputs(1, 40, 1, 64, BFLOAT16, sequences=3)
    run(host(), inputs, torch.tensor([-5, 30, 20, 90]))


def test_sanitizer_notices_a_step_beside_the_memory(program: Path, tmp_path: Path):
    inputs = random_inputs(1, 20, 1, 64, BFLOAT16)
    host: Operator = HostRun(program, tmp_path, "steps")
    inputs[1] = inputs[1][:, :8].expand(-1, -1, -1, -1)
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        host(*inputs)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_source_compiles_for_every_gpu_without_spills():
    library = build.compiled(build.cuda_library(build.nvcc_architectures()))
    assert "spill" not in (library.parent / "log.txt").read_text().lower()


BARRIERS = [
    ("wkv6_steps.h", "for (int i = thread; !kStates"),
    ("wkv6_steps_backward.h", "products<N>(m);"),
    ("wkv6_tiles_forward.h", "fetch_stage(p, s, ahead"),
    ("wkv6_tiles_forward.h", "state.scale_keys"),
    ("wkv6_tiles_backward.h", "fetch_stage(p, s, tile - 1"),
    ("wkv6_tiles_backward.h", "gradient.scale_keys"),
    ("wkv6_tiles_backward.h", "value_gradients(p"),
]


@pytest.mark.soak
@pytest.mark.parametrize(("file", "after"), BARRIERS, ids="-".join)
def test_host_run_notices_a_missing_barrier(file: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources = tmp_path / "cuda"
    shutil.copytree(build.SOURCES, sources)
    source = (sources / file).read_text()
    whole = f"        barrier();\n        {after}"
    assert source.count(whole) == 1
    (sources / file).write_text(source.replace(whole, f"        {after}"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "CACHE", tmp_path / "build")
    program = build.compiled(build.host_run())
    inputs = random_inputs(1, 40, 1, 64, BFLOAT16)
    results = []
    for order in (0, 1, 2):
        host = HostRun(program, tmp_path, "steps" if "steps" in file else "tiles", order)
        results.append(run(host, inputs))
    assert any(not torch.equal(x, other[name]) for other in results[1:] for name, x in results[0].items())
