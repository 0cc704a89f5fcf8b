"""The native kernels as PyTorch sees them: which one serves a tensor, and calls through a C interface."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import ctypes
import functools
import itertools
import struct
import threading
import warnings
from abc import ABC, abstractmethod
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from rwkv_speech.config import KERNEL_FORMS
from rwkv_speech.errors import UserError
from rwkv_speech.ops import build, wkv6_chunked, wkv7_chunked

HEAD_SIZES = (32, 64, 128)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GENERATIONS = {"auto": 1, "steps": 1, "tiles": 2}
_MOST_TOKENS = 2**31 - 64  # positions are 32 bits wide
_MOST_TIME_STRIDE = 2**24
_MOST_KEPT = 2**26  # bytes of scratch that a thread keeps between calls on a CPU
_TOKENS = ("r", "k", "v", "w", "a", "b")  # what each token has: in WKV-6 no a and b

Inputs = wkv6_chunked.Inputs | wkv7_chunked.Inputs


def kernels_for(r: Tensor, form: str = "auto") -> "Kernels | None":
    """The kernels of WKV-6 or WKV-7 for tensors like r (..., N); None where only the PyTorch form serves.

    auto   the CPU kernel or the CUDA kernel of the first generation; on a CPU without a compiler, with a warning,
           the chunked PyTorch form
    torch  the chunked PyTorch form
    steps  as auto; tiles: WKV-6's CUDA kernel of the second generation (tensor cores)

    Raises UserError for another form, and if a GPU's kernel cannot be built.
    """
    if (generation := _GENERATIONS.get(form)) is None:
        if form not in KERNEL_FORMS:
            raise UserError(f"--wkv6: found {form!r}, expected one of {', '.join(KERNEL_FORMS)}")
        return None
    if r.dtype not in _TYPES or r.shape[-1] not in HEAD_SIZES:
        return None
    if r.is_cuda:
        return _cuda(_architecture(r.device.index), generation)
    return _cpu() if r.is_cpu else None


def cpu_library() -> ctypes.CDLL | None:
    """The library of the CPU kernels; without a compiler None, with a warning."""
    kernels = _cpu()
    return None if kernels is None else kernels.library


# WkvProblem of cuda/wkv.h, field by field: a tensor is its address and three strides, a state two.
_FIELDS = {
    **dict.fromkeys(("batch", "tokens", "heads", "head_size", "sequences"), "q"),
    **dict.fromkeys(("version", "type", "decay_type", "bonus_type", "need_du"), "i"),
    **dict.fromkeys(("bounds", "order", "u"), "q"),
    **dict.fromkeys(_TOKENS, "4q"),
    "state": "3q",
    "y": "4q",
    "last": "3q",
    "dy": "4q",
    "dlast": "3q",
    **dict.fromkeys((f"d{name}" for name in _TOKENS), "4q"),
    "du": "q",
    "dstate": "3q",
    "scratch": "q",
}
_LAYOUT = struct.Struct("@" + "".join(_FIELDS.values()))
_SIZES = [int(code[:-1] or 1) for code in _FIELDS.values()]
_PLACES = dict(zip(_FIELDS, itertools.accumulate(_SIZES, initial=0), strict=False))


@functools.lru_cache(maxsize=256)
def _dense(
    fields: tuple[str, ...], shape: torch.Size, sequences: int, dtype: torch.dtype, w: torch.dtype, u: torch.dtype
) -> tuple[list[int], list[tuple[str, int, torch.dtype]]]:
    """The values of a WkvProblem of dense tensors, but for their addresses; each input's name, place and type."""
    B, T, H, N = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    if max(B * T, sequences) > _MOST_TOKENS:
        raise ValueError(f"wkv: {B} x {T} tokens in {sequences} sequences, expected at most {_MOST_TOKENS}")
    wide = {name: dtype if given == dtype else torch.float32 for name, given in (("w", w), ("u", u))}
    values = [B, T, H, N, sequences, 6 if "u" in fields else 7, *(_TYPES[x] for x in (dtype, *wide.values()))]
    values += [0] * (sum(_SIZES) - len(values))
    for name, at in _PLACES.items():
        if _FIELDS[name] == "4q":
            values[at + 1 : at + 4] = T * H * N, H * N, N
        elif _FIELDS[name] == "3q":
            values[at + 1 : at + 3] = H * N * N, N * N
    types = dict.fromkeys(fields, dtype) | wide | {"state": torch.float32}
    return values, [(name, _PLACES[name], types[name]) for name in fields]


def _problem(x: Inputs, cu_seqlens: Tensor | None = None) -> tuple[list[int], list[Tensor]]:
    """The values of a WkvProblem with these inputs, and the tensors that it points to, which must outlive the call.

    Those are first the inputs in their order, as the kernels can read them.
    """
    r, w = x.r, x.w
    shape, dtype = r.shape, r.dtype
    constants, inputs = _dense(x._fields, shape, x.state.size(0), dtype, w.dtype, getattr(x, "u", w).dtype)
    values, kept = constants.copy(), list(x)
    for i, (name, at, kind) in enumerate(inputs):
        part = kept[i]
        values[at] = address = part.data_ptr()
        if address % 16 or part.dtype != kind or not part.is_contiguous():
            kept[i] = _readable(values, name, part.to(kind))
    if cu_seqlens is not None:
        kept.append(cu_seqlens.to(torch.int64).contiguous())
        _point(values, "bounds", kept[-1])
        if r.is_cuda:
            kept.append(torch.empty(x.state.size(0), dtype=torch.int32, device=r.device))
            _point(values, "order", kept[-1])
    return values, kept


def _readable(values: list[int], name: str, x: Tensor) -> Tensor:
    """x as the kernels can read it; its address and strides are noted."""
    if name == "u":
        x = x.contiguous()
        _point(values, name, x)
    else:
        x = _matrices(x) if name == "state" else _rows(x)
        _strided(values, name, x)
    return x


def _point(values: list[int], name: str, x: Tensor) -> None:
    values[_PLACES[name]] = x.data_ptr()


def _strided(values: list[int], name: str, x: Tensor) -> None:
    at, strides = _PLACES[name], x.stride()
    if _FIELDS[name] == "3q":
        values[at : at + 3] = x.data_ptr(), *strides[:2]
    else:  # (B, T, H, N), or (B, H, N) of one token each
        values[at : at + 4] = x.data_ptr(), strides[0], strides[-3] if len(strides) == 4 else 0, strides[-2]


def _rows(x: Tensor) -> Tensor:
    """x itself if the kernels can read it, which they do by 16 bytes, else a dense copy."""
    if x.data_ptr() % 16 == 0 and (x.is_contiguous() or _fit(x.stride())):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _fit(strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 and all(x % 8 == 0 for x in strides[:-1]) and strides[1] < _MOST_TIME_STRIDE


def _matrices(state: Tensor) -> Tensor:
    """`state` itself if the kernels can read it: matrices are dense (an expanded state is), else a dense copy."""
    sequence, head, value, key = state.stride()
    dense = value == state.shape[-1] and key == 1
    aligned = sequence % 4 == 0 and head % 4 == 0 and state.data_ptr() % 16 == 0
    return state if dense and aligned else state.clone(memory_format=torch.contiguous_format)


class Kernels(ABC):
    """The kernels of one device, in one compiled library; the two differ in how they are called."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    @abstractmethod
    def _run(self, name: str, values: list[int], device: torch.device) -> None:
        """Call the kernel of this name."""

    @abstractmethod
    def _scratch(self, values: list[int], device: torch.device) -> Tensor:
        """What it needs beside its inputs and results, 64 bytes more."""

    def forward(self, x: Inputs, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and the last state, as `wkv6` or `wkv7`."""
        values, _kept = _problem(x, cu_seqlens)
        y = torch.empty_like(x.r, memory_format=torch.contiguous_format)
        last = torch.empty_like(x.state, memory_format=torch.contiguous_format)
        _point(values, "y", y)
        _point(values, "last", last)
        self._run("forward", values, x.r.device)
        return y, last

    def backward(
        self, dy: Tensor, dlast: Tensor, x: Inputs, cu_seqlens: Tensor | None, need_du: bool = False
    ) -> dict[str, Tensor]:
        """The gradients of all inputs by name, that of u empty unless needed."""
        values, kept = _problem(x, cu_seqlens)
        dy, dlast = _rows(dy.to(x.r.dtype)), _matrices(dlast.float())
        _strided(values, "dy", dy)
        _strided(values, "dlast", dlast)
        found = {}
        for name, part in zip(x._fields, kept, strict=False):
            # Of u each sequence's part by itself: their sum does not depend on which block ends first.
            shape = part.shape if name != "u" else x.state.shape[:3] if need_du else (0,)
            found[name] = torch.empty(shape, dtype=torch.float32 if name == "u" else part.dtype, device=part.device)
            _point(values, f"d{name}", found[name])
        values[_PLACES["need_du"]] = need_du
        scratch = self._scratch(values, x.r.device)
        values[_PLACES["scratch"]] = -(-scratch.data_ptr() // 64) * 64
        self._run("backward", values, x.r.device)
        if "u" in found and need_du:
            found["u"] = found["u"].sum(0)
        return {name: gradient.to(getattr(x, name).dtype) for name, gradient in found.items()}

    def step(self, x: Inputs) -> Tensor:
        """y (B, H, N) of one token in each slot, given as (B, H, N); the dense state is updated in place."""
        values, kept = _problem(x)
        y = torch.empty_like(x.r, memory_format=torch.contiguous_format)
        _point(values, "y", y)
        self._run("step", values, x.r.device)
        if (state := kept[-1]) is not x.state:
            x.state.copy_(state)
        return y


class _CpuKernels(Kernels):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.library.wkv_cpu_scratch.restype = c_int64
        self._calls = {name: getattr(self.library, f"wkv_cpu_{name}") for name in ("forward", "backward", "step")}
        for call in (self.library.wkv_cpu_scratch, *self._calls.values()):
            call.argtypes = [c_char_p, c_int]
        self._kept = threading.local()  # new memory costs a page fault per 4 KiB

    def _run(self, name: str, values: list[int], device: torch.device) -> None:
        self._calls[name](_LAYOUT.pack(*values), torch.get_num_threads())

    def _scratch(self, values: list[int], device: torch.device) -> Tensor:
        size = self.library.wkv_cpu_scratch(_LAYOUT.pack(*values), torch.get_num_threads()) + 64
        kept: Tensor | None = getattr(self._kept, "scratch", None)
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=torch.uint8)
            if size <= _MOST_KEPT:
                self._kept.scratch = kept
        return kept


class _CudaKernels(Kernels):
    def __init__(self, path: Path, generation: int) -> None:
        super().__init__(path)
        self._generation = generation
        library = self.library
        library.wkv_cuda_scratch.restype = c_int64
        library.wkv_cuda_scratch.argtypes = [c_char_p, c_int]
        library.wkv_cuda_error.restype = c_char_p
        self._calls = {name: getattr(library, f"wkv_cuda_{name}") for name in ("forward", "backward", "step")}
        for call in self._calls.values():
            call.argtypes = [c_char_p, c_int, c_void_p]

    def _run(self, name: str, values: list[int], device: torch.device) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            code = self._calls[name](_LAYOUT.pack(*values), self._generation, stream)
        if code:
            message = self.library.wkv_cuda_error(c_int(code)).decode()
            raise RuntimeError(f"wkv: the CUDA kernel for {name} failed on {device}: {message}")

    def _scratch(self, values: list[int], device: torch.device) -> Tensor:
        size = self.library.wkv_cuda_scratch(_LAYOUT.pack(*values), self._generation) + 64
        return torch.empty(size, dtype=torch.uint8, device=device)


@functools.cache
def _architecture(device: int) -> str:
    return "{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _cuda(architecture: str, generation: int) -> Kernels:
    path = build.prebuilt("libwkv_cuda.so") or build.compiled(build.cuda_library([architecture]))
    return _CudaKernels(path, generation)


@functools.cache
def _cpu() -> Kernels | None:
    try:
        return _CpuKernels(build.prebuilt("libwkv_cpu.so") or build.compiled(build.cpu_library()))
    except UserError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{reason}; until then the PyTorch form serves, slower", stacklevel=2)
        return None
