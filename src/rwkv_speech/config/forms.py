"""What flags may be: their choices, and the forms of those that are text."""

import re
from collections.abc import Callable, Sequence

STRATEGIES = ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
YES_NO = ("yes", "no")
OFF_ON = (0, 1)
QUANTS = ("int8", "nf4")
PRECISIONS = ("auto", "bf16", "fp32", *QUANTS)
KERNEL_FORMS = ("auto", "torch", "steps", "tiles")
AUDIO, TEXT = INPUTS = ("audio", "text")
LABEL_MODES = ("none", "lower")
NORMALIZERS = ("casefold", "characters", "basic", "whisper-english", "none")
PROMPT_FORMS = ("user", "instruction", "continue")
SCHEDULES = ("cosine", "constant")
FREEZE_ADAPTER = "adapter"
FROZEN = ("none", FREEZE_ADAPTER)
LOSSES = ("ce", "kl")
LORA, STATE_OFFSET = "lora", "state_offset"
PEFTS = ("none", LORA, STATE_OFFSET)
# Without a dot they are the time mix's.
LORA_TARGETS = ("receptance", "key", "value", "output", "gate", "ffn.key", "ffn.value", "ffn.receptance")
TRAIN_PARTS = ("ln", "time")
STATE_BY = ("task", "lang")
COMMITS = ("segment", "word")
VADS = ("silero", "none")
HISTORIES = ("own", "given")
OUTPUT_FORMATS = ("txt", "srt", "vtt", "tsv", "json")
FEATURE_DTYPES = ("bfloat16", "float16", "float32")
# What --train_data, --valid_data and --eval_data accept.
DATA_FORMS = {
    "FILE.jsonl or FILE.json": "a manifest: JSON lines with audio_filepath and text",
    "FILE.parquet or FILE.arrow": "a manifest with such columns",
    "FOLDER": "audio files, each with a .txt of the same name beside it",
    "FOLDER or FOLDER:SPLIT": "what datasets' save_to_disk wrote",
    "hf:NAME:SPLIT": "a Hugging Face dataset; SPLIT may be a+b",
    "hf:NAME:CONFIG:SPLIT": "one configuration of it",
    "librispeech:SPLIT": "LibriSpeech, for example train-960 or test-clean",
    "commonvoice:FOLDER:SPLIT": "a language of Common Voice, downloaded: SPLIT.tsv and clips",
    "fleurs:LANG:SPLIT": "FLEURS, for example fleurs:de_de:train, or its folder as LANG",
    "mls:LANG:SPLIT": "Multilingual LibriSpeech, for example mls:german:dev, or its folder",
    "aishell:FOLDER:SPLIT": "AISHELL-1, downloaded and unpacked",
    "covost:SRC_TGT:SPLIT": "CoVoST 2, as covost:en_de:test; or covost:FOLDER:SRC_TGT:SPLIT",
    "tar:FOLDER or tar:PATTERN": "WebDataset shards, for example tar:/data/train-{000..099}.tar",
    "hf-stream:NAME:SPLIT": "read as it arrives: the whole of --train_data, with --epoch_steps",
}
ACCEPTED_FORMS = ", ".join(DATA_FORMS)
TASK_FORM = (re.compile("[a-z][a-z0-9_]*").fullmatch, "a name of lower-case letters, digits and _, such as asr")
CHECKPOINT_HELP = "trained weights, own, published, or NAME/REPO on the hub; empty: the best of --proj_dir"
STATE_HELP = "file of states to use beside those of the weights; if it holds one and --task is empty, that is for all"
LIBRISPEECH_TESTS = "librispeech:test-clean,librispeech:test-other"


def numbers(text: str) -> tuple[float, ...]:
    """The comma-separated numbers of a flag; raises ValueError for anything else."""
    return tuple(float(part) for part in text.split(",")) if text.strip() else ()


def encoder_layers(text: str) -> tuple[int, ...]:
    """The comma-separated numbers of layers; raises ValueError unless they are whole, rise and begin at 1 or above."""
    found = tuple(int(part) for part in text.split(",")) if text else ()
    if list(found) != sorted({number for number in found if number > 0}):
        raise ValueError(text)
    return found


def are_factors(text: str) -> bool:
    # Whole percents keep the filter that changes the speed small.
    return all(0.5 <= x <= 2.0 and abs(100 * x - round(100 * x)) < 1e-6 for x in numbers(text))


def _are_temperatures(text: str) -> bool:
    found = numbers(text)
    return bool(found) and all(0 <= x <= 2 for x in found) and list(found) == sorted(set(found))


def _are_limits(text: str) -> bool:
    found = numbers(text)
    return len(found) == 2 and -100 <= found[0] <= found[1] <= 100


PHRASES = (
    lambda found: isinstance(found, str) or all(isinstance(line, str) for line in found),
    "a file, or in Python a list of phrases",
)


def output_formats(text: str) -> tuple[str, ...]:
    """The comma-separated formats of a flag, `all` being each of them; raises ValueError for anything else."""
    named = [part.strip() for part in text.split(",")] if text else []
    if not set(named) <= {*OUTPUT_FORMATS, "all"}:
        raise ValueError(text)
    return OUTPUT_FORMATS if "all" in named else tuple(dict.fromkeys(named))


def _are_tasks(text: str) -> bool:
    return all(TASK_FORM[0](name) for name in text.split(","))


def _are_some_of(names: Sequence[str]) -> tuple[Callable[[str], bool], str]:
    return lambda text: set(text.split(",")) <= set(names), f"some of {', '.join(names)}, separated by commas"


TARGETS_FORM, PARTS_FORM = _are_some_of(LORA_TARGETS), _are_some_of(TRAIN_PARTS)
STATES = (_are_tasks, "names of lower-case letters, digits and _, separated by commas")
LAYERS = (encoder_layers, "rising numbers from 1, separated by commas, as in 2,3,4")
FORMATS = (output_formats, f"one or several of {', '.join(OUTPUT_FORMATS)} and all, separated by commas")
TEMPERATURES = (_are_temperatures, "rising numbers from 0 to 2, as in 0 or 0,0.5,1")
PROMPT_FORM = (
    lambda text: text in PROMPT_FORMS or "{text}" in text,
    f"one of {', '.join(PROMPT_FORMS)}, or a template that holds {{text}}",
)
LIMITS = (_are_limits, "two numbers of dB, lowest and highest, from -100 to 100, as in -10,6")
