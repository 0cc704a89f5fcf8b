"""The list of the utterances that could not be used."""

import json
from collections.abc import Iterable
from pathlib import Path

from rwkv_speech.batch import BadSample
from rwkv_speech.errors import UserError


class BadFileLog:
    """A JSON-lines list of the utterances that could not be used, each once, and a limit on them.

    An utterance is known by its data set and its index there. An existing list is continued; only what this run meets
    counts, and what is merely too long never counts towards `max_bad`. Whoever iterates over batches calls `add` for
    each, prints `summary()` when done, and calls `require_used` where a data set has been gone through. Of several
    processes one `writes`.
    """

    def __init__(self, path: str | Path, max_bad: int, *, writes: bool = True) -> None:
        self.path, self._max_bad, self._writes = Path(path), max_bad, writes
        self._listed = _listed(self.path)
        self._broken: set[tuple[str, int]] = set()
        self._too_long: set[tuple[str, int]] = set()

    @property
    def num_bad(self) -> int:
        """Count the distinct broken utterances met so far in this run."""
        return len(self._broken)

    @property
    def num_too_long(self) -> int:
        """Count the distinct utterances met so far in this run that are sound but too long."""
        return len(self._too_long)

    def add(self, bad: Iterable[BadSample], data: str) -> None:
        """List what is new in the data set named `data`; raises UserError when more than `max_bad` are broken."""
        for sample in bad:
            key = (data, sample.index)
            if self._writes and key not in self._listed:
                self._listed.add(key)
                row = {"data": data, "index": sample.index, "id": sample.id, "reason": sample.reason}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            (self._too_long if sample.too_long else self._broken).add(key)
        if self.num_bad > self._max_bad:
            raise UserError(
                f"{self.path}: {self.num_bad} recordings could not be used; expected {self._max_bad} at "
                "most: mend or remove those listed there, or raise --max_bad"
            )

    def summary(self) -> str:
        """Say for the screen what this run skipped, "" if nothing."""
        counts = ((self.num_bad, "broken"), (self.num_too_long, "too long for --ctx_len"))
        found = ", ".join(f"{count} {what}" for count, what in counts if count)
        total = self.num_bad + self.num_too_long
        return f"skipped {total} recordings: {found}; listed in {self.path}" if total else ""

    def require_used(self, num_used: int, data: str) -> None:
        """Raise UserError if none of the utterances of the data set named `data` could be used."""
        if num_used:
            return
        too_long = sum(name == data for name, _ in self._too_long)
        broken = sum(name == data for name, _ in self._broken)
        remedy = (
            "raise --ctx_len or give shorter recordings" if too_long >= broken else "mend or replace the recordings"
        )
        raise UserError(
            f"{data}: no utterance could be used: {broken} broken, {too_long} too long for --ctx_len, listed in "
            f"{self.path}; expected at least one: {remedy}"
        )


def _listed(path: Path) -> set[tuple[str, int]]:
    if not path.is_file():
        return set()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return {(row["data"], row["index"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a list of bad files ({error}); expected JSON lines: move it away") from error
