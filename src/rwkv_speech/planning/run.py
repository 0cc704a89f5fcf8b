"""`train.py --plan 1`: what the run that the flags describe will need, with one step measured here if possible."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from rwkv_speech import tiny
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.source import parts_of
from rwkv_speech.data.sources import open_sources
from rwkv_speech.devices import accelerator, autocast, compute_of, torch_device
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import RWKV6Sizes, open_base
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM, check_sizes
from rwkv_speech.planning.memory import Setup
from rwkv_speech.planning.sizes import WAVLM_LARGE, EncoderSizes, Sizes, world_sizes
from rwkv_speech.planning.tables import RunPlan
from rwkv_speech.planning.time import DataPlan

_MEASURED_SECONDS = 3.0
_BATCHES = 4
# LibriSpeech's utterances.
_MEAN_SECONDS, _LONGEST_SECONDS, _SHORTEST_SECONDS = 12.3, 35.0, 1.3


def is_from_sizes(config: TrainConfig) -> bool:
    """Whether the plan is made without the model or without data, from what the flags say of them."""
    return config.plan_hours is not None or not _has_model(config)


def _has_model(config: TrainConfig) -> bool:
    if config.n_layer is None or config.n_embd is None or config.load_model == tiny.NAME:
        return True
    return Path(config.load_model).is_file()


def plan_from_sizes(config: TrainConfig) -> RunPlan:
    """As `plan_run`, from sizes instead of the model, and from --plan_hours where it is given instead of data."""
    notes: list[str] = []
    parts = Parts.of(config)
    if _has_model(config):
        parts = parts.filled()
        lm = RWKV6Sizes.of(open_base(parts.base_file()).tensors, parts.base_file())
        check_sizes(parts, lm)
    else:
        assert config.n_layer is not None and config.n_embd is not None
        lm = world_sizes(config.n_layer, config.n_embd)
        parts = replace(parts, load_model=parts.load_model or "the base model").filled()
        notes.append(f"{parts.load_model} is not here: planned from --n_layer {lm.n_layer} and --n_embd {lm.C}")
    encoder = _encoder_sizes(parts.encoder_name(), notes)
    assert parts.stack is not None and parts.adapter_hidden is not None
    sizes = Sizes(lm, encoder, parts.stack, parts.adapter_hidden)
    if config.plan_hours is None and not config.train_data:
        raise UserError("--train_data: found nothing, expected data, or --plan_hours for a plan without")
    if config.plan_hours is None:
        source = open_sources(config.train_data, audio_column=config.audio_column, text_column=config.text_column)
        data = _data_plan(config, source.durations(), parts_of(source))
    elif config.train_data:
        raise UserError("--plan_hours: found with --train_data, expected one of the two; leave one out")
    else:
        data = _data_plan(config, _read_speech(config.plan_hours), None)
        notes.append(
            f"{config.plan_hours:g} h of audio are assumed, in utterances of {_MEAN_SECONDS} s on average and "
            f"{_LONGEST_SECONDS:g} s at most, as in LibriSpeech"
        )
    return RunPlan(sizes, _setup(config), data, notes=tuple(notes))


def _encoder_sizes(name: str | Path, notes: list[str]) -> EncoderSizes:
    from transformers import AutoConfig

    try:
        return EncoderSizes.of(AutoConfig.from_pretrained(name, local_files_only=True))
    except (OSError, ValueError):
        notes.append(f"encoder {name} is not here: planned with the sizes of WavLM-Large")
        return WAVLM_LARGE


def _read_speech(hours: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Durations from the shortest up, evenly spread, and the longest once."""
    count = max(1, round(3600 * hours / _MEAN_SECONDS))
    durations = np.linspace(_SHORTEST_SECONDS, 2 * _MEAN_SECONDS - _SHORTEST_SECONDS, count, dtype=np.float32)
    durations[-1] = _LONGEST_SECONDS
    return durations


def plan_run(config: TrainConfig, model: SpeechLM, data: SpeechDataset) -> RunPlan:
    """Parameters, memory, steps and time of this run; a few micro batches are computed, if it is this machine's."""
    kind, devices = accelerator(config)
    here = kind == "cpu" or devices <= torch.cuda.device_count()
    return RunPlan(
        Sizes(
            model.lm.sizes,
            EncoderSizes.of(model.encoder.model.config),
            model.parts.stack or 5,
            model.parts.adapter_hidden or 2048,
        ),
        _setup(config),
        _data_plan(config, data.durations(), data.parts()),
        measured=config.accumulate * _measured(config, model, data) if here else None,
    )


def _setup(config: TrainConfig) -> Setup:
    compute = compute_of(config, "meta")
    return Setup(
        bf16=compute.lm_dtype == torch.bfloat16,
        encoder_bf16=compute.encoder_dtype == torch.bfloat16,
        cached_frames=bool(config.feature_cache),
        grad_cp=bool(config.grad_cp),
        strategy=config.strategy,
        ranks=accelerator(config)[1] * config.num_nodes,
        accumulate=config.accumulate,
    )


def _data_plan(config: TrainConfig, durations: Any, parts: Any) -> DataPlan:
    return DataPlan(
        durations,
        config.micro_bsz,
        config.batch_seconds,
        config.ctx_len,
        config.epoch_count,
        config.epoch_steps,
        parts,
    )


def _measured(config: TrainConfig, model: SpeechLM, data: SpeechDataset) -> float:
    """Seconds of one micro batch, forward and backward, on the first device; raises UserError if none can be used."""
    device = torch_device(config)
    model.to(device)
    model.lm.grad_cp = bool(config.grad_cp)
    loader = data.loader(Cut(config.micro_bsz, config.batch_seconds, config.seed))
    first = [batch for (batch,) in itertools.islice(loader, _BATCHES)]
    if not any(map(len, first)):
        reasons = [f"{sample.id}: {sample.reason}" for batch in first for sample in batch.bad]
        raise UserError(
            f"--train_data: none of the first {len(reasons)} utterances can be used ({reasons[0]}); mend them, or "
            f"give a larger --ctx_len than {config.ctx_len}"
        )
    batches = itertools.cycle([batch.to(device) for batch in first if len(batch)])

    def step() -> None:
        with autocast(device.type, compute_of(config).lm_dtype == torch.bfloat16):
            loss = model(next(batches))
        loss.backward()

    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_MEASURED_SECONDS).median
