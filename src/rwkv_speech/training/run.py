"""A whole run: the trainer, and `fit`."""

import dataclasses
import fcntl
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.loader import SpeechData
from rwkv_speech.devices import accelerator, uses_bf16
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import BEST, LAST, load_trained
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.planning.cost import memory_advice
from rwkv_speech.reports.page import write_report
from rwkv_speech.reports.record import read_metrics, write_run
from rwkv_speech.scoring.measures import said
from rwkv_speech.training.callbacks import MetricsTable, Throughput, TrainedWeights
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.progress import Progress, say
from rwkv_speech.training.resume import (
    Ended,
    RandomState,
    ResumePoints,
    find_point,
    resume_from,
    shared_settings,
    why_finished,
)
from rwkv_speech.training.selection import BestK, EarlyStop
from rwkv_speech.training.strategies import strategy_of

LOCK = "run.lock"


def quieten() -> None:
    """Keep what Lightning says of itself off the screen; its errors and other warnings stay."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r"Found \d+ module\(s\) in eval mode",  # the frozen parts, on purpose
        "Total length of `list` across ranks is zero",  # no validation data
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        "The '.*_dataloader' does not have many workers",  # --workers is the user's
        "`isinstance.treespec, LeafSpec.` is deprecated",
        "You're resuming from a checkpoint that ended before the epoch ended",  # the sampler is put in its place
        "It is recommended to use `self.log",  # WER is the same on every rank
    ):
        warnings.filterwarnings("ignore", message)


def make_trainer(config: TrainConfig, settings: Mapping[str, Any], first_step: int = 0) -> pl.Trainer:
    """The trainer that `config` describes, for a run that begins behind optimizer step `first_step`."""
    quieten()
    kind, devices = accelerator(config)
    folder = Path(config.proj_dir)
    curves = TensorBoardLogger(folder, "logs", "tensorboard", purge_step=first_step or None)
    loggers: list[Logger] = [curves]
    if config.wandb:
        loggers.append(WandbLogger(project=config.wandb, save_dir=folder))
    stop = EarlyStop(config.patience, config.min_delta)
    return pl.Trainer(
        accelerator=kind,
        devices=devices,
        num_nodes=config.num_nodes,
        strategy=strategy_of(config).lightning(),
        precision="bf16-mixed" if uses_bf16(config) else "32-true",
        max_epochs=config.epoch_count,
        limit_train_batches=config.epoch_steps or 1.0,
        log_every_n_steps=config.log_every,
        logger=loggers,
        callbacks=[
            Throughput(),
            MetricsTable(folder, first_step, config.log_every),
            TrainedWeights(folder, config.epoch_save, BestK(config.keep_best), stop),
            Progress(refresh_rate=config.log_every),
            RandomState(),
            ResumePoints(config, settings, stop),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def fit(
    model: SpeechLM, config: TrainConfig, train: SpeechData, valid: SpeechData | None, cache: FeatureCache | None = None
) -> None:
    """Train from the start, or from where the run in --proj_dir stopped; a finished one is left as it is."""
    settings = shared_settings(config, model, train, valid)
    point = find_point(config, settings)
    if point and (finished := why_finished(config, point)):
        return say(finished)
    trained = sum(x.numel() for x in model.trained_parameters())
    frozen = sum(x.nbytes for x in model.parameters() if not x.requires_grad) / 1e6
    heard = f"{len(train) or 'streamed'} utterances"
    say(f"training {trained:,} parameters beside {frozen:,.1f} MB of frozen ones, on {heard}")
    module = SpeechModule(model, config, train, valid, cache)
    trainer = make_trainer(config, settings, point.step if point else 0)
    state = resume_from(module, config, point, trainer) if point else None
    try:
        if not point and valid is not None and config.score_first:
            _score_first(trainer, module)
        if trainer.is_global_zero:
            device = f"{trainer.world_size} x {trainer.accelerator}"
            write_run(Path(config.proj_dir), dataclasses.asdict(config), device)
        # The points are this run's own files, checked by their SHA-256; they hold more than tensors.
        trainer.fit(module, ckpt_path=state, weights_only=False)
    except Ended:
        say(f"saved in {config.proj_dir}: the same command resumes the run from here")
        # Not 0: a script must not take the run for finished. Of the other ranks, though, an error would end rank 0.
        sys.exit(128 + (module.asked_to_end or signal.SIGTERM) if trainer.is_global_zero else 0)
    except SIGTERMException:  # before the first step, so that there is nothing to save
        sys.exit(128 + signal.SIGTERM)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"{error}\n{memory_advice(config)}") from error
    except SystemExit as error:
        if not error.code:  # the first rank says why
            raise
        raise KeyboardInterrupt from error  # Lightning makes this of Ctrl-C before the first step
    if trainer.should_stop and (point := find_point(config, settings)) and point.info["epoch"] < config.epoch_count:
        say(why_finished(config, point))
    if trainer.is_global_zero and (module.validated or read_metrics(Path(config.proj_dir))):
        print(f"report: {write_report(Path(config.proj_dir))}")


def _score_first(trainer: pl.Trainer, module: SpeechModule) -> None:
    trainer.validate(module, verbose=False)
    if module.measures:
        say(f"before training: {said(module.measures)}")
    module.measures = {}


def results(folder: Path) -> str:
    """What validation measured of the best and the last weights of a run, and where its weights are."""
    found = {name: load_trained(folder / name).metrics for name in (BEST, LAST) if (folder / name).is_file()}
    scored = [
        f"{name.removesuffix('.safetensors')} {metrics['validation']} (epoch {metrics['epoch']})"
        for name, metrics in found.items()
        if "validation" in metrics
    ]
    return "; ".join([*scored, f"trained weights are in {folder.resolve()}"])


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Raises UserError if another run uses the folder; the lock goes with the process, however that ends.

    Other ranks leave the lock, and warnings, to the first.
    """
    if getattr(rank_zero_only, "rank", 0):
        logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--proj_dir: {folder} is used by a run that has not ended; wait for it, or give another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
