"""Checkpoints of the trained tensors: own files (safetensors with metadata) and published ones (`.pth`).

Own files hold `adapter.{0,2}.{weight,bias}` (not of a run that heard nothing), `initial_states.TASK` (L, H, N, N),
`soft_prompts.TASK` (P, C) where a task has one, `lm.*` of what was trained of the language model, and with a CTC head
`ctc.*`; published ones, and own ones of format 1,
`speech_encoder.adapter.*` and one task's `language_model.blocks.{i}.att.time_state` (H, N, N).
"""

# L layers · H heads · N head size

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_atomically
from rwkv_speech.models import hub
from rwkv_speech.models.base import read_tensors
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts, TrainedOn

FORMAT = "rwkv_speech-2"
FORMAT_1 = "rwkv_speech-1"
BEST, LAST = "best.safetensors", "last.safetensors"
STATES, SOFT_PROMPTS = "initial_states.", "soft_prompts."
_ADAPTER, _CTC, _LM = "adapter.", "ctc.", "lm."
_ADAPTER_TENSORS = {"0.weight", "0.bias", "2.weight", "2.bias"}
_PUBLISHED_ADAPTER = "speech_encoder.adapter."
_PUBLISHED_STATE = re.compile(r"language_model\.blocks\.(\d+)\.att\.time_state")


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a checkpoint; `parts` is None for a published file, which does not say.

    `ctc` is None without a CTC head, else what it is and its tensors; `confidence` what decoding.confidence weighs with
    it, None where it was not calibrated.
    """

    path: Path
    adapter: dict[str, Tensor]  # "0.weight", "0.bias", "2.weight", "2.bias"; empty of a run that heard nothing
    initial_states: dict[str, Tensor]  # by task, (L, H, N, N)
    parts: Parts | None
    trained_on: TrainedOn | None
    ignored: tuple[str, ...]  # names of tensors in the file that are not trained ones
    metrics: dict[str, Any]
    ctc: tuple[CtcSpec, dict[str, Tensor]] | None = None
    confidence: dict[str, float] | None = None
    soft_prompts: dict[str, Tensor] = field(default_factory=dict)  # by task, (P, C), of tasks that have one
    lm: dict[str, Tensor] = field(default_factory=dict)  # of the language model, by its names

    def require_adapter(self) -> None:
        """Raises UserError for weights that cannot hear."""
        if not self.adapter:
            raise UserError(
                f"{self.path}: has no adapter, for it was trained with --input text; expected weights that were "
                "trained on audio: name others, or let eval.py score these with --input text"
            )

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors of adapter and states under their names in own files, on the CPU."""
        return named_tensors(self.adapter, self.initial_states, self.soft_prompts, self.lm)

    def ctc_head(self) -> CtcHead | None:
        """The CTC head, frozen, if there is one; raises UserError for one whose tensors are not those of its record."""
        if self.ctc is None:
            return None
        spec, tensors = self.ctc
        try:
            head = CtcHead(tensors["conv1.weight"].shape[1], spec)
            head.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.path}: its CTC head is damaged or of an older version, expected the tensors of one for "
                f"{len(spec.labels)} characters; train it again with --ctc 1"
            ) from error
        return head.requires_grad_(False).eval()


def named_tensors(
    adapter: Mapping[str, Tensor],
    initial_states: Mapping[str, Tensor],
    soft_prompts: Mapping[str, Tensor] | None = None,
    lm: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The trained tensors under their names in own files, on the CPU."""
    tensors = {_ADAPTER + name: x for name, x in adapter.items()}
    tensors |= {STATES + task: x for task, x in initial_states.items()}
    tensors |= {SOFT_PROMPTS + task: x for task, x in (soft_prompts or {}).items()}
    tensors |= {_LM + name: x for name, x in (lm or {}).items()}
    return {name: x.detach().cpu().clone() for name, x in tensors.items()}


def write_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    parts: Parts,
    trained_on: TrainedOn | None,
    metrics: Mapping[str, Any],
    ctc: CtcHead | None = None,
    confidence: Mapping[str, float] | None = None,
) -> None:
    """Write an own checkpoint of tensors as `named_tensors` names them, and of a CTC head if given, atomically."""
    metadata = {"format": FORMAT, "parts": json.dumps(asdict(parts)), "metrics": json.dumps(dict(metrics))}
    if ctc is not None:
        metadata["ctc"] = json.dumps(asdict(ctc.spec))
        tensors = tensors | {_CTC + name: x.detach().cpu().clone() for name, x in ctc.state_dict().items()}
    if trained_on is not None:
        metadata["trained_on"] = json.dumps(asdict(trained_on))
    if confidence is not None:
        metadata["confidence"] = json.dumps(dict(confidence))
    content = ordered(save(tensors, metadata))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def ordered(content: bytes) -> bytes:
    """A safetensors file with its header sorted: the same tensors and metadata are then the same bytes every time."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(ordered) > size:
        raise ValueError(f"a safetensors header of {size} bytes became {len(ordered)}")
    return content[:8] + ordered.ljust(size) + content[8 + size :]


def load_trained(path: str | Path, task: str = tasks.DEFAULT) -> Trained:
    """Read an own checkpoint or a published `.pth` adapter file, whose one state is then named `task`.

    Raises UserError naming the file if it holds no adapter or no initial state, or was written by another format.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path), _read_metadata(path)
    try:
        parts, trained_on, metrics = _described(metadata)
        ctc = CtcSpec(**json.loads(metadata["ctc"])) if "ctc" in metadata else None
        confidence = json.loads(metadata.get("confidence", "null"))
        if metadata.get("format") == FORMAT_1:
            task = json.loads(metadata["origin"])["task"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its metadata is damaged ({error}), expected parts and metrics; take another checkpoint"
        ) from error
    if metadata.get("format") != FORMAT:
        tensors = _renamed(path, tensors, task)
    known = (_ADAPTER, STATES, SOFT_PROMPTS, _LM, *([_CTC] if ctc else []))
    adapter, states, prompts, lm, head = (
        {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for prefix in (_ADAPTER, STATES, SOFT_PROMPTS, _LM, _CTC)
    )
    heard_nothing = not adapter and metadata.get("format") == FORMAT
    if not (set(adapter) == _ADAPTER_TENSORS or heard_nothing) or not states:
        raise UserError(
            f"{path}: not a checkpoint of an adapter and an initial state: found {len(states)} initial states and the "
            f"adapter tensors {sorted(adapter)}; expected a state and the adapter's 0.weight, 0.bias, 2.weight, 2.bias"
        )
    ignored = tuple(name for name in tensors if not name.startswith(known))
    about = parts, trained_on, ignored, metrics, (ctc, head) if ctc else None, confidence
    return Trained(path, adapter, states, *about, prompts, lm)


def add_confidence(path: Path, confidence: Mapping[str, float]) -> None:
    """Give an own checkpoint these weights of confidence, atomically; all else in it stays as it is."""
    trained = load_trained(path)
    assert trained.parts is not None
    parts = (trained.named_tensors(), trained.parts, trained.trained_on, trained.metrics, trained.ctc_head())
    write_checkpoint(path, *parts, confidence)


def add_ctc(path: Path, head: CtcHead) -> None:
    """Give an own checkpoint this CTC head, atomically; all else stays, but for the confidence, which another made."""
    trained = load_trained(path)
    assert trained.parts is not None
    if trained.ctc and head.is_like(*trained.ctc):
        return
    write_checkpoint(path, trained.named_tensors(), trained.parts, trained.trained_on, trained.metrics, head)


def _renamed(path: Path, tensors: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    """The tensors of the published layout, whose state is one tensor a layer, under their names in own files."""
    layers = {int(m[1]): x for name, x in tensors.items() if (m := _PUBLISHED_STATE.fullmatch(name))}
    if missing := sorted(set(range(max(layers, default=0))) - set(layers)):
        raise UserError(f"{path}: the initial states of layers {missing} are missing")
    shapes = {tuple(x.shape) for x in layers.values()}
    if len(shapes) > 1:
        raise UserError(f"{path}: time_state differs in shape between layers: found {sorted(shapes)}, expected one")
    renamed = {
        re.sub(f"^{_PUBLISHED_ADAPTER}", _ADAPTER, name): x
        for name, x in tensors.items()
        if not _PUBLISHED_STATE.fullmatch(name)
    }
    return renamed | ({STATES + task: torch.stack([layers[i] for i in range(len(layers))])} if layers else {})


def _read_metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") not in (FORMAT, FORMAT_1):
        raise UserError(
            f"{path}: found format {metadata.get('format')!r}, expected {FORMAT!r}; it was not written by this version"
        )
    return metadata


def _described(metadata: Mapping[str, str]) -> tuple[Parts | None, TrainedOn | None, dict[str, Any]]:
    """What an own file says of itself; format 1 named the base model otherwise."""
    if not metadata:
        return None, None, {}
    if metadata["format"] == FORMAT_1:
        origin = json.loads(metadata["origin"])
        return Parts.from_dict({**origin, "load_model": origin["base_model"]}), None, json.loads(metadata["metrics"])
    trained_on = TrainedOn(**json.loads(metadata["trained_on"])) if "trained_on" in metadata else None
    return Parts.from_dict(json.loads(metadata["parts"])), trained_on, json.loads(metadata["metrics"])


def find_checkpoint(path: str | Path, endpoint: str = "") -> Path:
    """The checkpoint that a path means: the file itself, a run's best, else its last, else the only one in the folder.

    Text that names nothing here is a repository of the hub at `endpoint`, as `hub.is_id` says, whose file is fetched.
    Raises UserError naming the folder and the remedy if there is none, or several to choose from.
    """
    if hub.is_id(path):
        return hub.download(str(path), BEST, endpoint)
    path = Path(path)
    if path.is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    found = sorted(file for suffix in ("pth", "safetensors") for file in path.glob(f"*.{suffix}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{path}: found {len(found)} checkpoints ({', '.join(file.name for file in found)}), expected one; "
            "name the one to use with --checkpoint"
        )
    raise UserError(
        f"{path}: found no trained weights there; expected {BEST}, {LAST} or one published .pth file: train first, "
        "put a published file there, or name a file with --checkpoint"
    )


def export_published(trained: Trained, path: Path, task: str = "") -> None:
    """Write the published layout: a `.pth` dictionary of the adapter and one task's state.

    Raises UserError for another kind of file, unless there is but one state, or `task` names one, and for a state that
    transcribes first.
    """
    if path.suffix != ".pth":
        raise UserError(f"{path}: found {path.suffix or 'no suffix'}, expected the name of a .pth file")
    trained.require_adapter()
    if trained.lm:
        offset = trained.parts is not None and trained.parts.has_state_offset
        raise UserError(
            f"{trained.path}: has {len(trained.lm)} trained tensors of the language model, which a published file has "
            "no place for; "
            + ("share the run with push" if offset else "make them a part of it first: python -m rwkv_speech merge")
        )
    task = one_task(trained.path, trained.initial_states, task)
    if trained.parts and task in trained.parts.transcribes:
        raise UserError(
            f"{path}: state {task} first says what it heard (--transcribe_first), expected one that does not: a "
            "published file cannot say so; share the run with push"
        )
    tensors = {_PUBLISHED_ADAPTER + name: x for name, x in trained.adapter.items()}
    layers = enumerate(trained.initial_states[task])
    tensors |= {f"language_model.blocks.{i}.att.time_state": layer for i, layer in layers}
    tensors = {name: x.detach().cpu().clone() for name, x in tensors.items()}
    write_atomically(path, lambda temporary: torch.save(tensors, temporary))


def one_task(path: Path | str, states: Mapping[str, Tensor], task: str) -> str:
    """The task that is meant: the given one, else the only one; raises UserError listing those that there are."""
    if task in states or (not task and len(states) == 1):
        return task or next(iter(states))
    found = f"no state named {task!r}" if task else "several states"
    raise UserError(f"{path}: found {found}, expected one of {', '.join(sorted(states))}; name it with --task")
