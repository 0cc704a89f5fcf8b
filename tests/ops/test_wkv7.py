"""Every form of WKV-7 against its definition in float64: every output, all seven gradients, always a non-zero state."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from assertions import assert_rms_close
from torch import Tensor
from torch.nn import functional as F
from wkv6_cases import DW_TOLERANCES, PACKED, TOLERANCES, compare, run

from rwkv_speech.ops import chunks
from rwkv_speech.ops.wkv7 import wkv7, wkv7_backward, wkv7_forward, wkv7_step
from rwkv_speech.ops.wkv7_ref import wkv7_ref

NAMES = ("r", "w", "k", "v", "a", "b", "state")
GPU = [pytest.mark.requires_cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Target(NamedTuple):
    """A device, and the form of the operator that runs there."""

    device: str
    form: str

    def wkv7(self, *inputs: Tensor | None, **named: Tensor | None) -> tuple[Tensor, Tensor]:
        return wkv7(*inputs, **named, form=self.form)

    def check(self, inputs: list[Tensor], bounds: list[int] | None = None) -> None:
        compare(self.wkv7, inputs, bounds, self.form, wkv7_ref, NAMES)


FORMS = [("cpu", "auto"), ("cpu", "torch"), *(pytest.param(("cuda", form), marks=GPU) for form in ("auto", "torch"))]


@pytest.fixture(params=FORMS, ids="-".join)
def target(request: pytest.FixtureRequest) -> Target:
    """Every form of the operator on every device that has it."""
    return Target(*request.param)


def random_inputs(
    B: int,
    T: int,
    H: int,
    N: int,
    dtype: torch.dtype = torch.float64,
    *,
    sequences: int | None = None,
    device: str = "cpu",
    decay: tuple[float, float] = (-1.5, 1.5),
) -> list[Tensor]:
    """r, w, k, v, a, b and a non-zero state; a and b near to what RWKV-7 makes of them, -kk and kk times a rate."""
    generator = torch.Generator().manual_seed(1000 * T + 10 * B + H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v, kk, noise = (normal(B, T, H, N) for _ in range(5))
    w = (decay[0] + decay[1] * normal(B, T, H, N)).clamp(max=max(8.0, decay[0]))
    kk = F.normalize(kk, dim=-1)
    b = kk * torch.sigmoid(normal(B, T, H, N)) + 0.2 * F.normalize(noise, dim=-1)
    state = normal(sequences or B, H, N, N).to(device, dtype if dtype == torch.float64 else torch.float32)
    return [*(x.to(device, dtype) for x in (r, w, k, v, -kk, b)), state]


@pytest.mark.parametrize("T", [0, 1, 2, 8, 9, 16, 17, 31, 63, 100, 257])
def test_wkv7_equals_reference(T: int, target: Target):
    for B, H in ((1, 1), (3, 5)):
        target.check(random_inputs(B, T, H, 32, device=target.device))
        target.check(random_inputs(B, T, H, 32, torch.float32, device=target.device))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("N", [32, 64, 128])
def test_wkv7_equals_reference_in_each_type_and_head_size(N: int, dtype: torch.dtype, target: Target):
    target.check(random_inputs(2, 50, 2, N, dtype, device=target.device))


def test_wkv7_equals_reference_for_a_thousand_tokens(target: Target):
    for dtype in (torch.float32, torch.bfloat16):
        target.check(random_inputs(1, 1000, 1, 64, dtype, device=target.device))


def test_wkv7_takes_a_float32_decay_beside_bfloat16(target: Target):
    inputs = random_inputs(2, 70, 2, 64, torch.bfloat16, device=target.device)
    inputs[1] = inputs[1].float() + 1e-3
    got, want = (run(op, x, names=NAMES) for op, x in (
        (target.wkv7, inputs), (wkv7_ref, [x.double() for x in inputs])))  # fmt: skip
    assert got["dw"].dtype == torch.float32
    assert_rms_close("dw", got["dw"], want["dw"], DW_TOLERANCES[torch.bfloat16])
    assert_rms_close("y", got["y"], want["y"], TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", [PACKED, [0, 1], [0, 0, 0], [0, 33, 34, 35], [0, 64, 128]], ids=str)
def test_wkv7_packed_equals_reference(bounds: list[int], dtype: torch.dtype, target: Target):
    S = len(bounds) - 1
    target.check(random_inputs(1, bounds[-1], 3, 32, dtype, sequences=S, device=target.device), bounds)


@pytest.mark.parametrize("group", [1, 2 * 64 * 32 * 2])
def test_wkv7_equals_reference_for_heads_in_groups(group: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_GROUP", group)
    portable = Target("cpu", "torch")
    portable.check(random_inputs(2, 50, 5, 32, torch.float32))
    portable.check(random_inputs(1, PACKED[-1], 5, 32, torch.float32, sequences=len(PACKED) - 1), PACKED)


def test_wkv7_packed_sequences_do_not_see_each_other(target: Target):
    inputs = random_inputs(1, PACKED[-1], 2, 32, torch.float32, sequences=len(PACKED) - 1)
    cu_seqlens = torch.tensor(PACKED)
    clean = target.wkv7(*inputs, cu_seqlens)
    inputs[3][:, :41] = torch.nan
    y, last = target.wkv7(*inputs, cu_seqlens)
    assert torch.equal(y[:, 41:], clean[0][:, 41:])
    assert torch.equal(last[3:], clean[1][3:])


@pytest.mark.parametrize("decay", [(1.0, 3.0), (8.0, 0.0), (-20.0, 1.0), (0.0, 20.0)], ids=str)
def test_wkv7_stays_exact_for_any_decay(decay: tuple[float, float], target: Target):
    for T in (1, 17, 100):
        target.check(random_inputs(2, T, 2, 32, torch.float32, device=target.device, decay=decay))
    target.check(
        random_inputs(1, PACKED[-1], 2, 32, torch.float32, sequences=9, device=target.device, decay=decay), PACKED
    )


@pytest.mark.parametrize("raw", [50.0, 100.0, torch.inf])
def test_wkv7_is_finite_for_an_instant_decay(raw: float, target: Target):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs = random_inputs(2, 40, 2, 32, dtype, device=target.device)
        inputs[1][:, ::3] = raw
        got = run(target.wkv7, inputs, names=NAMES)
        assert all(x.isfinite().all() for x in got.values())
        assert (got["dw"][:, ::3] == 0).all()


def test_wkv7_takes_any_strides(target: Target):
    B, T, H, N = 2, 37, 3, 32
    inputs = random_inputs(B, T, H, N, torch.float32, device=target.device)
    want = run(target.wkv7, inputs, names=NAMES)
    r, w, k, v, a, b, state = inputs
    strided = [
        r.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((w, w), 1)[:, :T],
        torch.stack((k, k), -1)[..., 0],
        v.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.cat((a, a), -1)[..., :N],
        b.transpose(0, 1).contiguous().transpose(0, 1),
        state.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    assert not any(x.is_contiguous() for x in strided)
    got = run(target.wkv7, strided, names=NAMES)
    assert got["y"].is_contiguous() and got["state_out"].is_contiguous()
    for name in want:
        assert_rms_close(name, got[name], want[name], 1e-6)


def test_wkv7_frozen_inputs_get_no_gradient():
    inputs = random_inputs(2, 20, 2, 32)
    want = run(wkv7, inputs, names=NAMES)
    for frozen in ({"state"}, {"r", "k", "w"}, {"a", "b"}):
        now = [x.clone().requires_grad_(name not in frozen) for name, x in zip(NAMES, inputs, strict=True)]
        y, last = wkv7(*now)
        generator = torch.Generator().manual_seed(5)
        upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (y, last)]
        torch.autograd.backward([y, last], upstream)
        for name, x in zip(NAMES, now, strict=True):
            assert x.grad is None if name in frozen else torch.equal(x.grad, want[f"d{name}"])


def test_wkv7_learned_state_gradient_sums_over_the_batch():
    *inputs, state = random_inputs(3, 40, 2, 32)
    learned = state[0].clone().requires_grad_()
    gradients = []
    for op in (wkv7, wkv7_ref):
        y, _ = op(*inputs, learned.expand(3, -1, -1, -1))
        gradients.append(torch.autograd.grad(y.square().sum(), learned)[0])
    assert_rms_close("gradient of the learned state", *gradients, 1e-12)


def test_wkv7_without_a_state_starts_from_zeros():
    *inputs, state = random_inputs(2, 20, 2, 32)
    for got, want in zip(wkv7(*inputs), wkv7(*inputs, torch.zeros_like(state)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("cuts", [[1], [17, 50], [0, 33, 33, 96]], ids=str)
def test_wkv7_streamed_equals_whole(cuts: list[int], target: Target):
    *tokens, state = random_inputs(2, 97, 2, 64, torch.float32, device=target.device)
    whole, last = target.wkv7(*tokens, state)
    parts = []
    for a, b in itertools.pairwise([0, *cuts, 97]):
        y, state = target.wkv7(*(x[:, a:b] for x in tokens), state)
        parts.append(y)
    assert_rms_close("y", torch.cat(parts, 1), whole, 1e-6)
    assert_rms_close("state", state, last, 1e-6)


def test_wkv7_does_not_alias_or_change_its_inputs(target: Target):
    for T, bounds in ((0, None), (1, None), (40, None), (40, [0, 7, 40])):
        inputs = random_inputs(2 if bounds is None else 1, T, 2, 32, torch.float32, sequences=2)
        before = [x.clone() for x in inputs]
        y, last = target.wkv7(*inputs, None if bounds is None else torch.tensor(bounds))
        y.fill_(7)
        last.fill_(7)
        assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


def test_wkv7_threads_do_not_change_a_bit():
    inputs = random_inputs(3, 257, 5, 64, torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(wkv7, inputs, names=NAMES))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, other[name]) for other in results[1:] for name, x in results[0].items())


@pytest.mark.parametrize("bounds", [None, [0, 0, 3, 9]], ids=["dense", "packed"])
def test_wkv7_passes_opcheck(bounds: list[int] | None):
    B, S = (2, 2) if bounds is None else (1, 3)
    inputs = random_inputs(B, 9, 2, 4, torch.float32, sequences=S)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    torch.library.opcheck(wkv7_forward, (*(x.clone().requires_grad_() for x in inputs), cu_seqlens, "auto"))
    torch.library.opcheck(wkv7_forward, (*inputs, cu_seqlens, "auto"))
    upstream = [torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])]
    torch.library.opcheck(wkv7_backward, (*upstream, *inputs, cu_seqlens, "auto"))


@pytest.mark.parametrize("op", [wkv7, wkv7_ref])
@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 6]], ids=["dense", "packed"])
def test_wkv7_passes_gradcheck(op: Callable[..., tuple[Tensor, Tensor]], bounds: list[int] | None):
    B, S = (2, 2) if bounds is None else (1, 3)
    inputs = [x.requires_grad_() for x in random_inputs(B, 6, 1, 2, sequences=S)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, None if bounds is None else torch.tensor(bounds)), inputs)


def test_wkv7_double_backward_raises():
    inputs = [x.requires_grad_() for x in random_inputs(1, 5, 1, 4)]
    y, _ = wkv7(*inputs)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="wkv7_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("N", [32, 64, 128])
def test_wkv7_step_equals_reference_in_place(N: int, dtype: torch.dtype, target: Target):
    inputs = random_inputs(5, 1, 3, N, dtype, device=target.device)
    want_y, want_state = wkv7_ref(*(x.double() for x in inputs))
    *tokens, state = inputs
    y = wkv7_step(*(x[:, 0] for x in tokens), state, form=target.form)
    assert_rms_close("y", y, want_y[:, 0], TOLERANCES[dtype])
    assert_rms_close("state", state, want_state, TOLERANCES[state.dtype])


def test_wkv7_step_refuses_a_state_that_it_could_not_update():
    *tokens, state = random_inputs(2, 1, 3, 4, torch.float32)
    tokens = [x[:, 0] for x in tokens]
    for bad in (state.bfloat16(), state.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"wkv7_step: state must be dense torch\.float32"):
            wkv7_step(*tokens, bad)


@pytest.mark.parametrize("name", NAMES)
def test_wkv7_wrong_shape_or_device_names_the_tensor(name: str):
    inputs = dict(zip(NAMES, random_inputs(2, 5, 3, 4), strict=True))
    with pytest.raises(ValueError, match=f"wkv7: {name} must"):
        wkv7(**inputs | {name: inputs[name][0]})
    if name != "r":
        with pytest.raises(ValueError, match=f"wkv7: {name} must be on r's device cpu, found meta"):
            wkv7(**inputs | {name: inputs[name].to("meta")})


def wkv7_numpy(r, w, k, v, a, b, S, dy, dS) -> tuple[np.ndarray, ...]:
    """One head, (T, N) each: the formulas of the operator and of its gradients, as written on paper."""
    states, y, d = [S], np.zeros_like(v), np.exp(-np.exp(w))
    for t in range(len(r)):
        S = S @ (np.diag(d[t]) + np.outer(a[t], b[t])) + np.outer(v[t], k[t])
        states.append(S)
        y[t] = S @ r[t]
    dr, dw, dk, dv, da, db = (np.zeros_like(x) for x in (r, w, k, v, a, b))
    for t in reversed(range(len(r))):
        dS = dS + np.outer(dy[t], r[t])
        dr[t], dv[t], dk[t] = states[t + 1].T @ dy[t], dS @ k[t], dS.T @ v[t]
        both = states[t].T @ dS  # of diag(d) + a b^T
        dw[t], da[t], db[t] = np.diag(both) * d[t] * -np.exp(w[t]), both @ b[t], both.T @ a[t]
        dS = dS @ (np.diag(d[t]) + np.outer(a[t], b[t])).T
    return y, states[-1], dr, dw, dk, dv, da, db, dS


@pytest.mark.parametrize("op", [wkv7, wkv7_ref])
def test_wkv7_equals_the_formulas_in_numpy(op: Callable[..., tuple[Tensor, Tensor]]):
    B, T, H, N = 2, 45, 2, 8
    inputs = random_inputs(B, T, H, N)
    got = run(op, inputs, names=NAMES)
    *tokens, state = (x.numpy() for x in inputs)
    generator = torch.Generator().manual_seed(5)
    dy, dstate = (torch.randn(x.shape, generator=generator).bfloat16().double().numpy() for x in (tokens[0], state))
    for b, h in itertools.product(range(B), range(H)):
        results = wkv7_numpy(*(x[b, :, h] for x in tokens), state[b, h], dy[b, :, h], dstate[b, h])
        for (name, x), want in zip(got.items(), results, strict=True):
            ours = x[b, h] if name in ("state_out", "dstate") else x[b, :, h]
            assert_rms_close(name, ours, torch.from_numpy(want), 1e-12)
