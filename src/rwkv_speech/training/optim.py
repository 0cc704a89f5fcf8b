"""Optimizer and schedule: a learning rate each for the adapter, the initial states, and what is tuned of the model."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


def lr_factor(schedule: str, warmup_steps: int, total_steps: int, final: float = 0.0) -> Callable[[int], float]:
    """The factor of all learning rates at each optimizer step: a linear warm-up, then one of config.SCHEDULES."""

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
    lm: Iterable[nn.Parameter] = (),
    lr_lm: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over exactly the tensors that are not frozen; weight decay pulls at the adapter only."""
    groups = (
        {"params": _trained(adapter), "lr": lr_adapter, "weight_decay": weight_decay, "name": "adapter"},
        {"params": _trained(initial_state), "lr": lr_state, "weight_decay": 0.0, "name": "state"},
        {"params": _trained(lm), "lr": lr_lm, "weight_decay": 0.0, "name": "lm"},
    )
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=eps)


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [x for x in parameters if x.requires_grad]
