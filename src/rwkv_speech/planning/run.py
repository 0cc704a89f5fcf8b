"""`train.py --plan 1`: what the run that the flags describe will need, with one step of it measured here."""

import itertools

import torch

from rwkv_speech.batch import Batch
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.devices import accelerator, torch_device, uses_bf16
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.planning.memory import out_of_memory_advice
from rwkv_speech.planning.sizes import EncoderSizes, ModelSizes, Setup
from rwkv_speech.planning.tables import DataPlan, RunPlan, measure

_MEASURED_SECONDS = 5.0
_BATCHES = 4


def plan_run(config: TrainConfig, model: SpeechLM, data: SpeechDataset) -> RunPlan:
    """Parameters, memory, steps and time of this run; a few micro batches are computed, if it is this machine's."""
    kind, devices = accelerator(config)
    here = kind == "cpu" or devices <= torch.cuda.device_count()
    setup = Setup(
        bf16=uses_bf16(config),
        encoder_bf16=model.encoder.dtype == torch.bfloat16,
        cached_frames=bool(config.feature_cache),
        grad_cp=bool(config.grad_cp),
        strategy=config.strategy,
        ranks=devices * config.num_nodes,
        accumulate=config.accumulate,
        native_wkv=config.wkv6 != "torch",
    )
    sizes = ModelSizes(
        model.lm.sizes, EncoderSizes.of(model.encoder.model), model.parts.stack or 5, model.parts.adapter_hidden or 2048
    )
    planned = DataPlan(
        data.durations(),
        config.micro_bsz,
        config.batch_seconds,
        config.ctx_len,
        config.epoch_count,
        config.epoch_steps,
        data.parts(),
    )
    return RunPlan(sizes, setup, planned, measured=config.accumulate * _measured(config, model, data) if here else None)


def memory_advice(config: TrainConfig) -> str:
    """What to change when a GPU's memory did not suffice."""
    return out_of_memory_advice(
        micro_bsz=config.micro_bsz,
        batch_seconds=config.batch_seconds,
        accumulate=config.accumulate,
        grad_cp=bool(config.grad_cp),
        ctx_len=config.ctx_len,
        bf16=uses_bf16(config),
        strategy=config.strategy,
        ranks=accelerator(config)[1] * config.num_nodes,
    )


def _measured(config: TrainConfig, model: SpeechLM, data: SpeechDataset) -> float:
    """Seconds of one micro batch, forward and backward, on the first device."""
    device = torch_device(config)
    model.to(device)
    model.lm.grad_cp = bool(config.grad_cp)
    loader = data.loader(Cut(config.micro_bsz, config.batch_seconds, config.seed))
    batches = itertools.cycle([batch.to(device) for (batch,) in itertools.islice(loader, _BATCHES) if len(batch)])

    def step() -> None:
        batch: Batch = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config)):
            loss = model(batch)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return measure(step, _MEASURED_SECONDS)
