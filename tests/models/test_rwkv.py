"""RWKV-6 and RWKV-7 against themselves: whole, in parts, packed, checkpointed, in bfloat16."""

# B batch · T time · C channels · L layers · S sequences of a packed batch

import itertools
from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from lm_cases import assert_same_state, make_model, random_ids, random_state
from tiny_models import RANDOM_TENSORS
from torch import Tensor

from rwkv_speech.models.families import read_lm
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.state import State


@pytest.fixture(params=RANDOM_TENSORS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, tmp_path: Path) -> RWKV:
    return make_model(tmp_path, family)


def test_rwkv_step_by_step_equals_whole(model: RWKV):
    ids, state = random_ids(model, 3, 21), random_state(model, 3)
    whole = model(ids, state=state)
    steps = []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], state=state)
        state = out.state
        steps.append(out.logits)
    assert_rms_close("logits", torch.cat(steps, 1), whole.logits, 1e-5)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("cuts", [[1], [20], [7, 8], [0, 33, 33, 40]], ids=str)
def test_rwkv_split_equals_whole(model: RWKV, cuts: list[int]):
    ids, state = random_ids(model, 2, 41), random_state(model, 2)
    whole = model(ids, state=state)
    parts = []
    for a, b in itertools.pairwise([0, *cuts, 41]):
        out = model(ids[:, a:b], state=state)
        state = out.state
        parts.append(out.logits)
    assert_rms_close("logits", torch.cat(parts, 1), whole.logits, 1e-5)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("lengths", [[0, 5, 1, 0, 37, 12, 0], [1], [0, 0, 3]], ids=str)
def test_rwkv_packed_equals_separate(model: RWKV, lengths: list[int]):
    bounds = [0, *itertools.accumulate(lengths)]
    ids, state = random_ids(model, 1, bounds[-1]), random_state(model, len(lengths))
    packed = model(ids, state=state, cu_seqlens=torch.tensor(bounds))
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        row = torch.tensor([s])
        alone = model(ids[:, a:b], state=state.select(row))
        assert_rms_close(f"logits of sequence {s}", packed.logits[:, a:b], alone.logits, 1e-5)
        assert_same_state(packed.state.select(row), alone.state)


def test_rwkv_packed_starts_from_zeros(model: RWKV):
    ids, cu_seqlens = random_ids(model, 1, 20), torch.tensor([0, 8, 20])
    got = model(ids, cu_seqlens=cu_seqlens)
    assert torch.equal(got.logits, model(ids, state=model.zero_state(2), cu_seqlens=cu_seqlens).logits)
    assert_rms_close("logits of the second", got.logits[:, 8:], model(ids[:, 8:]).logits, 1e-5)


def test_rwkv_batch_equals_rows(model: RWKV):
    ids, state = random_ids(model, 3, 10), random_state(model, 3)
    whole = model(ids, state=state)
    for row in range(3):
        alone = model(ids[row : row + 1], state=state.select(torch.tensor([row])))
        assert_rms_close("logits", whole.logits[row : row + 1], alone.logits, 1e-5)


def test_rwkv_embeddings_equal_ids(model: RWKV):
    ids = random_ids(model, 2, 10)
    assert torch.equal(model(ids).logits, model(inputs_embeds=model.embed(ids)).logits)


def test_rwkv_wants_exactly_one_input(model: RWKV):
    ids = random_ids(model, 1, 3)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.embed(ids)}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**inputs)


def gradients(model: RWKV, packed: bool) -> tuple[Tensor, Tensor]:
    """Of the inputs and of the initial matrices, with all of the outputs in the loss."""
    ids, batch = random_ids(model, *((1, 24) if packed else (2, 12))), 2
    x = model.embed(ids).requires_grad_()
    wkv, *shifts = random_state(model, batch)
    wkv.requires_grad_()
    out = model(inputs_embeds=x, state=State(wkv, *shifts), cu_seqlens=torch.tensor([0, 7, 24]) if packed else None)
    loss = out.logits.square().mean() + sum(part.square().mean() for part in out.state)
    loss.backward()
    return x.grad, wkv.grad


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_rwkv_grad_cp_keeps_the_gradients(model: RWKV, packed: bool):
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    want = gradients(model, packed)
    assert len(calls) == 1
    model.grad_cp = True
    got = gradients(model, packed)
    assert len(calls) == 3, "the block was not recomputed"
    for name, *pair in zip(("inputs_embeds", "initial state"), got, want, strict=True):
        assert_rms_close(name, *pair, 1e-6)


def test_rwkv_gradients_reach_inputs_and_state_only(model: RWKV):
    for gradient in gradients(model, packed=False):
        # Every token and every layer counts.
        assert (gradient.flatten(2).abs().amax(-1) > 0).all()
    assert not any(x.requires_grad for x in model.parameters())
    assert all(x.grad is None for x in model.parameters())


def test_rwkv_gradient_of_the_initial_state_equals_differences(family: str, tmp_path: Path):
    model = make_model(tmp_path, family, n_layer=2, C=64, vocab=20, ffn=32).double()
    ids = random_ids(model, 1, 9)
    state = State(*(x.double() for x in random_state(model, 1)))

    def loss(wkv: Tensor) -> Tensor:
        return model(ids, state=State(wkv, *state[1:])).logits.square().sum()

    wkv = state.wkv.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(wkv), wkv)
    direction = torch.randn(wkv.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    # The model keeps the decay and the state of a float64 model in float32 or better: differences of a wide step.
    step = 1e-2
    difference = (loss(state.wkv + step * direction) - loss(state.wkv - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-3)


def test_rwkv_bfloat16_is_close_to_float32(family: str, tmp_path: Path):
    wide = make_model(tmp_path, family)
    narrow = read_lm(tmp_path / "base.pth", torch.bfloat16)
    ids = random_ids(wide, 2, 60)
    want, got = wide(ids), narrow(ids)
    assert got.logits.dtype == torch.bfloat16
    assert got.state.wkv.dtype == torch.float32
    assert_rms_close("logits", got.logits, want.logits, 3e-2)
    assert_rms_close("state", got.state.wkv, want.state.wkv, 3e-2)
