"""A run from start or from where it stopped: the trainer, what a resumed run must share with the first, `fit`."""

import dataclasses
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DeepSpeedStrategy, Strategy
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.errors import UserError
from rwkv_speech.lightning_callbacks import (
    TRAINER_STATE,
    MetricsTable,
    Progress,
    RandomState,
    ResumePoints,
    Throughput,
    TrainedWeights,
)
from rwkv_speech.lightning_module import SpeechModule
from rwkv_speech.resume import ResumePoint, newest_point
from rwkv_speech.speech_lm import SpeechLM

POINTS = "resume"
# What a resumed run may set anew without another result of the steps that are left.
FREE_FLAGS = frozenset(
    "device num_nodes strategy micro_bsz batch_seconds accumulate workers log_every save_steps resume score_first "
    "epoch_save proj_dir wandb max_bad wkv6".split()
)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The flags that a resumed run must share with the one that it goes on with."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FLAGS}


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


def make_strategy(config: TrainConfig) -> str | Strategy:
    """How several devices work together, in Lightning's terms."""
    if not config.uses_deepspeed():
        return config.strategy
    return DeepSpeedStrategy(
        config={
            "zero_optimization": {"stage": int(config.strategy[-1])},
            "gradient_accumulation_steps": config.accumulate,
            "train_micro_batch_size_per_gpu": config.micro_bsz,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": False},  # autocast computes in bfloat16; the few trained tensors stay in float32
        },
        exclude_frozen_parameters=True,
        logging_level=logging.ERROR,
    )


def make_trainer(config: TrainConfig, first_step: int = 0) -> pl.Trainer:
    """The trainer that `config` describes, for a run that begins behind optimizer step `first_step`."""
    _quieten()
    accelerator, devices = config.accelerator()
    folder = Path(config.proj_dir)
    curves = TensorBoardLogger(folder, "logs", "tensorboard", purge_step=first_step or None)
    loggers: list[Logger] = [MetricsTable(folder, first_step), curves]
    if config.wandb:
        loggers.append(WandbLogger(project=config.wandb, save_dir=folder))
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=config.num_nodes,
        strategy=make_strategy(config),
        precision="bf16-mixed" if config.uses_bf16() else "32-true",
        max_epochs=config.epoch_count,
        limit_train_batches=config.epoch_steps or 1.0,
        log_every_n_steps=config.log_every,
        logger=loggers,
        callbacks=[
            Throughput(),
            TrainedWeights(folder, config.epoch_save),
            RandomState(),
            ResumePoints(folder / POINTS, config.save_steps, _info(config)),
            Progress(refresh_rate=config.log_every),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def _go_on(module: SpeechModule, config: TrainConfig, point: ResumePoint, world_size: int) -> None:
    """Put the sampler where the run stopped; with another cut of the global batch, only epochs can be kept."""
    epoch, step = int(point.info["epoch"]), int(point.info["step"])
    module.start = (epoch, step)
    print(f"going on with {point.path}: epoch {epoch + 1}, behind {step} steps of it")
    was = {name: point.info[name] for name in ("world_size", "accumulate", "micro_bsz", "batch_seconds")}
    now = {"world_size": world_size, "accumulate": config.accumulate, "micro_bsz": config.micro_bsz,
           "batch_seconds": config.batch_seconds}  # fmt: skip
    same = was["world_size"] * was["accumulate"] == world_size * config.accumulate
    if step and not (same and all(was[name] == now[name] for name in ("micro_bsz", "batch_seconds"))):
        raise UserError(
            f"{point.path}: lies inside epoch {epoch + 1}, whose batches were cut for {was}, now {now}; finish the "
            "epoch as it was begun, or go on from a checkpoint of its start with --init_from and resume=no"
        )
    if not same:
        print(f"note: batches were cut for {was}; weights and optimizer go on, the order of the data is another now")


def fit(model: SpeechLM, config: TrainConfig, train: SpeechDataset, valid: SpeechDataset | None) -> SpeechModule:
    """Train from the start or from where the run in --proj_dir stopped; returns the module with its last scores."""
    module = SpeechModule(model, config, train, valid)
    point = find_point(config)
    trainer = make_trainer(config, point.step if point else 0)
    if point:
        _go_on(module, config, point, trainer.world_size)
    elif valid is not None and config.score_first:
        trainer.validate(module, verbose=False)
        if trainer.is_global_zero and module.scores:
            print(f"before training: WER {100 * module.scores.wer:.2f} %")
        module.scores = None
    # The points are this run's own files, checked by their SHA-256; they hold more than tensors.
    state = point.path / TRAINER_STATE if point else None
    try:
        trainer.fit(module, ckpt_path=state, weights_only=False)
    except SIGTERMException:
        print(f"asked to end: the same command goes on from where it stopped")
        sys.exit(128 + signal.SIGTERM)  # not 0: a script must not take the run for finished
    return module
