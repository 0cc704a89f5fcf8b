"""A run from start or from where it stopped: the trainer, what a resumed run must share with the first, `fit`."""

import dataclasses
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy, Strategy
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.streaming import StreamedData
from rwkv_speech.devices import accelerator, uses_bf16
from rwkv_speech.errors import UserError
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.planning.memory import REDUCE_BUCKET
from rwkv_speech.reports.page import write_report
from rwkv_speech.reports.record import read_metrics, write_run
from rwkv_speech.training.callbacks import (
    TRAINER_STATE,
    MetricsTable,
    Progress,
    RandomState,
    ResumePoints,
    Throughput,
    TrainedWeights,
)
from rwkv_speech.training.module import SpeechModule
from rwkv_speech.training.points import ResumePoint, newest_point
from rwkv_speech.training.selection import BestK, EarlyStop

POINTS = "resume"


def identity(config: TrainConfig) -> dict[str, Any]:
    """The flags that a resumed run must share with the one that it goes on with."""
    return {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if not field.metadata["resume"]
    }


def _info(config: TrainConfig) -> dict[str, Any]:
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


class _BatchesAsTheyAre(DeepSpeedPrecision):
    """Lightning would cast waveforms to bfloat16, and refuses frozen dataclasses, which batches are."""

    def convert_input(self, data: Any) -> Any:
        return data


def make_strategy(config: TrainConfig) -> str | Strategy:
    """How several devices work together, in Lightning's terms."""
    if not config.uses_deepspeed():
        return config.strategy
    return DeepSpeedStrategy(
        config={
            "zero_optimization": {"stage": int(config.strategy[-1]), "reduce_bucket_size": REDUCE_BUCKET},
            "train_micro_batch_size_per_gpu": config.micro_bsz,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": False},  # autocast computes in bfloat16; the few trained tensors stay in float32
        },
        precision_plugin=_BatchesAsTheyAre("bf16-mixed" if uses_bf16(config) else "32-true"),
        exclude_frozen_parameters=True,
        logging_level=logging.ERROR,
    )


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
        strategy=make_strategy(config),
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
            ResumePoints(folder / POINTS, config.save_steps, _info(config)),
            Progress(refresh_rate=config.log_every),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def _same_cut(config: TrainConfig, point: ResumePoint, world_size: int) -> bool:
    """Whether the global batches of the point's run are this run's."""
    was = point.info["world_size"] * point.info["accumulate"]
    kept = all(point.info[name] == getattr(config, name) for name in ("micro_bsz", "batch_seconds"))
    return kept and bool(was == world_size * config.accumulate)


def _go_on(module: SpeechModule, config: TrainConfig, point: ResumePoint, trainer: pl.Trainer) -> Path | None:
    """Put the sampler where the run stopped; returns the whole state of the trainer, if it can be taken over whole.

    With another cut of the global batch the steps of an epoch are others: weights and optimizer are taken over, and
    the epoch begins anew.
    """
    epoch, step, state = int(point.info["epoch"]), int(point.info["step"]), point.path / TRAINER_STATE
    if _same_cut(config, point, trainer.world_size):
        module.start = (epoch, step)
        print(f"going on with {point.path}: epoch {epoch + 1}, behind {step} steps of it")
        return state
    if config.uses_deepspeed():
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


def fit(
    model: SpeechLM,
    config: TrainConfig,
    train: SpeechDataset | StreamedData,
    valid: SpeechDataset | None,
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
    state = _go_on(module, config, point, trainer) if point else None
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
