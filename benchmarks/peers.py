"""Other implementations of WKV-6 and of the whole model that ours is measured against, called as they are installed."""

# B batch · T time · H heads · N head size

import ast
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor


def pip_rwkv() -> Callable[[list[Tensor]], Tensor]:
    """The recurrence over a prompt as pip `rwkv` runs it: the loop over tokens, cut out of the installed source.

    Takes r, k, v, w (1, T, H, N), u (H, N), state (1, H, N, N), all float32; gives y (T, H, N).
    """
    os.environ.setdefault("RWKV_JIT_ON", "0")
    os.environ.setdefault("RWKV_CUDA_ON", "0")
    os.environ.setdefault("RWKV_V7_ON", "0")
    code = _pip_loop("att_seq_v6_0")

    def run(inputs: list[Tensor]) -> Tensor:
        r, k, v, w, u, state = inputs
        T, H, N = r.shape[1:]
        names: dict[str, Any] = {
            "r": r[0].transpose(0, 1),
            "k": k[0].permute(1, 2, 0),
            "v": v[0].transpose(0, 1),
            "w": torch.exp(-torch.exp(w[0])).view(T, H, N, 1),
            "t_first": u.view(H, N, 1),
            "s": state[0].transpose(1, 2),
            "T": T,
            "out": torch.empty(T, H, N),
            "matmul": torch.matmul,  # what its own `matmul` comes down to in float32
        }
        exec(code, names)
        out: Tensor = names["out"]
        return out

    return run


def pip_rwkv7() -> Callable[[list[Tensor]], Tensor]:
    """The same of RWKV-7; takes r, w, k, v, a, b (1, T, H, N), state (1, H, N, N), all float32; gives y (T, H N)."""
    code = _pip_loop("RWKV_x070_TMix_seq")

    def run(inputs: list[Tensor]) -> Tensor:
        r, w, k, v, a, b, state = inputs
        T, H, N = r.shape[1:]
        names: dict[str, Any] = {
            **{name: x[0].flatten(1) for name, x in (("r", r), ("k", k), ("v", v), ("kk", -a))},
            "w": torch.exp(-torch.exp(w[0])).flatten(1),
            "a": (b / -a)[0].flatten(1),  # it multiplies by kk itself
            "state": state[0],
            **{"T": T, "H": H, "N": N, "xx": torch.empty(T, H * N), "x": r, "torch": torch},
        }
        exec(code, names)
        y: Tensor = names["xx"]
        return y

    return run


def _pip_loop(function: str) -> CodeType:
    """A function's loop over tokens, cut out of the installed source; of several definitions of the one with it."""
    spec = importlib.util.find_spec("rwkv")
    assert spec is not None and spec.origin is not None, "pip install -r requirements.txt"
    path = Path(spec.origin).parent / "model.py"
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    wholes = [node for node in functions if node.name == function]
    loop = next(node for whole in wholes for node in whole.body if isinstance(node, ast.For))
    return compile(ast.Module([loop], []), str(path), "exec")


def pip_rwkv_model(path: Path, strategy: str) -> Any:
    """pip's whole model from a `.pth` file: `forward(ids, state)` -> logits (V,) of the last token, and the state."""
    # It reads these when it is imported; its compiled form is the faster one.
    os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0", RWKV_V7_ON="0")
    from rwkv.model import RWKV

    return RWKV(str(path.with_suffix("")), strategy, verbose=False)


def flash_linear_attention() -> Callable[[list[Tensor]], tuple[Tensor, Tensor]] | None:
    """`chunk_rwkv6` of flash-linear-attention, taking and giving what `wkv6` does; None if it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.rwkv6 import chunk_rwkv6

    def run(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        r, k, v, w, u, state = inputs
        # Its state is [key, value], its w the log decay, its scale not 1 by default.
        y, last = chunk_rwkv6(
            r, k, v, -torch.exp(w.float()), u, scale=1.0, initial_state=state.transpose(2, 3), output_final_state=True
        )
        return y, last.transpose(2, 3)

    return run
