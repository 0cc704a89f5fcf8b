"""The screen: a bar that moves, and lines that stay."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm

from rwkv_speech.scoring.measure import percent
from rwkv_speech.scoring.measures import said
from rwkv_speech.training.module import SpeechModule

_SECONDS_BETWEEN_LINES = 60.0


@rank_zero_only
def say(text: str) -> None:
    """Print a line once, whatever the number of ranks, above a bar if there is one."""
    tqdm.write(text)


class Progress(TQDMProgressBar):
    """A line for each epoch and for what was skipped; meanwhile a bar, or without a terminal a line a minute."""

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate if sys.stdout.isatty() else 0)
        self._skipped = ""
        self._restart()

    def _restart(self) -> None:
        self._loss_sum = self._targets = self._audio_seconds = 0.0
        self._started = self._stepped = self._said = time.perf_counter()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        known, shown = trainer.callback_metrics, {}
        if "loss" in known:
            shown["loss"] = f"{float(known['loss']):.3f}"
        if "error" in known:
            shown["error"] = percent(float(known["error"]))
        return shown

    def init_train_tqdm(self) -> Any:
        """The bar goes in the end: the lines stay."""
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """No bar stays in the way of what is said then."""
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that is resumed inside an epoch does not start one."""
        super().on_train_start(trainer, pl_module)
        self._say_notes(pl_module)
        self._show_epoch(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Epochs are counted from 1."""
        super().on_train_epoch_start(trainer, pl_module)
        self._show_epoch(trainer, pl_module)

    def _show_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SpeechModule)
        self._restart()
        epoch, step = pl_module.start
        self.train_progress_bar.total = trainer.num_training_batches
        self.train_progress_bar.initial = step if epoch == trainer.current_epoch else 0
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def _say_notes(self, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SpeechModule)
        for note in pl_module.notes:
            say(note)
        pl_module.notes.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's numbers, which are those of all ranks."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        loss, targets, seconds = (
            float(trainer.callback_metrics[name]) for name in ("loss", "target_tokens", "audio_seconds")
        )
        self._loss_sum += loss * targets
        self._targets += targets
        self._audio_seconds += seconds
        self._stepped = time.perf_counter()
        if not self.refresh_rate and self._stepped - self._said > _SECONDS_BETWEEN_LINES:
            self._said = self._stepped
            say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {batch_idx + 1} of "
                f"{trainer.num_training_batches}: loss {loss:.3f}")  # fmt: skip

    def on_validation_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Without the number of the loader, of which there is one."""
        super().on_validation_batch_start(trainer, *rest)
        self.val_progress_bar.set_description("validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the epoch's validation: the lines that stay."""
        assert isinstance(pl_module, SpeechModule)
        super().on_train_epoch_end(trainer, pl_module)
        speed = self._audio_seconds / max(self._stepped - self._started, 1e-9)
        parts = [f"loss {self._loss_sum / max(self._targets, 1):.3f}", f"{speed:.1f} audio hours per hour"]
        if pl_module.measures:
            parts.insert(1, said(pl_module.measures))
        say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {', '.join(parts)}")
        self._say_notes(pl_module)
        if (skipped := pl_module.bad_files.summary()) and skipped != self._skipped:
            say(skipped)
        self._skipped = skipped
