"""RWKV-7's time mix around WKV-7: the explicit backward pass against autograd, and what it keeps."""

# B batch · T time · C channels = H heads · N head size

import pytest
import torch
from assertions import assert_rms_close
from torch import Tensor

from rwkv_speech.ops.time_mix7 import Projections, Weights, attend, tokens
from rwkv_speech.ops.wkv7_ref import wkv7_ref

H, N, RANK = 2, 32, 5
C = H * N


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def case(B: int, T: int, first_layer: bool, dtype: torch.dtype, sequences: int) -> tuple[list[Tensor | None], Weights]:
    """The projections and a state, with gradients; and frozen weights."""
    torch.manual_seed(0)
    r, k, v, first = (normal(B, T, C, dtype=dtype) for _ in range(4))
    low = [normal(B, T, RANK, dtype=dtype) for _ in range(3)]
    later = not first_layer
    weights = Weights(
        *(x for _ in range(3) for x in (normal(1, 1, C, dtype=dtype), normal(RANK, C, dtype=dtype))),
        *(normal(1, 1, C, dtype=dtype) for _ in range(2)), normal(H, N, dtype=dtype),
    )  # fmt: skip
    if first_layer:
        weights = weights._replace(v0=None, v2=None)
    state = normal(sequences, H, N, N, dtype=dtype if dtype == torch.float64 else torch.float32)
    inputs = [r, k, v, low[0], low[1], low[2] if later else None, first if later else None, state]
    return [None if x is None else x.requires_grad_() for x in inputs], weights


def run(op, inputs: list[Tensor | None], weights: Weights, bounds: Tensor | None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Results, and the gradients of all inputs for the same gradients of the results."""
    *projections, state = inputs
    results = op(Projections(*projections), weights, state, bounds)
    draw = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=draw).bfloat16().to(x) for x in results]
    given = [x for x in inputs if x is not None]
    return [*results, *torch.autograd.grad(results, given, upstream)]


def by_definition(x: Projections, by: Weights, state: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    made, bonus = tokens(x, by)
    made = made._replace(w=made.w.to(state.dtype))  # which is kept in float32
    return *wkv7_ref(*made, state, bounds), bonus


@pytest.mark.parametrize("first_layer", [True, False])
@pytest.mark.parametrize("bounds", [None, [0, 7, 7, 20]], ids=str)
def test_gradients_are_those_of_the_definition(bounds: list[int] | None, first_layer: bool):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    B, sequences = (2, 2) if bounds is None else (1, 3)
    inputs, weights = case(B, 20, first_layer, torch.float32, sequences)
    found = run(lambda *x: attend(*x, "auto"), inputs, weights, cu_seqlens)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    doubles = Weights(*(None if x is None else x.double() for x in weights))
    for number, (got, want) in enumerate(zip(found, run(by_definition, exact, doubles, cu_seqlens), strict=True)):
        assert_rms_close(str(number), got, want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_weights_take_autograd_and_give_the_same(dtype: torch.dtype):
    inputs, weights = case(2, 20, False, dtype, 2)
    frozen = run(lambda *x: attend(*x, "auto"), inputs, weights, None)
    for weight in weights:
        weight.requires_grad_()
    trained = run(lambda *x: attend(*x, "auto"), inputs, weights, None)
    for number, (got, want) in enumerate(zip(frozen, trained, strict=True)):
        assert_rms_close(str(number), got, want, 1e-6)


def test_what_is_kept_are_the_projections_and_the_state():
    inputs, weights = case(2, 50, False, torch.float32, 2)
    kept = dict[int, int]()

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = attend(Projections(*inputs[:-1]), weights, inputs[-1], None, "auto")
    assert sum(kept.values()) == sum(x.nbytes for x in (*inputs, *weights) if x is not None)
    assert all(x.requires_grad for x in results)
