"""Tasks: each has a learned initial state of its name, and may have a prompt."""

from dataclasses import dataclass

from rwkv_speech.config import TASK_FORM
from rwkv_speech.errors import UserError

DEFAULT = "asr"


@dataclass(frozen=True)
class Task:
    """`name` is that of the learned state; `prompt` is text between audio and separator."""

    name: str
    prompt: str = ""


KNOWN = {task.name: task for task in (Task("asr"),)}


def task_named(name: str) -> Task:
    """The known task of that name, else a new one like speech recognition; raises UserError for what is no name."""
    if not TASK_FORM[0](name):
        raise UserError(f"task {name!r}: expected {TASK_FORM[1]}; known are {', '.join(KNOWN)}")
    return KNOWN.get(name) or Task(name)
