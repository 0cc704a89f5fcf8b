"""What a model is made of: one record of its files and sizes, from flags to checkpoint and back."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_speech import tiny
from rwkv_speech.config import STATE_OFFSET, ModelConfig, encoder_layers
from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models.peft import LoraSpec

logger = logging.getLogger(__name__)
# The published setting's.
WAVLM_LARGE = "microsoft/wavlm-large"
STACK, ADAPTER_HIDDEN, SEPARATOR = 5, 2048, "#"
# By the flag that says it, what of Parts keeps how matrices are packed.
_QUANTS = {"precision": "quant", "encoder_precision": "encoder_quant"}


@dataclass(frozen=True)
class FrameOptions:
    """Which frames an encoder gives.

    `padding` is the least number of seconds that a Whisper model hears, silence behind the audio included; None is half
    a second more than the audio. `layers`, counted from 1 and rising, are those whose outputs stand side by side in a
    frame, each with zero mean and unit variance; () is the last one's as it is. `quant` "int8" or "nf4": the encoder's
    matrices are kept in 8 or 4 bits.
    """

    padding: float | None = None
    layers: tuple[int, ...] = ()
    quant: str = ""


@dataclass(frozen=True)
class Parts:
    """Where the frozen parts come from and how the trained ones are shaped; what is empty is derived.

    "tiny" names the embedded default, for `load_model`, `encoder` and `vocab_file` alike, "tiny7" the same with an
    RWKV-7, for `load_model` alone; an empty `vocab_file` is the World vocabulary. The sizes and `base_sha256` are those
    of the base model's file, once it was read; `encoder_sha256` is that of the encoder's weights in what was shared,
    else empty. The tasks that it `transcribes` first say what they heard and the separator before their text. `quant`
    says how the language model's matrices are packed, `encoder_quant` how the encoder's, `lora` and `train_parts` what
    is trained of the language model, config.STATE_OFFSET being one of the latter.
    """

    load_model: str = ""
    encoder: str = ""
    vocab_file: str = ""
    stack: int | None = None
    adapter_hidden: int | None = None
    separator: str = ""
    n_layer: int | None = None
    n_embd: int | None = None
    base_sha256: str = ""
    encoder_padding: float | None = None
    encoder_layers: str = ""
    encoder_sha256: str = ""
    transcribes: tuple[str, ...] = ()
    quant: str | None = None
    encoder_quant: str | None = None
    lora: LoraSpec | None = None
    train_parts: str = ""

    @classmethod
    def of(cls, config: ModelConfig) -> "Parts":
        """The parts that the flags name."""
        known = vars(config) | {name: getattr(config, name) for name in _QUANTS.values()}
        if getattr(config, "peft", "none") == STATE_OFFSET:
            known["train_parts"] = ",".join(filter(None, (known["train_parts"], STATE_OFFSET)))
        return cls.from_dict(known | {"lora": LoraSpec.of(config)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Parts":
        """From a checkpoint's metadata; names of other versions are left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        known["transcribes"] = tuple(known.get("transcribes", ()))
        if isinstance(lora := known.get("lora"), dict):
            known["lora"] = LoraSpec(**lora)
        return cls(**known)

    @property
    def has_state_offset(self) -> bool:
        """Whether what each layer's r reads beside the state is trained, too."""
        return STATE_OFFSET in self.train_parts.split(",")

    def filled(self) -> "Parts":
        """Every part that was left empty takes what belongs to the base model; paths become absolute."""
        embedded = not self.load_model or self.load_model in tiny.BASE_MODELS
        return replace(
            self,
            load_model=_absolute(self.load_model) or tiny.NAME,
            encoder=_absolute(self.encoder) or (tiny.NAME if embedded else WAVLM_LARGE),
            vocab_file=_absolute(self.vocab_file) or (tiny.NAME if embedded else ""),
            stack=self.stack or (tiny.STACK if embedded else STACK),
            adapter_hidden=self.adapter_hidden or (tiny.ADAPTER_HIDDEN if embedded else ADAPTER_HIDDEN),
            separator=self.separator or SEPARATOR,
        )

    def recorded_in(self, path: Path, given: "Parts", hears: bool = True) -> "Parts":
        """These parts of the checkpoint `path`, with the files that the caller gave, else found again.

        A file that is no longer where it was is looked for beside the checkpoint, the base model by its SHA-256; the
        encoder need not be there unless the model `hears`. Raises UserError naming the flag that says where it is, and
        for another `encoder_padding`, other `encoder_layers`, another `quant` or `encoder_quant` than it was trained
        with.
        """
        if given.encoder_layers not in ("", self.encoder_layers):
            raise UserError(
                f"--encoder_layers: found {given.encoder_layers}, but {path} was trained with "
                f"{self.encoder_layers or 'the last one'}, expected the same: leave it out"
            )
        if given.encoder_padding not in (None, self.encoder_padding or 0):
            raise UserError(
                f"--encoder_padding: found {given.encoder_padding:g}, but {path} was trained with "
                f"{self.encoder_padding or 0:g}, expected the same: leave it out"
            )
        for flag, name in _QUANTS.items():
            found, trained_with = getattr(given, name), getattr(self, name)
            if trained_with and found not in (None, trained_with):
                raise UserError(
                    f"--{flag}: found {found or 'floats'}, but {path} was trained with {trained_with}, expected the "
                    "same: leave it out"
                )
        return replace(
            self,
            quant=self.quant or given.quant,
            encoder_quant=self.encoder_quant or given.encoder_quant,
            load_model=given.load_model or _find("load_model", self.load_model, path, self.base_sha256),
            encoder=given.encoder or (_find("encoder", self.encoder, path) if hears else self.encoder),
            vocab_file=given.vocab_file or _find("vocab_file", self.vocab_file, path),
            n_layer=given.n_layer or self.n_layer,
            n_embd=given.n_embd or self.n_embd,
        )

    def starting_from(self, start: "Parts", is_frozen: bool) -> "Parts":
        """These parts of a run that starts from weights of others: packed alike unless the flags say how; with what was
        trained of the language model, where that and the adapter stay.
        """
        quants = {name: getattr(start, name) for name in _QUANTS.values() if getattr(self, name) is None}
        known = replace(self, **quants)
        return replace(known, lora=start.lora, train_parts=start.train_parts) if is_frozen else known

    def read_by(self, path: Path, given: "Parts") -> "Parts":
        """The parts of a run that reads text on the adapter of the checkpoint `path`, which has these.

        As `recorded_in`; raises UserError for another size of the adapter or separator, too.
        """
        for flag, default in (("stack", None), ("adapter_hidden", None), ("separator", SEPARATOR)):
            found, trained_with = getattr(given, flag), getattr(self, flag)
            if found not in (default, trained_with):
                raise UserError(
                    f"--{flag}: found {found!r}, but {path} was trained with {trained_with!r}, expected the same: "
                    "leave it out"
                )
        return self.recorded_in(path, given, hears=False)

    def base_file(self) -> Path:
        """The base model's file."""
        return tiny.BASE_MODELS.get(self.load_model) or Path(self.load_model)

    def encoder_name(self) -> str | Path:
        """The encoder's folder or hub id."""
        return tiny.ENCODER if self.encoder == tiny.NAME else self.encoder

    @property
    def frame_options(self) -> FrameOptions:
        """Which of the encoder's frames are wanted."""
        return FrameOptions(self.encoder_padding, encoder_layers(self.encoder_layers), self.encoder_quant or "")

    def vocabulary(self) -> str | Path | None:
        """The vocabulary's file, None for the World vocabulary."""
        return tiny.VOCAB_FILE if self.vocab_file == tiny.NAME else self.vocab_file or None

    def check_base(self, wanted: str, checkpoint: Path) -> None:
        """Raises UserError unless the base model is the one of SHA-256 `wanted` that `checkpoint` was trained on."""
        if self.base_sha256 != wanted:
            raise UserError(
                f"{checkpoint}: trained on a base model with SHA-256 {wanted[:12]}..., found "
                f"{self.base_sha256[:12]}... in {self.load_model}; give the same file with --load_model"
            )

    def check_tuned(self, theirs: "Parts", checkpoint: Path) -> None:
        """Raises UserError for changes of the language model that have no place here; a warning for other rounding."""
        if theirs.lora and not theirs.lora.is_like(self.lora):
            raise UserError(
                f"{checkpoint}: was trained with --peft lora --lora_rank {theirs.lora.rank} --lora_alpha "
                f"{theirs.lora.alpha:g} --lora_targets {theirs.lora.targets}; give the same flags, or make it a part "
                "of the base model: python -m rwkv_speech merge"
            )
        missing = set(filter(None, theirs.train_parts.split(","))) - set(self.train_parts.split(","))
        if STATE_OFFSET in missing:
            raise UserError(f"{checkpoint}: was trained with --peft {STATE_OFFSET}; give the same flag")
        if missing:
            raise UserError(
                f"{checkpoint}: was trained with --train_parts {theirs.train_parts}; expected {min(missing)} among "
                "those of this run: give the same flag, or make it a part of the base model: python -m rwkv_speech "
                "merge"
            )
        for model, name in (("language model", "quant"), ("encoder", "encoder_quant")):
            kinds = getattr(theirs, name) or "floats", getattr(self, name) or "floats"
            if kinds[0] != kinds[1]:
                logger.warning("%s: was trained with the %s in %s, which is here in %s", checkpoint, model, *kinds)

    def shared(self, encoder: str, encoder_sha256: str) -> "Parts":
        """These for other machines: the encoder as named, its content, and no folder of this machine."""
        base, vocabulary = Path(self.load_model).name, Path(self.vocab_file).name
        known = replace(self, load_model=base, vocab_file=vocabulary)
        return replace(known, encoder=encoder, encoder_sha256=encoder_sha256)


@dataclass(frozen=True)
class TrainedOn:
    """The recordings that weights were trained on: their number, hours in all, seconds of the longest."""

    utterances: int
    hours: float
    longest_seconds: float


def _absolute(name: str) -> str:
    """A path that is there as an absolute one; any other name (a hub id, "tiny") as it is."""
    return str(Path(name).resolve()) if name and name not in tiny.BASE_MODELS and Path(name).exists() else name


def _find(flag: str, name: str, checkpoint: Path, sha256: str = "") -> str:
    """Where a checkpoint's file or folder is: as recorded, else in or beside its folder, of this content; ids stay."""
    if name in tiny.BASE_MODELS or Path(name).exists() or not (sha256 or Path(name).is_absolute()):
        return name
    folder = checkpoint.resolve().parent
    for found in (folder / Path(name).name, folder.parent / Path(name).name):
        if found.exists() and (not sha256 or sha256_file(found) == sha256):
            return str(found)
    content = f"expected a file of SHA-256 {sha256[:12]}...: " if sha256 else ""
    raise UserError(
        f"{checkpoint}: its {name} is neither there nor in {folder} or beside it; {content}give its path with --{flag}"
    )
