"""Checkpoints of the trained tensors: own files (safetensors with metadata) and published ones (`.pth`).

Both name the tensors alike: `language_model.blocks.{i}.att.time_state` (H, N, N) for layer i's initial state and
`speech_encoder.adapter.{0,2}.{weight,bias}` for the adapter.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.files import write_atomically
from rwkv_speech.models.base import read_tensors

FORMAT = "rwkv_speech-1"
BEST, LAST = "best.safetensors", "last.safetensors"
_STATE = re.compile(r"language_model\.blocks\.(\d+)\.att\.time_state")
_ADAPTER = "speech_encoder.adapter."


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was trained on: all that is needed to use it again."""

    base_model: str
    base_sha256: str
    encoder: str
    vocab_file: str
    n_layer: int
    n_embd: int
    stack: int
    adapter_hidden: int
    separator: str
    task: str = "asr"


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a checkpoint; `origin` is None for a published file, which does not say."""

    path: Path
    adapter: dict[str, Tensor]  # "0.weight", "0.bias", "2.weight", "2.bias"
    time_state: Tensor  # (L, H, N, N)
    origin: Origin | None
    ignored: tuple[str, ...]  # names of tensors in the file that are not trained ones
    metrics: dict[str, Any]


def named_tensors(adapter: Mapping[str, Tensor], time_state: Tensor) -> dict[str, Tensor]:
    """The trained tensors under their published names, on the CPU."""
    tensors = {f"language_model.blocks.{i}.att.time_state": layer for i, layer in enumerate(time_state)}
    tensors |= {_ADAPTER + name: tensor for name, tensor in adapter.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def save_trained(
    path: Path, adapter: Mapping[str, Tensor], time_state: Tensor, origin: Origin, metrics: Mapping[str, Any]
) -> None:
    """Write an own checkpoint, atomically."""
    metadata = {"format": FORMAT, "origin": json.dumps(asdict(origin)), "metrics": json.dumps(dict(metrics))}
    tensors = named_tensors(adapter, time_state)
    content = _ordered(save(tensors, metadata))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its header sorted: the same tensors and metadata are then the same bytes every time."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(ordered) > size:
        raise ValueError(f"a safetensors header of {size} bytes became {len(ordered)}")
    return content[:8] + ordered.ljust(size) + content[8 + size :]


def load_trained(path: str | Path) -> Trained:
    """Read an own checkpoint or a published `.pth` adapter file.

    Raises UserError naming the file if it holds no adapter or no initial state, or was written by another format.
    """
    path = Path(path)
    tensors = read_tensors(path)
    states = {int(m[1]): x for name, x in tensors.items() if (m := _STATE.fullmatch(name))}
    adapter = {name.removeprefix(_ADAPTER): x for name, x in tensors.items() if name.startswith(_ADAPTER)}
    if set(adapter) != {"0.weight", "0.bias", "2.weight", "2.bias"} or not states:
        raise UserError(
            f"{path}: not a checkpoint of an adapter and an initial state: found {len(states)} tensors "
            f"language_model.blocks.*.att.time_state and adapter tensors {sorted(adapter)}; expected one state a "
            "layer and the adapter's 0.weight, 0.bias, 2.weight, 2.bias"
        )
    if sorted(states) != list(range(len(states))):
        raise UserError(
            f"{path}: the initial states of layers {sorted(set(range(max(states))) - set(states))} are missing"
        )
    shapes = {tuple(x.shape) for x in states.values()}
    if len(shapes) > 1:
        raise UserError(f"{path}: time_state differs in shape between layers: found {sorted(shapes)}, expected one")
    known = {_ADAPTER + name for name in adapter} | {f"language_model.blocks.{i}.att.time_state" for i in states}
    origin, metrics = _read_metadata(path)
    return Trained(
        path=path,
        adapter=adapter,
        time_state=torch.stack([states[i] for i in range(len(states))]),
        origin=origin,
        ignored=tuple(name for name in tensors if name not in known),
        metrics=metrics,
    )


def _read_metadata(path: Path) -> tuple[Origin | None, dict[str, Any]]:
    if path.suffix != ".safetensors":
        return None, {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: found format {metadata.get('format')!r}, expected {FORMAT!r}; it was not written by this version"
        )
    names = {field.name for field in fields(Origin)}
    try:
        origin = {key: value for key, value in json.loads(metadata["origin"]).items() if key in names}
        return Origin(**origin), json.loads(metadata["metrics"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: its metadata is damaged ({error}), expected an origin and metrics; take another checkpoint"
        ) from error


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: the file itself, a run's best, else its last, else the only one in the folder.

    Raises UserError naming the folder and the remedy if there is none, or several to choose from.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    found = sorted(file for suffix in ("pth", "safetensors") for file in path.glob(f"*.{suffix}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{path}: found {len(found)} checkpoints ({', '.join(file.name for file in found)}), expected one; "
            "name the one to use with --checkpoint"
        )
    raise UserError(
        f"{path}: found no trained weights there; expected {BEST}, {LAST} or one published .pth file: train first, "
        "put a published file there, or name a file with --checkpoint"
    )


def export_published(trained: Trained, path: Path) -> None:
    """Write the published layout: a `.pth` dictionary of the trained tensors."""
    tensors = named_tensors(trained.adapter, trained.time_state)
    write_atomically(path, lambda temporary: torch.save(tensors, temporary))
