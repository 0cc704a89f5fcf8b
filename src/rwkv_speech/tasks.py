"""Tasks: a task is the name of a learned initial state; a table of the known ones says how each is measured."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from rwkv_speech.config import TASK_FORM
from rwkv_speech.errors import UserError

DEFAULT = "asr"
LANGUAGE = "lid"  # finds the language that is spoken
BY_LANG = "lang"  # of --state_by


@dataclass(frozen=True)
class Task:
    """`name` is that of the learned state, `prompt` text between audio and separator.

    `measure` is what its results are scored by: "wer", "bleu", "answer" (exact match and token F1) or "accuracy";
    `by_lang` says that each language of the text has a state of its own.
    """

    name: str
    measure: str = "wer"
    by_lang: bool = False
    prompt: str = ""

    @property
    def is_class(self) -> bool:
        """Whether a recording is one of several kinds, whatever pieces it is heard in."""
        return self.measure == "accuracy"

    @property
    def is_answer(self) -> bool:
        """Whether what is said is answered, and so is heard as one piece."""
        return self.measure == "answer"


KNOWN = {
    task.name: task
    for task in (
        Task("asr"),
        Task("st", "bleu", by_lang=True),
        Task("qa", "answer"),
        Task("chat", "answer"),
        *(Task(name, "accuracy") for name in (LANGUAGE, "emotion", "sex", "sound", "keyword", "topic")),
    )
}


def base_of(name: str) -> str:
    """The known task that a state's name begins with, as `st` of `st_fr`, else the name itself."""
    head = name.partition("_")[0]
    return head if head in KNOWN else name


def task_named(name: str) -> Task:
    """The task of a state of that name: a known one, else a new one like speech recognition.

    Raises UserError for what is no name.
    """
    if not TASK_FORM[0](name):
        raise UserError(f"task {name!r}: expected {TASK_FORM[1]}; known are {', '.join(KNOWN)}")
    known = KNOWN.get(base_of(name))
    return replace(known, name=name) if known else Task(name)


def state_name(task: str, lang: str | None, by_lang: bool = False) -> str:
    """The state of a task and a language of the text: `st` and `zh-CN` -> `st_zh_cn`.

    A task whose table entry is not `by_lang` has one state for all languages; with `by_lang`, recognition and tasks
    that are not known have one for each, too. What names a state already, as `st_fr`, stays.
    """
    found = task_named(task)
    apart = found.by_lang or (by_lang and found.measure == "wer")
    suffix = re.sub("[^a-z0-9]+", "_", (lang or "").lower()).strip("_")
    return f"{task}_{suffix}" if apart and suffix and task == base_of(task) else task


@dataclass(frozen=True)
class Naming:
    """Which state an utterance has.

    `task` is that of utterances that name none, or with `forced` of all; `by_lang` gives each language of recognition a
    state. Where the `states` are known, as in decoding, the language's is taken if there is one, else the task's.
    """

    task: str = DEFAULT
    by_lang: bool = False
    forced: bool = False
    states: frozenset[str] = frozenset()

    @classmethod
    def among(cls, states: Collection[str], forced: str = "") -> "Naming":
        """For decoding with these states; utterances that name no task have the only one, else recognition's.

        Raises UserError where the `forced` one is not among them.
        """
        only = next(iter(states)) if len(states) == 1 else DEFAULT
        naming = cls(forced or only, forced=bool(forced), states=frozenset(states))
        if forced and forced not in map(base_of, states):
            naming.state(None, None)
        return naming

    def state(self, task: str | None, lang: str | None) -> str:
        """The name of the state of an utterance with this task and this language, if it names them.

        Raises UserError for a name that cannot be one, and for one that is not among the states, where these are known.
        """
        if self.forced and self.task in self.states:
            return self.task
        task = self.task if self.forced else task or self.task
        if not self.states:
            return state_name(task, lang, self.by_lang)
        name, others = state_name(task, lang, by_lang=True), state_name(task, lang)
        if name not in self.states and others not in self.states:
            known = ", ".join(sorted(self.states))
            raise UserError(f"found no state named {others!r}, expected one of {known}; name it with --task")
        return name if name in self.states else others
