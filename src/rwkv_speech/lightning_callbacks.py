"""What happens around training: checkpoints, points to resume from, logs."""

import csv
import json
import math
import random
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from rwkv_speech.checkpoint import BEST, LAST
from rwkv_speech.data.dataset import Batch
from rwkv_speech.files import write_text_atomically
from rwkv_speech.lightning_module import SpeechModule
from rwkv_speech.resume import begin_point, finish_point

TRAINER_STATE = "trainer.ckpt"


class TrainedWeights(Callback):
    """Writes the trained tensors: last after every epoch, best by WER, and one of every `epoch_save` epochs."""

    def __init__(self, folder: Path, epoch_save: int) -> None:
        self.folder, self.epoch_save = folder, epoch_save
        self.best_wer = math.inf

    def state_dict(self) -> dict[str, Any]:
        """For a resume."""
        return {"best_wer": self.best_wer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a resume."""
        self.best_wer = state_dict["best_wer"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; Lightning calls this after the epoch's validation."""
        assert isinstance(pl_module, SpeechModule)
        if not trainer.is_global_zero:
            return
        epoch = trainer.current_epoch + 1
        metrics: dict[str, float | int] = {"epoch": epoch, "step": trainer.global_step}
        names = [LAST]
        if epoch % self.epoch_save == 0:
            names.append(f"epoch-{epoch}.safetensors")
        if pl_module.scores is not None:
            metrics["wer"] = pl_module.scores.wer
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in pl_module.validated]
            write_text_atomically(self.folder / "validation.jsonl", "".join(lines))
            if pl_module.scores.wer < self.best_wer:
                self.best_wer = pl_module.scores.wer
                names.append(BEST)
        for name in names:
            pl_module.model.save(self.folder / name, **metrics)


class ResumePoints(Callback):
    """Saves a point every `every` optimizer steps, after every epoch, and when the system asks the run to end."""

    def __init__(self, folder: Path, every: int, info: Mapping[str, Any]) -> None:
        self.folder, self.every, self.info = folder, every, info

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Inside an epoch; its end has a point of its own, after validation."""
        ending = trainer.received_sigterm
        if (ending or (batch_idx + 1) % self.every == 0) and batch_idx + 1 < trainer.num_training_batches:
            self._save(trainer, trainer.current_epoch, batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the epoch's validation and checkpoints: callbacks before this one have done their work."""
        self._save(trainer, trainer.current_epoch + 1, 0)

    def _save(self, trainer: pl.Trainer, epoch: int, step: int) -> None:
        number = trainer.global_step
        made = begin_point(self.folder, number) if trainer.is_global_zero else None
        pending: Path = trainer.strategy.broadcast(made)  # type: ignore[assignment]
        trainer.save_checkpoint(pending / TRAINER_STATE)  # DeepSpeed: every rank writes its part
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            finish_point(pending, {**self.info, "epoch": epoch, "step": step, "world_size": trainer.world_size})
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


class MetricsTable(Logger):
    """logs/csv/metrics.csv: a row per logged step; a resumed run goes on behind the point's step."""

    COLUMNS = (
        "step epoch loss lr_adapter lr_state grad_norm target_tokens padding audio_seconds audio_hours_per_hour "
        "data_wait memory wer cer".split()
    )

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__()
        self._path = folder / "logs" / "csv" / "metrics.csv"
        self._first_step, self._ready = first_step, False

    @property
    def name(self) -> str:
        """As Lightning wants it."""
        return "csv"

    @property
    def version(self) -> int:
        """As Lightning wants it."""
        return 0

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Flags are in run.json."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row; only the first process writes."""
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        if not self._ready:
            self._begin()
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS, extrasaction="ignore").writerow({"step": step, **metrics})

    def _begin(self) -> None:
        """The rows before the first step of this run stay; those after it are of a course that was given up."""
        kept: list[dict[str, str]] = []
        if self._first_step and self._path.exists():
            with self._path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"] or 0) < self._first_step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        self._ready = True


class Progress(TQDMProgressBar):
    """Without the version number that Lightning adds, which says nothing here."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
