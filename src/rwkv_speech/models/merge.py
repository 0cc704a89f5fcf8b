"""A run whose changes of the language model become a base model of their own, for any tool that reads one."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_speech.config import STATE_OFFSET
from rwkv_speech.devices import Compute
from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file, write_atomically
from rwkv_speech.models.base import open_base
from rwkv_speech.models.checkpoint import BEST, find_checkpoint, load_trained, write_checkpoint
from rwkv_speech.models.linear import Embedding, Linear
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.peft import take_over, tune, tuned
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.text_model import build_text_model

BASE = "base.pth"


def merge(run: str | Path, folder: Path, load_model: str = "") -> Path:
    """Write the run's base model with what was trained of it to a new folder, and the rest as a checkpoint beside it.

    Matrices are made the floats that they were trained as, also where they were packed, in the base model's type. The
    folder, which is returned, is a run to decode with. Raises UserError if there is nothing to merge.
    """
    trained = load_trained(find_checkpoint(run))
    if trained.parts is None or not (trained.lm or trained.parts.quant):
        raise UserError(f"{trained.path}: nothing was trained of its language model, expected a run with --peft lora")
    if trained.parts.has_state_offset:
        raise UserError(
            f"{trained.path}: was trained with --peft {STATE_OFFSET}, which no base model's file has a place for; use "
            "the run as it is"
        )
    if folder.exists():
        raise UserError(f"{folder}: is there already, expected a new folder; name another")
    parts = trained.parts.recorded_in(trained.path, Parts(load_model), hears=bool(trained.adapter)).filled()
    dtype = open_base(parts.base_file())[1]["emb.weight"].dtype
    lm, _ = build_text_model(parts, Compute(lm_dtype=dtype))
    known = replace(parts, base_sha256=sha256_file(parts.base_file()))
    known.check_base(trained.parts.base_sha256, trained.path)
    tune(lm, parts.lora, parts.train_parts)
    take_over(tuned(lm, parts.train_parts), trained.lm)
    tensors = {name: x.to(dtype).contiguous() for name, x in _whole(lm).items()}
    folder.mkdir(parents=True)
    write_atomically(folder / BASE, lambda temporary: torch.save(tensors, temporary))
    merged = replace(
        parts,
        load_model=str((folder / BASE).resolve()),
        base_sha256=sha256_file(folder / BASE),
        quant="",
        lora=None,
        train_parts="",
    )
    about = merged, trained.trained_on, trained.metrics, trained.ctc_head(), trained.confidence
    write_checkpoint(folder / BEST, replace(trained, lm={}).named_tensors(), *about)
    return folder


@torch.no_grad()
def _whole(lm: RWKV) -> dict[str, Tensor]:
    """All weights in floats, by their published names."""
    for module in lm.modules():
        if isinstance(module, Linear | Embedding):
            module.merge()
    return {name: x.detach() for name, x in lm.named_parameters()}
