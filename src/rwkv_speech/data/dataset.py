"""Utterances -> samples -> batches.

B batch · S samples · L text tokens
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rwkv_speech.audio import FRAME_RATE, SAMPLE_RATE, AudioError
from rwkv_speech.data.sources import Source
from rwkv_speech.errors import UserError
from rwkv_speech.text import normalise_label
from rwkv_speech.tokenizer import WorldTokenizer


@dataclass(frozen=True)
class Sample:
    """One utterance: `waveform` (S,) float32 at 16 kHz, normalised text, ids (no end of text), seconds."""

    id: str
    waveform: Tensor
    text: str
    ids: list[int]
    duration: float
    index: int


@dataclass(frozen=True)
class BadSample:
    """An utterance that cannot be used, and why; `too_long` marks sound audio beyond the length limit."""

    id: str
    reason: str
    too_long: bool = False


@dataclass(frozen=True)
class Batch:
    """B usable utterances, and the unusable ones that were drawn with them; B may be 0.

    waveforms   (B, S_max) float32, zero after each utterance's own S
    num_samples (B,) int64, S of each
    text_ids    (sum of L,) int64, the texts' ids one after another, no end of text
    text_lengths (B,) int64, L of each
    """

    ids: list[str]
    waveforms: Tensor
    num_samples: Tensor
    text_ids: Tensor
    text_lengths: Tensor
    texts: list[str]
    bad: list[BadSample]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device."""
        return replace(
            self,
            waveforms=self.waveforms.to(device),
            num_samples=self.num_samples.to(device),
            text_ids=self.text_ids.to(device),
            text_lengths=self.text_lengths.to(device),
        )


class SpeechDataset(Dataset[Sample | BadSample]):
    """Decodes and tokenises the utterances of a source.

    A broken recording becomes a BadSample, never an exception; so does one that does not `fit`. Raises
    UserError for an unknown `label_mode`.
    """

    def __init__(
        self, source: Source, tokenizer: WorldTokenizer, label_mode: str = "none", fit: "Fit | None" = None
    ) -> None:
        normalise_label("", label_mode)  # an unknown mode fails here, not in a data worker
        self._source, self._tokenizer = source, tokenizer
        self._label_mode, self._fit = label_mode, fit

    def __len__(self) -> int:
        return len(self._source)

    def durations(self) -> list[float | None]:
        """Seconds of every utterance, None where the source does not know."""
        return [self._source.utterance(index).duration for index in range(len(self))]

    def __getitem__(self, index: int) -> Sample | BadSample:
        found = self._source.utterance(index)
        text = normalise_label(found.text, self._label_mode)
        ids = self._tokenizer.encode(text)
        # A known duration saves the decoding of what is left out anyway.
        if found.duration is not None and (fault := self._fault(found.duration, ids)):
            return BadSample(found.id, fault, too_long=True)
        try:
            waveform = self._source.load(index)
        except AudioError as error:
            return BadSample(found.id, str(error))
        duration = len(waveform) / SAMPLE_RATE
        if fault := self._fault(duration, ids):
            return BadSample(found.id, fault, too_long=True)
        return Sample(found.id, waveform, text, ids, duration, index)

    def _fault(self, seconds: float, ids: list[int]) -> str | None:
        return self._fit.fault(seconds, len(ids)) if self._fit else None


@dataclass(frozen=True)
class Fit:
    """The longest sequence that is learned from: `ctx_len` positions, each audio token `stack` frames."""

    ctx_len: int
    stack: int

    def fault(self, seconds: float, num_text_ids: int) -> str | None:
        """Say why an utterance is too long, or None if it fits."""
        positions = int(seconds * FRAME_RATE) // self.stack + 1 + num_text_ids
        if positions <= self.ctx_len:
            return None
        return (
            f"lasts {seconds:.2f} s with {num_text_ids} text tokens: {positions} positions; the limit is "
            f"{self.ctx_len} (--ctx_len)"
        )


def collate(samples: Sequence[Sample | BadSample]) -> Batch:
    """Pad the usable samples into a Batch and pass the others on in `bad`."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    num_samples = torch.tensor([len(sample.waveform) for sample in good], dtype=torch.int64)
    waveforms = torch.zeros(len(good), int(num_samples.max()) if good else 0)
    for row, sample in zip(waveforms, good, strict=True):
        row[: len(sample.waveform)] = sample.waveform
    return Batch(
        ids=[sample.id for sample in good],
        waveforms=waveforms,
        num_samples=num_samples,
        text_ids=torch.tensor([token for sample in good for token in sample.ids], dtype=torch.int64),
        text_lengths=torch.tensor([len(sample.ids) for sample in good], dtype=torch.int64),
        texts=[sample.text for sample in good],
        bad=[sample for sample in samples if isinstance(sample, BadSample)],
    )


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
