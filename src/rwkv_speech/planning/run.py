"""`train.py --plan 1`: what the run that the flags describe will need, with one step measured here if possible."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from rwkv_speech import tiny
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut, Floats
from rwkv_speech.data.source import Part, parts_of
from rwkv_speech.data.sources import open_sources
from rwkv_speech.devices import accelerator, autocast, compute_of, torch_device
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import LMSizes
from rwkv_speech.models.families import read_sizes
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.text_model import check_sizes
from rwkv_speech.planning.measure import ENCODERS, WAVLM_LARGE, Sizes, world_sizes
from rwkv_speech.planning.tables import Data, report

_MEASURED_SECONDS, _BATCHES = 3.0, 4
# LibriSpeech's utterances.
_MEAN_SECONDS, _LONGEST_SECONDS, _SHORTEST_SECONDS = 12.3, 35.0, 1.3


def is_from_sizes(config: TrainConfig) -> bool:
    """Whether the plan is made without the model or without data, from what the flags say of them."""
    return config.plan_hours is not None or not _has_model(config)


def _has_model(config: TrainConfig) -> bool:
    sizes_are_given = config.n_layer is not None and config.n_embd is not None
    return not sizes_are_given or config.load_model in tiny.BASE_MODELS or Path(config.load_model).is_file()


def plan_run(config: TrainConfig, model: SpeechLM | None = None, dataset: SpeechDataset | None = None) -> str:
    """Tables of parameters, memory, steps and time of this run; with model and data a few micro batches are computed,
    if it is this machine's. Without them the flags say what they would be. Raises UserError where these do not.
    """
    notes: list[str] = []
    sizes = replace(_sizes(config, notes), num_states=len(model.initial_states) if model else 1)
    durations, parts = (dataset.durations(), dataset.parts()) if dataset else _durations(config, notes)
    compute, (kind, devices) = compute_of(config, "meta"), accelerator(config)
    lm, encoder = ("bf16" if x == torch.bfloat16 else "fp32" for x in (compute.lm_dtype, compute.encoder_dtype))
    settled = replace(config, device=str(devices), precision=lm, encoder_precision=encoder)
    data = Data.of(durations, parts, settled, sizes)
    here = kind == "cpu" or devices <= torch.cuda.device_count()
    measured = config.accumulate * _measured(config, model, dataset) if model and dataset and here else None
    return report(settled, sizes, data, measured, notes)


def _sizes(config: TrainConfig, notes: list[str]) -> Sizes:
    from transformers import AutoConfig

    if _has_model(config):
        parts = Parts.of(config).filled()
        lm: LMSizes = read_sizes(parts.base_file())
        check_sizes(parts, lm)
    else:
        lm = world_sizes(config.n_layer or 0, config.n_embd or 0)
        parts = replace(Parts.of(config), load_model=config.load_model or "the base model").filled()
        sizes = f"--n_layer {lm.n_layer} and --n_embd {lm.C}"
        notes.append(f"{parts.load_model} is not here: planned as RWKV-6 from {sizes}")
    try:
        encoder = AutoConfig.from_pretrained(parts.encoder_name(), local_files_only=True).to_json_string()
    except (OSError, ValueError):
        encoder = ENCODERS.get(parts.encoder, WAVLM_LARGE)
        known = "its published sizes" if parts.encoder in ENCODERS else "the sizes of WavLM-Large"
        notes.append(f"encoder {parts.encoder} is not here: planned with {known}")
    assert parts.stack is not None and parts.adapter_hidden is not None
    shape = parts.stack, parts.adapter_hidden, parts.frame_options
    return Sizes(lm, encoder, *shape, quant=parts.quant or "", lora=parts.lora, train_parts=parts.train_parts)


def _durations(config: TrainConfig, notes: list[str]) -> tuple[Floats, list[Part]]:
    """Those of --train_data; or --plan_hours of them from the shortest up, evenly spread, and the longest once."""
    if (config.plan_hours is None) == (not config.train_data):
        raise UserError(
            f"--plan_hours: found {config.plan_hours} with --train_data {config.train_data!r}, expected one of the two"
        )
    if config.plan_hours is None:
        source = open_sources(config.train_data, audio_column=config.audio_column, text_column=config.text_column)
        return source.durations(), parts_of(source)
    count = max(1, round(3600 * config.plan_hours / _MEAN_SECONDS))
    durations = np.linspace(_SHORTEST_SECONDS, 2 * _MEAN_SECONDS - _SHORTEST_SECONDS, count, dtype=np.float32)
    durations[-1] = _LONGEST_SECONDS
    notes.append(
        f"{config.plan_hours:g} h of audio are assumed, in utterances of {_MEAN_SECONDS} s on average and "
        f"{_LONGEST_SECONDS:g} s at most, as in LibriSpeech"
    )
    return durations, [Part(count)]


def _measured(config: TrainConfig, model: SpeechLM, data: SpeechDataset) -> float:
    """Seconds of one micro batch, forward and backward, on the first device; raises UserError if none can be used."""
    device = torch_device(config)
    model.to(device).lm.grad_cp = bool(config.grad_cp)
    loader = data.loader(Cut(config.micro_bsz, config.batch_seconds, config.seed))
    first = [batch for (batch,) in itertools.islice(loader, _BATCHES)]
    if not any(map(len, first)):
        bad = [sample for batch in first for sample in batch.bad]
        raise UserError(
            f"--train_data: none of the first {len(bad)} utterances can be used ({bad[0].id}: {bad[0].reason}); mend "
            f"them, or give a larger --ctx_len than {config.ctx_len}"
        )
    batches = itertools.cycle([batch.to(device) for batch in first if len(batch)])

    def step() -> None:
        with autocast(device.type, compute_of(config).lm_dtype == torch.bfloat16):
            loss = model(next(batches))
        loss.backward()

    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_MEASURED_SECONDS).median
