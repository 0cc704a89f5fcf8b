"""Every flag of train.py, eval.py and predict.py: dataclasses, and the parser made from them."""

import argparse
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

from rwkv_speech.data.feature_cache import DTYPES
from rwkv_speech.data.source import ACCEPTED_FORMS
from rwkv_speech.errors import UserError
from rwkv_speech.models.speech_lm import Parts
from rwkv_speech.ops.native import FORMS
from rwkv_speech.text import LABEL_MODES
from rwkv_speech.training.optim import SCHEDULES

STRATEGIES = ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
YES_NO = ("yes", "no")
PRECISIONS = ("auto", "bf16", "fp32")
_LIBRISPEECH_TESTS = "librispeech:test-clean,librispeech:test-other"


def flag(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """One flag: its default, its line of help, and its choices if there are but a few."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """What every command needs to know about the model."""

    load_model: str = flag(
        "", "base model, a .pth or .safetensors file; empty: the checkpoint's, else the embedded 'tiny'"
    )
    encoder: str = flag("", "speech encoder, a hub id or a folder; empty: microsoft/wavlm-large, or the tiny one")
    vocab_file: str = flag("", "vocabulary in the World format; empty: the World vocabulary, or the tiny one")
    proj_dir: str = flag("output", "folder of the run: checkpoints, logs, results")
    n_layer: int | None = flag(None, "layers of the base model; empty: read from the file, else it must agree")
    n_embd: int | None = flag(None, "channels of the base model; empty: read from the file, else it must agree")
    stack: int | None = flag(None, "encoder frames per audio token; empty: 5, or 3 for the tiny model")
    adapter_hidden: int | None = flag(None, "hidden width of the adapter; empty: 2048, or 512 for tiny")
    separator: str = flag("#", "the one token between audio and text")
    device: str = flag("auto", "auto, cpu, cuda, or the number of GPUs")
    precision: str = flag("auto", "auto: bf16 on a GPU, fp32 on a CPU", PRECISIONS)
    encoder_precision: str = flag("auto", "the speech encoder's; auto: as --precision", PRECISIONS)
    micro_bsz: int = flag(4, "utterances per device and step")
    wkv6: str = flag(
        "auto",
        "kernel of WKV-6: auto, the native one; torch, PyTorch's operations; on a GPU also\n"
        "steps (first generation, what auto takes) and tiles (second, tensor cores)",
        FORMS,
    )

    def parts(self, task: str = "asr") -> Parts:
        """The flags that choose and shape the model's parts."""
        return Parts(
            self.load_model,
            self.encoder,
            self.vocab_file,
            self.stack,
            self.adapter_hidden,
            self.separator,
            task,
        )

    def accelerator(self) -> tuple[str, int]:
        """("cpu" or "gpu", how many); raises UserError if the machine has fewer GPUs than were asked for."""
        kind, wanted = self._asked_for()
        if kind == "gpu" and wanted > torch.cuda.device_count():
            raise UserError(
                f"--device: asked for {wanted} GPU(s), found {torch.cuda.device_count()}; give a smaller number, or "
                "cpu to run without"
            )
        return kind, wanted

    def _asked_for(self) -> tuple[str, int]:
        name, colon, count = self.device.partition(":")
        if name == "cpu" and (not colon or (count.isdecimal() and int(count) > 0)):
            return "cpu", int(count or 1)
        if self.device == "auto" and not torch.cuda.device_count():
            return "cpu", 1
        if self.device in ("auto", "cuda"):
            return "gpu", 1
        if self.device.isdecimal() and int(self.device) > 0:
            return "gpu", int(self.device)
        raise UserError(
            f"--device: found {self.device!r}, expected auto, cpu, cpu:N (processes), cuda or a number of GPUs"
        )

    def torch_device(self) -> torch.device:
        """The one device of evaluation and prediction."""
        return torch.device("cuda" if self.accelerator()[0] == "gpu" else "cpu")

    def uses_bf16(self) -> bool:
        """Whether the language model computes in bfloat16."""
        return self.precision == "bf16" or (self.precision == "auto" and self.accelerator()[0] == "gpu")

    def lm_dtype(self) -> torch.dtype:
        """The type of the frozen language model's weights."""
        return torch.bfloat16 if self.uses_bf16() else torch.float32

    def encoder_dtype(self) -> torch.dtype:
        """The type of the frozen encoder's matrices."""
        bf16 = self.uses_bf16() if self.encoder_precision == "auto" else self.encoder_precision == "bf16"
        return torch.bfloat16 if bf16 else torch.float32

    def check_sizes(self, n_layer: int, n_embd: int) -> None:
        """Raises UserError if --n_layer or --n_embd contradicts the base model's file."""
        for name, said, found in (("n_layer", self.n_layer, n_layer), ("n_embd", self.n_embd, n_embd)):
            if said is not None and said != found:
                raise UserError(
                    f"--{name}: given {said}, but the model has {found}; leave it empty, or "
                    "give the right file with --load_model"
                )


@dataclass(frozen=True)
class _DataConfig(ModelConfig):
    audio_column: str = flag("audio", "column of the audio in a Hugging Face dataset")
    text_column: str = flag("text", "column of the text in a Hugging Face dataset")


@dataclass(frozen=True)
class TrainConfig(_DataConfig):
    """train.py"""

    train_data: str = flag(
        "",
        "what to train on, several separated by commas, each with @WEIGHT if it is\nto come so many times an epoch:\n"
        + ACCEPTED_FORMS,
    )
    valid_data: str = flag("", "what to score during training, in the same forms; empty: nothing")
    label_mode: str = flag("none", "what is done to transcripts before they are learned", LABEL_MODES)
    task: str = flag("asr", "name of the task, kept in the checkpoint")
    epoch_count: int = flag(1, "epochs")
    epoch_steps: int | None = flag(None, "steps per epoch; empty: all of the data")
    epoch_save: int = flag(1, "keep a checkpoint of every this many epochs, beside the best and the last")
    ctx_len: int = flag(1024, "most positions of audio and text; longer utterances are left out and listed")
    batch_seconds: float | None = flag(
        None, "seconds of audio per device and micro batch, padding included, instead of --micro_bsz"
    )
    accumulate: int = flag(1, "micro batches per optimizer step")
    strategy: str = flag("auto", "how several GPUs work together", STRATEGIES)
    num_nodes: int = flag(1, "machines")
    grad_cp: int = flag(0, "1: compute the language model's layers again in the backward pass, for less memory")
    compile: int = flag(
        0,
        "1: fuse the language model's elementwise parts with torch.compile; needs a C++ compiler, on a GPU Triton,\n"
        "and up to a minute at the start",
    )
    lr_adapter: float = flag(1e-4, "learning rate of the adapter")
    lr_state: float = flag(1e-2, "learning rate of the initial state")
    lr_schedule: str = flag("cosine", "course of both learning rates after the warm-up", SCHEDULES)
    warmup_steps: int = flag(100, "optimizer steps of linear warm-up")
    weight_decay: float = flag(0.01, "weight decay of the adapter")
    beta1: float = flag(0.9, "AdamW's decay of the gradient's average")
    beta2: float = flag(0.99, "AdamW's decay of the squared gradient's average")
    adam_eps: float = flag(1e-8, "what AdamW adds to the root of that average")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no limit")
    seed: int = flag(1, "seed of initial values and of the order of the data")
    max_bad: int = flag(20, "how many broken recordings may be skipped before the run stops")
    workers: int = flag(2, "processes that decode audio")
    speed: str = flag("", "factors of speed, one of which is drawn for each utterance and epoch, as in 0.9,1,1.1")
    volume_db: str = flag("", "lowest and highest gain in dB, as in -10,6")
    noise_dir: str = flag("", "folder of audio files that are added as noise")
    noise_snr_db: str = flag("5,30", "lowest and highest ratio of speech to noise in dB")
    time_masks: int = flag(0, "spans of each utterance that are silenced")
    time_mask_seconds: float = flag(0.2, "longest such span")
    freq_masks: int = flag(0, "bands of each utterance that are taken out")
    freq_mask_hz: float = flag(500.0, "widest such band")
    feature_cache: str = flag("", "folder that keeps the frozen encoder's frames, made once; empty: none")
    feature_dtype: str = flag("bfloat16", "type in which frames are kept", tuple(DTYPES))
    keep_best: int = flag(0, "keep the checkpoints of this many epochs of lowest WER, too")
    patience: int = flag(0, "stop after this many validations without a lower WER; 0: never")
    min_delta: float = flag(0.0, "by how much a WER must be lower to count")
    resume: str = flag(
        "yes", "yes: go on where the run in --proj_dir stopped; no: start anew, in a new folder if there is one", YES_NO
    )
    save_steps: int = flag(500, "optimizer steps between two points to resume from, beside one after every epoch")
    wandb: str = flag("", "project of Weights & Biases to log to; empty: none")
    plan: int = flag(0, "1: print what the run will need, its memory, steps and time, and end")
    init_from: str = flag("", "start from this checkpoint, own or published, instead of new weights")
    score_first: int = flag(0, "1: score the validation data before training, too")
    log_every: int = flag(10, "steps between two lines of the log")

    def accelerator(self) -> tuple[str, int]:
        """As for every command; a plan may be made for GPUs that are not here."""
        return self._asked_for() if self.plan else super().accelerator()

    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the gradients and the optimizer."""
        return self.strategy.startswith("deepspeed")

    def shards_frozen_weights(self) -> bool:
        """Whether a layer is whole only while all ranks run it together."""
        return self.strategy == "deepspeed_stage_3"

    def check_strategy(self) -> None:
        """Raises UserError for what ranks would do each in its own time while the layers are shared out."""
        for name in ("valid_data", "feature_cache"):
            if self.shards_frozen_weights() and getattr(self, name):
                raise UserError(
                    f"--{name}: found {getattr(self, name)!r} with --strategy deepspeed_stage_3, expected nothing: it "
                    "shares out the frozen layers, and ranks would wait for each other for ever; leave it empty and "
                    "score with eval.py afterwards, or use deepspeed_stage_2"
                )


@dataclass(frozen=True)
class EvalConfig(_DataConfig):
    """eval.py"""

    checkpoint: str = flag("", "trained weights, own or published; empty: the best of --proj_dir")
    eval_data: str = flag(_LIBRISPEECH_TESTS, "what to score, each set by itself:\n" + ACCEPTED_FORMS)
    untrained: int = flag(0, "1: score new, untrained weights instead, for comparison")
    max_new_tokens: int | None = flag(None, "longest text in tokens; empty: 25 per second of audio")
    max_bad: int = flag(0, "how many broken recordings may be skipped before the run stops")
    seed: int = flag(1, "seed of the untrained weights")


@dataclass(frozen=True)
class PredictConfig(ModelConfig):
    """predict.py"""

    checkpoint: str = flag("", "trained weights, own or published; empty: the best of --proj_dir")
    file_path: str = flag("", "audio files, separated by commas")
    max_new_tokens: int | None = flag(None, "longest text in tokens; empty: 25 per second of audio")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            flags = sorted(option for action in self._actions for option in action.option_strings if option != "-h")
            message += "\nvalid flags: " + " ".join(flags)
        super().error(message)


Config = TypeVar("Config", bound=ModelConfig)


def parse(cls: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """The flags in `argv` as a `cls`; a bad flag ends the program with code 2 and the valid choices.

    An empty value means the default, so that a script may leave a variable empty.
    """
    parser = _Parser(
        prog=f"{cls.__doc__}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        parser.add_argument(
            f"--{field.name}",
            type=_or_default(kind, field.default),
            default=field.default,
            choices=field.metadata["choices"],
            help=(field.metadata["help"] + default).replace("%", "%%"),
        )
    return cls(**vars(parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))))


def _joined(argv: Sequence[str]) -> list[str]:
    """Flags joined with values such as -6,6, which argparse would take for another flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1].startswith("--") and "=" not in words[-1] and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _or_default(kind: Callable[[str], Any], default: Any) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return default if text == "" else kind(text)

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert
