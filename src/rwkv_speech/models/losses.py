"""The training losses."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Targets whose logits are in memory at a time: enough to keep a GPU's matrix product from waiting for the weights.
TARGETS_AT_ONCE = 256


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over n target tokens, in float32; logits (n, V), targets (n,).

    A sum, not a mean: only the caller knows how many target tokens the whole global batch has.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def head_loss_sum(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """`token_loss_sum` of the logits hidden (n, C) @ head (V, C)^T, which never stand in memory all at once.

    The head gets no gradient. PyTorch's own chunked `linear_cross_entropy` is newer than the oldest PyTorch supported.
    """
    return _HeadLoss.apply(hidden, head, targets)


def head_kl_sum(hidden: Tensor, head: Tensor, teacher: Tensor, ends: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) summed over n positions, from both hidden states (n, C) and the head (V, C), float32.

    Both distributions are softened by the temperature T and the sum is multiplied by T^2, so that its gradient has the
    size of cross-entropy's (Hinton et al. 2015, arXiv:1503.02531). What the teacher gives to any of the tokens `ends`
    (k,) counts for the first of them. Only `hidden` gets a gradient; the logits stand in memory a few at a time.
    """
    return _HeadKL.apply(hidden, head, teacher, ends, temperature)


class _HeadLoss(torch.autograd.Function):
    """Makes the gradient along with the loss: nothing of the logits is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), TARGETS_AT_ONCE):
            rows, wanted = hidden[start : start + TARGETS_AT_ONCE], targets[start : start + TARGETS_AT_ONCE, None]
            logits = F.linear(rows, head)
            dtype, logits = logits.dtype, logits.float()
            # In place from here: another tensor of this size would cost more time than its arithmetic.
            highest = logits.amax(-1, keepdim=True)
            loss -= (logits.gather(1, wanted) - highest).sum()
            total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
            loss += total.log().sum()
            if gradient is not None:
                error = logits.div_(total).scatter_add_(1, wanted, total.new_full(wanted.shape, -1.0))
                gradient[start : start + TARGETS_AT_ONCE] = error.to(dtype) @ head.to(dtype)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None


class _HeadKL(torch.autograd.Function):
    """As _HeadLoss, against the softened distribution of a teacher."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, teacher: Tensor, ends: Tensor, temperature: float) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), TARGETS_AT_ONCE):
            rows = slice(start, start + TARGETS_AT_ONCE)
            wanted = F.linear(teacher[rows], head).float().div_(temperature)
            end = wanted[:, ends].logsumexp(-1)
            wanted[:, ends] = -torch.inf
            wanted[:, ends[0]] = end
            wanted = wanted.softmax(-1)
            logits = F.linear(hidden[rows], head)
            dtype, found = logits.dtype, logits.float().div_(temperature).log_softmax(-1)
            loss += F.kl_div(found, wanted, reduction="sum") * temperature**2
            if gradient is not None:
                error = found.exp_().sub_(wanted).mul_(temperature)
                gradient[rows] = error.to(dtype) @ head.to(dtype)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None, None
