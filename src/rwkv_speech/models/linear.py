"""The frozen models' matrices, in floats or in fewer bits; the language model's with or without a low-rank update."""

# M outputs · K inputs · R rank · V vocabulary · C channels

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_speech.models.losses import head_kl_sum, head_loss_sum
from rwkv_speech.models.quantised import pack, product, unpack


def _freeze(module: nn.Module, weight: Tensor, quant: str) -> None:
    """Keep a frozen weight as `pack` does, its scales beside it: as parameters, for DDP sends buffers in each step."""
    for name, x in zip(("weight", "scale"), pack(weight, quant), strict=True):
        setattr(module, name, nn.Parameter(x, requires_grad=False))


class Embedding(nn.Embedding):
    """Token ids (...) -> embeddings (..., C), of `dtype`."""

    dtype: torch.dtype | None = None
    scale: Tensor

    def quantise(self) -> None:
        """Keep them in 8 bits: only the rows that are read are ever made floats."""
        self.dtype = self.weight.dtype
        _freeze(self, self.weight, "int8")

    def merge(self) -> None:
        """Make them floats again."""
        if self.dtype is not None:
            self.weight = nn.Parameter(unpack(self.weight, self.scale, self.dtype), requires_grad=False)
            del self.scale
            self.dtype = None

    def forward(self, input: Tensor) -> Tensor:
        """As above."""
        found = super().forward(input)
        return found if self.dtype is None else (found * self.scale[input][..., None]).to(self.dtype)


class PackedLinear(nn.Module):
    """x (..., K) -> x W^T + b (..., M), in place of a frozen `theirs`; W kept as `quant` says, computed in `dtype`."""

    weight: Tensor
    scale: Tensor

    def __init__(self, theirs: nn.Linear, quant: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        _freeze(self, theirs.weight, quant)
        self.bias = None if theirs.bias is None else nn.Parameter(theirs.bias.detach().to(dtype), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """As above."""
        y = product(input, self.weight, self.scale, self.dtype)
        return y if self.bias is None else y + self.bias


class Linear(nn.Linear):
    """x (..., K) -> x W^T (..., M), without a bias; `lora_A` (R, K) and `lora_B` (M, R) are there after `add_lora`."""

    dtype: torch.dtype | None = None  # that packed weights are made of
    scale: Tensor
    lora_A: Tensor
    lora_B: Tensor
    lora_scale: float = 0.0
    lora_dropout: float = 0.0

    def __init__(self, K: int, M: int) -> None:
        super().__init__(K, M, bias=False)

    def quantise(self, quant: str, dtype: torch.dtype, device: str | torch.device | None = None) -> None:
        """Keep W as `quant` says, on `device` if it is given, and compute with `dtype`."""
        self.dtype = dtype
        _freeze(self, self.weight.to(device or self.weight.device), quant)

    def add_lora(self, rank: int, alpha: float, dropout: float = 0.0) -> None:
        """Add alpha / R B A to W, nothing at first: A is drawn at random, B zero; A reads what dropout leaves of x."""
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, math.sqrt(5))
        self.lora_scale, self.lora_dropout = alpha / rank, dropout

    def dense(self) -> Tensor:
        """W in floats, without the update."""
        return self.weight if self.dtype is None else unpack(self.weight, self.scale, self.dtype)

    def merge(self) -> None:
        """Make W and its update one matrix of floats, as it is computed with."""
        W = self.dense()
        if self.lora_scale:
            W = (W.float() + self.lora_scale * (self.lora_B.float() @ self.lora_A.float())).to(W.dtype)
            del self.lora_A, self.lora_B
        if self.dtype is not None:
            del self.scale
        self.lora_scale, self.dtype = 0.0, None
        self.weight = nn.Parameter(W, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """As above."""
        y = self._frozen(input)
        return torch.add(y, self._update(input), alpha=self.lora_scale) if self.lora_scale else y

    def _frozen(self, x: Tensor) -> Tensor:
        if self.dtype is None:
            return F.linear(x, self.weight)
        return product(x, self.weight, self.scale, self.dtype)

    def _update(self, x: Tensor) -> Tensor:
        # Frozen parts are always in evaluation mode: what asks for gradients is a training.
        if self.lora_dropout and torch.is_grad_enabled():
            x = F.dropout(x, self.lora_dropout)
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


class Head(Linear):
    """The last matrix: hidden (n, C) -> logits (n, V), or with targets (n,) their summed loss, or with what a teacher
    gives (the last arguments of losses.head_kl_sum) the summed divergence from it.

    Within one module, since ZeRO-3 has a matrix only while its module runs.
    """

    def forward(
        self, input: Tensor, targets: Tensor | None = None, teacher: tuple[Tensor, Tensor, float] | None = None
    ) -> Tensor:
        """As above."""
        if teacher is not None:
            return head_kl_sum(input, self.dense(), *teacher)
        return super().forward(input) if targets is None else head_loss_sum(input, self.dense(), targets)
