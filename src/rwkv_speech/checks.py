"""What can be known to be wrong with the flags before any data set or model is opened."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech import tiny
from rwkv_speech.config import (
    ACCEPTED_FORMS,
    TEXT,
    EvalConfig,
    ModelConfig,
    PageConfig,
    PredictConfig,
    ServeConfig,
    TrainConfig,
)
from rwkv_speech.data.inputs import Input
from rwkv_speech.data.phrases import read_phrases
from rwkv_speech.data.source import split_weight
from rwkv_speech.data.sources import KINDS
from rwkv_speech.devices import accelerator
from rwkv_speech.errors import UserError, printable
from rwkv_speech.models.checkpoint import find_checkpoint, load_trained
from rwkv_speech.models.hub import is_id


def before_training(config: TrainConfig) -> None:
    """Raises UserError for devices, packages, files or folders that the run would miss later."""
    check_devices(config)
    for flag, given, package in (
        ("strategy", config.strategy.startswith("deepspeed"), "deepspeed"),
        ("wandb", bool(config.wandb), "wandb"),
    ):
        if given and importlib.util.find_spec(package) is None:
            raise UserError(
                f"--{flag}: found {getattr(config, flag)!r} without the package {package}, expected it to be "
                f"installed; leave the flag out, or run: pip install {package}"
            )
    torch = importlib.util.find_spec("torch")
    if config.compile and torch and " " in str(torch.origin):
        raise UserError(
            f"--compile: found {torch.origin}, a folder with a blank, which torch's compiler cannot take; leave the "
            "flag out, or install torch in another folder"
        )
    _check_model_files(config)
    if config.init_from:
        find_checkpoint(config.init_from)
    if config.lora_from and not Path(config.lora_from).exists():
        raise UserError(f"--lora_from: no such file or folder {config.lora_from!r}; give updates in RWKV-PEFT's layout")
    if not config.train_data and not config.plan:
        raise UserError("--train_data: found nothing, expected a manifest, a folder or a dataset to train on")
    _check_data("train_data", config.train_data)
    _check_data("valid_data", config.valid_data)
    _check_columns(config, _items("train_data", config.train_data) + _items("valid_data", config.valid_data))
    if config.noise_dir and not Path(config.noise_dir).is_dir():
        raise UserError(f"--noise_dir: no such folder {config.noise_dir!r}; expected a folder of audio files")
    for flag in ("proj_dir", "feature_cache") if not config.plan else ():
        _check_folder(flag, getattr(config, flag))


def before_evaluation(config: EvalConfig) -> None:
    """Raises UserError for a device, files or folders that evaluation would miss later, and flags without effect."""
    check_devices(config)
    read_phrases(config)
    if not config.untrained:
        _check_checkpoint(config, config.checkpoint)
    if config.cascade:
        find_checkpoint(config.cascade)
    _check_model_files(config)
    _check_data("eval_data", config.eval_data)
    _check_columns(config, _items("eval_data", config.eval_data))
    _check_folder("proj_dir", config.proj_dir)


def before_prediction(config: PredictConfig) -> None:
    """Raises UserError for a device or files that prediction would miss later, and flags without effect."""
    check_devices(config)
    read_phrases(config)
    _check_checkpoint(config, config.checkpoint)
    _check_model_files(config)
    if not (named_inputs(config) or config.stream or config.text.strip()):
        raise UserError("found no input, expected audio files, folders, patterns or manifests: predict.py a.wav b.mp3")
    if config.output_format:
        _check_folder("output_dir", config.output_dir)
    if config.session:
        _check_folder("session", os.path.dirname(os.path.abspath(config.session)))


def before_serving(config: ServeConfig | PageConfig) -> None:
    """Raises UserError for a device or files that the server or the page would miss later, and flags without effect."""
    check_devices(config)
    read_phrases(config)
    _check_checkpoint(config, config.checkpoint)
    _check_model_files(config)


def named_inputs(config: PredictConfig) -> list[str]:
    """The words of the command line, and the names in --file_path, which may itself be one with a comma."""
    listed = [config.file_path] if os.path.lexists(config.file_path) else _items("file_path", config.file_path)
    return [*config.inputs, *listed]


def check_outputs(config: PredictConfig, inputs: Sequence[Input], formats: Sequence[str]) -> None:
    """Raises UserError if a file to write is a folder, or what is to be read."""
    read = {os.path.abspath(name) for name in [*named_inputs(config), *(found.audio for found in inputs)]}
    stems = [os.path.normpath(os.path.join(config.output_dir, found.output)) for found in inputs]
    for path in (f"{stem}.{form}" for stem in stems for form in formats):
        if os.path.isdir(path) or os.path.abspath(path) in read:
            kind = "a folder" if os.path.isdir(path) else "an input"
            raise UserError(
                f"--output_dir: found that {printable(path)} is {kind}, expected a file that may be written; give "
                "another folder"
            )


def check_devices(config: ModelConfig) -> None:
    """Raises UserError if the devices are not here, or the flags ask for what they cannot do."""
    if accelerator(config)[0] == "gpu":
        return
    for flag, found in (("strategy", getattr(config, "strategy", "auto")), ("wkv6", config.wkv6)):
        if found.startswith("deepspeed") or found in ("steps", "tiles"):
            raise UserError(
                f"--{flag}: found {found!r} on a CPU, expected a GPU; leave it out, or name GPUs with --device"
            )


def _check_model_files(config: ModelConfig) -> None:
    for flag, embedded in (("load_model", [*tiny.BASE_MODELS]), ("vocab_file", [tiny.NAME])):
        given = getattr(config, flag)
        if given and given not in embedded and not Path(given).is_file():
            raise UserError(f"--{flag}: no such file {given!r}; put it there, or give the right path")
    if getattr(config, "input", "") == TEXT:  # it is not read
        return
    looks_like_a_path = config.encoder.startswith((".", "/", "~")) or config.encoder.count("/") > 1
    if (looks_like_a_path or Path(config.encoder).is_file()) and not Path(config.encoder).is_dir():
        raise UserError(
            f"--encoder: no such folder {config.encoder!r}; give a folder, or an id such as microsoft/wavlm-large"
        )


def _check_checkpoint(config: EvalConfig | PredictConfig | ServeConfig | PageConfig, checkpoint: str) -> None:
    """A checkpoint that is not there; flags that an own one, which states its sizes, makes useless."""
    if checkpoint and not (Path(checkpoint).exists() or is_id(checkpoint)):
        raise UserError(f"--checkpoint: no such file or folder {checkpoint!r}; give trained weights or a run's folder")
    path = find_checkpoint(checkpoint or Path(config.proj_dir))
    for flag, given in (("stack", config.stack), ("adapter_hidden", config.adapter_hidden),
                        ("separator", config.separator != ModelConfig.separator)):  # fmt: skip
        if given and load_trained(path).parts is not None:
            raise UserError(
                f"--{flag}: has no effect, for {path} states what it was trained with; leave it out (only published "
                ".pth files need it)"
            )


def _items(flag: str, text: str) -> list[str]:
    found = [item.strip() for item in text.split(",")] if text else []
    if not all(found):
        raise UserError(f"--{flag}: found an empty name in {text!r}, expected names separated by single commas")
    return found


def _check_data(flag: str, text: str) -> None:
    """Names that are no form of data, and files and folders that are not there."""
    for item in _items(flag, text):
        spec = split_weight(item)[0] if flag == "train_data" else item
        start, colon, _ = spec.rpartition(":")
        if (colon and spec.split(":")[0] in KINDS) or Path(spec).exists() or (colon and Path(start).exists()):
            continue
        raise UserError(f"--{flag}: no such file or folder {spec!r}; expected one of: {ACCEPTED_FORMS}")


def _check_columns(config: TrainConfig | EvalConfig, specs: list[str]) -> None:
    """Columns are those of Hugging Face datasets: on the hub, or folders."""
    if specs and all(Path(spec).is_file() or spec.startswith("tar:") for spec in specs):
        for flag in ("audio_column", "text_column"):
            if getattr(config, flag) != getattr(EvalConfig, flag):
                raise UserError(
                    f"--{flag}: has no effect on {specs[0]}, which is no Hugging Face dataset; leave it out"
                )


def _check_folder(flag: str, folder: str) -> None:
    """Write to a folder, or to the one in which it will be made."""
    if not folder:
        return
    path = Path(folder).absolute()
    try:
        there = next(found for found in (path, *path.parents) if found.exists())
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"--{flag}: {folder!r} cannot be written to ({error.strerror}), expected a folder, new or not; give another"
        ) from error
