"""A whole run: the trainer, and `fit`."""

import dataclasses
import logging
import signal
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.loader import SpeechData
from rwkv_speech.devices import accelerator, uses_bf16
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.reports.page import write_report
from rwkv_speech.reports.record import read_metrics, write_run
from rwkv_speech.training.callbacks import MetricsTable, Progress, Throughput, TrainedWeights
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.resume import POINTS, RandomState, ResumePoints, find_point, resume_from, run_info
from rwkv_speech.training.selection import BestK, EarlyStop
from rwkv_speech.training.strategies import strategy_of


def _quieten() -> None:
    """Keep what Lightning says of itself off the screen; its errors and other warnings stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
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


def make_trainer(config: TrainConfig, first_step: int = 0) -> pl.Trainer:
    """The trainer that `config` describes, for a run that begins behind optimizer step `first_step`."""
    _quieten()
    kind, devices = accelerator(config)
    folder = Path(config.proj_dir)
    curves = TensorBoardLogger(folder, "logs", "tensorboard", purge_step=first_step or None)
    loggers: list[Logger] = [curves]
    if config.wandb:
        loggers.append(WandbLogger(project=config.wandb, save_dir=folder))
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
            TrainedWeights(
                folder, config.epoch_save, BestK(config.keep_best), EarlyStop(config.patience, config.min_delta)
            ),
            RandomState(),
            ResumePoints(folder / POINTS, config.save_steps, run_info(config)),
            Progress(refresh_rate=config.log_every),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def fit(
    model: SpeechLM,
    config: TrainConfig,
    train: SpeechData,
    valid: SpeechData | None,
    cache: FeatureCache | None = None,
) -> SpeechModule:
    """Train from the start or from where the run in --proj_dir stopped; returns the module with its last scores."""
    module = SpeechModule(model, config, train, valid, cache)
    point = find_point(config)
    if point and point.info["ended"]:
        print(
            f"{point.path}: the run has ended early, at epoch {point.info['epoch']} (--patience); nothing is left to do"
        )
        return module
    trainer = make_trainer(config, point.step if point else 0)
    state = resume_from(module, config, point, trainer) if point else None
    if not point and valid is not None and config.score_first:
        trainer.validate(module, verbose=False)
        if trainer.is_global_zero and module.scores:
            print(f"before training: WER {100 * module.scores.wer:.2f} %")
        module.scores = None
    if trainer.is_global_zero:
        write_run(Path(config.proj_dir), dataclasses.asdict(config), f"{trainer.world_size} x {trainer.accelerator}")
    # The points are this run's own files, checked by their SHA-256; they hold more than tensors.
    try:
        trainer.fit(module, ckpt_path=state, weights_only=False)
    except SIGTERMException:
        print("asked to end: the same command goes on from where it stopped")
        sys.exit(128 + signal.SIGTERM)  # not 0: a script must not take the run for finished
    if trainer.is_global_zero and (module.validated or read_metrics(Path(config.proj_dir))):
        print(f"report: {write_report(Path(config.proj_dir))}")
    return module
