"""RWKV-7 (x070, "Goose") over embeddings.

Parameters have the names of the published checkpoints:
    x_{r,w,k,v,a,g}  how much of the previous token each input of the time mix takes ("token shift")
    w0, w1, w2       the decay, a constant and a low-rank, data-dependent part; so, too
    a0, a1, a2       the in-context learning rate: how much of what the state holds under a key is replaced
    v0, v1, v2       how much of the first layer's values the later layers take; g1, g2 the gate, without a constant
    k_k, k_a, r_k    the key that is removed, how far the rate weakens the key that is written, the bonus of a token
Source: Peng et al. 2025 (arXiv:2503.14456).
"""

# B batch · T time · C channels = H heads · N head size · S sequences of a packed batch

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from rwkv_speech.errors import UserError
from rwkv_speech.models.base import LMSizes, RWKV7Sizes
from rwkv_speech.models.linear import Linear
from rwkv_speech.models.rwkv import GROUP_NORM_EPS, RWKV, Block, read_offset, token_shift
from rwkv_speech.models.state import Packing
from rwkv_speech.ops.mix import squared_relu
from rwkv_speech.ops.time_mix7 import Projections, Weights, attend, tokens
from rwkv_speech.ops.wkv7 import wkv7_step


class TimeMix(nn.Module):
    """Attention's place: token shift, six mixes, WKV-7, group norm, bonus, gate."""

    a1: Tensor
    g1: Tensor
    g2: Tensor
    state_offset: nn.Parameter | None
    v1: Tensor
    w1: Tensor

    def __init__(self, layer: int, sizes: RWKV7Sizes, form: str) -> None:
        super().__init__()
        C, self.H, self.N, self._form = sizes.C, sizes.H, sizes.N, form
        for name in (*(f"x_{name}" for name in "rwkvag"), "k_k", "k_a"):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, C)))
        ranks = {"w": sizes.decay_rank, "a": sizes.rate_rank, "v": sizes.value_rank if layer else 0}
        for name, rank in ranks.items():
            if rank:
                self.register_parameter(f"{name}0", nn.Parameter(torch.zeros(1, 1, C)))
                self._register_low_rank(name, C, rank)
        self._register_low_rank("g", C, sizes.gate_rank)
        self.r_k = nn.Parameter(torch.zeros(self.H, self.N))
        self.receptance, self.key, self.value, self.output = (Linear(C, C) for _ in range(4))
        self.ln_x = nn.GroupNorm(self.H, C, eps=GROUP_NORM_EPS)
        self.register_parameter("state_offset", None)  # (H, N, N) where it is learned

    def _register_low_rank(self, name: str, C: int, rank: int) -> None:
        self.register_parameter(f"{name}1", nn.Parameter(torch.zeros(C, rank)))
        self.register_parameter(f"{name}2", nn.Parameter(torch.zeros(rank, C)))

    def forward(
        self, x: Tensor, wkv: Tensor, shift: Tensor, packing: Packing | None, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C), wkv (B, H, N, N), shift (B, C), the first layer's values (B, T, C), None in that layer.

        Returns the output (B, T, C), the next wkv and shift, and the first layer's values.
        """
        xx, shift = token_shift(x, shift, packing)
        projections, gate, first = self._project(x, xx, first)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        y, wkv, bonus = attend(projections, self._weights(), wkv, cu_seqlens, self._form)
        y = read_offset(y, projections.r.view(y.shape), self.state_offset)
        return self._output(y, bonus, gate), wkv, shift, first

    def step(self, x: Tensor, wkv: Tensor, shift: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token of each of B slots: x (B, C) -> output (B, C) and the first layer's values (B, C).

        wkv and shift are updated in place.
        """
        xx = (shift - x)[:, None]
        projections, gate, first = self._project(x[:, None], xx, None if first is None else first[:, None])
        shift.copy_(x)
        made, bonus = tokens(projections, self._weights())
        r, w, k, v, a, b = (part[:, 0] for part in made)
        y = wkv7_step(r, w, k, v, a, b, wkv, self._form)
        y = read_offset(y[:, None], made.r, self.state_offset)
        return self._output(y, bonus, gate)[:, 0], first[:, 0]

    def _project(self, x: Tensor, xx: Tensor, first: Tensor | None) -> tuple[Projections, Tensor, Tensor]:
        """Of tokens x and what they differ by from the ones before; the gate (B, T, C) and the first layer's values."""
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, xx, getattr(self, f"x_{name}")) for name in "rwkvag")
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        value = None if first is None else xv @ self.v1
        found = Projections(r, k, v, torch.tanh(xw @ self.w1), xa @ self.a1, value, first)
        return found, gate, v if first is None else first

    def _weights(self) -> Weights:
        found: Any = (getattr(self, name, None) for name in Weights._fields)
        return Weights(*found)

    def _output(self, y: Tensor, bonus: Tensor, gate: Tensor) -> Tensor:
        y = self.ln_x(y.reshape(-1, gate.shape[-1])).view(y.shape)
        return self.output((y + bonus).view(gate.shape) * gate)


class ChannelMix(nn.Module):
    """The feed-forward part: token shift, squared ReLU."""

    def __init__(self, C: int, ffn: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(1, 1, C))
        self.key = Linear(C, ffn)
        self.value = Linear(ffn, C)

    def forward(self, x: Tensor, shift: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) -> output (B, T, C) and the next shift."""
        xx, shift = token_shift(x, shift, packing)
        return self._output(x, xx), shift

    def step(self, x: Tensor, shift: Tensor) -> Tensor:
        """One token of each of B slots: x (B, C) -> output (B, C); shift is updated in place."""
        xx = shift - x
        shift.copy_(x)
        return self._output(x, xx)

    def _output(self, x: Tensor, xx: Tensor) -> Tensor:
        return self.value(squared_relu(self.key(torch.addcmul(x, xx, self.x_k.view(-1)))))


class RWKV7(RWKV):
    """The RWKV-7 language model."""

    FAMILY, SIZES = "x070", RWKV7Sizes

    @classmethod
    def layers(cls, sizes: LMSizes, form: str, fuse: bool) -> Iterable[Block]:
        assert isinstance(sizes, RWKV7Sizes)
        if fuse:
            raise UserError("--compile: found 1 with an RWKV-7 model, whose parts it does not fuse; leave it out")
        for layer in range(sizes.n_layer):
            yield Block(layer, sizes.C, TimeMix(layer, sizes, form), ChannelMix(sizes.C, sizes.ffn))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], *where: Any, **how: Any) -> Self:
        """As of any model; some files hold a value mix of the first layer, which nothing uses."""
        unused = {f"blocks.0.att.v{i}" for i in range(3)}
        return super().from_tensors({name: x for name, x in tensors.items() if name not in unused}, *where, **how)
