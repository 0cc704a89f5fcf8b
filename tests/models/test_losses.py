import pytest
import torch
from assertions import assert_rms_close
from torch.nn import functional as F

from rwkv_speech.models.losses import TARGETS_AT_ONCE, head_kl_sum, head_loss_sum, token_loss_sum


def test_token_loss_sum_equals_float64():
    draw = torch.Generator().manual_seed(0)
    logits, targets = 5 * torch.randn(40, 300, generator=draw), torch.randint(300, (40,), generator=draw)
    exact = F.cross_entropy(logits.double(), targets, reduction="sum")
    loss = token_loss_sum(logits, targets)
    assert loss.dtype == torch.float32 and abs(loss.item() - exact.item()) < 1e-6 * exact.item()


def test_token_loss_sum_of_bfloat16_logits_is_computed_in_float32():
    draw = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(40, 300, generator=draw)).bfloat16()
    targets = torch.randint(300, (40,), generator=draw)
    exact = F.cross_entropy(logits.double(), targets, reduction="sum").item()
    loss = token_loss_sum(logits, targets)
    assert loss.dtype == torch.float32 and abs(loss.item() - exact) < 1e-6 * exact
    # The control: left in bfloat16 it would be off by far more.
    assert abs(F.cross_entropy(logits, targets, reduction="sum").item() - exact) > 1e-4 * exact


def test_token_loss_sum_adds_over_parts():
    draw = torch.Generator().manual_seed(2)
    logits, targets = torch.randn(7, 11, generator=draw), torch.randint(11, (7,), generator=draw)
    parts = token_loss_sum(logits[:3], targets[:3]) + token_loss_sum(logits[3:], targets[3:])
    torch.testing.assert_close(token_loss_sum(logits, targets), parts)
    assert token_loss_sum(logits[:0], targets[:0]).item() == 0


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("n", [1, TARGETS_AT_ONCE, 2 * TARGETS_AT_ONCE + 3])
def test_head_loss_sum_and_its_gradient_equal_float64(n: int, dtype: torch.dtype, tol: float):
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, 20, generator=draw).to(dtype).requires_grad_()
    head, targets = torch.randn(300, 20, generator=draw).to(dtype), torch.randint(300, (n,), generator=draw)
    exact = hidden.detach().double().requires_grad_()
    wanted = 0.3 * F.cross_entropy(exact @ head.double().T, targets, reduction="sum")
    loss = 0.3 * head_loss_sum(hidden, head, targets)
    assert loss.dtype == torch.float32 and abs(loss.item() - wanted.item()) < tol * wanted.item()
    for x in (loss, wanted):
        x.backward()
    assert_rms_close("gradient", hidden.grad, exact.grad, tol)
    assert hidden.grad.dtype == dtype


def test_head_loss_sum_of_large_logits_is_finite():
    hidden, head = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    loss = head_loss_sum(hidden, head, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 2e4 and hidden.grad.isfinite().all()


def test_head_loss_sum_of_no_target_is_zero():
    hidden = torch.zeros(0, 20, requires_grad=True)
    loss = head_loss_sum(hidden, torch.randn(300, 20), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 20)


def test_head_loss_sum_without_gradients_is_the_same():
    hidden, head, targets = torch.randn(5, 20, requires_grad=True), torch.randn(300, 20), torch.arange(5)
    with torch.no_grad():
        loss = head_loss_sum(hidden, head, targets)
    assert loss.item() == head_loss_sum(hidden, head, targets).item() and not loss.requires_grad


def plain_kl(student: torch.Tensor, teacher: torch.Tensor, ends: list[int], temperature: float) -> torch.Tensor:
    """The sum over vocabulary and positions, as its definition says, in float64."""
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    p = p.clone()
    moved = p[:, ends].sum(-1)
    p[:, ends] = 0
    p[:, ends[0]] = moved
    return temperature**2 * torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.log()), 0.0).sum()


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("n", "ends", "temperature"), [(1, [0], 1.0), (5, [0, 3, 7], 2.0), (515, [0, 299], 2.0)])
def test_head_kl_sum_and_its_gradient_equal_float64(
    n: int, ends: list[int], temperature: float, dtype: torch.dtype, tol: float
):
    draw = torch.Generator().manual_seed(4)
    hidden, teacher = (torch.randn(n, 20, generator=draw).to(dtype).requires_grad_() for _ in range(2))
    head = torch.randn(300, 20, generator=draw).to(dtype)
    exact = hidden.detach().double().requires_grad_()
    wanted = 0.3 * plain_kl(exact @ head.double().T, teacher.detach().double() @ head.double().T, ends, temperature)
    loss = 0.3 * head_kl_sum(hidden, head, teacher, torch.tensor(ends), temperature)
    assert loss.dtype == torch.float32 and abs(loss.item() - wanted.item()) < tol * wanted.item()
    for x in (loss, wanted):
        x.backward()
    assert_rms_close("gradient", hidden.grad, exact.grad, tol)
    assert hidden.grad.dtype == dtype and teacher.grad is None


def test_head_kl_sum_of_the_same_states_is_zero_and_of_no_position():
    hidden, head, ends = torch.randn(3, 20, requires_grad=True), torch.randn(300, 20), torch.tensor([0])
    loss = head_kl_sum(hidden, head, hidden.detach(), ends, 2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-4 and hidden.grad.abs().max() < 1e-4
    assert head_kl_sum(hidden[:0], head, hidden[:0], ends, 2.0).item() == 0
