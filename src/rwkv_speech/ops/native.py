"""The native kernels as PyTorch sees them: which one serves a tensor, and calls through a C interface."""

# B batch · T time · H heads · N head size · S sequences of a packed batch

import ctypes
import functools
import warnings
from abc import ABC, abstractmethod
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
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
        return _cuda("{}{}".format(*torch.cuda.get_device_capability(r.device)), _GENERATIONS[form])
    return _cpu() if r.device.type == "cpu" else None


def cpu_library() -> ctypes.CDLL | None:
    """The library of the CPU kernels; without a compiler None, with a warning."""
    kernels = _cpu()
    return None if kernels is None else kernels.library


class _Tokens(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch", c_int64), ("time", c_int64), ("head", c_int64))


class _State(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("sequence", c_int64), ("head", c_int64))


class _Problem(ctypes.Structure):
    """WkvProblem of cuda/wkv.h, field by field, and the tensors that it points to, which must outlive the call."""

    inputs: dict[str, Tensor]
    kept_bounds: Tensor | None
    _fields_ = (
        *((name, c_int64) for name in ("batch", "tokens", "heads", "head_size", "sequences")),
        *((name, c_int32) for name in ("version", "type", "decay_type", "bonus_type", "need_du")),
        ("bounds", c_void_p),
        ("order", c_void_p),
        ("u", c_void_p),
        *((name, _Tokens) for name in _TOKENS),
        ("state", _State),
        ("y", _Tokens),
        ("last", _State),
        ("dy", _Tokens),
        ("dlast", _State),
        *((f"d{name}", _Tokens) for name in _TOKENS),
        ("du", c_void_p),
        ("dstate", _State),
        ("scratch", c_void_p),
    )


def _rows(x: Tensor) -> Tensor:
    """x itself if the kernels can read it, which they do by 16 bytes, else a dense copy."""
    aligned = all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _matrices(state: Tensor) -> Tensor:
    """`state` itself if its N x N matrices are dense (an expanded state is read in place), else a dense copy."""
    return state if state.stride()[2:] == (state.shape[-1], 1) else state.contiguous()


def _tokens(x: Tensor) -> _Tokens:
    return _Tokens(x.data_ptr(), *x.stride()[:3])


def _state(x: Tensor) -> _State:
    return _State(x.data_ptr(), *x.stride()[:2])


def _problem(x: Inputs, cu_seqlens: Tensor | None) -> _Problem:
    B, T, H, N = x.r.shape
    if max(B * T, len(x.state)) > _MOST_TOKENS:
        raise ValueError(f"wkv: {B} x {T} tokens in {len(x.state)} sequences, expected at most {_MOST_TOKENS}")
    inputs = {name: _readable(name, part, x.r.dtype) for name, part in x._asdict().items()}
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    problem = _Problem(B, T, H, N, len(x.state), type=_TYPES[x.r.dtype], decay_type=_TYPES[inputs["w"].dtype])
    problem.version = 6 if "u" in inputs else 7
    if "u" in inputs:
        problem.u, problem.bonus_type = inputs["u"].data_ptr(), _TYPES[inputs["u"].dtype]
    if bounds is not None:
        problem.bounds = bounds.data_ptr()
    for name in _TOKENS:
        if name in inputs:
            setattr(problem, name, _tokens(inputs[name]))
    problem.state = _state(inputs["state"])
    problem.inputs, problem.kept_bounds = inputs, bounds
    return problem


def _readable(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """An input as the kernels read it: the decay and the bonus may be wider than the rest."""
    if name == "state":
        return _matrices(x)
    wide = x if x.dtype in (dtype, torch.float32) else x.float()
    return wide.contiguous() if name == "u" else _rows(wide if name == "w" else x.to(dtype))


class Kernels(ABC):
    """The kernels of one device, in one compiled library; the two differ in how they are called."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    @abstractmethod
    def _run(self, name: str, problem: _Problem, device: torch.device) -> None:
        """Call the kernel of this name."""

    @abstractmethod
    def _scratch_bytes(self, problem: _Problem) -> int:
        """What it needs beside its inputs and results."""

    def forward(self, x: Inputs, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and the last state, as `wkv6` or `wkv7`."""
        problem = _problem(x, cu_seqlens)
        y, last = x.r.new_empty(x.r.shape), x.state.new_empty(x.state.shape)
        problem.y, problem.last = _tokens(y), _state(last)
        self._run("forward", problem, y.device)
        return y, last

    def backward(
        self, dy: Tensor, dlast: Tensor, x: Inputs, cu_seqlens: Tensor | None, need_du: bool = False
    ) -> dict[str, Tensor]:
        """The gradients of all inputs by name, that of u empty unless needed."""
        problem = _problem(x, cu_seqlens)
        dy, dlast = _rows(dy.to(x.r.dtype)), _matrices(dlast.float())
        found = {name: torch.empty(part.shape, dtype=part.dtype, device=part.device)
                 for name, part in problem.inputs.items()}  # fmt: skip
        # Each sequence's part by itself: their sum does not depend on which block ends first.
        du = x.state.new_empty(x.state.shape[:3] if need_du else (0,))
        problem.dy, problem.dlast, problem.dstate = _tokens(dy), _state(dlast), _state(found["state"])
        for name in _TOKENS:
            if name in found:
                setattr(problem, f"d{name}", _tokens(found[name]))
        problem.du, problem.need_du = du.data_ptr(), need_du
        scratch = torch.empty(self._scratch_bytes(problem) + 64, dtype=torch.uint8, device=dy.device)
        problem.scratch = -(-scratch.data_ptr() // 64) * 64
        self._run("backward", problem, dy.device)
        if "u" in found:
            found["u"] = du.sum(0) if need_du else du
        return {name: gradient.to(getattr(x, name).dtype) for name, gradient in found.items()}

    def step(self, x: Inputs) -> Tensor:
        """y (B, 1, H, N) of one token in each slot; the state is updated in place."""
        problem = _problem(x, None)
        y = x.r.new_empty(x.r.shape)
        problem.y = _tokens(y)
        self._run("step", problem, y.device)
        return y


class _CpuKernels(Kernels):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.library.wkv_cpu_scratch.restype = c_int64

    def _run(self, name: str, problem: _Problem, device: torch.device) -> None:
        getattr(self.library, f"wkv_cpu_{name}")(byref(problem), c_int(torch.get_num_threads()))

    def _scratch_bytes(self, problem: _Problem) -> int:
        return int(self.library.wkv_cpu_scratch(byref(problem), c_int(torch.get_num_threads())))


class _CudaKernels(Kernels):
    def __init__(self, path: Path, generation: int) -> None:
        super().__init__(path)
        self._generation = generation
        library = self.library
        library.wkv_cuda_scratch.restype = c_int64
        library.wkv_cuda_error.restype = c_char_p
        for name in ("forward", "backward", "step"):
            getattr(library, f"wkv_cuda_{name}").argtypes = [POINTER(_Problem), c_int, c_void_p]

    def _run(self, name: str, problem: _Problem, device: torch.device) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            code = getattr(self.library, f"wkv_cuda_{name}")(byref(problem), self._generation, stream)
        if code:
            message = self.library.wkv_cuda_error(c_int(code)).decode()
            raise RuntimeError(f"wkv: the CUDA kernel for {name} failed on {device}: {message}")

    def _scratch_bytes(self, problem: _Problem) -> int:
        return int(self.library.wkv_cuda_scratch(byref(problem), c_int(self._generation)))


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
