"""What happens around training: checkpoints and logs."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from rwkv_speech.batch import Batch
from rwkv_speech.decoding.results import write_rows
from rwkv_speech.models.checkpoint import BEST, LAST
from rwkv_speech.reports.record import COLUMNS, VALIDATION, LogRow, add_metrics, start_metrics
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.selection import BestK, EarlyStop


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
        pl_module.note_trained()
        if pl_module.scores is not None and self.stop.should_stop(pl_module.scores.wer):
            trainer.should_stop = True
        with pl_module.strategy.whole_weights(pl_module.model):
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
            write_rows(self.folder / VALIDATION, pl_module.validated)
            one = f"best-epoch-{epoch}.safetensors"
            verdict = self.best_few.offer(pl_module.scores.wer, Path(one))  # without the folder, which may be moved
            names += [one] if verdict.keep else []
            dropped += verdict.drop
            if pl_module.scores.wer < self.best_wer:
                self.best_wer = pl_module.scores.wer
                names.append(BEST)
        for name in names:
            pl_module.model.save(self.folder / name, **metrics)
        for path in dropped:
            (self.folder / path).unlink(missing_ok=True)


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

    A callback, not a logger, so that a step's row is written before its point is saved: a resumed run continues after
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
