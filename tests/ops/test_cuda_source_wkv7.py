"""WKV-7's CUDA kernels without a GPU: their source run on the CPU under the sanitizers. They compile in
test_cuda_source.py.
"""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import functools
from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from host_run import HostRun, host_program, without_barrier
from torch import Tensor
from wkv6_cases import DW_TOLERANCES, PACKED, TOLERANCES, compare, run

from ops.test_wkv7 import NAMES, random_inputs
from rwkv_speech.ops.wkv7_ref import wkv7_ref

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture
def host(tmp_path: Path) -> functools.partial[HostRun]:
    """The kernels, still to be given an order of threads."""
    return functools.partial(HostRun, host_program(), tmp_path, "steps", names=NAMES)


def check(host: functools.partial[HostRun], inputs: list[Tensor], bounds: list[int] | None = None) -> None:
    compare(host(), inputs, bounds, "steps", wkv7_ref, NAMES)


@pytest.mark.parametrize("T", [0, 1, 15, 17, 100])
def test_source_equals_reference(host: functools.partial[HostRun], T: int):
    check(host, random_inputs(2, T, 1, 32, FLOAT32))


@pytest.mark.parametrize(("N", "dtype"), [(64, BFLOAT16), (64, torch.float16), (128, FLOAT32)], ids=str)
def test_source_equals_reference_in_each_type_and_head_size(
    host: functools.partial[HostRun], N: int, dtype: torch.dtype
):
    check(host, random_inputs(1, 35, 2, N, dtype))


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_source_equals_reference_for_a_thousand_tokens(host: functools.partial[HostRun], dtype: torch.dtype):
    check(host, random_inputs(1, 1000, 1, 64, dtype))


def test_source_packed_equals_reference(host: functools.partial[HostRun]):
    check(host, random_inputs(1, PACKED[-1], 1, 32, BFLOAT16, sequences=len(PACKED) - 1), PACKED)


@pytest.mark.parametrize("decay", [(8.0, 0.0), (-20.0, 1.0), (0.0, 20.0)], ids=str)
def test_source_stays_exact_for_any_decay(host: functools.partial[HostRun], decay: tuple[float, float]):
    check(host, random_inputs(1, 50, 1, 32, FLOAT32, decay=decay))


@pytest.mark.parametrize("raw", [50.0, torch.inf])
def test_source_is_finite_for_an_instant_decay(host: functools.partial[HostRun], raw: float):
    inputs = random_inputs(1, 40, 1, 32, BFLOAT16)
    inputs[1][:, ::3] = raw
    got = run(host(), inputs, names=NAMES)
    assert all(x.isfinite().all() for x in got.values())
    assert (got["dw"][:, ::3] == 0).all()


def test_source_takes_strides_and_a_float32_decay_beside_bfloat16(host: functools.partial[HostRun]):
    inputs = random_inputs(2, 37, 2, 32, BFLOAT16)
    inputs[1] = inputs[1].float() + 1e-3
    r, w, k, v, a, b, state = inputs
    strided = [
        r.transpose(1, 2).contiguous().transpose(1, 2),
        w.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat((k, k), 3)[..., :32],
        torch.stack((v, v), 2)[:, :, 1],
        torch.cat((a, a), 1)[:, :37],
        b.transpose(0, 2).contiguous().transpose(0, 2),
    ]
    assert not any(x.is_contiguous() for x in strided)
    got, want = run(host(), [*strided, state], names=NAMES), run(wkv7_ref, [x.double() for x in inputs], names=NAMES)
    for name, tolerance in {
        "y": TOLERANCES[BFLOAT16],
        "da": TOLERANCES[BFLOAT16],
        "dw": DW_TOLERANCES[BFLOAT16],
    }.items():
        assert_rms_close(name, got[name], want[name], tolerance)


@pytest.mark.parametrize("order", [1, 2])
def test_source_does_not_depend_on_the_order_of_threads(host: functools.partial[HostRun], order: int):
    inputs = random_inputs(1, 39, 1, 64, BFLOAT16, sequences=3)
    bounds = torch.tensor([0, 33, 33, 39])
    want, got = (run(host(order=order), inputs, bounds, NAMES) for order in (0, order))
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize(("N", "dtype"), [(32, torch.float16), (64, BFLOAT16), (128, FLOAT32)], ids=str)
def test_decode_source_equals_reference(host: functools.partial[HostRun], N: int, dtype: torch.dtype):
    inputs = random_inputs(3, 1, 2, N, dtype)
    y, last = host().run("step", inputs, None, [], [inputs[0], inputs[-1]])
    want_y, want_last = wkv7_ref(*(x.double() for x in inputs))
    assert_rms_close("y", y, want_y, TOLERANCES[dtype])
    assert_rms_close("state", last, want_last, TOLERANCES[FLOAT32])


def test_bounds_out_of_range_touch_no_foreign_memory(host: functools.partial[HostRun]):
    run(host(), random_inputs(1, 20, 1, 32, BFLOAT16, sequences=3), torch.tensor([-5, 12, 9, 90]), NAMES)


BARRIERS = [
    ("wkv7_steps.h", "for (int i = thread; i < count"),
    ("wkv7_steps_backward.h", "products<N>(m);"),
]


@pytest.mark.soak
@pytest.mark.parametrize(("file", "after"), BARRIERS)
def test_host_run_notices_a_missing_barrier(file: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program, inputs = without_barrier(file, after, tmp_path, monkeypatch), random_inputs(1, 40, 1, 64, BFLOAT16)
    results = [run(HostRun(program, tmp_path, "steps", order, names=NAMES), inputs, names=NAMES) for order in (0, 1, 2)]
    assert any(not torch.equal(x, other[name]) for other in results[1:] for name, x in results[0].items())
