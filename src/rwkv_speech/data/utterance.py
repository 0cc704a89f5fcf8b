"""What is known of one recording before its audio is read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Utterance:
    """What is known of one recording without decoding it.

    `offset` and `duration` (s) choose a segment of the file. `audio` is an absolute path, or None where the
    source keeps the bytes itself; `identity` then names them, if it can: it changes whenever they may have changed.
    """

    id: str
    audio: str | None
    text: str
    duration: float | None = None
    offset: float = 0.0
    lang: str | None = None
    task: str | None = None
    identity: str | None = None
