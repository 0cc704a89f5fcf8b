"""Files of task states: small, and bound to the base model and the adapter that they were learned with.

Own files are safetensors of `initial_states.TASK` (L, H, N, N), and `soft_prompts.TASK` where a task has one, with the
two SHA-256 and the tasks that transcribe first as metadata; published ones are `.pth` dictionaries of one state,
`blocks.{i}.att.time_state` (H, N, N), axes [value, key] as here. BlinkDL's inference code has them the other way round:
his loader transposes.
"""

# L layers · H heads · N head size

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_atomically
from rwkv_speech.models.base import read_tensors
from rwkv_speech.models.checkpoint import (
    SOFT_PROMPTS,
    STATES,
    find_checkpoint,
    load_trained,
    named_tensors,
    ordered,
    write_checkpoint,
)

FORMAT = "rwkv_speech-states-1"
_PUBLISHED = re.compile(r"blocks\.(\d+)\.att\.time_state")


@dataclass(frozen=True)
class States:
    """Task states by name, (L, H, N, N) each, and what they were learned with; "" where a published file is silent."""

    path: Path
    states: dict[str, Tensor]
    base_sha256: str
    adapter_sha256: str
    soft_prompts: dict[str, Tensor] = field(default_factory=dict)  # by task, of those that have one
    transcribes: frozenset[str] = frozenset()  # the tasks that say what they heard before their text

    def only(self, names: Sequence[str]) -> "States":
        """Those of these names, all by default; raises UserError for one that is not there."""
        if missing := [name for name in names if name not in self.states]:
            raise UserError(
                f"{self.path}: found no state named {missing[0]!r}, expected one of {', '.join(sorted(self.states))}"
            )
        states = {name: self.states[name] for name in names or self.states}
        prompts = {name: x for name, x in self.soft_prompts.items() if name in states}
        return replace(self, states=states, soft_prompts=prompts, transcribes=self.transcribes & set(states))

    def joined_with(self, other: "States") -> "States":
        """All of both, bound to what either is; raises UserError unless they fit together and share no name."""
        other.check_fit(self)
        if both := set(self.states) & set(other.states):
            raise UserError(
                f"{self.path}: has a state named {min(both)!r} already, and so has {other.path}, expected another "
                "name; copy one under another with --name, or remove it first"
            )
        return replace(
            self,
            states=self.states | other.states,
            soft_prompts=self.soft_prompts | other.soft_prompts,
            transcribes=self.transcribes | other.transcribes,
            base_sha256=self.base_sha256 or other.base_sha256,
            adapter_sha256=self.adapter_sha256 or other.adapter_sha256,
        )

    def named(self, name: str) -> "States":
        """The only state under another name; raises UserError for a bad name or several states."""
        tasks.task_named(name)
        if len(self.states) != 1:
            raise UserError(
                f"--name: found {len(self.states)} states ({', '.join(self.states)}), expected one to rename; choose "
                "it with --tasks"
            )
        [old] = self.states
        prompts = {name: self.soft_prompts[old]} if old in self.soft_prompts else {}
        transcribes = frozenset({name} if self.transcribes else ())
        return replace(self, states={name: self.states[old]}, soft_prompts=prompts, transcribes=transcribes)

    def check_fit(self, other: "States") -> None:
        """Raises UserError unless these states can be used where the `other` ones are."""
        for what, mine, theirs in (
            ("base model", self.base_sha256, other.base_sha256),
            ("adapter", self.adapter_sha256, other.adapter_sha256),
        ):
            if mine and theirs and mine != theirs:
                raise UserError(
                    f"{self.path}: its states were learned with the {what} of SHA-256 {mine[:12]}..., expected "
                    f"{theirs[:12]}... as in {other.path}; take the checkpoint that they are from"
                )
        shape = next(iter(other.states.values())).shape
        for name, state in self.states.items():
            if state.shape != shape:
                raise UserError(
                    f"{self.path}: state {name} has the shape {tuple(state.shape)}, expected {tuple(shape)} as in "
                    f"{other.path}; take states of the same base model"
                )

    def write(self, path: Path) -> None:
        """Write an own file, or the published layout of one state where the name ends in .pth, atomically."""
        if path.suffix == ".pth":
            if len(self.states) != 1 or self.soft_prompts or self.transcribes:
                raise UserError(
                    f"{path}: found {len(self.states)} states ({', '.join(self.states)}), expected one, without a soft "
                    "prompt or --transcribe_first: a published file has no names and cannot say that; choose it with "
                    "--tasks, or write a .safetensors file"
                )
            [state] = self.states.values()
            layers = {f"blocks.{i}.att.time_state": x.detach().float().cpu().clone() for i, x in enumerate(state)}
            write_atomically(path, lambda temporary: torch.save(layers, temporary))
            return
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: found {path.suffix or 'no suffix'}, expected the name of a .safetensors or .pth file"
            )
        about = {"base_sha256": self.base_sha256, "adapter_sha256": self.adapter_sha256}
        about |= {"transcribes": json.dumps(sorted(self.transcribes))} if self.transcribes else {}
        tensors = {name: x.float() for name, x in named_tensors({}, self.states, self.soft_prompts).items()}
        content = ordered(save(tensors, {"format": FORMAT, **about}))
        write_atomically(path, lambda temporary: temporary.write_bytes(content))


def adapter_sha256(adapter: Mapping[str, Tensor], lm: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the tensors, in float32, of an adapter and of what was trained of the language model with it; ""
    without an adapter, whose states fit any.
    """
    if not adapter:
        return ""
    found, tensors = hashlib.sha256(), {**adapter, **lm}
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def read_states(path: str | Path, task: str = tasks.DEFAULT) -> States:
    """The states of a run, a checkpoint, an own file of states, or a published one, whose only state is named `task`.

    Raises UserError for a file that holds none.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if about.get("format") == FORMAT:
            states, prompts = (
                {name.removeprefix(prefix): x for name, x in read_tensors(path).items() if name.startswith(prefix)}
                for prefix in (STATES, SOFT_PROMPTS)
            )
            transcribes = frozenset(json.loads(about.get("transcribes", "[]")))
            known = about.get("base_sha256", ""), about.get("adapter_sha256", "")
            return States(path, states, *known, prompts, transcribes)
    elif (layers := _published(path)) is not None:
        return States(path, {task: layers}, "", "")
    trained = load_trained(path, task)
    base = trained.parts.base_sha256 if trained.parts else ""
    fingerprint = adapter_sha256(trained.adapter, trained.lm)
    learned = dict(trained.initial_states), base, fingerprint, trained.soft_prompts
    return States(path, *learned, frozenset(trained.parts.transcribes if trained.parts else ()))


def _published(path: Path) -> Tensor | None:
    """The state of a published file, (L, H, N, N) float32; None if it is none."""
    layers = {int(m[1]): x for name, x in read_tensors(path).items() if (m := _PUBLISHED.fullmatch(name))}
    if not layers:
        return None
    if set(layers) != set(range(len(layers))) or len({x.shape for x in layers.values()}) > 1:
        raise UserError(
            f"{path}: found states of the layers {sorted(layers)}, expected one of each layer, all of a shape"
        )
    return torch.stack([layers[i].float() for i in range(len(layers))])


def joined(paths: Sequence[str | Path]) -> States:
    """The states of several files that fit together; raises UserError where they do not, or share a name."""
    return functools.reduce(States.joined_with, map(read_states, paths))


def add_states(path: str | Path, new: States) -> Path:
    """Add states to a checkpoint or an own file of states, which else stays as it is; the file.

    Raises UserError for states of another base model or adapter, and for names that are taken.
    """
    return _write_back(read_states(path).joined_with(new))


def remove_states(path: str | Path, names: Sequence[str]) -> Path:
    """Take states out of a checkpoint or an own file of states; the file. Raises UserError if none would be left."""
    there = read_states(path)
    gone = there.only(names).states
    if not names or len(gone) == len(there.states):
        raise UserError(f"{there.path}: expected --tasks to leave at least one of {', '.join(sorted(there.states))}")
    return _write_back(there.only([name for name in there.states if name not in gone]))


def _write_back(there: States) -> Path:
    """Put states back into their file, all else as it is."""
    if there.path.suffix != ".safetensors":
        raise UserError(f"{there.path}: a published file holds one state, expected an own .safetensors file")
    with safe_open(there.path, "pt") as file:
        is_states = file.metadata()["format"] == FORMAT
    if is_states:
        there.write(there.path)
        return there.path
    trained = replace(load_trained(there.path), initial_states=there.states, soft_prompts=there.soft_prompts)
    assert trained.parts is not None
    if there.adapter_sha256 != adapter_sha256(trained.adapter, trained.lm):
        raise UserError(
            f"{there.path}: has no adapter, for it was trained with --input text, and could not say which one its new "
            "states were learned with; expected states that were trained so, too"
        )
    parts = replace(trained.parts, transcribes=tuple(sorted(there.transcribes)))
    about = parts, trained.trained_on, trained.metrics, trained.ctc_head(), trained.confidence
    write_checkpoint(there.path, trained.named_tensors(), *about)
    return there.path


def mean(states: States, name: str) -> States:
    """The mean of all the states, summed in float64, under a name."""
    return _mixed(states, [1 / len(states.states)] * len(states.states), name)


def interpolated(states: States, weight: float, name: str) -> States:
    """(1 - weight) x the first of two states + weight x the second, under a name."""
    if len(states.states) != 2:
        raise UserError(f"--tasks: found {', '.join(states.states)}, expected two states, as in --tasks asr,st_fr")
    return _mixed(states, [1 - weight, weight], name)


def _mixed(states: States, weights: Sequence[float], name: str) -> States:
    """The weighted sum of all the states, and of their soft prompts, which all or none of them must have."""
    tasks.task_named(name)
    prompts = [states.soft_prompts.get(each) for each in states.states]
    sizes = {None if x is None else tuple(x.shape) for x in prompts}
    if len(sizes) > 1:
        raise UserError(
            f"{states.path}: of {', '.join(states.states)} some have other soft prompts than others, expected them to "
            "be alike; mix states that were learned with the same --soft_prompt"
        )
    if states.transcribes not in (set(), set(states.states)):
        raise UserError(
            f"{states.path}: {', '.join(sorted(states.transcribes))} first says what it heard, others of "
            f"{', '.join(states.states)} do not, expected them to be alike; mix states that were learned with the same "
            "--transcribe_first"
        )

    def total(tensors: Sequence[Tensor]) -> Tensor:
        return sum((w * x.double() for w, x in zip(weights, tensors, strict=True)), torch.zeros(())).float()

    learned = [x for x in prompts if x is not None]
    mixed = {name: total(list(states.states.values()))}
    soft_prompts = {name: total(learned)} if learned else {}
    transcribes = frozenset({name} if states.transcribes else ())
    return replace(states, states=mixed, soft_prompts=soft_prompts, transcribes=transcribes)


def described(states: States) -> str:
    """A line for each state, and what they were learned with."""
    lines = [
        f"{name:<16} {tasks.task_named(name).measure:<9} {' x '.join(map(str, x.shape))}, root mean square "
        f"{float(x.float().square().mean().sqrt()):.4f}"
        + (f", soft prompt of {len(states.soft_prompts[name])}" if name in states.soft_prompts else "")
        + (", transcribes first" if name in states.transcribes else "")
        for name, x in sorted(states.states.items())
    ]
    known = [("base model", states.base_sha256), ("adapter", states.adapter_sha256)]
    lines += (f"{what}: {f'SHA-256 {sha[:12]}...' if sha else 'none, or not known'}" for what, sha in known)
    return "\n".join(lines)
