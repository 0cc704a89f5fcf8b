"""A model's decoding step on a CPU as one native call: prepared once, then a few microseconds of Python a token."""

# L layers · B slots · n tokens · C channels = H heads · N head size · V vocabulary

import ctypes
from collections.abc import Mapping
from ctypes import byref, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_speech.ops import native

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}


class _Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("type", c_int64))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class _Family(NamedTuple):
    """What Rwkv6Layer or Rwkv7Layer of cuda/rwkv.h holds, in its order, by the names of published checkpoints."""

    version: int
    ranks: tuple[str, ...]
    vectors: tuple[str, ...]
    matrices: tuple[str, ...]

    def layer(self) -> type[ctypes.Structure]:
        """The structure."""
        kinds = ((_NORMS, _Norm), (self.vectors, c_void_p), (self.matrices, _Matrix))
        fields = tuple((name, kind) for names, kind in kinds for name in names)
        return type("_Layer", (ctypes.Structure,), {"_fields_": fields})


_OFFSET = ".state_offset"
_NORMS = ("ln1", "ln2", "att.ln_x")
_FAMILIES = {
    "x060": _Family(
        6,
        ("mix_rank", "decay_rank"),
        ("att.time_maa_x", *(f"att.time_maa_{name}" for name in "wkvrg"), "att.time_maa_w1", "att.time_maa_w2",
         "att.time_decay", "att.time_decay_w1", "att.time_decay_w2", "att.time_faaaa", "ffn.time_maa_k",
         "ffn.time_maa_r", "att.state_offset"),
        (*(f"att.{name}" for name in ("receptance", "key", "value", "gate", "output")),
         *(f"ffn.{name}" for name in ("key", "receptance", "value"))),
    ),
    "x070": _Family(
        7,
        ("decay_rank", "rate_rank", "value_rank", "gate_rank"),
        (*(f"att.x_{name}" for name in "rwkvag"), *(f"att.{name}{i}" for name in "wa" for i in range(3)), "att.g1",
         "att.g2", *(f"att.v{i}" for i in range(3)), "att.k_k", "att.k_a", "att.r_k", "ffn.x_k",
         "att.state_offset"),
        (*(f"att.{name}" for name in ("receptance", "key", "value", "output")), "ffn.key", "ffn.value"),
    ),
}  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("version", "layers", "C", "H", "ffn", "vocab")),
        ("ranks", c_int64 * 4),
        ("type", c_int64),
        ("layer", c_void_p),
        ("emb", c_void_p),
        ("ln0", _Norm),
        ("ln_out", _Norm),
        ("head", _Matrix),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", c_int64),
        ("slots", c_int64),
        *((name, c_void_p) for name in ("ids", "slot", "wkv", "att_shift", "ffn_shift", "logits", "scratch")),
    )


class Stepper:
    """The native step of one model's weights, which it points to and keeps."""

    def __init__(
        self, library: ctypes.CDLL, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], family: _Family
    ) -> None:
        self._library = library
        self._tensors = {name: _keys_first(x) if name.endswith(_OFFSET) else x for name, x in tensors.items()}
        library.rwkv_cpu_scratch.restype = c_int64
        self._dtype = tensors["emb.weight"].dtype
        self._sizes = tuple(sizes[name] for name in ("n_layer", "C", "H", "ffn", "vocab"))
        kind = family.layer()
        self._layers = (kind * sizes["n_layer"])(*(self._layer(kind, family, i) for i in range(sizes["n_layer"])))
        ranks = (c_int64 * 4)(*(sizes[name] for name in family.ranks))
        norms = self._norm("blocks.0.ln0"), self._norm("ln_out")
        self._model = _Model(
            family.version, *self._sizes, ranks, _TYPES[self._dtype], ctypes.addressof(self._layers),
            self._at("emb.weight"), *norms, self._matrix("head"),
        )  # fmt: skip

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], family: str) -> "Stepper | None":
        """From a model's tensors by their published names, its sizes and its family, "x060" or "x070"; None where the
        PyTorch form must serve.

        Served are frozen weights on a CPU, float32 or bfloat16, matrices also int8 with a `scale` (outputs,) beside
        each; without a compiler none are, with a warning.
        """
        dtype = tensors["emb.weight"].dtype
        one_type = all(x.dtype == _type_of(name, tensors, dtype) for name, x in tensors.items())
        usable = all(x.device.type == "cpu" and x.is_contiguous() and not x.requires_grad for x in tensors.values())
        if not usable or not one_type or dtype not in (torch.float32, torch.bfloat16):
            return None
        if sizes["C"] // sizes["H"] not in native.HEAD_SIZES or sizes["ffn"] % 16:
            return None
        library = native.cpu_library()
        return None if library is None else cls(library, tensors, sizes, _FAMILIES[family])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy's weights lie elsewhere

    def step(self, ids: Tensor, slots: Tensor | None, wkv: Tensor, att_shift: Tensor, ffn_shift: Tensor) -> Tensor:
        """Logits (n, V) in float32 of the tokens `ids` (n,), and the state in place; as RWKV.step."""
        n_layer, C, H, _, vocab = self._sizes
        n, B = len(ids), wkv.shape[1]
        wanted = ((n_layer, B, H, C // H, C // H), torch.float32), *(((n_layer, B, C), self._dtype),) * 2
        for x, (shape, dtype) in zip((wkv, att_shift, ffn_shift), wanted, strict=True):
            if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
                raise ValueError(f"step: state must be dense {dtype} {shape}, found {x.dtype} {tuple(x.shape)} with "
                                 f"strides {x.stride()}")  # fmt: skip
        ids, slots = ids.long().contiguous(), None if slots is None else slots.long().contiguous()
        logits = torch.empty(n, vocab)
        scratch = torch.empty(self._library.rwkv_cpu_scratch(byref(self._model), c_int64(n)), dtype=torch.uint8)
        slots_at = None if slots is None else slots.data_ptr()
        places = (x.data_ptr() for x in (wkv, att_shift, ffn_shift, logits, scratch))
        step = _Step(n, B, ids.data_ptr(), slots_at, *places)
        if self._library.rwkv_cpu_step(byref(self._model), byref(step), c_int(torch.get_num_threads())):
            raise IndexError(
                f"step: expected ids below {vocab} and slots below {B}, a slot's tokens together, found ids "
                f"{ids.tolist()} and slots {None if slots is None else slots.tolist()}"
            )
        return logits

    def _at(self, name: str) -> int | None:
        return self._tensors[name].data_ptr() if name in self._tensors else None

    def _norm(self, name: str) -> _Norm:
        return _Norm(self._at(f"{name}.weight"), self._at(f"{name}.bias"))

    def _matrix(self, name: str) -> _Matrix:
        weight, scale = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.scale")
        return _Matrix(weight.data_ptr(), None if scale is None else scale.data_ptr(), _TYPES[weight.dtype])

    def _layer(self, kind: type[ctypes.Structure], family: _Family, number: int) -> Any:
        block = f"blocks.{number}."
        return kind(
            *(self._norm(block + name) for name in _NORMS),
            *(self._at(block + name) for name in family.vectors),
            *(self._matrix(block + name) for name in family.matrices),
        )


def _keys_first(offset: Tensor) -> Tensor:
    """A state offset (H, values, keys) as the kernel reads it, (keys, C)."""
    return offset.permute(2, 0, 1).flatten(1).contiguous()


def _type_of(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """What a tensor's type must be in a model of `dtype`."""
    if f"{name.rpartition('.')[0]}.scale" not in tensors:
        return dtype
    return torch.float32 if name.endswith(".scale") else torch.int8
