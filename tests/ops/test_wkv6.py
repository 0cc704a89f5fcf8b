"""Every form of WKV-6 against its definition in float64: every output, all six gradients, always a non-zero state."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from assertions import assert_rms_close
from torch import Tensor
from wkv6_cases import DW_TOLERANCES, NAMES, PACKED, RESULTS, TOLERANCES, compare, random_inputs, run

from rwkv_speech.ops import chunks
from rwkv_speech.ops.wkv6 import wkv6, wkv6_backward, wkv6_forward, wkv6_step
from rwkv_speech.ops.wkv6_ref import wkv6_ref

GPU = [pytest.mark.requires_cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
TARGETS = [
    ("cpu", "auto"),
    ("cpu", "torch"),
    *(pytest.param(("cuda", form), marks=GPU) for form in ("torch", "steps", "tiles")),
]


class Target(NamedTuple):
    """A device, and the form of the operator that runs there."""

    device: str
    form: str

    def wkv6(self, *inputs: Tensor | None, **named: Tensor | None) -> tuple[Tensor, Tensor]:
        return wkv6(*inputs, **named, form=self.form)

    def wkv6_step(self, *inputs: Tensor) -> Tensor:
        return wkv6_step(*inputs, form=self.form)

    def check(self, inputs: list[Tensor], bounds: list[int] | None = None) -> None:
        compare(self.wkv6, inputs, bounds, form=self.form)


@pytest.fixture(params=TARGETS, ids="-".join)
def target(request: pytest.FixtureRequest) -> Target:
    """Every form of the operator on every device that has it."""
    return Target(*request.param)


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 63, 64, 100, 257])
def test_wkv6_equals_reference(T: int, target: Target):
    for B, H in itertools.product((1, 3), (1, 5)):
        target.check(random_inputs(B, T, H, 32, device=target.device))
        target.check(random_inputs(B, T, H, 32, torch.float32, device=target.device))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("N", [32, 64, 128])
def test_wkv6_equals_reference_in_each_type_and_head_size(N: int, dtype: torch.dtype, target: Target):
    target.check(random_inputs(2, 50, 2, N, dtype, device=target.device))


def test_wkv6_takes_a_float32_decay_beside_bfloat16(target: Target):
    inputs = random_inputs(2, 70, 2, 64, torch.bfloat16, device=target.device)
    inputs[3] = inputs[3].float() + 1e-3
    got, want = run(target.wkv6, inputs), run(wkv6_ref, [x.double() for x in inputs])
    assert got["dw"].dtype == torch.float32
    assert_rms_close("dw", got["dw"], want["dw"], DW_TOLERANCES[torch.bfloat16])
    assert_rms_close("y", got["y"], want["y"], TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", [PACKED, [0, 1], [0, 0, 0], [0, 33, 34, 35], [0, 64, 128]], ids=str)
def test_wkv6_packed_equals_reference(bounds: list[int], dtype: torch.dtype, target: Target):
    S = len(bounds) - 1
    target.check(random_inputs(1, bounds[-1], 3, 32, dtype, sequences=S, device=target.device), bounds)


def test_wkv6_packed_equals_separate_sequences(target: Target):
    r, k, v, w, u, state = random_inputs(
        1, PACKED[-1], 2, 64, torch.float32, sequences=len(PACKED) - 1, device=target.device
    )
    y, last = target.wkv6(r, k, v, w, u, state, torch.tensor(PACKED, device=target.device))
    for s, (a, b) in enumerate(itertools.pairwise(PACKED)):
        alone = target.wkv6(*(x[:, a:b] for x in (r, k, v, w)), u, state[s : s + 1])
        assert_rms_close(f"y of sequence {s}", y[:, a:b], alone[0], 1e-6)
        assert_rms_close(f"state of sequence {s}", last[s : s + 1], alone[1], 1e-6)


@pytest.mark.parametrize("group", [1, 2 * 64 * 32 * 2])
def test_wkv6_equals_reference_for_heads_in_groups(group: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_GROUP", group)
    portable = Target("cpu", "torch")
    portable.check(random_inputs(2, 50, 5, 32, torch.float32))
    portable.check(random_inputs(1, PACKED[-1], 5, 32, torch.float32, sequences=len(PACKED) - 1), PACKED)


def test_wkv6_packed_sequences_do_not_see_each_other():
    inputs = random_inputs(1, PACKED[-1], 2, 32, torch.float32, sequences=len(PACKED) - 1)
    cu_seqlens = torch.tensor(PACKED)
    clean = wkv6(*inputs, cu_seqlens)
    inputs[2][:, :41] = torch.nan
    y, last = wkv6(*inputs, cu_seqlens)
    assert torch.equal(y[:, 41:], clean[0][:, 41:])
    assert torch.equal(last[3:], clean[1][3:])


@pytest.mark.parametrize("decay", [(1.0, 3.0), (8.0, 0.0), (-20.0, 1.0), (0.0, 20.0)], ids=str)
def test_wkv6_stays_exact_for_any_decay(decay: tuple[float, float], target: Target):
    for T in (1, 17, 100):
        target.check(random_inputs(2, T, 2, 32, torch.float32, device=target.device, decay=decay))
    target.check(
        random_inputs(1, PACKED[-1], 2, 32, torch.float32, sequences=9, device=target.device, decay=decay), PACKED
    )


@pytest.mark.parametrize("raw", [50.0, 100.0, torch.inf])
def test_wkv6_is_finite_for_an_instant_decay(raw: float, target: Target):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs = random_inputs(2, 40, 2, 32, dtype, device=target.device)
        inputs[3][:, ::3] = raw
        got = run(target.wkv6, inputs)
        assert all(x.isfinite().all() for x in got.values())
        assert (got["dw"][:, ::3] == 0).all()


def test_wkv6_takes_any_strides(target: Target):
    B, T, H, N = 2, 37, 3, 32
    inputs = random_inputs(B, T, H, N, torch.float32, device=target.device)
    want = run(target.wkv6, inputs)
    r, k, v, w, u, state = inputs
    strided = [
        r.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((k, k), -1)[..., 0],
        v.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.cat((w, w), 1)[:, :T],
        u.t().contiguous().t(),
        state.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    assert not any(x.is_contiguous() for x in strided)
    strided = [x.requires_grad_() for x in strided]
    y, last = target.wkv6(*strided)
    assert y.is_contiguous() and last.is_contiguous()
    generator = torch.Generator().manual_seed(5)
    g_y, g_last = (torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (y, last))
    g_y = g_y.transpose(1, 3).contiguous().transpose(1, 3)
    g_last = g_last.transpose(0, 1).contiguous().transpose(0, 1)
    gradients = torch.autograd.grad([y, last], strided, [g_y, g_last])
    for name, got in zip(RESULTS, (y, last, *gradients), strict=True):
        assert_rms_close(name, got, want[name], 1e-6)


def test_wkv6_takes_an_expanded_gradient():
    inputs = [x.requires_grad_() for x in random_inputs(2, 20, 2, 32)]
    got, want = (torch.autograd.grad([x.sum() for x in op(*inputs)], inputs) for op in (wkv6, wkv6_ref))
    for name, *pair in zip(NAMES, got, want, strict=True):
        assert_rms_close(f"d{name}", *pair, 1e-12)


def test_wkv6_frozen_inputs_get_no_gradient():
    inputs = random_inputs(2, 20, 2, 32)
    want = run(wkv6, inputs)
    for frozen in ({"u"}, {"state"}, {"u", "state"}, {"r", "k", "w"}):
        now = [x.clone().requires_grad_(name not in frozen) for name, x in zip(NAMES, inputs, strict=True)]
        y, last = wkv6(*now)
        generator = torch.Generator().manual_seed(5)
        upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (y, last)]
        torch.autograd.backward([y, last], upstream)
        for name, x in zip(NAMES, now, strict=True):
            if name in frozen:
                assert x.grad is None
            else:
                assert torch.equal(x.grad, want[f"d{name}"])


def test_wkv6_learned_state_gradient_sums_over_the_batch():
    *inputs, state = random_inputs(3, 40, 2, 32)
    learned = state[0].clone().requires_grad_()
    gradients = []
    for op in (wkv6, wkv6_ref):
        y, _ = op(*inputs, learned.expand(3, -1, -1, -1))
        gradients.append(torch.autograd.grad(y.square().sum(), learned)[0])
    assert_rms_close("gradient of the learned state", *gradients, 1e-12)


def test_wkv6_without_a_state_starts_from_zeros():
    *inputs, state = random_inputs(2, 20, 2, 32)
    for got, want in zip(wkv6(*inputs), wkv6(*inputs, torch.zeros_like(state)), strict=True):
        assert torch.equal(got, want)


def test_wkv6_state_of_a_narrow_type_is_widened():
    *inputs, state = random_inputs(2, 40, 2, 32, torch.bfloat16)
    y, last = wkv6(*inputs, state.bfloat16())
    want = wkv6(*inputs, state.bfloat16().float())
    assert last.dtype == torch.float32
    assert torch.equal(y, want[0]) and torch.equal(last, want[1])


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3], [17, 50], [0, 33, 33, 96]], ids=str)
def test_wkv6_streamed_equals_whole(cuts: list[int], target: Target):
    r, k, v, w, u, state = random_inputs(2, 97, 2, 64, torch.float32, device=target.device)
    whole, last = target.wkv6(r, k, v, w, u, state)
    parts = []
    for a, b in itertools.pairwise([0, *cuts, 97]):
        y, state = target.wkv6(*(x[:, a:b] for x in (r, k, v, w)), u, state)
        parts.append(y)
    assert_rms_close("y", torch.cat(parts, 1), whole, 1e-6)
    assert_rms_close("state", state, last, 1e-6)


def test_wkv6_does_not_alias_or_change_its_inputs():
    for T, bounds in ((0, None), (1, None), (40, None), (40, [0, 7, 40])):
        S = 2
        inputs = random_inputs(S if bounds is None else 1, T, 2, 32, sequences=S)
        before = [x.clone() for x in inputs]
        y, last = wkv6(*inputs, None if bounds is None else torch.tensor(bounds))
        y.fill_(7)
        last.fill_(7)
        assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


def test_wkv6_trains_after_inference_mode():
    inputs = random_inputs(1, 40, 2, 32, sequences=2)
    with torch.inference_mode():
        wkv6(*inputs, torch.tensor([0, 18, 40]))
    Target("cpu", "auto").check(inputs, [0, 18, 40])


@pytest.mark.parametrize("bounds", [None, [0, 0, 3, 9]], ids=["dense", "packed"])
def test_wkv6_passes_opcheck(bounds: list[int] | None):
    B, S = (2, 2) if bounds is None else (1, 3)
    inputs = random_inputs(B, 9, 2, 4, torch.float32, sequences=S)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    torch.library.opcheck(wkv6_forward, (*(x.clone().requires_grad_() for x in inputs), cu_seqlens, "auto"))
    torch.library.opcheck(wkv6_forward, (*inputs, cu_seqlens, "auto"))
    upstream = [torch.randn_like(inputs[0]), torch.randn_like(inputs[5])]
    for need_du in (True, False):
        torch.library.opcheck(wkv6_backward, (*upstream, *inputs, cu_seqlens, need_du, "auto"))


@pytest.mark.parametrize("op", [wkv6, wkv6_ref])
@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 6]], ids=["dense", "packed"])
def test_wkv6_passes_gradcheck(op: Callable[..., tuple[Tensor, Tensor]], bounds: list[int] | None):
    B, S = (2, 2) if bounds is None else (1, 3)
    inputs = [x.requires_grad_() for x in random_inputs(B, 6, 2, 3, sequences=S)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, None if bounds is None else torch.tensor(bounds)), inputs)


def test_wkv6_double_backward_raises():
    inputs = [x.requires_grad_() for x in random_inputs(1, 5, 1, 4)]
    y, _ = wkv6(*inputs)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="wkv6_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("N", [32, 64, 128])
def test_wkv6_step_equals_reference_in_place(N: int, dtype: torch.dtype, target: Target):
    inputs = random_inputs(5, 1, 3, N, dtype, device=target.device)
    want_y, want_state = wkv6_ref(*(x.double() for x in inputs))
    *tokens, u, state = inputs
    y = target.wkv6_step(*(x[:, 0] for x in tokens), u, state)
    assert_rms_close("y", y, want_y[:, 0], TOLERANCES[dtype])
    assert_rms_close("state", state, want_state, TOLERANCES[state.dtype])


def test_wkv6_step_updates_a_state_at_an_odd_address():
    *tokens, u, state = random_inputs(2, 1, 3, 64, torch.float32)
    tokens = [x[:, 0] for x in tokens]
    odd = torch.empty(state.numel() + 1)[1:].view_as(state).copy_(state)
    assert odd.data_ptr() % 16
    assert torch.equal(wkv6_step(*tokens, u, odd), wkv6_step(*tokens, u, state))
    assert torch.equal(odd, state)


def test_wkv6_step_refuses_a_state_that_it_could_not_update():
    *tokens, u, state = random_inputs(2, 1, 3, 4, torch.float32)
    tokens = [x[:, 0] for x in tokens]
    for bad in (state.bfloat16(), state.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"wkv6_step: state must be dense torch\.float32"):
            wkv6_step(*tokens, u, bad)
    with pytest.raises(ValueError, match=r"wkv6_step: r must be \(B, H, N\)"):
        wkv6_step(tokens[0][:, None], *tokens[1:], u, state)
    with pytest.raises(ValueError, match=r"wkv6_step: u must be \(3, 4\) to fit r \(2, 3, 4\), found \(2, 3, 4\)"):
        wkv6_step(*tokens, tokens[0], state)


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("form", ["steps", "tiles"])
def test_wkv6_in_a_cuda_graph_and_on_another_stream(form: str):
    inputs = random_inputs(4, 50, 3, 64, torch.bfloat16, device="cuda")
    *tokens, u, state = random_inputs(4, 1, 3, 64, torch.bfloat16, device="cuda")
    tokens = [x[:, 0] for x in tokens]
    want, stepped = wkv6(*inputs, form=form), state.clone()
    want_step = wkv6_step(*tokens, u, stepped, form=form)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    replayed = state.clone()
    with torch.cuda.graph(graph, stream=stream):
        got = wkv6(*inputs, form=form)
        got_step = wkv6_step(*tokens, u, replayed, form=form)
    replayed.copy_(state)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip((*got, got_step, replayed), (*want, want_step, stepped), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_wkv6_wrong_shape_names_the_tensor(name: str):
    inputs = dict(zip(NAMES, random_inputs(2, 5, 3, 4), strict=True))
    inputs[name] = inputs[name][0]
    with pytest.raises(ValueError, match=f"wkv6: {name} must"):
        wkv6(**inputs)


@pytest.mark.parametrize("name", NAMES[1:])
def test_wkv6_wrong_device_names_the_tensor(name: str):
    inputs = dict(zip(NAMES, random_inputs(2, 5, 3, 4), strict=True))
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=f"wkv6: {name} must be on r's device cpu, found meta"):
        wkv6(**inputs)


@pytest.mark.parametrize(
    "bounds", [[0, 3], [1, 3, 5], [0, 4, 3, 5], [0, 6], [-1, 5], [0.0, 5.0], [[0, 5]], []], ids=str
)
def test_wkv6_bad_cu_seqlens_raise(bounds: list):
    inputs = random_inputs(1, 5, 2, 4, sequences=max(len(bounds) - 1, 1))
    dtype = torch.float32 if bounds and isinstance(bounds[0], float) else torch.int64
    with pytest.raises(ValueError, match="cu_seqlens"):
        wkv6(*inputs, torch.tensor(bounds, dtype=dtype))


def test_wkv6_packed_batch_of_two_rows_raises():
    with pytest.raises(ValueError, match="B = 1, found B = 2"):
        wkv6(*random_inputs(2, 5, 2, 4), torch.tensor([0, 2, 5]))


def wkv6_numpy(
    r: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    w: np.ndarray,
    u: np.ndarray,
    S: np.ndarray,
    dy: np.ndarray,
    dS: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """One head, (T, N) each: the formulas of the operator and of its gradients, as written on paper."""
    states, y = [], np.zeros_like(v)
    d = np.exp(-np.exp(w))
    for t in range(len(r)):
        states.append(S)
        y[t] = (S + np.outer(v[t], u * k[t])) @ r[t]
        S = S @ np.diag(d[t]) + np.outer(v[t], k[t])
    last = S
    dr, dk, dv, dw, du = (np.zeros_like(x) for x in (r, k, v, w, u))
    for t in reversed(range(len(r))):
        S = states[t]
        dr[t] = (S + np.outer(v[t], u * k[t])).T @ dy[t]
        dv[t] = dS @ k[t] + (r[t] @ (u * k[t])) * dy[t]
        dk[t] = dS.T @ v[t] + (v[t] @ dy[t]) * (u * r[t])
        du += r[t] * k[t] * (v[t] @ dy[t])
        dw[t] = (dS * S).sum(0) * d[t] * -np.exp(w[t])
        dS = dS @ np.diag(d[t]) + np.outer(dy[t], r[t])
    return y, last, dr, dk, dv, dw, du, dS


@pytest.mark.parametrize("op", [wkv6, wkv6_ref])
def test_wkv6_equals_the_formulas_in_numpy(op: Callable[..., tuple[Tensor, Tensor]]):
    B, T, H, N = 2, 45, 2, 8
    inputs = random_inputs(B, T, H, N)
    got = run(op, inputs)
    r, k, v, w, u, state = (x.numpy() for x in inputs)
    generator = torch.Generator().manual_seed(5)
    dy, dstate = (torch.randn(x.shape, generator=generator).bfloat16().double().numpy() for x in (r, state))
    want = {name: np.zeros(got[name].shape) for name in RESULTS}
    for b, h in itertools.product(range(B), range(H)):
        head = (x[b, :, h] for x in (r, k, v, w))
        results = wkv6_numpy(*head, u[h], state[b, h], dy[b, :, h], dstate[b, h])
        for name, result in zip(RESULTS, results, strict=True):
            if name == "du":
                want[name][h] += result
            elif name in ("state_out", "dstate"):
                want[name][b, h] = result
            else:
                want[name][b, :, h] = result
    for name in RESULTS:
        assert_rms_close(name, got[name], torch.from_numpy(want[name]), 1e-12)
