"""RWKV-6 (x060, "Finch") over embeddings, with the recurrent state going in and coming out.

Parameters have the names of the published checkpoints:
    time_maa_{x,w,k,v,r,g}   how much of the previous token each input of the time mix takes ("token shift")
    time_maa_w1, time_maa_w2 the low-rank map that makes the five mixes depend on the data
    time_decay, _w1, _w2     the raw decay and its low-rank, data-dependent part
    time_faaaa               the bonus u of the current token
Source: Peng et al. 2024 (arXiv:2404.05892).
"""

# B batch · T time · C channels = H heads · N head size · L layers · S sequences of a packed batch

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_speech.errors import UserError
from rwkv_speech.models.base import RWKV6Sizes, check_tensors, open_base
from rwkv_speech.models.losses import head_kl_sum, head_loss_sum
from rwkv_speech.models.quantised import Int8Linear
from rwkv_speech.models.state import Packing, State
from rwkv_speech.ops import rwkv6_cpu
from rwkv_speech.ops.mix import gated, mixes, squared_relu
from rwkv_speech.ops.wkv6 import wkv6, wkv6_step

FAMILY = "x060"
_GROUP_NORM_EPS = 64e-5


@dataclass
class Output:
    """`logits` (B, T, V) and the `state` after the last token of each sequence."""

    logits: Tensor
    state: State


def token_shift(x: Tensor, shift: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """The previous token less the current one, (B, T, C), and each sequence's last token, (B or S, C)."""
    previous = x.roll(1, 1)
    if packing is not None:
        previous.index_copy_(1, packing.starts, shift[packing.filled].to(x.dtype)[None])
        return previous.sub_(x), shift.to(x.dtype).index_copy(0, packing.filled, x[0, packing.ends])
    if x.shape[1] == 0:
        return x, shift
    previous[:, 0] = shift
    return previous.sub_(x), x[:, -1]


class TimeMix(nn.Module):
    """Attention's place: token shift, five data-dependent mixes, WKV-6, group norm, gate."""

    time_maa_x: Tensor

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
        self.receptance, self.key, self.value, self.gate, self.output = (nn.Linear(C, C, bias=False) for _ in range(5))
        self.ln_x = nn.GroupNorm(H, C, eps=_GROUP_NORM_EPS)

    def forward(self, x: Tensor, wkv: Tensor, shift: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), wkv (B, H, N, N), shift (B, C) -> output (B, T, C) and the next wkv and shift."""
        xx, shift = token_shift(x, shift, packing)
        r, k, v, w, gate = self._inputs(x, xx)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        y, wkv = wkv6(r, k, v, w, self.time_faaaa, wkv, cu_seqlens, self._form)
        return self._output(y, gate), wkv, shift

    def step(self, x: Tensor, wkv: Tensor, shift: Tensor) -> Tensor:
        """One token of each of B slots: x (B, C) -> output (B, C); wkv and shift are updated in place."""
        r, k, v, w, gate = self._inputs(x[:, None], (shift - x)[:, None])
        shift.copy_(x)
        y = wkv6_step(r[:, 0], k[:, 0], v[:, 0], w[:, 0], self.time_faaaa, wkv, self._form)
        return self._output(y[:, None], gate)[:, 0]

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
        self.key = nn.Linear(C, ffn, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(ffn, C, bias=False)

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


class Block(nn.Module):
    """One layer; the first one also normalises the embeddings."""

    def __init__(self, layer: int, sizes: RWKV6Sizes, form: str, fuse: bool) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(sizes.C)
        self.ln1, self.ln2 = nn.LayerNorm(sizes.C), nn.LayerNorm(sizes.C)
        self.att = TimeMix(sizes.C, sizes.H, sizes.mix_rank, sizes.decay_rank, form, fuse)
        self.ffn = ChannelMix(sizes.C, sizes.ffn)

    def forward(
        self, x: Tensor, wkv: Tensor, att_shift: Tensor, ffn_shift: Tensor, packing: Packing | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C) and the layer's state -> the same, one layer further."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        out, wkv, att_shift = self.att(self.ln1(x), wkv, att_shift, packing)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), ffn_shift, packing)
        return x + out, wkv, att_shift, ffn_shift

    def step(self, x: Tensor, wkv: Tensor, att_shift: Tensor, ffn_shift: Tensor) -> Tensor:
        """One token of each of B slots, x (B, C); the layer's state is updated in place."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        x = x + self.att.step(self.ln1(x), wkv, att_shift)
        return x + self.ffn.step(self.ln2(x), ffn_shift)


class Head(nn.Linear):
    """The last matrix: hidden (n, C) -> logits (n, V), or with targets (n,) their summed loss, or with what a teacher
    gives (the last arguments of losses.head_kl_sum) the summed divergence from it.

    Within one module, since ZeRO-3 has a matrix only while its module runs.
    """

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, teacher: tuple[Tensor, Tensor, float] | None = None
    ) -> Tensor:
        if teacher is not None:
            return head_kl_sum(hidden, self.weight, *teacher)
        return super().forward(hidden) if targets is None else head_loss_sum(hidden, self.weight, targets)


class RWKV6(nn.Module):
    """The language model: `model(input_ids)` -> `Output` with `.logits` (B, T, V) and `.state`.

    `form` is the WKV-6 kernel's, one of config.KERNEL_FORMS; with `fuse`, torch.compile fuses the elementwise parts.
    """

    def __init__(self, sizes: RWKV6Sizes, form: str = "auto", fuse: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.grad_cp = False
        self._form = form
        self._prepared: tuple[Any, rwkv6_cpu.Stepper | None] = (None, None)
        self.emb = nn.Embedding(sizes.vocab, sizes.C)
        self.blocks = nn.ModuleList(Block(layer, sizes, form, fuse) for layer in range(sizes.n_layer))
        self.ln_out = nn.LayerNorm(sizes.C)
        self.head = Head(sizes.C, sizes.vocab, bias=False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        form: str = "auto",
        fuse: bool = False,
    ) -> "RWKV6":
        """Load a `.pth` or `.safetensors` file; sizes come from its tensors.

        Raises UserError naming the file for a key that is missing, unknown or of the wrong shape.
        A file of the asked `dtype` is mapped, not copied: peak memory stays near the file's size. With torch.int8 the
        matrices are kept in 8 bits and the rest in bfloat16: for decoding on a CPU alone.
        """
        family, tensors = open_base(path)
        if family != FAMILY:
            raise UserError(f"{path}: found an {family} model, expected RWKV-6 ({FAMILY}); give one with --load_model")
        sizes = RWKV6Sizes.of(tensors, path)
        with torch.device("meta"):
            model = cls(sizes, form, fuse)
        check_tensors(tensors, {name: p.shape for name, p in model.named_parameters()}, path)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        quantised = {name: Int8Linear(tensors.pop(f"{name}.weight")) for name in linear if dtype == torch.int8}
        floats = torch.bfloat16 if dtype == torch.int8 else dtype
        # Not strict, for check_tensors was.
        model.load_state_dict({name: x.to(device, floats) for name, x in tensors.items()}, strict=False, assign=True)
        for name, module in quantised.items():
            model.set_submodule(name, module)
        return model.requires_grad_(False).eval()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., C), as the first block takes them."""
        return self.emb(input_ids)

    def zero_state(self, batch: int) -> State:
        """The state before anything was read, for `batch` sequences."""
        s, p = self.sizes, self.emb.weight
        wkv = torch.zeros(s.n_layer, batch, s.H, s.N, s.N, dtype=torch.float32, device=p.device)
        shift = torch.zeros(s.n_layer, batch, s.C, dtype=p.dtype, device=p.device)
        return State(wkv, shift, shift.clone())

    def hidden(
        self, inputs_embeds: Tensor, state: State, packing: Packing | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State]:
        """Embeddings (B, T, C) -> normed hidden states (B, T, C), for `head`, and the next state.

        Without `keep_state` the state is the given one: training needs no other, and all layers' take memory.
        """
        x, layers = inputs_embeds, []
        for block, *layer_state in zip(self.blocks, *state, strict=True):
            if self.grad_cp and torch.is_grad_enabled():
                x, *layer = torch.utils.checkpoint.checkpoint(block, x, *layer_state, packing, use_reentrant=False)
            else:
                x, *layer = block(x, *layer_state, packing)
            if keep_state:
                layers.append(layer)
        return self.ln_out(x), State(*(torch.stack(part) for part in zip(*layers, strict=True))) if layers else state

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Output:
        """Ids (B, T) or embeddings (B, T, C) -> logits (B, T, V); packed with `cu_seqlens` (S + 1,), then B = 1.

        Raises ValueError unless exactly one of the two inputs is given.
        """
        if inputs_embeds is None and input_ids is not None:
            x = self.embed(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            x = inputs_embeds
        else:
            raise ValueError("RWKV6: give exactly one of input_ids and inputs_embeds")
        if state is None:
            state = self.zero_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        x, state = self.hidden(x, state, None if cu_seqlens is None else Packing.of(cu_seqlens))
        return Output(self.head(x), state)

    @torch.no_grad()
    def step(self, input_ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        """One token of each of B slots: ids (B,) -> logits (B, V) in float32; the dense `state` is updated in place.

        With `slots` (n,) instead any tokens (n,) of some slots, those of a slot together and in their order: the
        logits after each. On a CPU a native kernel serves, and the bits of a token's logits depend on nothing but the
        tokens of its own slot. Raises ValueError for a state that is not dense, IndexError for ids or slots that are
        not there.
        """
        if stepper := self._stepper():
            return stepper.step(input_ids, slots, *state)
        x = self.embed(input_ids)
        if slots is not None:
            return self._read_slots(x, state, slots)
        layers: Any = self.blocks
        for block, *layer_state in zip(layers, *state, strict=True):
            x = block.step(x, *layer_state)
        return self.head(self.ln_out(x)).float()

    @property
    def slots_are_apart(self) -> bool:
        """Whether the bits of a slot's step depend on nothing else in it: then only those in use need be given."""
        return self._stepper() is not None

    def _read_slots(self, x: Tensor, state: State, slots: Tensor) -> Tensor:
        """Embeddings (n, C) of a few tokens of some slots, as one packed batch."""
        rows, counts = slots.unique_consecutive(return_counts=True)
        cu_seqlens = nn.functional.pad(counts.cumsum(0), (1, 0))
        hidden, after = self.hidden(x[None], state.select(rows), Packing.of(cu_seqlens))
        for whole, part in zip(state, after, strict=True):
            whole[:, rows] = part
        return self.head(hidden[0]).float()

    def _stepper(self) -> rwkv6_cpu.Stepper | None:
        """The native step, prepared when the weights have come to another place; None where it cannot serve."""
        weight = self.emb.weight
        key = id(self), weight.data_ptr(), weight.requires_grad
        if self._prepared[0] != key:
            tensors = dict(self.named_parameters()) | dict(self.named_buffers())
            self._prepared = key, None if self._form == "torch" else rwkv6_cpu.Stepper.of(tensors, vars(self.sizes))
        return self._prepared[1]
