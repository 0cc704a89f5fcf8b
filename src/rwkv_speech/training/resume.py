"""Resuming: what a resumed run must share with the first, where it stopped, and the points that make it possible."""

import dataclasses
import random
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from rwkv_speech.config import TrainConfig
from rwkv_speech.errors import UserError
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.points import ResumePoint, begin_point, finish_point, newest_point

TRAINER_STATE = "trainer.ckpt"
POINTS = "resume"


def identity(config: TrainConfig) -> dict[str, Any]:
    """The flags that a resumed run must share with the one that it goes on with."""
    return {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if not field.metadata["resume"]
    }


def run_info(config: TrainConfig) -> dict[str, Any]:
    cut = {name: getattr(config, name) for name in ("accumulate", "micro_bsz", "batch_seconds")}
    return {"flags": identity(config), **cut}


def find_point(config: TrainConfig) -> ResumePoint | None:
    """Where the run in --proj_dir stopped; raises UserError naming the flags that changed since."""
    point = newest_point(Path(config.proj_dir) / POINTS)
    if point is None:
        return None
    before, now = point.info["flags"], identity(config)
    different = [name for name in now if before.get(name) != now[name]]
    changed = [f"--{name}: was {before.get(name)!r}, now {now[name]!r}" for name in different]
    if changed:
        raise UserError(
            f"{point.path}: the run that stopped there had other flags; give the same ones to go on with it, or "
            "resume=no to start anew in another folder:\n  " + "\n  ".join(changed)
        )
    return point


def _same_cut(config: TrainConfig, point: ResumePoint, world_size: int) -> bool:
    """Whether the global batches of the point's run are this run's."""
    was = point.info["world_size"] * point.info["accumulate"]
    kept = all(point.info[name] == getattr(config, name) for name in ("micro_bsz", "batch_seconds"))
    return kept and bool(was == world_size * config.accumulate)


def resume_from(module: SpeechModule, config: TrainConfig, point: ResumePoint, trainer: pl.Trainer) -> Path | None:
    """Put the sampler where the run stopped; returns the whole state of the trainer, if it can be taken over whole.

    With another cut of the global batch the steps of an epoch are others: weights and optimizer are taken over, and
    the epoch begins anew.
    """
    epoch, step, state = int(point.info["epoch"]), int(point.info["step"]), point.path / TRAINER_STATE
    if _same_cut(config, point, trainer.world_size):
        module.start = (epoch, step)
        print(f"going on with {point.path}: epoch {epoch + 1}, behind {step} steps of it")
        return state
    if not module.strategy.any_number:
        raise UserError(
            f"{point.path}: DeepSpeed's state was cut for {point.info['world_size']} devices, now there are "
            f"{trainer.world_size}, or for other batches; give the same --device, --micro_bsz and --accumulate, "
            "or --strategy ddp"
        )
    print(
        f"going on with {point.path}, whose batches were cut otherwise: weights, optimizer and learning rates are "
        f"kept; epoch {epoch + 1} begins anew, and its {step} steps that were done are not left out"
    )
    module.taken_over = torch.load(state, map_location="cpu", weights_only=False)
    module.start = (epoch, 0)
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.started = progress.processed = progress.completed = epoch
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = point.step
    return None


class ResumePoints(Callback):
    """Saves a point every `every` optimizer steps, after every epoch, and when the system asks the run to end."""

    def __init__(self, folder: Path, every: int, info: Mapping[str, Any]) -> None:
        self.folder, self.every, self.info = folder, every, info
        self._end_the_run: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """SIGTERM is kept for the end of a step, the same on all ranks: Lightning would end the run between two hooks.

        A handler can be set in the main thread alone; elsewhere Lightning's own stays.
        """
        if threading.current_thread() is threading.main_thread():
            self._end_the_run = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *_: setattr(pl_module, "asked_to_end", True))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Inside an epoch; its end has a point of its own, after validation."""
        if batch_idx + 1 == trainer.num_training_batches:
            return
        if pl_module.ending or (batch_idx + 1) % self.every == 0:
            self._save(trainer, trainer.current_epoch, batch_idx + 1)
        if pl_module.ending:
            self._end_the_run(signal.SIGTERM, None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the epoch's validation and checkpoints: callbacks before this one have done their work."""
        self._save(trainer, trainer.current_epoch + 1, 0)
        if pl_module.ending:
            self._end_the_run(signal.SIGTERM, None)

    def _save(self, trainer: pl.Trainer, epoch: int, step: int) -> None:
        number = trainer.global_step
        made = begin_point(self.folder, number) if trainer.is_global_zero else None
        pending: Path = trainer.strategy.broadcast(made)  # type: ignore[assignment]
        trainer.save_checkpoint(pending / TRAINER_STATE)  # DeepSpeed: every rank writes its part
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            place = {"epoch": epoch, "step": step, "world_size": trainer.world_size, "ended": trainer.should_stop}
            finish_point(pending, {**self.info, **place})
        trainer.strategy.barrier()


class RandomState(Callback):
    """Keeps the states of all random generators with a point."""

    def state_dict(self) -> dict[str, Any]:
        """Python's, NumPy's and PyTorch's."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same numbers."""
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        if len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state_dict["cuda"])
