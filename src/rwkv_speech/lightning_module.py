"""Training with Lightning: the only file that imports it."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv_speech.checkpoint import BEST, LAST
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import BadFileLog, Batch, SpeechDataset
from rwkv_speech.data.loader import make_loader
from rwkv_speech.errors import UserError
from rwkv_speech.metrics import Scores, score
from rwkv_speech.optim import lr_factor, make_optimizer
from rwkv_speech.speech_lm import SpeechLM
from rwkv_speech.text import normalise_score


class SpeechModule(pl.LightningModule):
    """Loss, optimizer and validation of a SpeechLM.

    The gradient of a step is that of the loss summed over the whole global batch (ranks and accumulation), divided
    by its number of target tokens: how the batch was cut up does not change it.
    """

    def __init__(self, model: SpeechLM, config: TrainConfig, train: SpeechDataset, valid: SpeechDataset | None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self._train_data, self._valid_data = train, valid
        model.lm.grad_cp = bool(config.grad_cp)
        self._loss_sum = 0.0
        self._targets = 0
        self._hyps: dict[tuple[str, str], str] = {}  # (id, reference) -> hypothesis
        self.scores: Scores | None = None

    def setup(self, stage: str) -> None:
        """Open the list of bad files, one of each rank."""
        rank = self.trainer.global_rank
        name = f"bad_files-rank{rank}.jsonl" if rank else "bad_files.jsonl"
        self.bad_files = BadFileLog(Path(self.config.proj_dir) / name, self.config.max_bad)

    def _loader(self, dataset: SpeechDataset, shuffle: bool, workers: int) -> DataLoader[Batch]:
        return make_loader(
            dataset,
            self.config.micro_bsz,
            shuffle=shuffle,
            seed=self.config.seed,
            workers=workers,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the training data; raises UserError if --epoch_steps asks for more than there is."""
        loader = self._loader(self._train_data, shuffle=True, workers=self.config.workers)
        if self.config.epoch_steps and self.config.epoch_steps > len(loader):
            raise UserError(
                f"--epoch_steps: given {self.config.epoch_steps}, but {len(self._train_data)} utterances in batches of "
                f"{self.config.micro_bsz} on {self.trainer.world_size} device(s) make {len(loader)}; leave it "
                "empty, or give at most that"
            )
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """This rank's share of the validation data, if there is any."""
        return self._loader(self._valid_data, shuffle=False, workers=0) if self._valid_data else []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with two learning rates and one schedule over the optimizer's steps."""
        c = self.config
        optimizer = make_optimizer(
            self.model.adapter.parameters(), [self.model.time_state], c.lr_adapter, c.lr_state, c.weight_decay
        )
        total = int(self.trainer.estimated_stepping_batches)
        factor = lr_factor(c.lr_schedule, min(c.warmup_steps, max(1, total // 2)), total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The summed loss of one micro batch; raises UserError before anything is updated if it is not finite."""
        self.bad_files.add(batch.bad)
        if len(batch) == 0:
            # Every rank must take part in the step, with nothing to add to it.
            return sum((p.sum() * 0.0 for p in self.model.trained_parameters()), torch.zeros((), device=self.device))
        loss, targets = self.model.loss_sum(batch.waveforms, batch.num_samples, batch.text_ids, batch.text_lengths)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"step {self.global_step}: the loss is {value}, expected a finite number, for the utterances "
                f"{', '.join(batch.ids)}; no weight was changed by it: listen to them, lower --lr_state and "
                "--lr_adapter, or set --precision fp32"
            )
        self._loss_sum += value
        self._targets += targets
        # Lightning divides by the number of accumulated batches; here only the number of targets may divide.
        return loss * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the gradient of the sum into that of the mean over all target tokens."""
        totals = torch.tensor([self._loss_sum, self._targets], dtype=torch.float64, device=self.device)
        if self.trainer.world_size > 1:
            dist.all_reduce(totals)
        loss_sum, targets = totals.tolist()
        self._loss_sum, self._targets = 0.0, 0
        if not targets:
            return
        # Data-parallel training averages over ranks, which the number of ranks undoes.
        scale = self.trainer.world_size / targets
        for parameter in self.model.trained_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.log("loss", loss_sum / targets, prog_bar=True)
        self.log("target_tokens", targets)
        for group in optimizer.param_groups:
            self.log(f"lr_{group['name']}", group["lr"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Decode one batch."""
        self.bad_files.add(batch.bad)
        ids, _ = self.model.generate(batch.waveforms, batch.num_samples)
        for name, text, hyp in zip(batch.ids, batch.texts, ids, strict=True):
            self._hyps[name, text] = self.model.tokenizer.decode(hyp)

    def on_validation_epoch_end(self) -> None:
        """Corpus WER over all ranks; an utterance that two ranks saw counts once."""
        gathered = self._hyps
        if self.trainer.world_size > 1:
            parts: list[dict[tuple[str, str], str]] = [{} for _ in range(self.trainer.world_size)]
            dist.all_gather_object(parts, self._hyps)
            gathered = {key: hyp for part in parts for key, hyp in part.items()}
        self._hyps = {}
        if not gathered:
            return
        refs = [normalise_score(ref) for _, ref in gathered]
        self.scores = score(refs, [normalise_score(hyp) for hyp in gathered.values()])
        self.log("wer", self.scores.wer, prog_bar=True)
        self.log("cer", self.scores.cer)


class TrainedWeights(Callback):
    """Writes the trained tensors: last after every epoch, best by WER, and one of every `epoch_save` epochs."""

    def __init__(self, folder: Path, epoch_save: int) -> None:
        self.folder, self.epoch_save = folder, epoch_save
        self.best_wer = math.inf

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
            if pl_module.scores.wer < self.best_wer:
                self.best_wer = pl_module.scores.wer
                names.append(BEST)
        for name in names:
            pl_module.model.save(self.folder / name, **metrics)


class _Progress(TQDMProgressBar):
    """Without the version number that Lightning adds, which says nothing here."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _quieten() -> None:
    """Keep what Lightning says of itself off the screen; its errors and other warnings stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        r"Found \d+ module\(s\) in eval mode",  # the frozen parts, on purpose
        "Total length of `list` across ranks is zero",  # no validation data
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        "The '.*_dataloader' does not have many workers",  # --workers is the user's
        "`isinstance.treespec, LeafSpec.` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)


def make_trainer(config: TrainConfig) -> pl.Trainer:
    """The trainer that `config` describes."""
    _quieten()
    accelerator, devices = config.accelerator()
    folder = Path(config.proj_dir)
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision="bf16-mixed" if config.uses_bf16() else "32-true",
        max_epochs=config.epoch_count,
        limit_train_batches=config.epoch_steps or 1.0,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.grad_clip or None,
        log_every_n_steps=config.log_every,
        logger=[CSVLogger(folder, "logs", "csv"), TensorBoardLogger(folder, "logs", "tensorboard")],
        callbacks=[TrainedWeights(folder, config.epoch_save), _Progress(refresh_rate=config.log_every)],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def fit(model: SpeechLM, config: TrainConfig, train: SpeechDataset, valid: SpeechDataset | None) -> SpeechModule:
    """Train; returns the module with its last scores."""
    module = SpeechModule(model, config, train, valid)
    trainer = make_trainer(config)
    if valid is not None and config.score_first:
        trainer.validate(module, verbose=False)
        if trainer.is_global_zero and module.scores:
            print(f"before training: WER {100 * module.scores.wer:.2f} %")
        module.scores = None
    trainer.fit(module)
    return module
