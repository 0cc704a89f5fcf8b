"""The conversations that a server remembers: bounded in number and age, and each its client's alone."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rwkv_speech.decoding.session import Session
from rwkv_speech.serving.faults import Fault


@dataclass
class Lent:
    """A session for as long as a turn takes, None for a new one; what it is set to is remembered."""

    session: Session | None


@dataclass(frozen=True)
class _Kept:
    session: Session
    timer: asyncio.TimerHandle


class Sessions:
    """At most so many sessions, each forgotten after so many seconds without a turn; of one event loop.

    With one more than fit, the client that has the most loses the one that was silent longest.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._kept = dict[tuple[str, str], _Kept]()  # by client and name, the longest silent first
        self._lent = set[tuple[str, str]]()

    def __len__(self) -> int:
        return len(self._kept) + len(self._lent)

    @contextmanager
    def lent(self, client: str, name: str) -> Iterator[Lent]:
        """A client's session of this name, "" for none; raises Fault while another turn of it is answered."""
        if not name:
            yield Lent(None)
            return
        key = client, name
        if key in self._lent:
            raise Fault(409, "session_id: its last turn is still answered", "session_busy", "session_id", retry=True)
        kept = self._kept.pop(key, None)
        if kept:
            kept.timer.cancel()
        lent = Lent(kept.session if kept else None)
        self._lent.add(key)
        try:
            yield lent
        finally:
            self._lent.remove(key)
            if lent.session:
                self._keep(key, lent.session)

    def _keep(self, key: tuple[str, str], session: Session) -> None:
        if len(self._kept) >= self._most:
            [(greatest, _)] = Counter(client for client, _ in (*self._kept, key)).most_common(1)
            oldest = next(other for other in self._kept if other[0] == greatest)
            self._kept.pop(oldest).timer.cancel()
        timer = asyncio.get_running_loop().call_later(self._seconds, self._kept.pop, key, None)
        self._kept[key] = _Kept(session, timer)
