"""What happens around training: checkpoints, points to resume from, logs."""

import math
import random
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar

from rwkv_speech.batch import Batch
from rwkv_speech.models.checkpoint import BEST, LAST
from rwkv_speech.reports.record import COLUMNS, LogRow, add_metrics, start_metrics, write_validation
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.points import begin_point, finish_point
from rwkv_speech.training.selection import BestK, EarlyStop

TRAINER_STATE = "trainer.ckpt"


class TrainedWeights(Callback):
    """Writes the trained tensors: last after every epoch, best by WER, one of every `epoch_save` epochs, the best few.

    Ends the run when WER has stopped falling.
    """

    def __init__(self, folder: Path, epoch_save: int, best: BestK, stop: EarlyStop) -> None:
        self.folder, self.epoch_save, self.best_few, self.stop = folder, epoch_save, best, stop
        self.best_wer = math.inf

    def state_dict(self) -> dict[str, Any]:
        """For a resume."""
        return {"best_wer": self.best_wer, "best_few": self.best_few.state_dict(), "stop": self.stop.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a resume."""
        self.best_wer = state_dict["best_wer"]
        self.best_few.load_state_dict(state_dict["best_few"])
        self.stop.load_state_dict(state_dict["stop"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; Lightning calls this after the epoch's validation."""
        assert isinstance(pl_module, SpeechModule)
        if pl_module.scores is not None and self.stop.should_stop(pl_module.scores.wer):
            trainer.should_stop = True
        with pl_module.whole_weights():
            if trainer.is_global_zero:
                self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: SpeechModule) -> None:
        epoch = trainer.current_epoch + 1
        metrics: dict[str, float | int] = {"epoch": epoch, "step": trainer.global_step}
        names, dropped = [LAST], list[Path]()
        if epoch % self.epoch_save == 0:
            names.append(f"epoch-{epoch}.safetensors")
        if pl_module.scores is not None:
            metrics["wer"] = pl_module.scores.wer
            write_validation(self.folder, pl_module.validated)
            verdict = self.best_few.offer(pl_module.scores.wer, self.folder / f"best-epoch-{epoch}.safetensors")
            names += [f"best-epoch-{epoch}.safetensors"] if verdict.keep else []
            dropped += verdict.drop
            if pl_module.scores.wer < self.best_wer:
                self.best_wer = pl_module.scores.wer
                names.append(BEST)
        for name in names:
            pl_module.model.save(self.folder / name, **metrics)
        for path in dropped:
            path.unlink(missing_ok=True)


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


class Throughput(Callback):
    """Logs audio hours per hour, the share of time spent waiting for data, and memory."""

    def __init__(self) -> None:
        self._waiting_since = self._started = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock starts."""
        self._waiting_since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The data is here."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        """The step is done; its loss was waited for, so the time is true on a GPU as well."""
        now = time.perf_counter()
        whole = max(now - self._waiting_since, 1e-9)
        waited = (self._started - self._waiting_since) / whole
        seconds = float(trainer.callback_metrics.get("audio_seconds", 0.0))
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        pl_module.log_dict({"audio_hours_per_hour": seconds / whole, "data_wait": waited, "memory": memory})
        self._waiting_since = now


class MetricsTable(Callback):
    """logs/csv/metrics.csv: a row every `every` steps and one for each validation.

    A callback, not a logger, so that a step's row is written before its point is saved: a resumed run goes on behind
    the point's step, and no row is missing or there twice.
    """

    def __init__(self, folder: Path, first_step: int, every: int) -> None:
        self._folder, self._first_step, self._every = folder, first_step, every

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The rows before the first step of this run stay; those after it are of a course that was given up."""
        if trainer.is_global_zero:
            start_metrics(self._folder, self._first_step)

    def _write(self, trainer: pl.Trainer, names: Sequence[str]) -> None:
        known = trainer.callback_metrics
        row = {name: float(known[name]) for name in names if name in known}
        if row and trainer.is_global_zero:
            add_metrics(self._folder, LogRow(step=trainer.global_step, epoch=trainer.current_epoch + 1, **row))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step's numbers."""
        if trainer.global_step % self._every == 0:
            self._write(trainer, [name for name in COLUMNS if name not in ("step", "epoch", "wer", "cer")])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The validation's numbers."""
        self._write(trainer, ("wer", "cer"))


class Progress(TQDMProgressBar):
    """Without the version number that Lightning adds, which says nothing here."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
