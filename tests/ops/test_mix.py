import shutil

import pytest
import torch
from assertions import assert_rms_close
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech.ops.mix import gated, mixes, squared_relu

B, T, C, R = 2, 7, 12, 3
SHAPES = {"x": (B, T, C), "xx": (B, T, C), "maa_x": (C,), "w1": (C, 5 * R), "w2": (5, R, C), "base": (5, C)}


def draw(dtype: torch.dtype = torch.float64, trained: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: x.to(dtype).requires_grad_(trained or name in ("x", "xx")) for name, x in tensors.items()}


def written_out(x: Tensor, xx: Tensor, maa_x: Tensor, w1: Tensor, w2: Tensor, base: Tensor) -> list[Tensor]:
    """The formula, one mix after another."""
    low = torch.tanh((x + xx * maa_x) @ w1)
    return [x + xx * (base[f] + low[..., f * R : (f + 1) * R] @ w2[f]) for f in range(5)]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_mixes_and_gradients_equal_float64(dtype: torch.dtype, tol: float, trained: bool):
    # Both start from numbers that `dtype` can hold.
    given = draw(dtype, trained)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in given.items()}
    found, wanted = mixes(**given), written_out(**exact)
    weights = [torch.randn(B, T, C, dtype=torch.float64) for _ in range(5)]
    sum((y * weight).sum() for y, weight in zip(found, weights, strict=True)).backward()
    sum((y * weight).sum() for y, weight in zip(wanted, weights, strict=True)).backward()
    for y, want in zip(found, wanted, strict=True):
        assert y.dtype == dtype
        assert_rms_close("mix", y, want, tol)
    for name, x in given.items():
        assert (x.grad is not None) == (trained or name in ("x", "xx"))
        if x.grad is not None:
            assert_rms_close(name, x.grad, exact[name].grad, tol)


def test_mixes_under_autocast_are_in_its_type_and_gradients_in_the_inputs():
    given = draw(torch.float32)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in given.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = mixes(**given)
    wanted = written_out(**exact)
    assert {y.dtype for y in found} == {torch.bfloat16}
    sum(y.float().square().sum() for y in found).backward()
    sum(y.square().sum() for y in wanted).backward()
    for y, want in zip(found, wanted, strict=True):
        assert_rms_close("mix", y, want, 2e-2)
    for name in ("x", "xx"):
        assert given[name].grad.dtype == torch.float32
        assert_rms_close(name, given[name].grad, exact[name].grad, 2e-2)


def test_mixes_without_gradients_are_the_same():
    given = draw(torch.float32)
    with torch.no_grad():
        found = mixes(**given)
    assert all(torch.equal(a, b) for a, b in zip(found, mixes(**given), strict=True))


@pytest.mark.parametrize("grad", [True, False])
def test_gated_and_squared_relu_equal_pytorch(grad: bool):
    y, gate = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with torch.set_grad_enabled(grad):
        # What squared_relu overwrites must not be a leaf.
        found = (gated(y, gate), squared_relu(gate * 1))
    wanted = (y * F.silu(gate), F.relu(gate).square())
    torch.testing.assert_close(found, wanted)
    if grad:
        for a, b in zip(found, wanted, strict=True):
            weight = torch.randn_like(a)
            for x, z in zip(
                torch.autograd.grad(a, (y, gate), weight, allow_unused=True),
                torch.autograd.grad(b, (y, gate), weight, allow_unused=True),
                strict=True,
            ):
                torch.testing.assert_close(x, z)


def test_gated_takes_a_wider_value():
    y, gate = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6).bfloat16().requires_grad_()
    out = gated(y, gate)
    out.sum().backward()
    assert (out.dtype, y.grad.dtype, gate.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile does not quote the blank in torch's own path")
def test_fused_parts_equal_the_others():
    given = draw(torch.float32)
    y, gate = (torch.randn(B, T, C, requires_grad=True) for _ in range(2))

    def values_and_gradients(fuse: bool) -> tuple[Tensor, ...]:
        outputs = (*mixes(**given, fuse=fuse), gated(y, gate, fuse))
        return *outputs, *torch.autograd.grad(
            outputs, (given["x"], given["xx"], y, gate), [x.detach() for x in outputs]
        )

    for found, wanted in zip(values_and_gradients(True), values_and_gradients(False), strict=True):
        assert_rms_close("fused", found, wanted, 1e-6)
