"""RWKV-6 against pip's `rwkv` (BlinkDL), and against itself: whole, in parts, packed, checkpointed, in bfloat16."""

# B batch · T time · C channels · L layers · S sequences of a packed batch

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_rms_close
from tiny_models import random_rwkv6_tensors
from torch import Tensor

from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.state import State

SIZES = {
    "tiny": {},
    "ranks of 1.6B and 3B": {"n_layer": 3, "C": 192, "vocab": 100, "mix_rank": 32, "decay_rank": 64, "ffn": 672},
    "ranks of 7B": {"n_layer": 1, "C": 256, "vocab": 300, "mix_rank": 64, "decay_rank": 128, "ffn": 896},
}


def make_model(folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> RWKV6:
    torch.save(random_rwkv6_tensors(**sizes), folder / "base.pth")
    return RWKV6.from_pretrained(folder / "base.pth", dtype)


@pytest.fixture
def model(tmp_path: Path) -> RWKV6:
    return make_model(tmp_path)


def random_state(model: RWKV6, batch: int) -> State:
    torch.manual_seed(3)
    return State(*(torch.randn_like(x) for x in model.zero_state(batch)))


def random_ids(model: RWKV6, *shape: int) -> Tensor:
    return torch.randint(model.sizes.vocab, shape, generator=torch.Generator().manual_seed(4))


def assert_same_state(got: State, want: State, tol: float = 1e-5) -> None:
    for name, *pair in zip(State._fields, got, want, strict=True):
        assert_rms_close(name, *pair, tol)


def pip_state(state: State) -> list[Tensor]:
    """One sequence's state as pip's `rwkv` keeps it: three tensors a layer, the matrices [key, value]."""
    layers = zip(*(x[:, 0].clone() for x in state), strict=True)
    return [x for wkv, att, ffn in layers for x in (att, wkv.transpose(1, 2).contiguous(), ffn)]


@pytest.fixture(scope="module")
def pip_rwkv() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RWKV_JIT_ON", "0")
        environment.setenv("RWKV_CUDA_ON", "0")
        environment.delenv("RWKV_V7_ON", raising=False)
        environment.delenv("RWKV_RESCALE_LAYER", raising=False)
        yield pytest.importorskip("rwkv.model").RWKV


@pytest.mark.parametrize("name", SIZES)
def test_rwkv6_logits_equal_pip_rwkv(name: str, tmp_path: Path, pip_rwkv: Any):
    model = make_model(tmp_path, **SIZES[name])
    peer = pip_rwkv(str(tmp_path / "base"), "cpu fp32", verbose=False)
    for state in (None, random_state(model, 1)):
        ids = random_ids(model, 1, 41)
        got = model(ids, state=state)
        want, after = peer.forward(ids[0].tolist(), None if state is None else pip_state(state), full_output=True)
        assert (got.logits[0] - want).abs().max() < 1e-4
        assert want.std() > 0.1, "a test of nothing"
        for ours, theirs in zip(pip_state(got.state), after, strict=True):
            assert_rms_close("state", ours, theirs, 1e-5)
        # One token goes another way in pip's `rwkv`, and in ours.
        got = model(ids[:, :1], state=got.state)
        want, _ = peer.forward(ids[0, :1].tolist(), after)
        assert (got.logits[0, 0] - want).abs().max() < 1e-4


def test_rwkv6_step_by_step_equals_whole(model: RWKV6):
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
def test_rwkv6_split_equals_whole(model: RWKV6, cuts: list[int]):
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
def test_rwkv6_packed_equals_separate(model: RWKV6, lengths: list[int]):
    bounds = [0, *itertools.accumulate(lengths)]
    ids, state = random_ids(model, 1, bounds[-1]), random_state(model, len(lengths))
    packed = model(ids, state=state, cu_seqlens=torch.tensor(bounds))
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        row = torch.tensor([s])
        alone = model(ids[:, a:b], state=state.select(row))
        assert_rms_close(f"logits of sequence {s}", packed.logits[:, a:b], alone.logits, 1e-5)
        assert_same_state(packed.state.select(row), alone.state)


def test_rwkv6_packed_starts_from_zeros(model: RWKV6):
    ids, cu_seqlens = random_ids(model, 1, 20), torch.tensor([0, 8, 20])
    got = model(ids, cu_seqlens=cu_seqlens)
    assert torch.equal(got.logits, model(ids, state=model.zero_state(2), cu_seqlens=cu_seqlens).logits)
    assert_rms_close("logits of the second", got.logits[:, 8:], model(ids[:, 8:]).logits, 1e-5)


def test_rwkv6_batch_equals_rows(model: RWKV6):
    ids, state = random_ids(model, 3, 10), random_state(model, 3)
    whole = model(ids, state=state)
    for row in range(3):
        alone = model(ids[row : row + 1], state=state.select(torch.tensor([row])))
        assert_rms_close("logits", whole.logits[row : row + 1], alone.logits, 1e-5)


def test_rwkv6_embeddings_equal_ids(model: RWKV6):
    ids = random_ids(model, 2, 10)
    assert torch.equal(model(ids).logits, model(inputs_embeds=model.embed(ids)).logits)


def test_rwkv6_wants_exactly_one_input(model: RWKV6):
    ids = random_ids(model, 1, 3)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.embed(ids)}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**inputs)


def gradients(model: RWKV6, packed: bool) -> tuple[Tensor, Tensor]:
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
def test_rwkv6_grad_cp_keeps_the_gradients(model: RWKV6, packed: bool):
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    want = gradients(model, packed)
    assert len(calls) == 1
    model.grad_cp = True
    got = gradients(model, packed)
    assert len(calls) == 3, "the block was not recomputed"
    for name, *pair in zip(("inputs_embeds", "initial state"), got, want, strict=True):
        assert_rms_close(name, *pair, 1e-6)


def test_rwkv6_gradients_reach_inputs_and_state_only(model: RWKV6):
    for gradient in gradients(model, packed=False):
        # Every token and every layer counts.
        assert (gradient.flatten(2).abs().amax(-1) > 0).all()
    assert not any(x.requires_grad for x in model.parameters())
    assert all(x.grad is None for x in model.parameters())


def test_rwkv6_gradient_of_the_initial_state_equals_differences(tmp_path: Path):
    model = make_model(tmp_path, n_layer=2, C=64, vocab=20, ffn=32).double()
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


def test_rwkv6_bfloat16_is_close_to_float32(tmp_path: Path):
    wide = make_model(tmp_path, dtype=torch.float32)
    narrow = RWKV6.from_pretrained(tmp_path / "base.pth", torch.bfloat16)
    ids = random_ids(wide, 2, 60)
    want, got = wide(ids), narrow(ids)
    assert got.logits.dtype == torch.bfloat16
    assert got.state.wkv.dtype == torch.float32
    assert_rms_close("logits", got.logits, want.logits, 3e-2)
    assert_rms_close("state", got.state.wkv, want.state.wkv, 3e-2)
