"""Encoding and prefill, so that what is found in an utterance does not depend on the others in flight."""

# F frames · K labels of the CTC head · A audio tokens · C channels · V vocabulary

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.splice import Audio, Prompt, Segment
from rwkv_speech.models.state import State

_GPU_ROWS = 8


class Reading(NamedTuple):
    """How an utterance is read: with ids before and after its audio tokens, from its task's state or from `start`."""

    task: str
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    start: State | None = None


class Encoded(NamedTuple):
    """What the frozen encoder made of an utterance."""

    audio: Tensor  # (A, C) audio tokens
    ctc: Tensor | None  # (F, K) log-probabilities of the CTC head on the CPU, if the model has one
    room: int  # audio tokens that any utterance of the same size may have


class Reader:
    """Reads utterances, each as if it were alone.

    A CPU reads them one by one at their own lengths. A GPU takes `rows` at once, always as many, and pads them to a
    length that is a function of their own: whoever comes along, all matrix products have the same shapes, and with them
    the same bits. Their tasks may differ: each has its own state and prompts.
    """

    def __init__(self, model: SpeechLM, rows: int | None = None) -> None:
        self._model = model
        self._device = next(model.trained_parameters()).device
        self.rows = rows or (1 if self._device.type == "cpu" else _GPU_ROWS)

    def size(self, sample: Sample) -> int:
        """The samples, or frames, that an utterance is padded to; those of one size may be read together."""
        length = sample.length
        if self.rows == 1:
            return length
        step = 2 ** max(0, length.bit_length() - 4)  # at most an eighth is padding
        hears = sample.frames is None and sample.input_ids is None
        smallest = self._model.encoder.framing.min_samples if hears else 1
        return max(smallest, -(-length // step) * step)

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Waveforms of one size, or the encoder's frames where the samples have them -> audio tokens of each.

        Of text that is read in place of audio the embeddings are taken for these.
        """
        if samples[0].input_ids is not None:
            return [self._embedded(sample) for sample in samples]
        batch, size, missing = collate(samples), self.size(samples[0]), self.rows - len(samples)
        if batch.frames is not None and batch.frame_lengths is not None:
            lengths = F.pad(batch.frame_lengths, (0, missing))
            frames = F.pad(batch.frames, (0, 0, 0, size - batch.frames.shape[1], 0, missing)).to(self._device).float()
        else:
            waveforms = F.pad(batch.waveforms, (0, size - batch.waveforms.shape[1], 0, missing)).to(self._device)
            num_samples = F.pad(batch.num_samples, (0, missing))
            frames, lengths = self._model.encoder(waveforms, num_samples, batch.normalised, crop=self.rows == 1)
        # Of all frames, padding too, and then cut: the shape is that of the frames.
        audio, longest = self._model.adapter(frames, torch.full_like(lengths, frames.shape[1]))
        audio = audio.view(len(frames), int(longest[0]), audio.shape[-1])
        ctc = None if self._model.ctc is None else self._model.ctc(frames, lengths).cpu()
        stack = self._model.adapter.stack
        return [
            Encoded(audio[row, : length // stack], None if ctc is None else ctc[row, :length], int(longest[0]))
            for row, length in enumerate(lengths[: len(samples)].tolist())
        ]

    def _embedded(self, sample: Sample) -> Encoded:
        ids = torch.tensor(sample.input_ids, dtype=torch.int64, device=self._device)
        return Encoded(self._model.lm.embed(ids), None, self.size(sample))

    def room(self, reading: Reading) -> int:
        """The positions that prompts and separator are given; readings of one room may be made together.

        At most a quarter is padding.
        """
        length = sum(map(_length, self._prefix(0, reading)))
        step = 2 ** max(0, length.bit_length() - 3) if self.rows > 1 else 1
        return -(-length // step) * step

    @torch.no_grad()
    def prefill(self, encoded: Sequence[Encoded], readings: Sequence[Reading]) -> tuple[Tensor, State]:
        """Read audio tokens of n utterances of one size, whose readings have one room, in one packed pass.

        The logits (n, V) of the first token of each text, and the states before it.
        """
        count = len(encoded)
        sequences = [self._prefix(len(one.audio), reading) for one, reading in zip(encoded, readings, strict=True)]
        readings = list(readings)
        if self.rows > 1:
            whole = self.rows * (encoded[0].room + self.room(readings[0]))
            padding = whole - sum(_length(segment) for sequence in sequences for segment in sequence)
            sequences += [list[Segment]()] * (self.rows - count) + [[Prompt((0,) * padding)]]
            readings += readings[:1] * (self.rows - count + 1)
        audio = torch.cat([one.audio for one in encoded])
        logits, state = self._model.prefill(audio, sequences, self._before(readings))
        return logits[:count], State(*(x[:, :count] for x in state))

    def _before(self, readings: Sequence[Reading]) -> State:
        """The states to begin with."""
        if not any(reading.start for reading in readings):
            return self._model.initial_state([reading.task for reading in readings])
        return State.joined([reading.start or self._model.initial_state([reading.task]) for reading in readings])

    def _prefix(self, num_audio: int, reading: Reading) -> list[Segment]:
        return self._model.prefix(num_audio, reading.task, reading.before, reading.after)


def _length(segment: Segment) -> int:
    return segment.length if isinstance(segment, Audio) else len(segment.ids)
