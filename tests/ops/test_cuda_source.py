"""The CUDA kernels without a GPU: their source run on the CPU under the sanitizers, and compiled for every GPU."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import functools
from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from host_run import GENERATIONS, TYPES, HostRun, host_program, without_barrier
from torch import Tensor
from wkv6_cases import DW_TOLERANCES, NAMES, PACKED, TOLERANCES, Operator, compare, random_inputs, run

from rwkv_speech.ops import build
from rwkv_speech.ops.wkv6_ref import wkv6_ref

BFLOAT16 = torch.bfloat16


@pytest.fixture(scope="session")
def program() -> Path:
    return host_program()


@pytest.fixture(params=GENERATIONS)
def host(request: pytest.FixtureRequest, program: Path, tmp_path: Path) -> functools.partial[HostRun]:
    """A HostRun of each generation, still to be given an order."""
    return functools.partial(HostRun, program, tmp_path, request.param, names=NAMES)


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
    host = HostRun(program, tmp_path, "steps", names=NAMES)
    y, last = host.run("step", inputs, None, [], [inputs[0], inputs[5]])
    want_y, want_last = wkv6_ref(*(x.double() for x in inputs))
    assert_rms_close("y", y, want_y, TOLERANCES[dtype])
    assert_rms_close("state", last, want_last, TOLERANCES[torch.float32])


def test_bounds_out_of_range_touch_no_foreign_memory(host: functools.partial[HostRun]):
    inputs = random_inputs(1, 40, 1, 64, BFLOAT16, sequences=3)
    run(host(), inputs, torch.tensor([-5, 30, 20, 90]))


def test_sanitizer_notices_a_step_beside_the_memory(program: Path, tmp_path: Path):
    inputs = random_inputs(1, 20, 1, 64, BFLOAT16)
    host: Operator = HostRun(program, tmp_path, "steps", names=NAMES)
    inputs[1] = inputs[1][:, :8].expand(-1, -1, -1, -1)
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        host(*inputs)


@pytest.mark.skipif(not build.has_nvcc(), reason="no nvcc")
def test_source_compiles_for_every_gpu_without_spills():
    library = build.compiled(build.cuda_library(build.nvcc_architectures()))
    assert "spill" not in (library.parent / "log.txt").read_text().lower()


BARRIERS = [
    ("wkv6_steps.h", "for (int i = thread; !kStates"),
    ("wkv6_steps_backward.h", "products<N>(m);"),
    ("wkv6_tiles_forward.h", "const int count"),
    ("wkv6_tiles_forward.h", "m.y.store_sum"),
    ("wkv6_tiles_states.h", "fetch(tile + 1);"),
    ("wkv6_tiles_backward.h", "turn = 1 - turn;"),
    ("wkv6_tiles_backward.h", "gradient.store(m.gradient"),
    ("wkv6_tiles_backward.h", "    m.dv.store_sum"),
]


@pytest.mark.soak
@pytest.mark.parametrize(("file", "after"), BARRIERS)
def test_host_run_notices_a_missing_barrier(file: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program, inputs = without_barrier(file, after, tmp_path, monkeypatch), random_inputs(1, 70, 1, 64, BFLOAT16)
    form = "steps" if "steps" in file else "tiles"
    results = [run(HostRun(program, tmp_path, form, order, names=NAMES), inputs) for order in (0, 1, 2)]
    assert any(not torch.equal(x, other[name]) for other in results[1:] for name, x in results[0].items())
