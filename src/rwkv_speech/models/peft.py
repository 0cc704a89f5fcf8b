"""What a run trains of the frozen language model: low-rank updates of matrices (LoRA), norms, the mixes' own tensors,
or what each layer's r reads beside the state (a state offset).

The names are RWKV-PEFT's, `blocks.0.att.key.lora_A` and `lora_B` beside `blocks.0.att.key.weight`. Hugging Face's peft
is not used: it renames the frozen tensors, which files and the native step know by their published names.
Source: Hu et al. 2021 (arXiv:2106.09685).
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rwkv_speech.config import LORA, STATE_OFFSET
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import check_tensors, read_tensors
from rwkv_speech.models.linear import Linear
from rwkv_speech.models.rwkv import RWKV, Block

_UPDATE = re.compile(r"\.lora_[AB]$")
_NORMS = (nn.LayerNorm, nn.GroupNorm)
# As Hugging Face's peft writes them, of which RWKV-PEFT is made since 2025.
_PEFT_FILE, _PEFT_CONFIG, _PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


@dataclass(frozen=True)
class LoraSpec:
    """Updates of rank R, times alpha / R, of these matrices of each layer: config.LORA_TARGETS, separated by commas."""

    rank: int
    alpha: float
    targets: str
    dropout: float = 0.0

    @classmethod
    def of(cls, config: Any) -> "LoraSpec | None":
        """What the flags ask for; None without --peft lora, and of commands that have no such flag."""
        if getattr(config, "peft", "none") != LORA:
            return None
        return cls(config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_dropout)

    def is_like(self, other: "LoraSpec | None") -> bool:
        """Whether tensors of the one are those of the other; dropout is the training's alone."""
        return other is not None and (self.rank, self.alpha) == (other.rank, other.alpha) and self.names == other.names

    @property
    def names(self) -> set[str]:
        """The targets within a layer, as att.key."""
        return {name if "." in name else f"att.{name}" for name in self.targets.split(",")}


def tune(lm: RWKV, lora: LoraSpec | None, train_parts: str) -> None:
    """Let a frozen model learn these: in float32, and as yet without effect.

    Raises UserError for a target that models of this family do not have.
    """
    for layer in range(lm.sizes.n_layer if lora else 0):
        assert lora is not None
        for target in sorted(lora.names):
            module = dict(lm.named_modules()).get(f"blocks.{layer}.{target}")
            if not isinstance(module, Linear):
                raise UserError(
                    f"--lora_targets: found {target.removeprefix('att.')}, which an {lm.SIZES.NAME} model has not, "
                    "expected matrices of its layers; leave it out"
                )
            module.add_lora(lora.rank, lora.alpha, lora.dropout)
    if STATE_OFFSET in train_parts.split(","):
        sizes, blocks = lm.sizes, cast(Iterable[Block], lm.blocks)
        for block in blocks:
            block.att.state_offset = nn.Parameter(torch.zeros(sizes.H, sizes.N, sizes.N, device=lm.emb.weight.device))
    for module, name in _parts(lm, train_parts):
        setattr(module, name, nn.Parameter(getattr(module, name).float()))


def tuned(lm: RWKV, train_parts: str) -> dict[str, nn.Parameter]:
    """What `tune` lets be trained, by its names in `lm`."""
    chosen = {id(getattr(module, name)) for module, name in _parts(lm, train_parts)}
    return {name: x for name, x in lm.named_parameters() if _UPDATE.search(name) or id(x) in chosen}


def settle(lm: RWKV, train_parts: str) -> None:
    """Make what was trained a part of the model, as it decodes fastest; updates of packed matrices stay beside them."""
    for matrix in (x for x in lm.modules() if isinstance(x, Linear) and x.lora_scale):
        if matrix.dtype is None:
            matrix.merge()
        else:
            matrix.lora_A, matrix.lora_B = (nn.Parameter(x.to(lm.dtype)) for x in (matrix.lora_A, matrix.lora_B))
    for module, name in _parts(lm, train_parts):
        setattr(module, name, nn.Parameter(getattr(module, name).to(lm.dtype), requires_grad=False))


@contextlib.contextmanager
def as_frozen(lm: RWKV) -> Iterator[None]:
    """Meanwhile the model has no low-rank updates and no state offsets; other parts stay as they were trained."""
    matrices = [(x, x.lora_scale) for x in lm.modules() if isinstance(x, Linear) and x.lora_scale]
    offsets = [(module, getattr(module, name)) for module, name in _parts(lm, STATE_OFFSET)]
    try:
        for matrix, _ in matrices:
            matrix.lora_scale = 0.0
        for module, _ in offsets:
            setattr(module, STATE_OFFSET, None)
        yield
    finally:
        for matrix, scale in matrices:
            matrix.lora_scale = scale
        for module, offset in offsets:
            setattr(module, STATE_OFFSET, offset)


def load_updates(lm: RWKV, path: str | Path, lora: LoraSpec, train_parts: str) -> None:
    """Begin with the LoRA of a file or folder of RWKV-PEFT's, in its own layout or Hugging Face's.

    Raises UserError for another rank, alpha or other tensors than the flags say.
    """
    path = Path(path)
    file, known = (path / _PEFT_FILE, _peft_config(path)) if path.is_dir() else (path, {})
    for flag, found, given in (("rank", known.get("r"), lora.rank), ("alpha", known.get("lora_alpha"), lora.alpha)):
        if found not in (None, given):
            raise UserError(f"--lora_{flag}: found {given:g}, but {path} has {found:g}; give --lora_{flag} {found:g}")
    tensors = {
        re.sub(r"(\.lora_[AB])(\.default)?\.weight$", r"\1", name.removeprefix(_PEFT_PREFIX)): x
        for name, x in read_tensors(file).items()
    }
    wanted = tuned(lm, train_parts)
    flags = f"--lora_rank {lora.rank} --lora_targets {lora.targets}" + f" --train_parts {train_parts}" * bool(
        train_parts
    )
    check_tensors(tensors, {name: x.shape for name, x in wanted.items()}, file, flags)
    take_over(wanted, tensors)


def take_over(into: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names."""
    with torch.no_grad():
        for name, x in tensors.items():
            into[name].copy_(x)


def _peft_config(folder: Path) -> dict[str, Any]:
    file = folder / _PEFT_CONFIG
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--lora_from: {file} cannot be read ({error}), expected what peft wrote beside {_PEFT_FILE}; name a "
            "folder that has both, or a .pth file"
        ) from error
    return {name: found[name] for name in ("r", "lora_alpha") if name in found}


def _parts(lm: RWKV, train_parts: str) -> Iterator[tuple[nn.Module, str]]:
    """The parameters that config.TRAIN_PARTS and a state offset mean: modules, and names in them."""
    kinds = train_parts.split(",")
    blocks: Any = lm.blocks
    mixes = [mix for block in blocks for mix in (block.att, block.ffn)] if "time" in kinds else []
    offsets = [block.att for block in blocks] if STATE_OFFSET in kinds else []
    norms = [x for x in lm.modules() if isinstance(x, _NORMS)] if "ln" in kinds else []
    for module in (*mixes, *norms):
        yield from ((module, name) for name, _ in module.named_parameters(recurse=False))
    yield from ((module, STATE_OFFSET) for module in offsets)
