"""How long evaluation takes, stage by stage."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")

# What stands between audio and text; reading files is apart.
_COMPUTED = ("encoding", "decoding")
STAGES = ("reading", *_COMPUTED)


class Timer:
    """Seconds spent in stages, on a device that is waited for at the ends of each."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._started = device, 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which took time for reading."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds["reading"] += time.perf_counter() - started
            yield item

    @contextmanager
    def run(self, encoder: nn.Module) -> Iterator[None]:
        """What happens inside is decoding, but for reading, and for the encoder's calls."""

        def start(*_: Any) -> None:
            self._started = self._now()

        def end(*_: Any) -> None:
            self.seconds["encoding"] += self._now() - self._started

        hooks = [encoder.register_forward_pre_hook(start), encoder.register_forward_hook(end)]
        begin = self._now()
        try:
            yield
        finally:
            whole = self._now() - begin
            self.seconds["decoding"] += whole - self.seconds["reading"] - self.seconds["encoding"]
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Speed:
    """Seconds of audio, and of each stage in each of the processes that shared them."""

    audio_seconds: float
    processes: Sequence[dict[str, float]]

    def seconds(self, *stages: str) -> float:
        """Of these stages together, in the slowest process."""
        return max(sum(process.get(stage, 0.0) for stage in stages) for process in self.processes)

    @property
    def times_real_time(self) -> float:
        """Seconds of audio per second of encoding and decoding; reading files is not counted."""
        return self._rate(*_COMPUTED)

    def _rate(self, *stages: str) -> float:
        return self.audio_seconds / max(1e-9, self.seconds(*stages))

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "processes": len(self.processes),
            "audio_seconds": round(self.audio_seconds, 3),
            "times_real_time": round(self.times_real_time, 2),
            **{f"{stage}_seconds": round(self.seconds(stage), 3) for stage in STAGES},
        }

    def report(self) -> str:
        """A line for the screen."""
        stages = ", ".join(f"{stage} {self._rate(stage):,.0f}" for stage in STAGES)
        several = f", {len(self.processes)} processes" if len(self.processes) > 1 else ""
        return f"{self.times_real_time:,.1f} times real time (alone: {stages}){several}"
