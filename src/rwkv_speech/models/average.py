"""The mean of several checkpoints."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models.checkpoint import Origin, Trained, find_checkpoint, load_trained, save_trained


def average(checkpoints: Sequence[str | Path], output: str | Path) -> None:
    """Write the mean of the trained tensors, summed in float64; the metadata names the averaged files.

    Each is a file, or a folder as `find_checkpoint` reads it. Raises UserError naming the file if there are fewer than
    two, if one comes twice, is a published file, was trained on other parts or shapes, or holds a number that is not
    finite, and if `output` is one of them or no .safetensors file.
    """
    paths, output = [find_checkpoint(path) for path in checkpoints], Path(output)
    _check_paths(paths, output)
    first = load_trained(paths[0])
    origin = _origin(first)
    sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in _tensors(first).items()}
    for path in paths:
        trained = load_trained(path)
        _check_same(trained, first, origin)
        for name, x in _tensors(trained).items():
            sums[name] += x.double()
    means = {name: (x / len(paths)).to(_tensors(first)[name].dtype) for name, x in sums.items()}
    state = means.pop("time_state")
    named: dict[str, Any] = {"averaged": [{"file": str(path), "sha256": sha256_file(path)} for path in paths]}
    save_trained(output, means, state, origin, named)


def _check_paths(paths: Sequence[Path], output: Path) -> None:
    if len(paths) < 2:
        raise UserError(f"--checkpoints: found {len(paths)}, expected two or more, separated by commas")
    for i, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:i]}:
            raise UserError(f"--checkpoints: {path} is given twice, expected different files; leave one out")
    if output.suffix != ".safetensors":
        raise UserError(f"--output: found {str(output)!r}, expected a name that ends in .safetensors")
    if output.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--output: {output} is one of the checkpoints to average; give another name")


def _tensors(trained: Trained) -> dict[str, Tensor]:
    return {**trained.adapter, "time_state": trained.time_state}


def _origin(trained: Trained) -> Origin:
    if trained.origin is None:
        raise UserError(
            f"{trained.path}: a published file does not say what it was trained on, expected an own .safetensors "
            "checkpoint; train from it with --init_from first, or leave it out"
        )
    return trained.origin


def _check_same(trained: Trained, first: Trained, origin: Origin) -> None:
    # The base model is known by its content; where it lies differs between machines.
    wanted, found = ({**asdict(o), "base_model": None} for o in (origin, _origin(trained)))
    for name, value in wanted.items():
        if found[name] != value:
            raise _differs(trained, first, name, found[name], value)
    for name, x in _tensors(first).items():
        other = _tensors(trained)[name]
        if other.shape != x.shape:
            raise _differs(trained, first, f"the shape of {name}", tuple(other.shape), tuple(x.shape))
        if not other.isfinite().all():
            raise UserError(f"{trained.path}: {name} holds numbers that are not finite; leave this checkpoint out")


def _differs(trained: Trained, first: Trained, what: str, found: object, wanted: object) -> UserError:
    return UserError(
        f"{trained.path}: {what} is {found!r}, expected {wanted!r} as in {first.path}; average checkpoints of one "
        "base model, encoder and adapter only"
    )
