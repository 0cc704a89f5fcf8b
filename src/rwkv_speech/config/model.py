"""Flags of the model, its devices and its data, which all commands have."""

import re
from dataclasses import dataclass
from typing import ClassVar

from rwkv_speech.config.forms import DATA_FORMS, INPUTS, KERNEL_FORMS, LAYERS, PRECISIONS, QUANTS
from rwkv_speech.errors import UserError
from rwkv_speech.flags import Flags, flag


@dataclass(frozen=True)
class _ModelFlags:
    group: ClassVar[str] = "model"
    load_model: str = flag(
        "",
        "base model, a .pth or .safetensors file, or 'tiny' or 'tiny7', which are embedded; empty: the checkpoint's, "
        "else 'tiny'",
    )
    encoder: str = flag("", "speech encoder, a hub id or a folder; empty: microsoft/wavlm-large, or the tiny one")
    encoder_padding: float | None = flag(
        None,
        "seconds that a Whisper encoder hears at least, the rest being silence; it was trained on 30; empty: the audio "
        "and half a second",
        at_least=0,
        at_most=30,
    )
    encoder_layers: str = flag(
        "",
        "layers of the encoder whose frames are put side by side, as in 2,3,4; empty: the last. An encoder of one "
        "language hears others better in earlier layers",
        form=LAYERS,
    )
    vocab_file: str = flag("", "vocabulary in the World format; empty: the World vocabulary, or the tiny one")
    n_layer: int | None = flag(
        None, "layers of the base model; empty: read from the file, else it must agree", at_least=1, resume=True
    )
    n_embd: int | None = flag(
        None, "channels of the base model; empty: read from the file, else it must agree", at_least=1, resume=True
    )
    stack: int | None = flag(
        None, "encoder frames per audio token; empty: 5, or 3 for the tiny model", at_least=1, at_most=1000
    )
    adapter_hidden: int | None = flag(None, "hidden width of the adapter; empty: 2048, or 512 for tiny", at_least=1)
    separator: str = flag("#", "the one token between audio and text")


@dataclass(frozen=True)
class DeviceFlags:
    group: ClassVar[str] = "device and precision"
    device: str = flag(
        "auto",
        "auto, cpu, cpu:N (processes), cuda, or the number of GPUs",
        form=(
            re.compile("auto|cuda|cpu(:[1-9][0-9]{0,3})?|[1-9][0-9]{0,3}").fullmatch,
            "auto, cpu, cpu:N (processes), cuda or a number of GPUs",
        ),
        resume=True,
    )
    precision: str = flag(
        "auto",
        "the language model's; auto: the checkpoint's int8 or nf4, else bf16 on a GPU, fp32 on a CPU; int8, nf4: its "
        "matrices are kept in 8 or 4 bits",
        PRECISIONS,
    )
    encoder_precision: str = flag(
        "auto",
        "the speech encoder's; auto: the checkpoint's int8 or nf4, else as --precision, beside int8 and nf4 bf16 on a "
        "GPU, fp32 on a CPU; int8, nf4: its matrices are kept in 8 or 4 bits",
        PRECISIONS,
    )
    wkv6: str = flag(
        "auto",
        "kernel of the recurrence: auto, the native one; torch, PyTorch's operations, as always for RWKV-7 on a GPU; "
        "for RWKV-6 there also steps (first generation, what auto takes) and tiles (second, tensor cores)",
        KERNEL_FORMS,
        resume=True,
    )

    @property
    def quant(self) -> str | None:
        """How the language model's matrices are packed, "" if not, None if --precision does not say."""
        return _quant(self.precision)

    @property
    def encoder_quant(self) -> str | None:
        """The same of the encoder's, and --encoder_precision."""
        return _quant(self.encoder_precision)


def _quant(precision: str) -> str | None:
    return precision if precision in QUANTS else None if precision == "auto" else ""


@dataclass(frozen=True)
class ModelConfig(_ModelFlags, DeviceFlags, Flags):
    """What training, evaluation and prediction need to know."""

    group: ClassVar[str] = "run"
    proj_dir: str = flag("output", "folder of the run: checkpoints, logs, results", resume=True)
    micro_bsz: int = flag(4, "utterances per device and step", at_least=1, resume=True)


@dataclass(frozen=True)
class ColumnFlags:
    group: ClassVar[str] = "data"
    epilog: ClassVar[str] = "forms of data:\n" + "\n".join(f"  {x:<27}  {text}" for x, text in DATA_FORMS.items())
    input: str = flag(
        "audio",
        "text: source_text, in recognition the text, is read in place of audio, by a state alone; the adapter is not "
        "trained",
        INPUTS,
    )
    audio_column: str = flag("audio", "column of the audio in a Hugging Face dataset")
    text_column: str = flag("text", "column of the text in a Hugging Face dataset")


def check_one_device(config: ModelConfig) -> None:
    if config.device not in ("auto", "cpu", "cuda", "1"):
        raise UserError(
            f"--device: found {config.device!r}, expected auto, cpu or cuda: scores and texts are computed "
            "on one device; leave it out for auto"
        )
