import pytest
import torch
from torch import nn

from rwkv_speech.training.optim import lr_factor, make_optimizer


def test_lr_factor_cosine_at_the_key_steps():
    factor = lr_factor("cosine", warmup_steps=4, total_steps=12)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(6) == pytest.approx((2 + 2**0.5) / 4)  # a quarter of the way: (1 + cos 45°) / 2
    assert factor(8) == pytest.approx(0.5)
    assert factor(10) == pytest.approx((2 - 2**0.5) / 4)
    assert factor(12) == pytest.approx(0.0) and factor(13) == factor(500) == pytest.approx(0.0)


def test_lr_factor_cosine_ends_at_its_final_value():
    factor = lr_factor("cosine", warmup_steps=0, total_steps=10, final=0.2)
    assert (factor(0), factor(5), factor(10), factor(99)) == pytest.approx((1.0, 0.6, 0.2, 0.2))


def test_lr_factor_constant_keeps_its_warmup():
    factor = lr_factor("constant", warmup_steps=2, total_steps=4)
    assert [factor(step) for step in (0, 1, 2, 3, 400)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("warmup", "total"), [(10, 5), (5, 5), (0, 0)])
def test_lr_factor_of_a_run_no_longer_than_its_warmup_stays_finite(warmup: int, total: int):
    factor = lr_factor("cosine", warmup, total)
    assert all(0.0 <= factor(step) <= 1.0 for step in range(20))
    assert [factor(step) for step in range(warmup)] == [(step + 1) / warmup for step in range(warmup)]


def test_make_optimizer_holds_exactly_the_trained_tensors_at_their_rates():
    adapter, state, update = nn.Linear(3, 2), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(adapter.parameters(), iter([state]), 1e-3, 1e-1, 0.01, lm=[update], lr_lm=1e-2)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups) == {"adapter", "state", "lm"}
    assert [id(p) for p in groups["adapter"]["params"]] == [id(adapter.weight), id(adapter.bias)]
    assert [id(p) for p in groups["state"]["params"]] == [id(state)]
    assert (groups["adapter"]["lr"], groups["adapter"]["weight_decay"]) == (1e-3, 0.01)
    assert (groups["state"]["lr"], groups["state"]["weight_decay"]) == (1e-1, 0.0)
    assert [id(p) for p in groups["lm"]["params"]] == [id(update)]
    assert (groups["lm"]["lr"], groups["lm"]["weight_decay"]) == (1e-2, 0.0)


def test_make_optimizer_and_lr_factor_scale_both_rates_alike():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = make_optimizer(parameters[:1], parameters[1:], 1e-3, 1e-1, 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor("cosine", 2, 4))
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([f * 1e-3, f * 1e-1]) for f in (0.5, 1.0, 1.0, 0.5)]


def test_make_optimizer_takes_betas_and_epsilon():
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], [], 1e-3, 1e-1, 0.0, (0.8, 0.95), 1e-6)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)
