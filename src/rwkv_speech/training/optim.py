"""Optimizer and schedule: two learning rates, one for the adapter and one for the initial state."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from rwkv_speech.config import SCHEDULES
from rwkv_speech.errors import UserError


def lr_factor(schedule: str, warmup_steps: int, total_steps: int, final: float = 0.0) -> Callable[[int], float]:
    """The factor of both learning rates at each optimizer step: a linear warm-up, then cosine decay or a constant.

    Raises UserError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"--lr_schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def make_optimizer(
    adapter: Iterable[nn.Parameter],
    initial_state: Iterable[nn.Parameter],
    lr_adapter: float,
    lr_state: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over exactly the trained tensors; weight decay pulls at the adapter only.

    Raises UserError for a decay that is not below 1, and for other numbers below 0.
    """
    for flag, value in (("--beta1", betas[0]), ("--beta2", betas[1])):
        if not 0 <= value < 1:
            raise UserError(f"{flag}: found {value}, expected at least 0 and below 1, as in 0.9")
    rates = {"lr_adapter": lr_adapter, "lr_state": lr_state, "weight_decay": weight_decay, "adam_eps": eps}
    for name, value in rates.items():
        if not value >= 0:
            raise UserError(f"--{name}: found {value}, expected 0 or more")
    return torch.optim.AdamW(
        [
            {"params": list(adapter), "lr": lr_adapter, "weight_decay": weight_decay, "name": "adapter"},
            {"params": list(initial_state), "lr": lr_state, "weight_decay": 0.0, "name": "state"},
        ],
        betas=betas,
        eps=eps,
    )
