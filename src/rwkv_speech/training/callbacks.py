"""What happens around training: checkpoints and logs."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from rwkv_speech.batch import Batch
from rwkv_speech.decoding.results import write_rows
from rwkv_speech.models.checkpoint import BEST, LAST
from rwkv_speech.reports.record import VALIDATION, LogRow, TaskRow, add_metrics, columns, start_metrics
from rwkv_speech.scoring.measures import mean_error, said
from rwkv_speech.tasks import base_of
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.selection import BestK, EarlyStop

_PLACE, _VALIDATED = ("step", "epoch"), ("wer", "cer", "error")  # columns that each row, or a validation's, has


class TrainedWeights(Callback):
    """Writes the trained tensors: last after every epoch, the best, one of every `epoch_save` epochs, the best few.

    The best has the lowest mean of the tasks' errors, of speech recognition its WER. Ends the run when that has stopped
    falling.
    """

    def __init__(self, folder: Path, epoch_save: int, best: BestK, stop: EarlyStop) -> None:
        self.folder, self.epoch_save, self.best_few, self.stop = folder, epoch_save, best, stop
        self.best_error = math.inf

    def state_dict(self) -> dict[str, Any]:
        """For a resume."""
        return {"best_error": self.best_error, "best_few": self.best_few.state_dict(), "stop": self.stop.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a resume."""
        self.best_error = state_dict["best_error"]
        self.best_few.load_state_dict(state_dict["best_few"])
        self.stop.load_state_dict(state_dict["stop"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; Lightning calls this after the epoch's validation."""
        assert isinstance(pl_module, SpeechModule)
        pl_module.note_trained()
        if pl_module.measures and self.stop.should_stop(mean_error(pl_module.measures)):
            trainer.should_stop = True
        with pl_module.strategy.whole_weights(pl_module.model):
            if trainer.is_global_zero:
                self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: SpeechModule) -> None:
        epoch = trainer.current_epoch + 1
        metrics: dict[str, float | int | str] = {"epoch": epoch, "step": trainer.global_step}
        names, dropped = [LAST], list[Path]()
        if epoch % self.epoch_save == 0:
            names.append(f"epoch-{epoch}.safetensors")
        if pl_module.measures:
            error = mean_error(pl_module.measures)
            metrics |= {"error": error, "validation": said(pl_module.measures)}
            write_rows(self.folder / VALIDATION, pl_module.validated)
            one = f"best-epoch-{epoch}.safetensors"
            verdict = self.best_few.offer(error, Path(one))  # without the folder, which may be moved
            names += [one] if verdict.keep else []
            dropped += verdict.drop
            if error < self.best_error:
                self.best_error = error
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
    """logs/csv/metrics.csv: a row every `every` steps and for each validation; tasks.csv: one for each of its tasks.

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
            self._write(trainer, [name for name in columns(LogRow) if name not in _PLACE + _VALIDATED])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The validation's numbers."""
        assert isinstance(pl_module, SpeechModule)
        self._write(trainer, _VALIDATED)
        if trainer.is_global_zero:
            add_metrics(self._folder, *_task_rows(trainer, pl_module))


def _task_rows(trainer: pl.Trainer, pl_module: SpeechModule) -> Iterator[TaskRow]:
    sizes = Counter(base_of(row.task) for row in pl_module.validated)
    place = {"step": trainer.global_step, "epoch": trainer.current_epoch + 1}
    for task, found in pl_module.measures.items():
        numbers = {name: x for name, x in found.numbers().items() if name in columns(TaskRow)}
        yield TaskRow(**place, task=task, num_utterances=sizes[task], error=found.error, **numbers)
