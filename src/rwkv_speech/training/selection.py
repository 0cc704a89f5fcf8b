"""Which checkpoints are worth keeping, and when training has stopped helping; both by the validation's error."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """Whether to `keep` (write) the offered file, and which earlier ones to `drop` (delete) once it is written."""

    keep: bool
    drop: tuple[Path, ...]


class BestK:
    """The k checkpoints of lowest error; the earlier of two that are equal.

    It only ever drops what it has kept, so nobody else's files are lost.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._kept: list[tuple[float, Path]] = []  # in the order of the offers

    def offer(self, error: float, path: Path) -> Verdict:
        """Judge one more checkpoint; one offered under a kept path takes that one's place. An error of NaN is none."""
        others = [(kept_error, kept) for kept_error, kept in self._kept if kept != path]
        candidates = others if math.isnan(error) else [*others, (error, path)]
        # Stable: of equal ones the earlier comes first.
        best = sorted(candidates, key=lambda item: item[0])[: self.k]
        self._kept = [item for item in candidates if item in best]
        kept = {item_path for _, item_path in self._kept}
        return Verdict(path in kept, tuple(item_path for _, item_path in others if item_path not in kept))

    @property
    def paths(self) -> list[Path]:
        """What is kept, best first."""
        return [path for _, path in sorted(self._kept, key=lambda item: item[0])]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, JSON-ready."""
        return {"kept": [[error, str(path)] for error, path in self._kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; with a smaller k the next offer drops the surplus."""
        self._kept = [(float(error), Path(path)) for error, path in state["kept"]]


class EarlyStop:
    """Says when the error has not fallen by more than `min_delta` for `patience` validations; with 0 never."""

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience, self.min_delta = patience, min_delta
        self._best = math.inf
        self.waited = 0  # validations since the best

    def should_stop(self, error: float) -> bool:
        """Take note of a validation's error; NaN is no improvement."""
        if error < self._best - self.min_delta:
            self._best, self.waited = error, 0
        else:
            self.waited += 1
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, JSON-ready: a best error of None before the first validation."""
        return {"best": None if math.isinf(self._best) else self._best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._best = math.inf if state["best"] is None else float(state["best"])
        self.waited = int(state["waited"])
