"""Encoding and prefill, so that what is found in an utterance does not depend on the others in flight."""

# F frames · K labels of the CTC head · A audio tokens · C channels · V vocabulary

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.state import State


class Encoded(NamedTuple):
    """What the frozen encoder made of an utterance."""

    audio: Tensor  # (A, C) audio tokens
    ctc: Tensor | None  # (F, K) log-probabilities of the CTC head on the CPU, if the model has one


class Reader:
    """Reads each utterance by itself, at its own length: whoever else comes along changes no bit of it."""

    def __init__(self, model: SpeechLM) -> None:
        self._model = model
        self._device = next(model.trained_parameters()).device

    @torch.no_grad()
    def encode(self, sample: Sample) -> Encoded:
        """Waveform, or the encoder's frames where the sample has them -> audio tokens."""
        frames, lengths = self._model.frames(collate([sample]).to(self._device))
        audio, _ = self._model.adapter(frames, lengths)
        head = getattr(self._model, "ctc", None)
        return Encoded(audio, None if head is None else head(frames, lengths)[0, : int(lengths)].cpu())

    def prefill(
        self, encoded: Encoded, task: str, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> tuple[Tensor, State]:
        """Read the audio tokens and what stands around them: the logits (1, V) of the first text token, and a state."""
        prefix = self._model.prefix(len(encoded.audio), task, before, after)
        return self._model.prefill(encoded.audio, [prefix], [task])
