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
from rwkv_speech.models.splice import Prompt, Segment
from rwkv_speech.models.state import State

_GPU_ROWS = 8


class Encoded(NamedTuple):
    """What the frozen encoder made of an utterance."""

    audio: Tensor  # (A, C) audio tokens
    ctc: Tensor | None  # (F, K) log-probabilities of the CTC head on the CPU, if the model has one
    room: int  # audio tokens that any utterance of the same size may have


class Reader:
    """Reads utterances, each as if it were alone.

    A CPU reads them one by one at their own lengths. A GPU takes `rows` at once, always as many, and pads them to a
    length that is a function of their own: whoever comes along, all matrix products have the same shapes, and with them
    the same bits.
    """

    def __init__(self, model: SpeechLM, rows: int | None = None) -> None:
        self._model = model
        self._device = next(model.trained_parameters()).device
        self.rows = rows or (1 if self._device.type == "cpu" else _GPU_ROWS)

    def size(self, sample: Sample) -> int:
        """The samples, or frames, that an utterance is padded to; those of one size may be read together."""
        length = len(sample.waveform if sample.frames is None else sample.frames)
        if self.rows == 1:
            return length
        step = 2 ** max(0, length.bit_length() - 4)  # at most an eighth is padding
        smallest = self._model.encoder.min_samples if sample.frames is None else 1
        return max(smallest, -(-length // step) * step)

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Waveforms of one size, or the encoder's frames where the samples have them -> audio tokens of each."""
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

    @torch.no_grad()
    def prefill(
        self, encoded: Sequence[Encoded], task: str, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> tuple[Tensor, State]:
        """Read audio tokens of n utterances of one size and the prompts around them.

        The logits (n, V) of the first token of each text, and the states before it.
        """
        count = len(encoded)
        sequences = [self._model.prefix(len(one.audio), task, before, after) for one in encoded]
        if self.rows > 1:
            padding = sum(one.room - len(one.audio) for one in encoded)
            padding += (self.rows - count) * (encoded[0].room + len(before) + len(after) + 1)
            sequences += [list[Segment]()] * (self.rows - count) + [[Prompt((0,) * padding)]]
        audio = torch.cat([one.audio for one in encoded])
        logits, state = self._model.prefill(audio, sequences, [task] * len(sequences))
        return logits[:count], State(*(x[:, :count] for x in state))
