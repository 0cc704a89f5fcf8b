"""The mean of several checkpoints."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models.checkpoint import Trained, find_checkpoint, load_trained, write_checkpoint
from rwkv_speech.models.ctc import CtcHead
from rwkv_speech.models.parts import Parts

logger = logging.getLogger(__name__)


def average(checkpoints: Sequence[str | Path], output: str | Path) -> None:
    """Write the mean of the trained tensors, summed in float64; the metadata names the averaged files.

    A CTC head that is the same in all, as in those of one run, is kept; others are left out with a note. Each of
    `checkpoints` is a file, or a folder as `find_checkpoint` reads it. Raises UserError naming the file if there are
    fewer than two, if one comes twice, is a published file, was trained on other parts or shapes, or holds a number
    that is not finite, and if `output` is one of them or no .safetensors file.
    """
    paths, output = [find_checkpoint(path) for path in checkpoints], Path(output)
    _check_paths(paths, output)
    first = load_trained(paths[0])
    parts = _parts(first)
    heads = [first.ctc_head()]
    sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in first.named_tensors().items()}
    for path in paths:
        trained = load_trained(path)
        _check_same(trained, first)
        for name, x in trained.named_tensors().items():
            if not x.isfinite().all():
                raise UserError(f"{path}: {name} holds numbers that are not finite; leave this checkpoint out")
            sums[name] += x.double()
        heads.append(trained.ctc_head())
    means = {name: (x / len(paths)).to(first.named_tensors()[name].dtype) for name, x in sums.items()}
    named: dict[str, Any] = {"averaged": [{"file": str(path), "sha256": sha256_file(path)} for path in paths]}
    write_checkpoint(output, means, parts, first.trained_on, named, _common(heads, output))


def _common(heads: Sequence[CtcHead | None], output: Path) -> CtcHead | None:
    """The one CTC head that all have; the mean of heads trained apart would hear nothing."""
    first = heads[0]
    if all(head is first or (head and first and head.is_like(first.spec, first.state_dict())) for head in heads):
        return first
    logger.warning("%s: the checkpoints' CTC heads differ: it has none", output)
    return None


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


def _parts(trained: Trained) -> Parts:
    if trained.parts is None:
        raise UserError(
            f"{trained.path}: a published file does not say what it was trained on, expected an own .safetensors "
            "checkpoint; train from it with --init_from first, or leave it out"
        )
    return trained.parts


def _check_same(trained: Trained, first: Trained) -> None:
    wanted, found = _described(first), _described(trained)
    for what in [*wanted, *found]:
        if found.get(what) != wanted.get(what):
            raise UserError(
                f"{trained.path}: {what} is {found.get(what)!r}, expected {wanted.get(what)!r} as in {first.path}; "
                "average checkpoints of one base model, encoder and adapter only"
            )


def _described(trained: Trained) -> dict[str, object]:
    # The base model is known by its content; where files lie differs between machines.
    described = {**asdict(_parts(trained)), "load_model": None}
    return described | {f"the shape of {name}": tuple(x.shape) for name, x in trained.named_tensors().items()}
