"""What a flag is: its default, help and range, and the command line made of flags."""

import argparse
import dataclasses
import difflib
import inspect
import math
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeVar

from rwkv_speech.errors import UserError

GROUPS = (
    "model", "device and precision", "data", "changes of the training audio", "training", "decoding", "output",
    "streaming", "conversation", "serving", "run",
)  # fmt: skip
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_NUMBERS: dict[type, Any] = {int: numbers.Integral, float: numbers.Real}
_LARGEST_WHOLE_NUMBER = 2**31 - 1


def flag(
    default: Any,
    text: str,
    choices: Sequence[Any] | None = None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    form: tuple[Callable[[Any], object], str] | None = None,
    needs: str = "",
    resume: bool = False,
) -> Any:
    """One flag: its default, its help, what it may be (one of `choices`, in the range, or of a
    `form`: its test and how it is said), the flag without which it has no effect, and whether a resumed
    run may be given another value.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return dataclasses.field(
        default=default,
        metadata={"help": text, "choices": choices, "bounds": bounds, "form": form, "needs": needs, "resume": resume},
    )


@dataclass(frozen=True)
class Flags:
    """A command's flags. Raises UserError for a value outside its flag's choices or range."""

    group: ClassVar[str] = "run"
    epilog: ClassVar[str] = ""  # of --help

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value != field.default and not _allowed(field, value):
                raise UserError(_unexpected(field, value))

    def check(self) -> None:
        """Raises UserError for flags that contradict each other."""


@dataclass(frozen=True)
class OutFlags(Flags):
    """What a command that fills a folder needs to know."""

    out: str = flag("", "folder to write")
    seed: int = flag(1, "seed of all that is drawn", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        """Raises UserError without a folder."""
        if not self.out:
            raise UserError("--out: found nothing, expected a folder to write")


def _kind(field: dataclasses.Field[Any]) -> type:
    """The type of a flag's value where it has one: int, float or str."""
    options = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    return typing.cast(type, options[0])


def _takes_words(field: dataclasses.Field[Any]) -> bool:
    """Whether it takes the words of the command line that belong to no flag."""
    return field.type == tuple[str, ...]


def _allowed(field: dataclasses.Field[Any], value: Any) -> bool:
    facts = field.metadata
    if facts["choices"] is not None:
        return value in facts["choices"]
    if facts["form"] is not None:
        try:
            return bool(facts["form"][0](value))
        except ValueError:
            return False
    if (kind := _kind(field)) not in _NUMBERS:
        return True
    if not isinstance(value, _NUMBERS[kind]):
        return False
    low, above, high, below = facts["bounds"].values()
    most = _LARGEST_WHOLE_NUMBER if high is None and isinstance(value, int) else high
    return (
        math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )


def _unexpected(field: dataclasses.Field[Any], found: Any) -> str:
    """What is said of a value that its flag may not have."""
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices is not None:
        expected = "one of " + ", ".join(map(str, choices))
    elif field.metadata["form"]:
        expected = field.metadata["form"][1]
    else:
        ranges = [f"{words} {bound:g}" if abs(bound) < 1e6 else f"{words} {bound}" for words, bound in bounds.items()
                  if bound is not None]  # fmt: skip
        kind = {int: "a whole number", float: "a number"}.get(_kind(field), "text")
        expected = " ".join([kind, " and ".join(ranges)]).strip()
    default = f" for {field.default}" if field.default not in (None, "") else ""
    return f"--{field.name}: found {found!r}, expected {expected}; leave it out{default}"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are the user's to mend, raised instead of printed."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument ").replace("expected one", "found no value, expected one"))


Config = TypeVar("Config", bound=Flags)


def parse(cls: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """The flags in `argv` as a `cls`; raises UserError for a flag that is unknown, or without effect, or has a value
    that it may not have.

    An empty value means the default, so that a script may leave a variable empty. Words that belong to no flag, and
    all that follow a `--`, go into the field of type tuple[str, ...], if there is one.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    home = next((name for name, field in fields.items() if _takes_words(field)), None)
    end = given.index("--") if home and "--" in given else len(given)
    found, free = _parser(cls, description).parse_known_args(_joined(given[:end]))
    if wrong := [word for word in free if not home or (word.startswith("-") and word != "-")]:
        raise UserError(unknown_flag(wrong[0], list(fields)))
    for name, text in vars(found).items():
        if text and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
            raise UserError(
                f"--{name}={text!r}: found bytes that are no text, expected UTF-8; rename the file or folder"
            )
    values = {name: _value(fields[name], text) for name, text in vars(found).items() if text}
    config = cls(**values, **({home: (*free, *given[end + 1 :])} if home else {}))
    config.check()
    for name in (name for name, text in vars(found).items() if text):
        needed = fields[name].metadata["needs"]
        if needed and not getattr(config, needed):
            raise UserError(
                f"--{name}: found without --{needed}, where it has no effect; add --{needed}, or leave it out"
            )
    return config


def _parser(cls: type[Flags], description: str) -> Parser:
    free = [field for field in dataclasses.fields(cls) if _takes_words(field)]
    description += "".join(f"\n\n{field.name}: {field.metadata['help']}" for field in free)
    parser = Parser(
        prog=cls.__doc__,
        usage="%(prog)s [--FLAG VALUE ...]" + "".join(f" [{field.name} ...]" for field in free),
        description=description,
        epilog=cls.epilog or None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26),
        allow_abbrev=False,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for field in (field for field in dataclasses.fields(cls) if field not in free):
        home: Any = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        choices = field.metadata["choices"]
        groups[home.group].add_argument(
            f"--{field.name}",
            metavar="{" + ",".join(map(str, choices)) + "}" if choices else _METAVARS[_kind(field)],
            help=(field.metadata["help"] + default).replace("%", "%%"),
        )
    return parser


def _value(field: dataclasses.Field[Any], text: str) -> Any:
    try:
        return _kind(field)(text)
    except ValueError as error:
        raise UserError(_unexpected(field, text)) from error


def unknown_flag(word: str, names: Sequence[str]) -> str:
    """What is said of a word that no flag takes."""
    if not word.startswith("-"):
        return f"{word!r}: found a word that belongs to no flag, expected --FLAG VALUE pairs; quote values with blanks"
    name = word.lstrip("-").partition("=")[0]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(f"--{found}" for found in close) + "? " if close else ""
    if os.path.exists(word):
        hint = f"if the file is meant, write ./{word}; "
    return f"--{name}: there is no such flag; {hint}--help lists all"


def _joined(argv: Sequence[str]) -> list[str]:
    """Flags joined with values such as -6,6, which argparse would take for another flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1].startswith("--") and "=" not in words[-1] and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words
