"""Reads RWKV-6 base models: `.pth` (mapped, never unpickled) or safetensors, and accounts for every tensor."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rwkv_speech.errors import UserError, first_line


@dataclass(frozen=True)
class RWKV6Sizes:
    """Every size of an x060 model, as its tensors' shapes give them."""

    vocab: int
    n_layer: int
    C: int
    H: int
    ffn: int
    mix_rank: int
    decay_rank: int

    @property
    def N(self) -> int:
        """Head size."""
        return self.C // self.H

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: str | Path) -> "RWKV6Sizes":
        """Derive the sizes from a base model's tensors; raises UserError if the file is not an x060 model."""
        layers = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        try:
            vocab, channels = tensors["emb.weight"].shape
            return cls(
                vocab=vocab,
                n_layer=len(layers),
                C=channels,
                H=tensors["blocks.0.att.time_faaaa"].shape[0],
                ffn=tensors["blocks.0.ffn.key.weight"].shape[0],
                mix_rank=tensors["blocks.0.att.time_maa_w1"].shape[1] // 5,
                decay_rank=tensors["blocks.0.att.time_decay_w1"].shape[1],
            )
        except KeyError as error:
            raise UserError(
                f"{path}: not an RWKV-6 (x060) model: no tensor {error} among {len(tensors)} tensors; "
                "take a file named RWKV-x060-World-*.pth"
            ) from error


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
            "RWKV-x060-World-*.pth"
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


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: str | Path) -> None:
    """Raises one UserError that lists every missing, unknown or misshapen tensor."""
    faults = [f"missing {key}, expected shape {tuple(shape)}" for key, shape in shapes.items() if key not in tensors]
    faults += [f"unknown {key}, found shape {tuple(x.shape)}" for key, x in tensors.items() if key not in shapes]
    faults += [
        f"{key}: found shape {tuple(x.shape)}, expected {tuple(shapes[key])}"
        for key, x in tensors.items()
        if key in shapes and x.shape != shapes[key]
    ]
    if faults:
        raise UserError("\n  ".join([f"{path}: {len(faults)} tensors do not fit RWKV-6 (x060):", *faults[:20]]))
