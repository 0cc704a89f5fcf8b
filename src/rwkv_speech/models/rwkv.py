"""What RWKV-6 and RWKV-7 share: everything around the two mixes of a layer, with the state going in and coming out."""

# B batch · T time · C channels = H heads · N head size · L layers · S sequences of a packed batch

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rwkv_speech.errors import UserError
from rwkv_speech.models.base import LMSizes, check_tensors, open_base
from rwkv_speech.models.linear import Embedding, Head, Linear
from rwkv_speech.models.state import Packing, State
from rwkv_speech.ops import rwkv_cpu

GROUP_NORM_EPS = 64e-5


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


def read_offset(y: Tensor, r: Tensor, offset: Tensor | None) -> Tensor:
    """y (B, T, H, N) as if each r (B, T, H, N) had read the state plus `offset` (H, N, N), which the state never holds.

    Source: Kang et al. 2025 (arXiv:2503.03499).
    """
    return y if offset is None else y + torch.einsum("bthk,hvk->bthv", r, offset.to(r.dtype))


class Block(nn.Module):
    """One layer; the first one also normalises the embeddings."""

    def __init__(self, layer: int, C: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.att, self.ffn = att, ffn

    def forward(
        self,
        x: Tensor,
        wkv: Tensor,
        att_shift: Tensor,
        ffn_shift: Tensor,
        packing: Packing | None,
        *carried: Tensor,
    ) -> tuple[Tensor, ...]:
        """x (B, T, C) and the layer's state -> the same, one layer further.

        `carried` is what layers hand on beside x: RWKV-7's first values (B, T, C), nothing in RWKV-6.
        """
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        out, wkv, att_shift, *carried_on = self.att(self.ln1(x), wkv, att_shift, packing, *carried)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), ffn_shift, packing)
        return x + out, wkv, att_shift, ffn_shift, *carried_on

    def step(
        self, x: Tensor, wkv: Tensor, att_shift: Tensor, ffn_shift: Tensor, *carried: Tensor
    ) -> tuple[Tensor, ...]:
        """One token of each of B slots, x (B, C), and what is carried; the layer's state is updated in place."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        mixes: Any = self.att, self.ffn
        att, ffn = mixes
        out, *carried_on = att.step(self.ln1(x), wkv, att_shift, *carried)
        x = x + out
        return x + ffn.step(self.ln2(x), ffn_shift), *carried_on


class RWKV(nn.Module):
    """A language model: `model(input_ids)` -> `Output` with `.logits` (B, T, V) and `.state`.

    `form` is the recurrence's kernel's, one of config.KERNEL_FORMS; with `fuse`, torch.compile fuses the elementwise
    parts.
    """

    FAMILY: ClassVar[str]
    SIZES: ClassVar[type[LMSizes]]

    def __init__(self, sizes: LMSizes, form: str = "auto", fuse: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.grad_cp = False
        self._form = form
        self._prepared: tuple[Any, rwkv_cpu.Stepper | None] = (None, None)
        self.emb = Embedding(sizes.vocab, sizes.C)
        self.blocks = nn.ModuleList(self.layers(sizes, form, fuse))
        self.ln_out = nn.LayerNorm(sizes.C)
        self.head = Head(sizes.C, sizes.vocab)

    @classmethod
    def layers(cls, sizes: LMSizes, form: str, fuse: bool) -> Iterable[Block]:
        """The layers of a model of these sizes."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        form: str = "auto",
        fuse: bool = False,
        quant: str = "",
    ) -> Self:
        """Load a `.pth` or `.safetensors` file; raises UserError for one of another family, else as `from_tensors`."""
        family, tensors = open_base(path)
        if family != cls.FAMILY:
            raise UserError(f"{path}: found an {family} model, expected {cls.SIZES.NAME}; give one with --load_model")
        return cls.from_tensors(tensors, path, dtype, device, form, fuse, quant)

    @classmethod
    def from_tensors(
        cls,
        tensors: dict[str, Tensor],
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        form: str = "auto",
        fuse: bool = False,
        quant: str = "",
    ) -> Self:
        """From the tensors of the file `path`, which say the sizes.

        Raises UserError naming the file for a key that is missing, unknown or of the wrong shape.
        A file of the asked `dtype` is mapped, not copied: peak memory stays near the file's size. `quant` as in
        `quantise`.
        """
        sizes = cls.SIZES.of(tensors, path)
        with torch.device("meta"):
            model = cls(sizes, form, fuse)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        check_tensors(tensors, shapes, path, cls.SIZES.NAME)
        packed = {f"{name}.weight" for name, module in model.named_modules() if quant and isinstance(module, Linear)}
        # What is packed is read as the file has it. Not strict, for check_tensors was.
        tensors = {name: x if name in packed else x.to(device, dtype) for name, x in tensors.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.quantise(quant, dtype, device)
        return model.requires_grad_(False).eval()

    def quantise(self, quant: str, dtype: torch.dtype, device: str | torch.device | None = None) -> None:
        """Keep the matrices in 8 ("int8") or 4 bits ("nf4", with the embeddings in 8) and compute with `dtype`."""
        for module in (x for x in self.modules() if quant and isinstance(x, Linear)):
            module.quantise(quant, dtype, device)
        if quant == "nf4":
            self.emb.quantise()

    @property
    def dtype(self) -> torch.dtype:
        """What is not kept in fewer bits has this type."""
        return self.emb.dtype or self.emb.weight.dtype

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., C), as the first block takes them."""
        return self.emb(input_ids)

    def zero_state(self, batch: int) -> State:
        """The state before anything was read, for `batch` sequences."""
        s, device = self.sizes, self.emb.weight.device
        wkv = torch.zeros(s.n_layer, batch, s.H, s.N, s.N, dtype=torch.float32, device=device)
        shift = torch.zeros(s.n_layer, batch, s.C, dtype=self.dtype, device=device)
        return State(wkv, shift, shift.clone())

    def hidden(
        self, inputs_embeds: Tensor, state: State, packing: Packing | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State]:
        """Embeddings (B, T, C) -> normed hidden states (B, T, C), for `head`, and the next state.

        Without `keep_state` the state is the given one: training needs no other, and all layers' take memory.
        """
        x, layers, carried = inputs_embeds, [], list[Tensor]()
        for block, *layer_state in zip(self.blocks, *state, strict=True):
            if self.grad_cp and torch.is_grad_enabled():
                inputs = x, *layer_state, packing, *carried
                x, *layer = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, *layer = block(x, *layer_state, packing, *carried)
            carried = layer[len(state) :]
            if keep_state:
                layers.append(layer[: len(state)])
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
            raise ValueError("RWKV: give exactly one of input_ids and inputs_embeds")
        if state is None:
            state = self.zero_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        x, state = self.hidden(x, state, None if cu_seqlens is None else Packing.of(cu_seqlens))
        return Output(self.head(x), state)

    @torch.no_grad()
    def step(self, input_ids: Tensor, state: State, slots: Tensor | None = None) -> Tensor:
        """One token of each of B slots: ids (B,) -> logits (B, V) in float32; the dense `state` is updated in place.

        With `slots` (n,) instead any tokens (n,) of some slots, those of a slot together and in their order: the
        logits after each. Raises ValueError for a state that is not dense, IndexError for ids or slots that are not
        there. On a CPU a native kernel serves, and the bits of a token's logits depend on nothing but the tokens of its
        own slot.
        """
        if stepper := self._stepper():
            return stepper.step(input_ids, slots, *state)
        x = self.embed(input_ids)
        if slots is not None:
            return self._read_slots(x, state, slots)
        layers: Any = self.blocks
        carried: list[Tensor] = []
        for block, *layer_state in zip(layers, *state, strict=True):
            x, *carried = block.step(x, *layer_state, *carried)
        return self.head(self.ln_out(x)).float()

    @property
    def slots_are_apart(self) -> bool:
        """Whether the native kernel serves: then only the slots in use need be given to a step."""
        return self._stepper() is not None

    def _stepper(self) -> rwkv_cpu.Stepper | None:
        """The native step, prepared when the weights have come to another place; None where it cannot serve."""
        weight = self.emb.weight
        key = id(self), weight.data_ptr(), weight.requires_grad
        if self._prepared[0] != key:
            tensors = dict(self.named_parameters()) | dict(self.named_buffers())
            usable = self._form != "torch" and not any(name.endswith(".lora_A") for name in tensors)
            native = rwkv_cpu.Stepper.of(tensors, vars(self.sizes), self.FAMILY) if usable else None
            self._prepared = key, native
        return self._prepared[1]

    def _read_slots(self, x: Tensor, state: State, slots: Tensor) -> Tensor:
        """Embeddings (n, C) of a few tokens of some slots, as one packed batch."""
        rows, counts = slots.unique_consecutive(return_counts=True)
        cu_seqlens = nn.functional.pad(counts.cumsum(0), (1, 0))
        hidden, after = self.hidden(x[None], state.select(rows), Packing.of(cu_seqlens))
        for whole, part in zip(state, after, strict=True):
            whole[:, rows] = part
        return self.head(hidden[0]).float()
