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
    if form not in KERNEL_FORMS:
        raise UserError(f"--wkv6: found {form!r}, expected one of {', '.join(KERNEL_FORMS)}")
    if form == "torch" or r.dtype not in _TYPES or r.shape[-1] not in HEAD_SIZES:
        return None
    if r.device.type == "cuda":
        return _cuda(_architecture(r.device.index), _GENERATIONS[form])
    return _cpu() if r.device.type == "cpu" else None


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


class _Problem:
    """The numbers of a WkvProblem, and the tensors that they point to, which must outlive the call."""

    def __init__(self, x: Inputs, cu_seqlens: Tensor | None, in_place: bool = False) -> None:
        r, state = x.r, x.state
        B, T, H, N = r.shape if r.dim() == 4 else (len(r), 1, *r.shape[1:])
        sequences = len(state)
        if max(B * T, sequences) > _MOST_TOKENS:
            raise ValueError(f"wkv: {B} x {T} tokens in {sequences} sequences, expected at most {_MOST_TOKENS}")
        self.device, dtype = r.device, r.dtype
        self.values = values = [0] * sum(_SIZES)
        self.inputs: dict[str, Tensor] = {}
        inputs = self.inputs
        for name, part in zip(x._fields, x, strict=True):
            if name == "state":
                inputs[name] = part if in_place else _matrices(part)
                self.state("state", inputs[name])
            elif name == "u":
                inputs[name] = _typed(name, part, dtype).contiguous()
            else:
                inputs[name] = _rows(_typed(name, part, dtype))
                self.tokens(name, inputs[name])
        values[:7] = B, T, H, N, sequences, 7, _TYPES[dtype]
        values[_PLACES["decay_type"]] = _TYPES[inputs["w"].dtype]
        if "u" in inputs:
            values[_PLACES["version"]] = 6
            values[_PLACES["bonus_type"]] = _TYPES[inputs["u"].dtype]
            self.point("u", inputs["u"])
        if cu_seqlens is not None:
            self.bounds = cu_seqlens.to(torch.int64).contiguous()
            self.point("bounds", self.bounds)
            if self.device.type == "cuda":
                self.order = torch.empty(sequences, dtype=torch.int32, device=self.device)
                self.point("order", self.order)

    def point(self, name: str, x: Tensor) -> None:
        self.values[_PLACES[name]] = x.data_ptr()

    def tokens(self, name: str, x: Tensor) -> None:
        """(B, T, H, N), or (B, H, N) of one token each."""
        at, strides = _PLACES[name], x.stride()
        self.values[at : at + 4] = x.data_ptr(), strides[0], strides[1] if len(strides) == 4 else 0, strides[-2]

    def state(self, name: str, x: Tensor) -> None:
        at = _PLACES[name]
        self.values[at : at + 3] = x.data_ptr(), *x.stride()[:2]

    def packed(self) -> bytes:
        return _LAYOUT.pack(*self.values)


def _typed(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """An input in the type of r; the decay and the bonus may be wider."""
    if x.dtype == dtype or (x.dtype == torch.float32 and name in ("w", "u")):
        return x
    return x.float() if name in ("w", "u") else x.to(dtype)


def _rows(x: Tensor) -> Tensor:
    """x itself if the kernels can read it, which they do by 16 bytes, else a dense copy."""
    if x.data_ptr() % 16 == 0 and (x.is_contiguous() or _readable(x.stride())):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _readable(strides: tuple[int, ...]) -> bool:
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
    def _run(self, name: str, problem: _Problem) -> None:
        """Call the kernel of this name."""

    @abstractmethod
    def _scratch(self, problem: _Problem) -> Tensor:
        """What it needs beside its inputs and results, 64 bytes more."""

    def forward(self, x: Inputs, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and the last state, as `wkv6` or `wkv7`."""
        problem = _Problem(x, cu_seqlens)
        y = torch.empty(x.r.shape, dtype=x.r.dtype, device=problem.device)
        last = torch.empty(x.state.shape, dtype=torch.float32, device=problem.device)
        problem.tokens("y", y)
        problem.state("last", last)
        self._run("forward", problem)
        return y, last

    def backward(
        self, dy: Tensor, dlast: Tensor, x: Inputs, cu_seqlens: Tensor | None, need_du: bool = False
    ) -> dict[str, Tensor]:
        """The gradients of all inputs by name, that of u empty unless needed."""
        problem = _Problem(x, cu_seqlens)
        dy, dlast = _rows(dy.to(x.r.dtype)), _matrices(dlast.float())
        found = {name: torch.empty(part.shape, dtype=part.dtype, device=part.device)
                 for name, part in problem.inputs.items()}  # fmt: skip
        # Each sequence's part by itself: their sum does not depend on which block ends first.
        du = x.state.new_empty(x.state.shape[:3] if need_du else (0,))
        problem.tokens("dy", dy)
        problem.state("dlast", dlast)
        problem.state("dstate", found["state"])
        for name in _TOKENS:
            if name in found:
                problem.tokens(f"d{name}", found[name])
        problem.point("du", du)
        problem.values[_PLACES["need_du"]] = need_du
        scratch = self._scratch(problem)
        problem.values[_PLACES["scratch"]] = -(-scratch.data_ptr() // 64) * 64
        self._run("backward", problem)
        if "u" in found:
            found["u"] = du.sum(0) if need_du else du
        return {name: gradient.to(getattr(x, name).dtype) for name, gradient in found.items()}

    def step(self, x: Inputs) -> Tensor:
        """y (B, H, N) of one token in each slot, given as (B, H, N); the state is updated in place."""
        problem = _Problem(x, None, in_place=True)
        y = torch.empty(x.r.shape, dtype=x.r.dtype, device=problem.device)
        problem.tokens("y", y)
        self._run("step", problem)
        return y


class _CpuKernels(Kernels):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.library.wkv_cpu_scratch.restype = c_int64
        self._calls = {name: getattr(self.library, f"wkv_cpu_{name}") for name in ("forward", "backward", "step")}
        for call in (self.library.wkv_cpu_scratch, *self._calls.values()):
            call.argtypes = [c_char_p, c_int]
        self._kept = threading.local()  # new memory costs a page fault per 4 KiB

    def _run(self, name: str, problem: _Problem) -> None:
        self._calls[name](problem.packed(), torch.get_num_threads())

    def _scratch(self, problem: _Problem) -> Tensor:
        size = self.library.wkv_cpu_scratch(problem.packed(), torch.get_num_threads()) + 64
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

    def _run(self, name: str, problem: _Problem) -> None:
        device = problem.device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            code = self._calls[name](problem.packed(), self._generation, stream)
        if code:
            message = self.library.wkv_cuda_error(c_int(code)).decode()
            raise RuntimeError(f"wkv: the CUDA kernel for {name} failed on {device}: {message}")

    def _scratch(self, problem: _Problem) -> Tensor:
        size = self.library.wkv_cuda_scratch(problem.packed(), self._generation) + 64
        return torch.empty(size, dtype=torch.uint8, device=problem.device)


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
