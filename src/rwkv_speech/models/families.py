"""The families of language models: which class a base model's file or sizes ask for."""

from pathlib import Path

import torch

from rwkv_speech.errors import UserError
from rwkv_speech.models.base import LMSizes, open_base
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.rwkv7 import RWKV7

_FAMILIES: dict[str, type[RWKV]] = {family.FAMILY: family for family in (RWKV6, RWKV7)}


def read_lm(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    form: str = "auto",
    fuse: bool = False,
    quant: str = "",
) -> RWKV:
    """The language model of a file, of the family that it is of; raises UserError as RWKV.from_tensors."""
    family, tensors = open_base(path)
    return _class_of(family, path).from_tensors(tensors, path, dtype, device, form, fuse, quant)


def read_sizes(path: str | Path) -> LMSizes:
    """The sizes of a file's language model; raises UserError for a file of none that is known."""
    family, tensors = open_base(path)
    return _class_of(family, path).SIZES.of(tensors, path)


def lm_of(sizes: LMSizes) -> RWKV:
    """A language model of these sizes, without values."""
    family = next(family for family in _FAMILIES.values() if isinstance(sizes, family.SIZES))
    return family(sizes)


def _class_of(family: str, path: str | Path) -> type[RWKV]:
    if family not in _FAMILIES:
        known = " or ".join(family.SIZES.NAME for family in _FAMILIES.values())
        raise UserError(f"{path}: found an {family} model, expected {known}; give one with --load_model")
    return _FAMILIES[family]
