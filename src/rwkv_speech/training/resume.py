"""Resuming: what a resumed run must share with the first, where it stopped, and the points that make it possible."""

import dataclasses
import os
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
from rwkv_speech.data.loader import SpeechData
from rwkv_speech.data.source import digest
from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models.checkpoint import find_checkpoint
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.points import ResumePoint, begin_point, finish_point, newest_point
from rwkv_speech.training.progress import say
from rwkv_speech.training.selection import EarlyStop

POINTS, TRAINER_STATE = "resume", "trainer.ckpt"
# How the global batch is cut: with another cut a run is resumed, but not inside an epoch.
_CUT = ("micro_bsz", "batch_seconds", "accumulate")


def shared_settings(
    config: TrainConfig, model: SpeechLM, train: SpeechData, valid: SpeechData | None
) -> dict[str, Any]:
    """What a resumed run must share with the first, by flag; of files and data it is the content, wherever they lie."""
    flags = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if not field.metadata["resume"]
    }
    content = {
        "load_model": model.parts.base_sha256,
        "encoder": model.encoder.fingerprint(),
        "vocab_file": sha256_file(model.tokenizer.vocab_file),
        **{name: getattr(model.parts, name) for name in ("stack", "adapter_hidden", "separator")},
        "train_data": train.fingerprint(),
        "valid_data": valid.fingerprint() if valid is not None else "",
        "noise_dir": _files_in(config.noise_dir) if config.noise_dir else "",
        "lora_from": _updates(config.lora_from) if config.lora_from else "",
        "init_from": sha256_file(find_checkpoint(config.init_from)) if config.init_from else "",
    }
    return flags | content


def _updates(path: str) -> str:
    return (
        sha256_file(path)
        if Path(path).is_file()
        else digest((x.name, sha256_file(x)) for x in sorted(Path(path).iterdir()))
    )


def _files_in(folder: str) -> str:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return digest((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)


def find_point(config: TrainConfig, settings: Mapping[str, Any]) -> ResumePoint | None:
    """Where the run in --proj_dir stopped; raises UserError naming the settings that changed since."""
    point = newest_point(Path(config.proj_dir) / POINTS)
    if point is None:
        return None
    if "settings" not in point.info:
        raise UserError(
            f"{point.path}: was saved by another version of this program; resume the run with that one, or give "
            "--resume no to start another"
        )
    before = point.info["settings"]
    given = dataclasses.asdict(config)
    different = [
        f"--{name}: was {before.get(name)!r}, now {now!r}"
        + (f", the content of {given[name]}" if given[name] and given[name] != now else "")
        for name, now in settings.items()
        if before.get(name) != now
    ]
    if different:
        raise UserError(
            f"{config.proj_dir}: the run in this folder began with other settings; give the same ones to resume it, "
            "or --resume no to start another:\n  " + "; ".join(different)
        )
    return point


def why_finished(config: TrainConfig, point: ResumePoint) -> str:
    """Say that nothing is left to do, and what would be done with other flags; "" if something is."""
    done, waited = int(point.info["epoch"]), int(point.info["waited"])
    if 0 < config.patience <= waited:
        return (
            f"{config.proj_dir}: this run has ended early, after epoch {done}: no lower error in {waited} validations; "
            f"a --patience above {waited}, or 0, resumes it"
        )
    if done < config.epoch_count:
        return ""
    asked = "" if done == config.epoch_count else f", more than --epoch_count {config.epoch_count} asks for"
    return (
        f"{config.proj_dir}: this run is finished, with {done} epochs{asked}; an --epoch_count above {done} resumes it"
    )


def resume_from(module: SpeechModule, config: TrainConfig, point: ResumePoint, trainer: pl.Trainer) -> Path | None:
    """Put the sampler where the run stopped; returns the whole state of the trainer, if it can be taken over whole.

    With another cut of the global batch the steps of an epoch are others: weights and optimizer are taken over, and
    the epoch begins again.
    """
    epoch, step, state = int(point.info["epoch"]), int(point.info["step"]), point.path / TRAINER_STATE
    where = f"resuming {config.proj_dir} at step {point.step}: epoch {epoch + 1} of {config.epoch_count}"
    # Both move the end of the learning rates' schedule.
    module.other_course = int(point.info["epoch_count"]) != config.epoch_count
    if _same_cut(config, point, trainer.world_size):
        module.start = (epoch, step)
        say(f"{where}, after {step} of its steps" if step else where)
        return state
    if not module.strategy.any_number:
        raise UserError(
            f"{point.path}: DeepSpeed's state was cut for {point.info['world_size']} devices, now there are "
            f"{trainer.world_size}, or for other batches; give the same --device, --micro_bsz and --accumulate, "
            "or --strategy ddp"
        )
    again = f", from its beginning (its first {step} steps are done again)" if step else ""
    say(f"{where}{again}; batches are cut otherwise: weights and optimizer are kept")
    module.taken_over = torch.load(state, map_location="cpu", weights_only=False)
    module.start, module.other_course = (epoch, 0), True
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.started = progress.processed = progress.completed = epoch
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = point.step
    return None


def _same_cut(config: TrainConfig, point: ResumePoint, world_size: int) -> bool:
    """Whether the global batches of the point's run are this run's."""
    was = point.info["world_size"] * point.info["accumulate"]
    kept = all(point.info[name] == getattr(config, name) for name in ("micro_bsz", "batch_seconds"))
    return kept and bool(was == world_size * config.accumulate)


class Ended(Exception):
    """A signal asked the run to end, and what it needs to resume was saved."""


class ResumePoints(Callback):
    """Saves a point every `every` optimizer steps, after every epoch, and when a signal asks the run to end."""

    def __init__(self, config: TrainConfig, settings: Mapping[str, Any], stop: EarlyStop) -> None:
        self.folder, self.every, self.stop = Path(config.proj_dir) / POINTS, config.save_steps, stop
        self.info = {"settings": settings, **{name: getattr(config, name) for name in (*_CUT, "epoch_count")}}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the learning rates, heed signals."""
        assert isinstance(pl_module, SpeechModule)
        self._set_rates(trainer, pl_module)
        # A handler can be set in the main thread alone; elsewhere Lightning's own stays.
        if threading.current_thread() is threading.main_thread():
            self._heed_signals(trainer, pl_module)

    def _set_rates(self, trainer: pl.Trainer, module: SpeechModule) -> None:
        """The learning rates of a resumed run are those that its flags give at this step, whatever it had before."""
        schedule: Any = module.lr_schedulers()
        moves = []
        for group, base, factor in zip(
            trainer.optimizers[0].param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            before, group["lr"] = group["lr"], base * factor(schedule.last_epoch)
            moves.append(f"{group['name']} {before:.3g} -> {group['lr']:.3g}")
        if module.other_course:
            steps = int(trainer.estimated_stepping_batches)
            say(f"learning rates as in a run of {steps} steps from its start: {', '.join(moves)}")

    def _heed_signals(self, trainer: pl.Trainer, module: SpeechModule) -> None:
        """SIGTERM and Ctrl-C are kept for the end of a step, the same on all ranks; a second Ctrl-C ends at once."""

        def asked_to_end(number: int, _: object) -> None:
            module.asked_to_end = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if trainer.is_global_zero:
                what = "this validation" if trainer.validating else "this step"
                name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
                # Not print: the signal may have come while it printed.
                os.write(1, f"\n{name}: this run ends after {what}, Ctrl-C now ends it at once\n".encode())

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, asked_to_end)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Inside an epoch; its end has a point of its own, after validation."""
        assert isinstance(pl_module, SpeechModule)
        if batch_idx + 1 == trainer.num_training_batches:
            return
        if pl_module.ending or (batch_idx + 1) % self.every == 0:
            self._save(trainer, pl_module, trainer.current_epoch, batch_idx + 1)
        if pl_module.ending:
            raise Ended

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the epoch's validation and checkpoints: callbacks before this one have done their work."""
        assert isinstance(pl_module, SpeechModule)
        epoch = trainer.current_epoch + 1
        self._save(trainer, pl_module, epoch, 0)
        # A signal may have come since the last step, during validation.
        if pl_module.all_agree_to_end() and epoch < (trainer.max_epochs or 0) and not trainer.should_stop:
            raise Ended

    def _save(self, trainer: pl.Trainer, module: SpeechModule, epoch: int, step: int) -> None:
        number = trainer.global_step
        module.share_longest()
        made = begin_point(self.folder, number) if trainer.is_global_zero else None
        pending: Path = trainer.strategy.broadcast(made)  # type: ignore[assignment] # rank 0 has a path
        trainer.save_checkpoint(pending / TRAINER_STATE)  # DeepSpeed: every rank writes its part
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            place = {"epoch": epoch, "step": step, "world_size": trainer.world_size, "waited": self.stop.waited}
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
        """The same numbers come next."""
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        if len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state_dict["cuda"])
