"""RWKV-6's decoding step on a CPU as one native call: prepared once, then a few microseconds of Python a token."""

# L layers · B slots · n tokens · C channels = H heads · N head size · V vocabulary

import ctypes
from collections.abc import Mapping
from ctypes import byref, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.ops import native

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}
_NORMS = ("ln1", "ln2", "att.ln_x")
_VECTORS = (
    "att.time_maa_x", *(f"att.time_maa_{name}" for name in "wkvrg"), "att.time_maa_w1", "att.time_maa_w2",
    "att.time_decay", "att.time_decay_w1", "att.time_decay_w2", "att.time_faaaa", "ffn.time_maa_k", "ffn.time_maa_r",
)  # fmt: skip
_MATRICES = (
    *(f"att.{name}" for name in ("receptance", "key", "value", "gate", "output")),
    *(f"ffn.{name}" for name in ("key", "receptance", "value")),
)


class _Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("type", c_int64))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class _Layer(ctypes.Structure):
    """Rwkv6Layer of cuda/rwkv6.h, field by field."""

    _fields_ = (
        *((name, _Norm) for name in _NORMS),
        *((name, c_void_p) for name in _VECTORS),
        *((name, _Matrix) for name in _MATRICES),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layers", "C", "H", "ffn", "mix_rank", "decay_rank", "vocab", "type")),
        ("layer", ctypes.POINTER(_Layer)),
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
    """A model's weights as the native step reads them; holds the tensors that it points to."""

    def __init__(self, library: ctypes.CDLL, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self._library, self._tensors = library, tensors
        library.rwkv6_cpu_scratch.restype = c_int64
        self.dtype = tensors["emb.weight"].dtype
        self._layers = (_Layer * sizes["n_layer"])(*map(self._layer, range(sizes["n_layer"])))
        self._model = _Model(
            sizes["n_layer"], *(sizes[name] for name in ("C", "H", "ffn", "mix_rank", "decay_rank", "vocab")),
            _TYPES[self.dtype], self._layers, self._at("emb.weight"), self._norm("blocks.0.ln0"),
            self._norm("ln_out"), self._matrix("head"),
        )  # fmt: skip
        self._vocab = sizes["vocab"]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> "Stepper | None":
        """From a model's tensors by their published names; None where the PyTorch form must serve.

        That is: another device than a CPU, no compiler, other types than float32, bfloat16 and int8 for matrices,
        or sizes that the kernels do not have.
        """
        weights = dict(tensors)
        dtype, N = weights["emb.weight"].dtype, sizes["C"] // sizes["H"]
        fits = all(
            x.device.type == "cpu" and x.is_contiguous() and not x.requires_grad
            and (x.dtype == dtype or x.dtype == torch.int8 or name.endswith(".scale"))
            for name, x in weights.items()
        )  # fmt: skip
        if not fits or dtype not in _TYPES or N not in native.HEAD_SIZES or sizes["ffn"] % 16:
            return None
        library = native.cpu_library()
        return None if library is None else cls(library, weights, sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # pointers are of no use to a copy

    def step(self, ids: Tensor, slots: Tensor | None, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Logits (n, V) in float32 of tokens `ids` (n,); see RWKV6.step."""
        wkv, att_shift, ffn_shift = state
        n = len(ids)
        logits = torch.empty(n, self._vocab)
        scratch = torch.empty(self._library.rwkv6_cpu_scratch(byref(self._model), c_int64(n)), dtype=torch.uint8)
        step = _Step(
            n, wkv.shape[1], ids.data_ptr(), None if slots is None else slots.data_ptr(), wkv.data_ptr(),
            att_shift.data_ptr(), ffn_shift.data_ptr(), logits.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        if self._library.rwkv6_cpu_step(byref(self._model), byref(step), c_int(torch.get_num_threads())):
            raise IndexError("x")
        return logits

    def _at(self, name: str) -> int:
        return self._tensors[name].data_ptr()

    def _norm(self, name: str) -> _Norm:
        return _Norm(self._at(f"{name}.weight"), self._at(f"{name}.bias"))

    def _matrix(self, name: str) -> _Matrix:
        weight, scale = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.scale")
        return _Matrix(weight.data_ptr(), None if scale is None else scale.data_ptr(), _TYPES[weight.dtype])

    def _layer(self, number: int) -> Any:
        block = f"blocks.{number}."
        return _Layer(
            *(self._norm(block + name) for name in _NORMS),
            *(self._at(block + name) for name in _VECTORS),
            *(self._matrix(block + name) for name in _MATRICES),
        )
