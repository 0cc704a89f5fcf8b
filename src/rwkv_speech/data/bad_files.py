"""The list of the utterances that could not be used."""

import json
from collections.abc import Iterable
from pathlib import Path

from rwkv_speech.batch import BadSample
from rwkv_speech.errors import UserError


class BadFileLog:
    """A JSON-lines list of the utterances that could not be used, each distinct id once, and a limit on them.

    An existing list is continued; only what this run meets counts towards `max_bad`, and an utterance that
    is merely too long is listed but never counts.
    """

    def __init__(self, path: str | Path, max_bad: int) -> None:
        self.path, self._max_bad = Path(path), max_bad
        self._listed = _listed_ids(self.path)
        self._broken: set[str] = set()

    @property
    def num_bad(self) -> int:
        """Count the distinct broken utterances met so far in this run."""
        return len(self._broken)

    def add(self, bad: Iterable[BadSample]) -> None:
        """List what is new; raises UserError, naming the list, when more than `max_bad` are broken."""
        for sample in bad:
            if sample.id not in self._listed:
                self._listed.add(sample.id)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": sample.id, "reason": sample.reason}, ensure_ascii=False) + "\n")
            if not sample.too_long:
                self._broken.add(sample.id)
        if self.num_bad > self._max_bad:
            raise UserError(
                f"{self.path}: {self.num_bad} recordings could not be used; expected {self._max_bad} at "
                "most: mend or remove those listed there, or raise the limit"
            )


def _listed_ids(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    try:
        return {json.loads(line)["id"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a list of bad files ({error}); expected JSON lines: move it away") from error
