"""A run as others can use it: its checkpoint without a path of this machine, and a model card."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from rwkv_speech import tasks, tiny
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_text_atomically
from rwkv_speech.models import hub
from rwkv_speech.models.checkpoint import BEST, Trained, find_checkpoint, load_trained, write_checkpoint
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import Parts
from rwkv_speech.reports.record import read_metrics, read_run
from rwkv_speech.tasks import base_of

_LIBRARY = "rwkv_speech"
_KINDS = {
    "asr": "automatic-speech-recognition", "st": "translation", "qa": "question-answering", "chat": "text-generation",
}  # fmt: skip
_PERCENT, _POINTS = ("wer", "cer", "f1", "exact_match", "accuracy", "weighted_f1"), ("chrf", "bleu")
_TRAINING = (
    "task", "input", "epoch_count", "micro_bsz", "accumulate", "lr_adapter", "lr_state", "lr_schedule", "warmup_steps",
    "weight_decay", "stack", "soft_prompt", "peft", "lora_rank", "lora_alpha",
    "lora_targets", "train_parts", "lr_lm", "loss", "speed", "precision", "encoder_precision", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Sharing:
    """What the person says who shares a run: licence of the weights, hub ids of the frozen models, "" if none."""

    license: str
    base_model: str = ""
    encoder: str = ""
    is_private: bool = False
    endpoint: str = ""


@dataclass(frozen=True)
class _Score:
    """A number of an evaluation, in % or points, of so many utterances of a data set."""

    data: str
    task: str
    metric: str
    value: float
    utterances: int


def push(repo: str, run: str | Path, sharing: Sharing, folder: Path | None = None) -> str:
    """Put a run on the hub as NAME/REPO, or only into a new folder; where it is then.

    Raises UserError for what is no run, for a frozen model that is not the one it was trained with, and as hub.upload.
    """
    if folder is not None:
        if folder.exists():
            raise UserError(f"--folder: {folder} is there already, expected a new folder; name another")
        write_shared(folder, repo, Path(run), sharing)
        return str(folder)
    with tempfile.TemporaryDirectory() as name:
        write_shared(Path(name), repo, Path(run), sharing)
        return hub.upload(Path(name), repo, sharing.is_private, sharing.endpoint)


def write_shared(folder: Path, repo: str, run: Path, sharing: Sharing) -> None:
    """Fill a folder with the run's best checkpoint and its card."""
    trained = load_trained(find_checkpoint(run))
    if trained.parts is None:
        raise UserError(
            f"{trained.path}: a published file does not say what it was trained on; expected a run of train.py"
        )
    parts = _shared_parts(trained, sharing)
    folder.mkdir(parents=True, exist_ok=True)
    known = trained.named_tensors(), parts, trained.trained_on, _without_folders(trained.metrics)
    write_checkpoint(folder / BEST, *known, trained.ctc_head(), trained.confidence)
    home = trained.path.parent
    write_text_atomically(folder / hub.CARD, card(repo, trained, parts, home, sharing))


def _shared_parts(trained: Trained, sharing: Sharing) -> Parts:
    """The parts by names that mean something elsewhere, with the fingerprint of the encoder that is here."""
    assert trained.parts is not None
    if not trained.adapter:
        return trained.parts.shared(trained.parts.encoder, "")
    here = trained.parts.recorded_in(trained.path, Parts())
    weights = SpeechEncoder.from_pretrained(here.encoder_name(), options=here.frame_options).weights_sha256()
    is_folder = here.encoder != tiny.NAME and Path(here.encoder).exists()
    name = sharing.encoder or (Path(here.encoder).name if is_folder else here.encoder)
    return trained.parts.shared(name, weights)


def _without_folders(value: Any) -> Any:
    """Names of files alone, wherever paths of this machine stand."""
    if isinstance(value, Mapping):
        return {name: _without_folders(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(x) for x in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def card(repo: str, trained: Trained, parts: Parts, run: Path, sharing: Sharing) -> str:
    """The model card: what the hub reads in front, then data, scores, plan and licences in words."""
    flags = read_run(run).get("flags", {})
    scores, languages = list(_scores(run, trained.path.stem)), _languages(trained)
    main = tasks.DEFAULT if tasks.DEFAULT in map(base_of, trained.initial_states) else ""
    fields = {
        "license": sharing.license,
        "library_name": _LIBRARY,
        "pipeline_tag": _KINDS[main] if main else None,
        "tags": ["rwkv", "speech", *sorted({base_of(name) for name in trained.initial_states})],
        "language": languages,
        "base_model": [name for name in (sharing.base_model, parts.encoder if "/" in parts.encoder else "") if name],
        "datasets": sorted(set(_hub_sets(flags.get("train_data", "")))),
        "metrics": sorted({score.metric for score in scores}),
        "model_name": repo.rpartition("/")[2],
    }
    results = [
        {
            "task_type": _KINDS.get(base_of(score.task), "audio-classification"),
            "dataset_type": "custom",
            "dataset_name": score.data,
            "metric_type": score.metric,
            "metric_value": score.value,
        }
        for score in scores
    ]
    sections = {
        "Use": _use(repo, parts, trained),
        "Data": "\n".join(_data(trained, flags)),
        "Scores": _shown(scores, trained),
        "Plan": _table(("", ""), _plan(trained, run, flags)),
        "Frozen models": _table(("", ""), _frozen(parts, sharing)),
        "Licences": _LICENCES.format(license=sharing.license),
    }
    body = "\n".join(f"\n## {title}\n\n{text}" for title, text in sections.items())
    return f"{hub.front_matter(fields, results)}\n# {repo}\n\n{_WHAT}\n{body}\n"


_WHAT = (
    "An adapter and learned initial states that teach a frozen RWKV-6 language model to hear, by way of a frozen "
    "speech encoder. Neither of the frozen models is in here."
)
_LICENCES = (
    "The weights in here: `{license}`. The base model, the encoder and the data have licences of their own, which "
    "their homes name, and which hold for what is made with them."
)


def _use(repo: str, parts: Parts, trained: Trained) -> str:
    given = "" if parts.load_model in tiny.BASE_MODELS else f" --load_model {parts.load_model}"
    if trained.adapter and "/" not in parts.encoder and parts.encoder != tiny.NAME:
        given += " --encoder FOLDER"
    states = ", ".join(f"`{name}`" for name in sorted(trained.initial_states))
    head = " A CTC head gives the times of words." if trained.ctc else ""
    return f"    python -m {_LIBRARY} predict --checkpoint {repo}{given} speech.wav\n\nStates: {states}.{head}"


def _data(trained: Trained, flags: Mapping[str, Any]) -> Iterator[str]:
    for flag, what in (("train_data", "Trained on"), ("valid_data", "validated on")):
        names = [PurePath(item).name if PurePath(item).is_absolute() else item for item in _items(flags.get(flag, ""))]
        if names:
            yield f"{what} {', '.join(f'`{name}`' for name in names)}" + (";" if flag == "train_data" else ".")
    if found := trained.trained_on:
        yield f"{found.utterances:,} utterances, {found.hours:.1f} h, the longest {found.longest_seconds:.1f} s."


def _plan(trained: Trained, run: Path, flags: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What training was set to, took and made."""
    yield "trained parameters", f"{sum(x.numel() for x in trained.named_tensors().values()):,}"
    if rows := read_metrics(run):
        yield "steps, epochs", f"{rows[-1].step:,}, {rows[-1].epoch}"
    record = read_run(run)
    for name in ("commit", "started"):
        if record.get(name):
            yield name, str(record[name])
    for name in _TRAINING:
        if flags.get(name) not in (None, ""):
            yield f"`--{name}`", str(flags[name])


def _frozen(parts: Parts, sharing: Sharing) -> Iterator[tuple[str, str]]:
    yield "base model", f"`{sharing.base_model or parts.load_model}`"
    yield "its file's SHA-256", f"`{parts.base_sha256}`"
    yield "encoder", f"`{parts.encoder}`"
    if parts.encoder_sha256:
        yield "its weights' SHA-256, in bfloat16", f"`{parts.encoder_sha256}`"
    sizes = {name: value for name, value in asdict(parts).items() if name in ("n_layer", "n_embd", "stack")}
    yield "sizes", ", ".join(f"{name} {value}" for name, value in sizes.items() if value)


def _scores(run: Path, weights: str) -> Iterator[_Score]:
    """The numbers of the evaluations of these weights that lie in the run's folder."""
    for path in sorted(run.glob(f"eval-{weights}-*.json")):
        try:
            found = json.loads(path.read_bytes())
            for task, numbers in found.get("tasks", {}).items():
                for metric in (*_PERCENT, *_POINTS):
                    if (value := numbers.get(metric)) is not None:
                        shown = round(100 * value if metric in _PERCENT else value, 2)
                        yield _Score(_set_name(found["data"]), task, metric, shown, numbers["num_utterances"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: not a result of eval.py ({error!r}); delete it, or score again") from error


def _shown(scores: Sequence[_Score], trained: Trained) -> str:
    if scores:
        return _table(("data", "task", "utterances", "measure", "value"), map(_row, scores))
    validated = trained.metrics.get("validation")
    return f"In training's validation: {validated}." if validated else "None were measured."


def _row(score: _Score) -> tuple[str, ...]:
    unit = " %" if score.metric in _PERCENT else ""
    return f"`{score.data}`", score.task, f"{score.utterances:,}", score.metric, f"{score.value}{unit}"


def _set_name(data: str) -> str:
    """A data set's name without the folders of this machine."""
    return PurePath(data).name if PurePath(data).is_absolute() else data


def _languages(trained: Trained) -> list[str]:
    """Those that the states are named for."""
    return sorted({name.partition("_")[2] for name in trained.initial_states} - {""})


def _items(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _hub_sets(train_data: str) -> Iterator[str]:
    for item in _items(train_data):
        kind, _, rest = item.partition(":")
        if kind in ("hf", "hf-stream"):
            yield rest.partition(":")[0]
        elif kind == "librispeech":
            yield "openslr/librispeech_asr"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)
