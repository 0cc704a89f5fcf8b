"""Training of the CTC head: a stage of its own behind the adapter's, on the same data and the same frozen frames."""

# B batch · F frames · D encoder width · K labels · S samples

import hashlib
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech import tasks
from rwkv_speech.audio import length_mask
from rwkv_speech.batch import Batch
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.feature_fill import fill
from rwkv_speech.data.loader import StepLoader
from rwkv_speech.devices import accelerator
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import BEST, LAST, add_ctc
from rwkv_speech.models.ctc import BLANK, CtcHead, CtcSpec
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.training.ctc_speech import Speech, with_times
from rwkv_speech.training.optim import lr_factor
from rwkv_speech.training.points import begin_point, finish_point, newest_point
from rwkv_speech.training.progress import say
from rwkv_speech.training.resume import shared_settings
from rwkv_speech.training.run import quieten

FOLDER = "ctc"  # in that of the run: points to resume from, and the frames of a small set
_STATE, _FRAMES = "state.pt", "frames"
_STEPS, _MOST_EPOCHS = 750, 20  # that suffice for little data; much data is gone through once
_WARMUP, _GRAD_CLIP, _WEIGHT_DECAY = 50, 5.0, 0.01
# Frames of so many bytes are made once and kept on the disk for all epochs.
_SMALL = 1 << 30
# Every so many steps a batch more: half of it sounds without words, half of it speech with silence around.
_EXTRAS_EVERY = 8
# Spans of frames that are hidden while it learns: how rare, and how long at most.
_FRAMES_PER_GAP, _LONGEST_GAP = 60, 8
_SECONDS_BETWEEN_LINES = 60.0
_CHECKPOINT = re.compile(rf"{BEST}|{LAST}|(best-)?epoch-\d+\.safetensors")


def fit_ctc(model: SpeechLM, config: TrainConfig, data: SpeechDataset, cache: FeatureCache | None) -> None:
    """Train a CTC head, from where that stopped, and add it to the run's checkpoints, which else stay as they are.

    `data` and its `cache` are those of the run. A head that the same settings and data gave before is only added where
    it is missing. Raises UserError for data without speech recognition.
    """
    folder, frames = Path(config.proj_dir), Path(config.proj_dir) / FOLDER / _FRAMES
    speech = Speech(data.source, config)
    settings = shared_settings(config, model, data, None)
    if cache is None and _is_small(data, model.encoder):
        cache = FeatureCache(frames, settings["encoder"], "float32")
        data = data.with_cache(cache)
    module = CtcModule(model.encoder, config, data, speech, cache)
    if not module.is_trained(settings):
        _fit(module, config)
    if getattr(rank_zero_only, "rank", 0):
        return
    head = module.head.to(next(model.encoder.parameters()).device).eval().requires_grad_(False)
    head.spec = with_times(head, model.encoder, speech, config.seed)
    paths = sorted(path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name))
    for path in paths:
        add_ctc(path, head)
    shutil.rmtree(frames, ignore_errors=True)
    say(f"CTC head: {len(head.spec.labels)} characters, in {len(paths)} checkpoints of {folder}")


def _is_small(data: SpeechDataset, encoder: SpeechEncoder) -> bool:
    """Whether the frames of all utterances are worth keeping for the time of the stage."""
    size = float(data.durations().sum(dtype=np.float64)) * encoder.numbers_per_second * 4
    return not data.changes_audio and size <= _SMALL  # NaN, where a duration is not known, is not


def _fit(module: "CtcModule", config: TrainConfig) -> None:
    kind, devices = accelerator(config)
    quieten()
    trainer = pl.Trainer(
        accelerator=kind,
        devices=devices,
        num_nodes=config.num_nodes,
        # What is trained is small: each device holds all of it.
        strategy="ddp" if config.strategy.startswith("deepspeed") else config.strategy,
        max_epochs=module.epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=_GRAD_CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the run's own waits for the end of a step
    say(f"training a CTC head of {sum(x.numel() for x in module.head.parameters()):,} parameters")
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.started = progress.processed = progress.completed = module.start
    try:
        trainer.fit(module)
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from error


class CtcModule(pl.LightningModule):
    """Loss and optimizer of a CTC head on the frames of a frozen encoder."""

    def __init__(
        self,
        encoder: SpeechEncoder,
        config: TrainConfig,
        data: SpeechDataset,
        speech: Speech,
        cache: FeatureCache | None,
    ) -> None:
        super().__init__()
        self.config, self._data, self._speech, self._cache = config, data, speech, cache
        self._frozen = (encoder,)  # hidden from Lightning: it is neither trained, nor saved, nor shared out
        torch.manual_seed(_number(config.seed))
        self.head = CtcHead(encoder.width, CtcSpec(speech.characters(), config.ctc_hidden, layers=config.ctc_layers))
        world_size = config.num_nodes * accelerator(config)[1]
        cut = Cut(config.micro_bsz, config.batch_seconds, world_size=world_size, accumulate=config.accumulate)
        enough = math.ceil(_STEPS / len(data.loader(cut, config.epoch_steps)))
        self.epochs = config.ctc_epochs or min(_MOST_EPOCHS, enough)
        self.start = 0  # the epoch to begin with
        self._resumed: dict[str, Any] = {}
        self._info: dict[str, Any] = {}  # of the points
        self._said, self._losses, self._left_out = time.perf_counter(), list[Tensor](), set[int]()

    def is_trained(self, settings: Mapping[str, Any]) -> bool:
        """Take over what was trained before with the same settings; whether that was all.

        What was interrupted is resumed with batches that are cut alike; else it begins again.
        """
        c = self.config
        cut = {name: getattr(c, name) for name in ("micro_bsz", "batch_seconds", "accumulate", "device", "num_nodes")}
        own = {name: getattr(c, name) for name in ("lr_ctc", "ctc_epochs", "ctc_hidden", "ctc_layers")}
        self._info = {"settings": {**settings, **own}, "cut": cut, "epochs": self.epochs}
        point = newest_point(Path(c.proj_dir) / FOLDER)
        if point is None:
            return False
        done = point.info["epoch"] == point.info["epochs"]
        if point.info["settings"] != self._info["settings"] or not (done or point.info["cut"] == cut):
            say("the CTC head here was trained with other settings: it is trained again")
            return False
        self._resumed, self.start = torch.load(point.path / _STATE, map_location="cpu"), point.info["epoch"]
        self.head.load_state_dict(self._resumed["head"])
        return done

    @property
    def _encoder(self) -> SpeechEncoder:
        return self._frozen[0]

    def on_fit_start(self) -> None:
        """Take over the state of an interrupted stage; fill the cache of frames, each rank its share."""
        self._encoder.to(self.device)
        if self._resumed:
            self.trainer.optimizers[0].load_state_dict(self._resumed["optimizer"])
            cast(Any, self.lr_schedulers()).load_state_dict(self._resumed["schedule"])
        if self._cache is None:
            return
        cut = self._cut()
        cache, plain = self._cache.for_writer(self.trainer.global_rank), self._data.plain()
        fill(cache, plain, self._encode, self._encoder.numbers_per_second, cut, self.config.workers)
        self.trainer.strategy.barrier()
        self._cache.refresh()

    def on_train_epoch_start(self) -> None:
        """What is dropped out depends on seed, epoch and rank alone, as after a resume."""
        torch.manual_seed(_number(self.config.seed, self.current_epoch, self.trainer.global_rank))

    def train_dataloader(self) -> StepLoader:
        """This rank's share of the training data."""
        c = self.config
        steps = c.epoch_steps and c.epoch_steps * c.accumulate
        loader = self._data.loader(self._cut(), steps, c.workers, pin_memory=self.device.type == "cuda")
        loader.set_state(self.trainer.current_epoch, 0)
        return loader

    def _cut(self) -> Cut:
        c, trainer = self.config, self.trainer
        return Cut(c.micro_bsz, c.batch_seconds, c.seed, rank=trainer.global_rank, world_size=trainer.world_size)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, a short warm-up and a cosine."""
        optimizer = torch.optim.AdamW(self.head.parameters(), self.config.lr_ctc, weight_decay=_WEIGHT_DECAY)
        total = int(self.trainer.estimated_stepping_batches)
        factor = lr_factor("cosine", min(_WARMUP, total // 10), total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, step: list[Batch], batch_idx: int) -> Tensor:
        """The mean loss of the utterances of a batch."""
        batches = step
        self._left_out |= {sample.index for batch in step for sample in batch.bad}
        if (self.current_epoch * int(self.trainer.num_training_batches) + batch_idx) % _EXTRAS_EVERY == 0:
            batches = [*step, self._speech.extras(f"{self.current_epoch}/{batch_idx}/{self.trainer.global_rank}")]
        losses = torch.cat([self._losses_of(batch) for batch in batches if len(batch)] or [torch.zeros(0)])
        if not len(losses):  # this rank has none, but takes part
            return sum((x.sum() * 0.0 for x in self.head.parameters()), torch.zeros((), device=self.device))
        if not losses.isfinite().all():
            raise UserError(f"CTC head, step {self.global_step}: the loss is not finite; lower --lr_ctc")
        self._losses.append(losses.detach())
        if time.perf_counter() - self._said > _SECONDS_BETWEEN_LINES:
            self._report(f", step {batch_idx + 1} of {self.trainer.num_training_batches}")
        return losses.mean()

    def _losses_of(self, batch: Batch) -> Tensor:
        """The loss of each utterance whose text says what is spoken, (at most B,), on the host."""
        if batch.frames is not None and batch.frame_lengths is not None:
            frames, lengths = batch.frames, batch.frame_lengths
        else:
            frames, lengths = self._encode(batch.waveforms, batch.num_samples, batch.normalised)
        read = batch.input_ids or [None] * len(batch)
        spoken = [i for i, x in enumerate(batch.tasks) if tasks.base_of(x) == tasks.DEFAULT and read[i] is None]
        if not spoken:
            return torch.zeros(0)
        targets = [self.head.spec.encode(batch.texts[row]) for row in spoken]
        for row, target in zip(spoken, targets, strict=True):
            if frames_needed(target) > lengths[row]:
                self._left_out.add(batch.indices[row])
        frames, lengths = frames[spoken].to(self.device), lengths[spoken]
        return ctc_losses(self.head(with_gaps(frames, lengths), lengths), lengths, targets)

    def _encode(self, waveforms: Tensor, num_samples: Tensor, normalised: bool = False) -> tuple[Tensor, Tensor]:
        return self._encoder.forward(waveforms.to(self.device), num_samples, normalised)

    def _report(self, where: str = "") -> None:
        """A line that stays, of the first rank's loss since the epoch's start, and of what it could not use."""
        self._said = time.perf_counter()
        loss = float(torch.cat(self._losses).mean()) if self._losses else 0.0
        left_out = f", utterances left out: {len(self._left_out)}" if self._left_out else ""
        say(f"CTC head, epoch {self.current_epoch + 1}/{self.epochs}{where}: loss {loss:.3f}{left_out}")

    def on_train_epoch_end(self) -> None:
        """Say the epoch's loss, and save a point to resume from."""
        self._report()
        self._losses = []
        if self.trainer.is_global_zero:
            epoch = self.current_epoch + 1
            pending = begin_point(Path(self.config.proj_dir) / FOLDER, epoch)
            schedule: Any = self.lr_schedulers()
            state = {"head": self.head.state_dict(), "optimizer": self.trainer.optimizers[0].state_dict()}
            torch.save({**state, "schedule": schedule.state_dict()}, pending / _STATE)
            finish_point(pending, {**self._info, "epoch": epoch}, keep=1)


def with_gaps(frames: Tensor, frame_lengths: Tensor) -> Tensor:
    """Frames (B, F, D), (B,) with the row's mean in place of some spans: the rest must tell what is said there.

    Source: time masking, SpecAugment, Park et al. 2019.
    """
    rows, count, _ = frames.shape
    place = torch.arange(count)
    begins = torch.rand(rows, count) * _FRAMES_PER_GAP < 1
    ends = torch.where(begins, place + torch.randint(1, _LONGEST_GAP + 1, (rows, count)), 0).cummax(1).values
    gaps = (place < ends)[..., None].to(frames.device)
    outside = ~length_mask(frame_lengths, count, frames.device)[..., None]
    means = (
        frames.masked_fill(outside, 0.0).sum(1, dtype=torch.float32)
        / frame_lengths.clamp_min(1).to(frames.device)[:, None]
    )
    return torch.where(gaps, means[:, None].to(frames.dtype), frames)


def frames_needed(targets: Sequence[int]) -> int:
    """The fewest frames in which these labels can be heard: one each, and a blank between two that are alike."""
    return len(targets) + sum(a == b for a, b in pairwise(targets))


def ctc_losses(log_probs: Tensor, frame_lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """The CTC loss of each row of log-probabilities (B, F, K), (B,), on the host; 0 for a text that is too long.

    On the host, because PyTorch's on a GPU adds up in no fixed order; of the labels that occur alone, which are few.
    """
    used = sorted({BLANK, *(label for row in targets for label in row)})
    place = {label: i for i, label in enumerate(used)}
    return F.ctc_loss(
        log_probs[..., used].cpu().transpose(0, 1),
        torch.tensor([place[label] for row in targets for label in row], dtype=torch.int64),
        frame_lengths.cpu(),
        torch.tensor([len(row) for row in targets]),
        reduction="none",
        zero_infinity=True,
    )


def _number(*names: object) -> int:
    """A seed of its own for each place in the run."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, ("ctc", *names))).encode()).digest()[:7])
