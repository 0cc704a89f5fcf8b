"""Flags of train.py."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_speech.config.forms import (
    FEATURE_DTYPES,
    FREEZE_ADAPTER,
    FROZEN,
    LABEL_MODES,
    LIMITS,
    LORA,
    LOSSES,
    OFF_ON,
    PARTS_FORM,
    PEFTS,
    PROMPT_FORM,
    SCHEDULES,
    STATE_BY,
    STATES,
    STRATEGIES,
    TARGETS_FORM,
    TASK_FORM,
    TEXT,
    YES_NO,
    are_factors,
)
from rwkv_speech.config.model import ColumnFlags, DeviceFlags, ModelConfig
from rwkv_speech.errors import UserError
from rwkv_speech.flags import flag


@dataclass(frozen=True)
class _TrainDataFlags(ColumnFlags):
    group: ClassVar[str] = "data"
    train_data: str = flag(
        "",
        "what to train on, several separated by commas, each with @WEIGHT if it is to come so many times an epoch",
    )
    valid_data: str = flag("", "what to score during training, in the same forms; empty: nothing")
    label_mode: str = flag("none", "what is done to transcripts before they are learned", LABEL_MODES)
    task: str = flag(
        "asr",
        "task of utterances that name none; each task is the name of an initial state that is learned",
        form=TASK_FORM,
    )
    state_by: str = flag(
        "task",
        "task: a state for each task of the training data, of translation for each language of the text; lang: for "
        "each language of recognition, too",
        STATE_BY,
    )
    states: str = flag(
        "", "further states, separated by commas: for a stream, whose tasks are not known beforehand", form=STATES
    )
    transcribe_first: str = flag(
        "",
        "tasks, separated by commas, that write what they hear, the separator, and then their text, as in qa,st; lines "
        "of them need a source_text, and decoding gives the text alone",
        form=STATES,
    )
    ctx_len: int = flag(1024, "most positions of audio and text; longer utterances are left out and listed", at_least=1)
    batch_seconds: float | None = flag(
        None,
        "seconds of audio per device and micro batch, padding included, instead of --micro_bsz",
        above=0,
        resume=True,
    )
    max_bad: int = flag(20, "how many broken recordings may be skipped before the run stops", at_least=0, resume=True)
    workers: int = flag(2, "processes that decode audio", at_least=0, at_most=1024, resume=True)
    feature_cache: str = flag("", "folder that keeps the frozen encoder's frames, made once; empty: none", resume=True)
    feature_dtype: str = flag(
        "bfloat16", "type in which frames are kept", FEATURE_DTYPES, resume=True, needs="feature_cache"
    )


@dataclass(frozen=True)
class _AudioFlags:
    group: ClassVar[str] = "changes of the training audio"
    speed: str = flag(
        "",
        "factors of speed, one of which is drawn for each utterance and epoch, as in 0.9,1,1.1",
        form=(are_factors, "factors from 0.5 to 2 with two decimals at most, as in 0.9,1,1.1"),
    )
    volume_db: str = flag("", "lowest and highest gain in dB, as in -10,6", form=LIMITS)
    noise_dir: str = flag("", "folder of audio files that are added as noise")
    noise_snr_db: str = flag("5,30", "lowest and highest signal-to-noise ratio in dB", form=LIMITS, needs="noise_dir")
    time_masks: int = flag(0, "spans of each utterance that are silenced", at_least=0, at_most=100)
    time_mask_seconds: float = flag(0.2, "longest such span", above=0, below=60, needs="time_masks")
    freq_masks: int = flag(0, "bands of each utterance that are taken out", at_least=0, at_most=100)
    freq_mask_hz: float = flag(500.0, "widest such band", above=0, at_most=8000, needs="freq_masks")


@dataclass(frozen=True)
class _OptimizerFlags:
    group: ClassVar[str] = "training"
    init_from: str = flag(
        "", "start from this checkpoint, own, published or NAME/REPO on the hub, not from new weights"
    )
    soft_prompt: int = flag(
        0,
        "learned vectors that each new task reads between audio and separator, beside its state",
        at_least=0,
        at_most=1000,
    )
    freeze: str = flag(
        "none",
        "adapter: it stays as in --init_from, whose states are kept, and the states of the training data alone are "
        "learned",
        FROZEN,
        needs="init_from",
    )
    epoch_count: int = flag(1, "epochs", at_least=1, resume=True)
    epoch_steps: int | None = flag(None, "steps per epoch; empty: all of the data", at_least=1)
    accumulate: int = flag(1, "micro batches per optimizer step", at_least=1, resume=True)
    lr_adapter: float = flag(1e-4, "learning rate of the adapter", at_least=0)
    lr_state: float = flag(
        1e-2, "learning rate of the initial states; states alone, with --freeze adapter, want about 1", at_least=0
    )
    lr_schedule: str = flag("cosine", "course of both learning rates after the warm-up", SCHEDULES)
    warmup_steps: int = flag(100, "optimizer steps of linear warm-up", at_least=0)
    weight_decay: float = flag(0.01, "weight decay of the adapter", at_least=0)
    beta1: float = flag(0.9, "AdamW's decay of the gradient's average", at_least=0, below=1)
    beta2: float = flag(0.99, "AdamW's decay of the squared gradient's average", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "what AdamW adds to the root of that average", above=0)
    loss: str = flag(
        "ce",
        "ce: cross-entropy; kl: for lines with an answer and a source_text the divergence from what the same frozen "
        "language model says to the transcript",
        LOSSES,
    )
    kl_temperature: float = flag(2.0, "what softens both distributions of --loss kl", at_least=0.1, at_most=100)
    kl_form: str = flag(
        "user",
        "how that model is asked: user, instruction, continue (the text alone, to be continued), or a template with "
        "{text}",
        form=PROMPT_FORM,
    )
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no limit", at_least=0)
    seed: int = flag(1, "seed of initial values and of the order of the data", at_least=0, at_most=2**32 - 1)
    ctc: int = flag(
        0,
        "1: train a CTC head, too, after all else or on a finished run: for word times, drafts, and to tell noise",
        OFF_ON,
        resume=True,
    )
    ctc_epochs: int | None = flag(
        None,
        "epochs of the CTC head; empty: those that make 750 steps, 20 at most",
        at_least=1,
        needs="ctc",
        resume=True,
    )
    lr_ctc: float = flag(4e-3, "learning rate of the CTC head", above=0, needs="ctc", resume=True)
    ctc_hidden: int = flag(256, "channels of the CTC head", at_least=1, needs="ctc", resume=True)
    ctc_layers: int = flag(2, "convolutions of the CTC head", at_least=1, needs="ctc", resume=True)


@dataclass(frozen=True)
class _TuningFlags:
    group: ClassVar[str] = "training"
    peft: str = flag(
        "none",
        "what else is learned, which all states share: lora, low-rank updates of the language model's matrices; "
        "state_offset, what each token reads beside the state, undiminished by time (wants --lr_lm 1e-2)",
        PEFTS,
    )
    lora_rank: int = flag(16, "rank of the updates", at_least=1)
    lora_alpha: float = flag(32.0, "the updates are multiplied by this, divided by their rank", above=0)
    lora_dropout: float = flag(0.0, "share of what the updates read that is left out", at_least=0, below=1)
    lora_targets: str = flag(
        "receptance,key,value,output",
        "which matrices of each layer: those, gate (RWKV-6's), ffn.key, ffn.value, ffn.receptance (RWKV-6's)",
        form=TARGETS_FORM,
    )
    lora_from: str = flag("", "start with the updates of this file or folder, of RWKV-PEFT's or peft's layout")
    train_parts: str = flag(
        "",
        "what else of the language model is trained: ln, its norms; time, the mixes' own tensors",
        form=PARTS_FORM,
    )
    lr_lm: float = flag(1e-4, "learning rate of what is trained of the language model", at_least=0)


@dataclass(frozen=True)
class _TrainDeviceFlags(DeviceFlags):
    group: ClassVar[str] = "device and precision"
    strategy: str = flag("auto", "how several GPUs work together", STRATEGIES, resume=True)
    num_nodes: int = flag(1, "machines", at_least=1, resume=True)
    grad_cp: int = flag(0, "1: compute the language model's layers again in the backward pass, for less memory", OFF_ON)
    compile: int = flag(
        0,
        "1: fuse the language model's elementwise parts with torch.compile; needs a C++ compiler, on a GPU Triton, "
        "and up to a minute at the start",
        OFF_ON,
        resume=True,
    )


@dataclass(frozen=True)
class TrainConfig(_TuningFlags, _OptimizerFlags, _AudioFlags, _TrainDataFlags, _TrainDeviceFlags, ModelConfig):
    """train.py"""

    group: ClassVar[str] = "run"
    epoch_save: int = flag(
        1, "keep a checkpoint of every this many epochs, beside the best and the last", at_least=1, resume=True
    )
    keep_best: int = flag(
        0, "keep the checkpoints of this many epochs of lowest error, too", at_least=0, resume=True, needs="valid_data"
    )
    patience: int = flag(
        0,
        "stop after this many validations without a lower error; 0: never",
        at_least=0,
        resume=True,
        needs="valid_data",
    )
    min_delta: float = flag(
        0.0, "by how much an error must be lower to count", at_least=0, resume=True, needs="patience"
    )
    resume: str = flag(
        "yes",
        "yes: resume the run in --proj_dir where it stopped; no: start from the beginning, in a new folder if there "
        "is one",
        YES_NO,
        resume=True,
    )
    save_steps: int = flag(
        500, "optimizer steps between two points to resume from, beside one after every epoch", at_least=1, resume=True
    )
    wandb: str = flag("", "project of Weights & Biases to log to; empty: none", resume=True)
    plan: int = flag(0, "1: print what the run will need, its memory, steps and time, and end", OFF_ON, resume=True)
    plan_hours: float | None = flag(
        None, "hours of audio in an epoch, for a plan without data", above=0, at_most=1e6, needs="plan", resume=True
    )
    score_first: int = flag(
        0, "1: score the validation data before training, too", OFF_ON, resume=True, needs="valid_data"
    )
    log_every: int = flag(10, "steps between two lines of the log", at_least=1, resume=True)

    @property
    def adapter_stays(self) -> bool:
        """Whether the adapter, and with it the states of other tasks, stay as they are in --init_from."""
        return self.freeze == FREEZE_ADAPTER or self.input == TEXT

    def check(self) -> None:
        """Raises UserError for flags that contradict each other, and for what ranks would do each in its own time with
        the layers shared out.
        """
        self._check_tuning()
        for name, quant in (("precision", self.quant), ("encoder_precision", self.encoder_quant)):
            if quant and self.strategy == "deepspeed_stage_3":
                raise UserError(
                    f"--{name}: found {quant!r} with --strategy deepspeed_stage_3, which shares out the frozen layers "
                    "as floats; use deepspeed_stage_2"
                )
        for name in ("valid_data", "feature_cache"):
            if self.strategy == "deepspeed_stage_3" and getattr(self, name):
                raise UserError(
                    f"--{name}: found {getattr(self, name)!r} with --strategy deepspeed_stage_3, expected nothing: it "
                    "shares out the frozen layers, and ranks would wait for each other for ever; leave it empty and "
                    "score with eval.py afterwards, or use deepspeed_stage_2"
                )
        for name, default in (("kl_temperature", 2.0), ("kl_form", "user")):
            if self.loss != "kl" and getattr(self, name) != default:
                raise UserError(f"--{name}: found without --loss kl, where it has no effect; add it, or leave this out")
        if self.loss == "kl" and self.strategy == "deepspeed_stage_3":
            raise UserError(
                "--loss: found kl with --strategy deepspeed_stage_3, which shares out the frozen layers: ranks without "
                "an answer in a batch would keep the others waiting; use deepspeed_stage_2"
            )
        if self.ctc and self.strategy == "deepspeed_stage_3":
            raise UserError(
                "--ctc: found 1 with --strategy deepspeed_stage_3, which shares out the frozen encoder; train without "
                "it, then start the finished run again with --ctc 1 --strategy ddp"
            )
        hearing = "plan", "ctc", "feature_cache", "speed", "volume_db", "noise_dir", "time_masks", "freq_masks"
        for name in (*hearing, "transcribe_first"):
            if self.input == TEXT and getattr(self, name):
                raise UserError(
                    f"--{name}: found {getattr(self, name)!r} with --input text, which hears nothing; leave out one of "
                    "them"
                )
        if self.ctc and self.train_data.startswith("hf-stream:"):
            raise UserError(
                f"--ctc: {self.train_data} arrives row by row, expected data whose characters can be listed: a "
                "manifest, a folder, tar shards or a set on the disk"
            )

    def _check_tuning(self) -> None:
        """Raises UserError for flags of --peft without it, and for what cannot be trained beside a tuned model."""
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_from"):
            if self.peft != LORA and getattr(self, name) != getattr(TrainConfig, name):
                raise UserError(
                    f"--{name}: found without --peft lora, where it has no effect; add it, or leave this out"
                )
        tunes = f"--peft {self.peft}" if self.peft != "none" else f"--train_parts {self.train_parts}"
        if self.peft == "none" and not self.train_parts:
            if self.lr_lm != TrainConfig.lr_lm:
                raise UserError("--lr_lm: found without --peft or --train_parts, where it has no effect; leave it out")
            return
        if self.adapter_stays:
            what = "--input text" if self.input == TEXT else "--freeze adapter"
            raise UserError(
                f"{tunes}: found with {what}, which learns states alone, beside others that the change would spoil; "
                "leave out one of them"
            )
        if self.loss == "kl" and self.train_parts:
            raise UserError(
                f"--train_parts: found {self.train_parts} with --loss kl, whose teacher is the frozen language model; "
                "leave out one of them, or take --peft in its place"
            )
