"""How several devices train together: what the module and its callbacks need of each strategy."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.strategies import Strategy as LightningStrategy
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Sample
from rwkv_speech.config import TEXT, TrainConfig
from rwkv_speech.data.loader import collate
from rwkv_speech.devices import uses_bf16
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.planning.cost import REDUCE_BUCKET


class Replicated:
    """One device, or several that each hold the whole model and average their gradients."""

    any_number = True  # a run's state can be taken over by another number of devices

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def lightning(self) -> str | LightningStrategy:
        """The strategy in Lightning's terms."""
        return self.config.strategy

    def prepare(self, model: SpeechLM) -> None:
        """Called once, before the model is given to Lightning."""

    def micro_batch(self, trainer: pl.Trainer, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of one micro batch; gradients are exchanged with the `last` of a step."""
        strategy: Any = trainer.strategy
        return nullcontext() if last or trainer.world_size == 1 else strategy.block_backward_sync()

    def zero_loss(self, model: SpeechLM) -> Tensor:
        """A loss of 0 for a rank without utterances, which must take part all the same."""
        return sum((p.sum() * 0.0 for p in model.trained_parameters()), torch.zeros((), device=_device(model)))

    def whole_weights(self, model: SpeechLM) -> AbstractContextManager[None]:
        """Within it the trained tensors are whole on every rank; for all ranks to enter together."""
        return nullcontext()

    def gradient_norm(self, model: SpeechLM) -> Tensor:
        """Of all trained tensors together, on the device; 0 where it is known only after the step."""
        return torch.nn.utils.get_total_norm([p.grad for p in model.trained_parameters() if p.grad is not None])

    def step(self, trainer: pl.Trainer, optimizer: Any, model: SpeechLM, norm: Tensor, norm_found: float) -> float:
        """Clip the gradient, whose `norm` is `norm_found`, take the optimizer's step, clear; returns the norm."""
        if self.config.grad_clip:
            parameters = [p for p in model.trained_parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm_found


class _BatchesAsTheyAre(DeepSpeedPrecision):
    """Lightning would cast waveforms to bfloat16, and refuses frozen dataclasses, which batches are."""

    def convert_input(self, data: Any) -> Any:
        return data


class DeepSpeed(Replicated):
    """ZeRO 1 and 2: DeepSpeed's engine holds the gradients and shares out the optimizer."""

    any_number = False

    def lightning(self) -> LightningStrategy:
        """The strategy in Lightning's terms."""
        return DeepSpeedStrategy(
            config={
                "zero_optimization": {"stage": int(self.config.strategy[-1]), "reduce_bucket_size": REDUCE_BUCKET},
                "train_micro_batch_size_per_gpu": self.config.micro_bsz,
                "gradient_clipping": self.config.grad_clip,
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": False},  # autocast computes in bfloat16; the few trained tensors stay in float32
            },
            precision_plugin=_BatchesAsTheyAre("bf16-mixed" if uses_bf16(self.config) else "32-true"),
            exclude_frozen_parameters=True,
            logging_level=logging.ERROR,
        )

    def micro_batch(self, trainer: pl.Trainer, last: bool) -> AbstractContextManager[None]:
        """As in Replicated.

        Lightning calls the engine once a step, so that it neither averages over micro batches nor counts them: it
        must be told which backward pass is the last, and, as its own forward would, that another begins.
        """
        strategy: Any = trainer.strategy
        strategy.deepspeed_engine.set_gradient_accumulation_boundary(last)
        strategy.deepspeed_engine.optimizer.clear_backward_seen_flag()
        return nullcontext()

    def gradient_norm(self, model: SpeechLM) -> Tensor:
        """0: the engine holds the gradients."""
        return torch.zeros((), device=_device(model))

    def step(self, trainer: pl.Trainer, optimizer: Any, model: SpeechLM, norm: Tensor, norm_found: float) -> float:
        """The engine clips, steps and clears by itself, at the last micro batch."""
        optimizer.step()
        return float(trainer.model.get_global_grad_norm() or 0.0)  # type: ignore[union-attr, operator] # an engine


class ShardedDeepSpeed(DeepSpeed):
    """ZeRO 3: the frozen layers are shared out, too; a layer is whole only while all ranks run it together."""

    def prepare(self, model: SpeechLM) -> None:
        """The encoder's convolutions run as often as a rank has utterances: they are gathered once, as a whole."""
        from deepspeed.utils import set_z3_leaf_modules

        if self.config.input != TEXT:
            set_z3_leaf_modules(model, [SpeechEncoder])

    def zero_loss(self, model: SpeechLM) -> Tensor:
        """As in Replicated, but through every layer."""
        silence = Sample("silence", torch.zeros(SAMPLE_RATE), "", [], 1.0, 0, next(iter(model.initial_states)))
        if self.config.input == TEXT:
            silence = replace(silence, waveform=torch.zeros(0), input_ids=(model.separator_id,))
        loss: Tensor = model(collate([silence]).to(_device(model)))
        return loss * 0.0

    @contextmanager
    def whole_weights(self, model: SpeechLM) -> Iterator[None]:
        """As in Replicated."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.trained_parameters())):
            yield


def _device(model: SpeechLM) -> torch.device:
    return next(model.trained_parameters()).device


def strategy_of(config: TrainConfig) -> Replicated:
    """What --strategy names."""
    if config.strategy == "deepspeed_stage_3":
        return ShardedDeepSpeed(config)
    return DeepSpeed(config) if config.strategy.startswith("deepspeed") else Replicated(config)
