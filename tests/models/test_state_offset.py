"""A state offset, against both recurrences written out in float64 with it added to each state that is read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from assertions import assert_rms_close
from lm_cases import make_model, random_ids, random_state
from speech_models import LENGTHS, TEXTS, batch_of, build, sounds
from tiny_models import RANDOM_TENSORS
from torch import Tensor

from rwkv_speech.__main__ import main
from rwkv_speech.config import STATE_OFFSET
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.peft import settle, tune, tuned
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.speech_lm import SpeechLM

FAMILIES = tuple(RANDOM_TENSORS)


def with_offset(lm: RWKV) -> RWKV:
    """A model that learns one, as far as it matters."""
    ids = random_ids(lm, 1, 5)
    before = lm(ids).logits.detach()
    tune(lm, None, STATE_OFFSET)
    assert torch.equal(lm(ids).logits.detach(), before), "it begins without effect"
    found = tuned(lm, STATE_OFFSET)
    sizes = lm.sizes
    assert {x.shape for x in found.values()} == {(sizes.H, sizes.N, sizes.N)} and len(found) == sizes.n_layer
    torch.manual_seed(7)
    with torch.no_grad():
        for x in found.values():
            x.copy_(0.2 * torch.randn_like(x))
    return lm


def written_out(family: str, offset: Tensor, r: Tensor, *rest: Tensor) -> Tensor:
    """y (T, H, N) of one sequence from the inputs of its operator, token by token, head by head."""
    *given, state = (x.detach().double().numpy() for x in rest)
    reads, added = r.detach().double().numpy(), offset.detach().double().numpy()
    y, S = np.zeros_like(reads), state.copy()
    for t in range(len(reads)):
        for h in range(reads.shape[1]):
            if family == "x060":
                k, v, w = (x[t, h] for x in given[:3])
                y[t, h] = (S[h] + added[h] + np.outer(v, given[3][h] * k)) @ reads[t, h]
                S[h] = S[h] * np.exp(-np.exp(w)) + np.outer(v, k)
            else:
                w, k, v, a, b = (x[t, h] for x in given)
                S[h] = S[h] * np.exp(-np.exp(w)) + np.outer(S[h] @ a, b) + np.outer(v, k)
                y[t, h] = (S[h] + added[h]) @ reads[t, h]
    return torch.from_numpy(y)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_reads_the_state_plus_the_offset(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a layer hands to its group norm, of the operator's own inputs."""
    lm = with_offset(make_model(tmp_path, family))
    calls, normed = list[tuple[Tensor, ...]](), list[Tensor]()
    where = "rwkv_speech.models.rwkv6.wkv6" if family == "x060" else "rwkv_speech.ops.time_mix7.wkv7"
    op = pytest.importorskip(where.rpartition(".")[0]).__dict__[where.rpartition(".")[2]]

    def recorded(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(inputs)
        return op(*inputs)

    monkeypatch.setattr(where, recorded)
    for block in lm.blocks:
        block.att.ln_x.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0]))
    with torch.no_grad():
        lm(random_ids(lm, 1, 13), state=random_state(lm, 1))
    assert len(calls) == len(normed) == lm.sizes.n_layer
    count = 6 if family == "x060" else 7  # to the state
    for block, inputs, got in zip(lm.blocks, calls, normed, strict=True):
        one = [x if x.dim() == 2 else x[0] for x in inputs[:count]]  # RWKV-6's bonus is no sequence's
        want = written_out(family, block.att.state_offset, *one)
        assert_rms_close("y", got.view_as(want), want, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_through_the_model_reads_it(family: str, dtype: torch.dtype, tmp_path: Path):
    lm = make_model(tmp_path, family, dtype)
    ids, tolerance = random_ids(lm, 3, 9), 2e-5 if dtype == torch.float32 else 3e-2
    plain = lm(ids).logits.detach()
    with_offset(lm)
    whole = lm(ids).logits.detach()
    assert (whole - plain).std() > 0.1 * plain.std(), "a test of nothing"
    packed = lm(ids.reshape(1, -1), cu_seqlens=torch.tensor([0, 9, 9, 18, 27])).logits.detach()
    assert_rms_close("packed", packed.view_as(whole), whole, tolerance)
    for settled in (False, True):
        if settled:
            settle(lm, STATE_OFFSET)
            lm._prepared = (None, None)
        assert lm.slots_are_apart == settled  # the native step serves, where there is a compiler
        state, slots = lm.zero_state(3), lm.zero_state(3)
        steps = torch.stack([lm.step(column, state) for column in ids.T], 1)
        assert_rms_close("steps", steps, whole.float(), tolerance)
        several = lm.step(ids.flatten(), slots, torch.arange(3).repeat_interleave(9))
        assert_rms_close("several of a slot", several.view_as(whole), whole.float(), tolerance)
        if settled:
            assert torch.equal(several.view_as(steps), steps)
            assert all(torch.equal(x, y) for x, y in zip(slots, state, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_a_difference(family: str, tmp_path: Path):
    lm = with_offset(make_model(tmp_path, family)).double()
    ids, state = random_ids(lm, 2, 7), random_state(lm, 2)
    found = tuned(lm, STATE_OFFSET)

    def loss() -> Tensor:
        return lm(ids, state=state).logits.square().mean()

    loss().backward()
    for name, x in found.items():
        assert x.grad is not None and x.grad.norm() > 1e-6, name
        direction = x.grad / x.grad.norm()
        with torch.no_grad():
            ends = []
            for step in (1e-2, -2e-2):
                x.add_(direction, alpha=step)
                ends.append(loss())
            x.add_(direction, alpha=1e-2)
        slope = (ends[0] - ends[1]) / 2e-2
        assert (x.grad.norm() - slope).abs() < 1e-3 * slope, name


@torch.no_grad()
def logits_of(model: SpeechLM) -> Tensor:
    audio, lengths = model.audio_tokens(batch_of(model, sounds(LENGTHS), TEXTS))
    state = model.initial_state(["asr"] * len(lengths))
    return model.prefill(audio, [model.prefix(n, "asr") for n in lengths.tolist()], state)[0]


def test_a_checkpoint_holds_it_and_no_base_model_can(
    tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = build(replace(tiny_parts, train_parts=f"ln,{STATE_OFFSET}"))
    model.save(tmp_path / "run/best.safetensors")
    again = SpeechLM.from_pretrained(tmp_path / "run")
    assert_rms_close("logits", logits_of(again), logits_of(model), 2e-5)
    before = logits_of(again)
    for block in again.lm.blocks:
        block.att.state_offset = None
    assert (logits_of(again) - before).std() > 0.01 * before.std()
    trained = load_trained(tmp_path / "run/best.safetensors")
    assert trained.parts is not None and trained.parts.train_parts == model.parts.train_parts
    with pytest.raises(UserError, match="best.safetensors: was trained with --peft state_offset; give the same flag"):
        SpeechLM.build(replace(tiny_parts, train_parts="ln")).load_trained(trained)
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 2
    assert "was trained with --peft state_offset, which no base model's file has a place for" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "a.pth")]) == 2
    error = capsys.readouterr().err
    assert "share the run with push" in error
    assert "merge" not in error
