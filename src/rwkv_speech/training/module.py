"""One training step and one validation of a SpeechLM, in Lightning's terms."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import BadSample, Batch
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.bad_files import BadFileLog
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.feature_fill import fill
from rwkv_speech.data.loader import SpeechData, StepLoader
from rwkv_speech.decoding.results import Row
from rwkv_speech.decoding.transcribe import transcribe_batch
from rwkv_speech.devices import uses_bf16
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import TrainedOn
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.measure import Measure
from rwkv_speech.scoring.measures import mean_error, measures
from rwkv_speech.training.languages import Languages
from rwkv_speech.training.optim import lr_factor, make_optimizer
from rwkv_speech.training.strategies import strategy_of

T = TypeVar("T")


class SpeechModule(pl.LightningModule):
    """Loss, optimizer and validation of a SpeechLM.

    A step's gradient is that of the loss summed over the whole global batch (ranks and accumulation), divided by its
    number of target tokens, which all ranks know before the first backward pass: how the batch was cut up does not
    change it, whatever engine adds up the gradients.
    """

    def __init__(
        self,
        model: SpeechLM,
        config: TrainConfig,
        train: SpeechData,
        valid: SpeechData | None,
        cache: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a saved state holds the trained tensors alone
        self.model, self.config = model, config
        self._train_data, self._valid_data, self._cache = train, valid, cache
        model.lm.grad_cp = bool(config.grad_cp)
        self.strategy = strategy_of(config)
        self.strategy.prepare(model)
        self.start = (0, 0)  # the epoch and the optimizer step in it to begin with
        self.taken_over: dict[str, Any] | None = None  # the state of a run whose batches were cut otherwise
        self.other_course = False  # a resumed run's schedule ends elsewhere than it did
        self.asked_to_end = 0  # the signal that asked this rank
        self.ending = False  # all ranks, after this step
        # Of the epoch, over all ranks: utterances and samples that were trained on; of the run: the longest's samples.
        self._num_used = self._samples_used = self._longest = 0
        if config.adapter_stays and model.trained_on:  # the old tasks' pieces stay as long as they were
            self._longest = round(model.trained_on.longest_seconds * SAMPLE_RATE)
        self._rows: dict[tuple[int, int], Row] = {}  # by place in the validation set
        self._bad: list[BadSample] = []  # of this validation, on this rank
        self.validated: list[Row] = []
        self.measures: dict[str, Measure] = {}  # of the last validation's tasks
        self._languages = Languages(model)
        self.notes: list[str] = []  # of languages, that nobody has said yet

    def setup(self, stage: str) -> None:
        """Open the list of bad files, which all ranks know and the first writes."""
        path = Path(self.config.proj_dir) / "bad_files.jsonl"
        self.bad_files = BadFileLog(path, self.config.max_bad, writes=self.trainer.is_global_zero)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override] # torch has overloads of it
        """The trained tensors alone: frozen weights are in no checkpoint."""
        trained = {id(x) for x in self.model.trained_parameters()}
        wanted = {name for name, x in self.named_parameters() if id(x) in trained}
        return {name: x for name, x in super().state_dict(*args, **kwargs).items() if name in wanted}

    def on_fit_start(self) -> None:
        """Take over another cut's state, if any; look for unknown languages; fill the cache, each rank its share."""
        if self.taken_over is not None:
            self._take_over(self.taken_over)
            self.taken_over = None
        c, data = self.config, self._train_data
        if self.trainer.is_global_zero and isinstance(data, SpeechDataset) and c.strategy != "deepspeed_stage_3":
            with self._autocast():
                self.notes += self._languages.read(data.source, c.label_mode)
        if self._cache is None:
            return
        encoder, workers = self.model.encoder, self.config.workers
        fill(
            self._cache.for_writer(self.trainer.global_rank),
            cast(SpeechDataset, self._train_data).plain(),  # a stream has no cache
            lambda waveforms, sizes: encoder(waveforms.to(self.device), sizes),
            encoder.numbers_per_second,
            self._cut(),
            workers,
        )
        self.trainer.strategy.barrier()
        self._cache.refresh()

    def _take_over(self, state: dict[str, Any]) -> None:
        """Weights, optimizer, and what callbacks know; the schedule by epochs, whose steps differ."""
        self.load_state_dict(state["state_dict"], strict=False)
        self.trainer.optimizers[0].load_state_dict(state["optimizer_states"][0])
        schedule: Any = self.lr_schedulers()
        schedule.last_epoch = self.start[0] * int(self.trainer.estimated_stepping_batches) // self.config.epoch_count
        self._longest = state["used"][2]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # Lightning sets it by a name
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])

    def on_train_epoch_start(self) -> None:
        """Not called where a run is resumed inside an epoch, whose numbers come with the point."""
        self._num_used = self._samples_used = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What was trained on; after `share_longest`."""
        checkpoint["used"] = [self._num_used, self._samples_used, self._longest]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The same of a resumed run."""
        self._num_used, self._samples_used, self._longest = checkpoint["used"]

    def share_longest(self) -> None:
        """All ranks know the longest utterance of all; for all to call together."""
        self._longest = max(self._gathered(self._longest))

    def note_trained(self) -> None:
        """Note in the model what an epoch trained on; raises UserError if it was nothing; for all ranks together."""
        with self._said_once():
            self.bad_files.require_used(self._num_used, self.config.train_data)
        self.share_longest()
        self.model.trained_on = TrainedOn(
            self._num_used, self._samples_used / SAMPLE_RATE / 3600, self._longest / SAMPLE_RATE
        )

    def all_agree_to_end(self) -> bool:
        """Whether a signal asked any rank to end; for all to call together."""
        self.ending = any(self._gathered(self.asked_to_end))
        return self.ending

    @contextmanager
    def _said_once(self) -> Iterator[None]:
        """An error that all ranks raise is said by the first; the others end without a word."""
        try:
            yield
        except UserError:
            if self.trainer.is_global_zero:
                raise
            sys.exit(0)  # an error of theirs would end the first before it has said it

    def _note_bad(self, mine: Sequence[BadSample], data: str) -> None:
        """List what any rank could not use; raises UserError if it is too much; for all ranks together."""
        bad = [sample for part in self._gathered(mine) for sample in part]
        with self._said_once():
            self.bad_files.add(bad, data)

    def _gathered(self, mine: T) -> list[T]:
        """One of each rank."""
        found = [mine] * self.trainer.world_size
        if len(found) > 1:
            dist.all_gather_object(found, mine)
        return found

    def train_dataloader(self) -> StepLoader:
        """This rank's share of the training data; raises UserError if --epoch_steps asks for more than there is."""
        c = self.config
        cut = self._cut(c.accumulate)
        with self._said_once():
            loader = self._train_data.loader(cut, c.epoch_steps, c.workers, pin_memory=self.device.type == "cuda")
        loader.set_state(*self.start)
        return loader

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """This rank's share of the validation data, if there is any."""
        if not self._valid_data:
            return []
        cut = Cut(
            self.config.micro_bsz, shuffle=False, rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )
        with self._said_once():
            return self._valid_data.loader(cut)

    def _cut(self, accumulate: int = 1) -> Cut:
        """How the training data is cut and shared."""
        c, rank, world_size = self.config, self.trainer.global_rank, self.trainer.world_size
        return Cut(c.micro_bsz, c.batch_seconds, c.seed, rank=rank, world_size=world_size, accumulate=accumulate)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a learning rate for each part and one schedule over the optimizer's steps."""
        c = self.config
        optimizer = make_optimizer(
            self.model.adapter.parameters(),
            self.model.task_parameters(),
            c.lr_adapter,
            c.lr_state,
            c.weight_decay,
            (c.beta1, c.beta2),
            c.adam_eps,
            self.model.tuned.values(),
            c.lr_lm,
        )
        total = int(self.trainer.estimated_stepping_batches)
        factor = lr_factor(c.lr_schedule, min(c.warmup_steps, max(1, total // 2)), total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _summed(self, numbers: Tensor) -> Tensor:
        """Each number added up over all ranks, on the device."""
        numbers = numbers.to(self.device, torch.float64, non_blocking=True)
        if self.trainer.world_size > 1:
            dist.all_reduce(numbers)
        return numbers

    def training_step(self, step: list[Batch], batch_idx: int) -> None:
        """One optimizer step over this rank's micro batches; raises UserError before it if the loss is not finite."""
        bad = [sample for batch in step for sample in batch.bad]
        targets = sum(batch.num_targets for batch in step)
        seconds = sum(float(batch.num_samples.sum()) for batch in step) / SAMPLE_RATE
        padded = sum(batch.waveforms.numel() for batch in step) / SAMPLE_RATE
        known = [targets, seconds, padded, self.asked_to_end, sum(len(batch) for batch in step), len(bad)]
        counts = self._summed(torch.tensor(known, dtype=torch.float64))
        # Data-parallel training averages over ranks, which their number undoes.
        scale = (self.trainer.world_size / counts[0].clamp_min(1)).float()
        if self.config.lora_dropout:  # what is dropped depends on the step and the rank, not on what came before
            torch.manual_seed((self.config.seed << 40) + (self.global_step << 16) + self.trainer.global_rank)
        losses = torch.stack([self._backward(batch, scale, last=batch is step[-1]) for batch in step])
        norm = self.strategy.gradient_norm(self.model)
        # The one time in a step that the device is waited for.
        numbers = torch.cat((counts, self._summed(losses.sum()[None]), norm[None])).tolist()
        targets, seconds, padded, asked_to_end, num_used, num_bad, loss_sum, norm_found = numbers
        if num_bad:
            self._note_bad(bad, self.config.train_data)
        self.ending = asked_to_end > 0
        self._num_used += int(num_used)
        self._samples_used += round(seconds * SAMPLE_RATE)
        self._longest = max(self._longest, *(int(batch.num_samples.max()) for batch in step if len(batch)), 0)
        if not math.isfinite(loss_sum):
            ids = [name for batch, loss in zip(step, losses, strict=True) if not loss.isfinite() for name in batch.ids]
            self._refuse_loss(loss_sum, ids)
        rates = {f"lr_{group['name']}": group["lr"] for group in self.trainer.optimizers[0].param_groups}
        if targets:
            rates["grad_norm"] = self._update(norm, norm_found)
        else:
            self.trainer.optimizers[0].zero_grad()
        self.log_dict({"loss": loss_sum / max(targets, 1), "target_tokens": targets, "audio_seconds": seconds,
                       "padding": 1 - seconds / padded if padded else 0.0, **rates})  # fmt: skip

    def _refuse_loss(self, loss_sum: float, ids: Sequence[str]) -> NoReturn:
        """Raises UserError naming the utterances of all ranks whose loss is not finite; for all ranks together."""
        names = ", ".join(name for part in self._gathered(ids) for name in part)
        with self._said_once():
            raise UserError(
                f"step {self.global_step}: the loss is {loss_sum}, expected a finite number, for the utterances "
                f"{names}; no weight was changed by it: listen to them, lower --lr_state and --lr_adapter, or set "
                "--precision fp32"
            )

    def _autocast(self) -> torch.autocast:
        """The trained tensors stay in float32; Lightning's DeepSpeed plugin would not compute in bfloat16 by itself."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=uses_bf16(self.config))

    def _backward(self, batch: Batch, scale: Tensor, last: bool) -> Tensor:
        """Add one micro batch's share to the gradients; its summed loss."""
        with self.strategy.micro_batch(self.trainer, last):
            with self._autocast():
                loss = (
                    self.model(batch, self.config.kl_temperature) if len(batch) else self.strategy.zero_loss(self.model)
                )
            self.manual_backward(loss * scale)
        return loss.detach()

    def _update(self, norm: Tensor, norm_found: float) -> float:
        """The optimizer's and the schedule's step; the gradient's norm."""
        norm_found = self.strategy.step(self.trainer, self.optimizers(), self.model, norm, norm_found)
        schedule: Any = self.lr_schedulers()
        schedule.step()
        return norm_found

    def validation_step(self, step: list[Batch], batch_idx: int) -> None:
        """Decode one batch; a rank may be left with an empty one."""
        (batch,) = step
        self._bad += batch.bad
        if not len(batch):
            return
        with self._autocast():
            self._rows.update({row.place: row for row in transcribe_batch(self.model, batch)})
            if self.trainer.is_global_zero and self.trainer.state.fn == TrainerFn.FITTING:
                self._languages.hear(batch)

    def on_validation_epoch_end(self) -> None:
        """What each task is measured by, over all ranks; an utterance that two ranks saw counts once."""
        gathered = {place: row for part in self._gathered(self._rows) for place, row in part.items()}
        self._note_bad(self._bad, self.config.valid_data)
        self._rows, self._bad = {}, []
        with self._said_once():
            self.bad_files.require_used(len(gathered), self.config.valid_data)
        self.validated = [row for _, row in sorted(gathered.items())]
        self.measures = measures(self.validated)
        self.notes += self._languages.heard()
        # The same number on every rank, so that all decide alike by it.
        self.log("error", mean_error(self.measures), rank_zero_only=False)
        for task, found in self.measures.items():
            numbers = {name: x for name, x in found.numbers().items() if isinstance(x, float)}
            self.log_dict({name if len(self.measures) == 1 else f"{task}/{name}": x for name, x in numbers.items()})
