"""Reads RWKV-6 base models: `.pth` (mapped, never unpickled) or safetensors, and accounts for every tensor."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rwkv_speech.errors import UserError, first_line


@dataclass(frozen=True)
class LMSizes:
    """The sizes that every family has."""

    vocab: int
    n_layer: int
    C: int
    H: int
    ffn: int

    @property
    def N(self) -> int:
        """Head size."""
        return self.C // self.H

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: str | Path) -> Self:
        """Derive the sizes from a base model's tensors; raises UserError if the file is not of this family."""
        try:
            return cls(**cls._found(tensors))
        except KeyError as error:
            raise UserError(
                f"{path}: not an {cls.NAME} model: no tensor {error} among {len(tensors)} tensors; take a file named "
                f"{cls.FILE}"
            ) from error

    NAME: ClassVar[str]
    FILE: ClassVar[str]

    @classmethod
    def _found(cls, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        vocab, channels = tensors["emb.weight"].shape
        layers = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        ffn = tensors["blocks.0.ffn.key.weight"].shape[0]
        return {"vocab": vocab, "n_layer": len(layers), "C": channels, "ffn": ffn}


@dataclass(frozen=True)
class RWKV6Sizes(LMSizes):
    """Every size of an x060 model, as its tensors' shapes give them."""

    mix_rank: int
    decay_rank: int

    NAME, FILE = "RWKV-6 (x060)", "RWKV-x060-World-*.pth"

    @classmethod
    def _found(cls, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        return super()._found(tensors) | {
            "H": tensors["blocks.0.att.time_faaaa"].shape[0],
            "mix_rank": tensors["blocks.0.att.time_maa_w1"].shape[1] // 5,
            "decay_rank": tensors["blocks.0.att.time_decay_w1"].shape[1],
        }


@dataclass(frozen=True)
class RWKV7Sizes(LMSizes):
    """Every size of an x070 model; the ranks are those of decay, in-context learning rate, value mix and gate."""

    decay_rank: int
    rate_rank: int
    value_rank: int  # 0 of a single layer, which has no value mix
    gate_rank: int

    NAME, FILE = "RWKV-7 (x070)", "RWKV-x070-World-*.pth or rwkv7-g1*.pth"

    @classmethod
    def _found(cls, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        found, att = super()._found(tensors), "blocks.0.att."
        return found | {
            "H": tensors[f"{att}r_k"].shape[0],
            "decay_rank": tensors[f"{att}w1"].shape[1],
            "rate_rank": tensors[f"{att}a1"].shape[1],
            "value_rank": tensors["blocks.1.att.v1"].shape[1] if found["n_layer"] > 1 else 0,
            "gate_rank": tensors[f"{att}g1"].shape[1],
        }


# A tensor that each family has and the ones after it in this list have not.
_FAMILIES = (
    ("x070", "blocks.0.att.r_k"),
    ("x060", "blocks.0.att.time_maa_w1"),
    ("x052", "blocks.0.att.time_faaaa"),
    ("x04", "blocks.0.att.time_first"),
)


def open_base(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """A base model's family, such as "x060", and its mapped tensors; raises UserError for one that is not known."""
    tensors = read_tensors(path)
    family = next((name for name, key in _FAMILIES if key in tensors), None)
    if family is None:
        raise UserError(
            f"{path}: not an RWKV model: none of its {len(tensors)} tensors tells a family; take a file named "
            f"{RWKV6Sizes.FILE}, {RWKV7Sizes.FILE}"
        )
    return family, tensors


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a `.pth` or `.safetensors` file, mapped into memory; raises UserError if that cannot be done."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; put the weights there or give another path")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as {'safetensors' if path.suffix == '.safetensors' else 'a torch zip of tensors'} "
            f"({first_line(error)}); download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise UserError(f"{path}: expected a dictionary of tensors, found {type(tensors).__name__}")
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: str | Path, name: str) -> None:
    """Raises one UserError that lists every missing, unknown or misshapen tensor."""
    faults = [f"missing {key}, expected shape {tuple(shape)}" for key, shape in shapes.items() if key not in tensors]
    faults += [f"unknown {key}, found shape {tuple(x.shape)}" for key, x in tensors.items() if key not in shapes]
    faults += [
        f"{key}: found shape {tuple(x.shape)}, expected {tuple(shapes[key])}"
        for key, x in tensors.items()
        if key in shapes and x.shape != shapes[key]
    ]
    if faults:
        raise UserError("\n  ".join([f"{path}: {len(faults)} tensors do not fit {name}:", *faults[:20]]))
