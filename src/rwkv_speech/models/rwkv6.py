"""RWKV-6 (x060, "Finch") over embeddings, with the recurrent state going in and coming out.

Parameters have the names of the published checkpoints:
    time_maa_{x,w,k,v,r,g}   how much of the previous token each input of the time mix takes ("token shift")
    time_maa_w1, time_maa_w2 the low-rank map that makes the five mixes depend on the data
    time_decay, _w1, _w2     the raw decay and its low-rank, data-dependent part
    time_faaaa               the bonus u of the current token
Source: Peng et al. 2024 (arXiv:2404.05892).
"""

# B batch · T time · C channels = H heads · N head size · L layers · S sequences of a packed batch

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rwkv_speech.models.base import LMSizes, RWKV6Sizes
from rwkv_speech.models.linear import Linear
from rwkv_speech.models.rwkv import GROUP_NORM_EPS, RWKV, Block, read_offset, token_shift
from rwkv_speech.models.state import Packing
from rwkv_speech.ops.mix import gated, mixes, squared_relu
from rwkv_speech.ops.wkv6 import wkv6, wkv6_step


class TimeMix(nn.Module):
    """Attention's place: token shift, five data-dependent mixes, WKV-6, group norm, gate."""

    time_maa_x: Tensor
    state_offset: nn.Parameter | None

    def __init__(self, C: int, H: int, mix_rank: int, decay_rank: int, form: str, fuse: bool) -> None:
        super().__init__()
        self.H, self.N, self._form, self._fuse = H, C // H, form, fuse
        for name in "xwkvrg":
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.zeros(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(C, 5 * mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.zeros(5, mix_rank, C))
        self.time_decay = nn.Parameter(torch.zeros(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.zeros(C, decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.zeros(decay_rank, C))
        self.time_faaaa = nn.Parameter(torch.zeros(H, self.N))
        self.receptance, self.key, self.value, self.gate, self.output = (Linear(C, C) for _ in range(5))
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)
        self.register_parameter("state_offset", None)  # (H, N, N) where it is learned

    def forward(self, x: Tensor, wkv: Tensor, shift: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), wkv (B, H, N, N), shift (B, C) -> output (B, T, C) and the next wkv and shift."""
        xx, shift = token_shift(x, shift, packing)
        r, k, v, w, gate = self._inputs(x, xx)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        y, wkv = wkv6(r, k, v, w, self.time_faaaa, wkv, cu_seqlens, self._form)
        return self._output(read_offset(y, r, self.state_offset), gate), wkv, shift

    def step(self, x: Tensor, wkv: Tensor, shift: Tensor) -> tuple[Tensor]:
        """One token of each of B slots: x (B, C) -> output (B, C); wkv and shift are updated in place."""
        r, k, v, w, gate = self._inputs(x[:, None], (shift - x)[:, None])
        shift.copy_(x)
        y = wkv6_step(r[:, 0], k[:, 0], v[:, 0], w[:, 0], self.time_faaaa, wkv, self._form)
        return (self._output(read_offset(y[:, None], r, self.state_offset), gate)[:, 0],)

    def _inputs(self, x: Tensor, xx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r, k, v, w (B, T, H, N) and the gate (B, T, C) of tokens x and what they differ by from the ones before."""
        B, T, _ = x.shape
        base = torch.cat([getattr(self, f"time_maa_{name}") for name in "wkvrg"])[:, 0]
        maa = (self.time_maa_x[0, 0], self.time_maa_w1, self.time_maa_w2, base)
        xw, xk, xv, xr, xg = mixes(x, xx, *maa, fuse=self._fuse)
        # The raw decay is the exponent of an exponent: it stays in float32 from here to the kernel.
        w = self.time_decay.float() + (torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2).float()
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        r, k, v, w = (part.view(B, T, self.H, self.N) for part in (r, k, v, w))
        return r, k, v, w, self.gate(xg)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        y = self.ln_x(y.reshape(-1, gate.shape[-1])).view_as(gate)
        return self.output(gated(y, gate, self._fuse))


class ChannelMix(nn.Module):
    """The feed-forward part: token shift, squared ReLU, gated by the receptance."""

    def __init__(self, C: int, ffn: int) -> None:
        super().__init__()
        self.time_maa_k = nn.Parameter(torch.zeros(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.zeros(1, 1, C))
        self.key = Linear(C, ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(ffn, C)

    def forward(self, x: Tensor, shift: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) -> output (B, T, C) and the next shift."""
        xx, shift = token_shift(x, shift, packing)
        return self._output(x, xx), shift

    def step(self, x: Tensor, shift: Tensor) -> Tensor:
        """One token of each of B slots: x (B, C) -> output (B, C); shift is updated in place."""
        xx = shift - x
        shift.copy_(x)
        return self._output(x[:, None], xx[:, None])[:, 0]

    def _output(self, x: Tensor, xx: Tensor) -> Tensor:
        k = squared_relu(self.key(torch.addcmul(x, xx, self.time_maa_k)))
        return torch.sigmoid(self.receptance(torch.addcmul(x, xx, self.time_maa_r))) * self.value(k)


class RWKV6(RWKV):
    """The RWKV-6 language model."""

    FAMILY, SIZES = "x060", RWKV6Sizes

    @classmethod
    def layers(cls, sizes: LMSizes, form: str, fuse: bool) -> Iterable[Block]:
        assert isinstance(sizes, RWKV6Sizes)
        for layer in range(sizes.n_layer):
            att = TimeMix(sizes.C, sizes.H, sizes.mix_rank, sizes.decay_rank, form, fuse)
            yield Block(layer, sizes.C, att, ChannelMix(sizes.C, sizes.ffn))
