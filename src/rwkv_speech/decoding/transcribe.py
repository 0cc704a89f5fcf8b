"""The one road from audio to text: prediction, evaluation, validation and Python all take it."""

# S samples · U utterances

import io
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, AudioError, load_audio
from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.decoding.results import Row, Segment, Transcript
from rwkv_speech.errors import UserError
from rwkv_speech.models import speech_lm
from rwkv_speech.models.checkpoint import one_task

# Fast speech is about 6 tokens a second; a decoder that still runs at this rate is lost.
TOKENS_PER_SECOND = 25
MIN_NEW_TOKENS = 16
# Of the weights that do not say what they were trained on: LibriSpeech's longest utterance is 35 s.
_LONGEST_IF_UNKNOWN = 40.0
_LENGTHS_BEYOND = 1.2  # times the longest of training
# Read ahead, so that audio of like length shares a batch.
_WINDOW = 8

Audio = str | Path | bytes | Tensor | np.ndarray


class SpeechLM(speech_lm.SpeechLM):
    """The model with its road from audio to text: what `from rwkv_speech import SpeechLM` gives."""

    def transcribe(
        self, audio: Audio | Iterable[Audio], batch_size: int = 8, max_new_tokens: int | None = None, task: str = ""
    ) -> list[Transcript]:
        """A file, its bytes or a waveform (S,) at 16 kHz, or a list of these -> a Transcript of each, in order.

        A waveform holds floating-point numbers between -1 and 1, or int16. `task` names a learned state where there
        are several. Raises AudioError for what cannot be decoded; warns of audio much longer than the weights were
        trained on.
        """
        one = isinstance(audio, Audio | Mapping | io.IOBase) or not isinstance(audio, Iterable)
        items: Any = [audio] if one else audio
        found = []
        for _, result in transcribe(self, items, batch_size, max_new_tokens, task):
            if isinstance(result, BadSample):
                raise AudioError(result.reason)
            found.append(result)
        if note := length_note(self, (transcript.seconds for transcript in found)):
            warnings.warn(note, stacklevel=2)
        return found


@torch.no_grad()
def decode_batch(model: speech_lm.SpeechLM, batch: Batch, max_new_tokens: int | None = None) -> list[Transcript]:
    """Transcripts of a batch on the model's device, at most `max_new_tokens` each, by default 25 a second."""
    found: dict[int, Transcript] = {}
    for done in Engine(model, slots=max(1, len(batch))).run(_requests(batch, max_new_tokens)):
        sample, text = done.request.sample, done.hypotheses[0]
        ids = list(text.ids)
        found[done.request.key] = _transcript(
            model.tokenizer.decode(ids), ids, sample.duration, text.cut, sample.task, sample.lang
        )
    return [found[index] for index in range(len(batch))]


def _requests(batch: Batch, max_new_tokens: int | None) -> Iterator[Request]:
    for key, sample in enumerate(batch.samples()):
        limit = max(MIN_NEW_TOKENS, int(TOKENS_PER_SECOND * sample.duration))
        yield Request(key, sample, limit if max_new_tokens is None else max_new_tokens)


def _transcript(text: str, ids: list[int], seconds: float, cut: bool, task: str, lang: str | None) -> Transcript:
    segment = Segment(0, 0.0, seconds, text, ids, 0.0, 0.0, 0.0, 0.0, cut)
    return Transcript(text, [segment], seconds, task, lang)


def transcribe_batch(model: speech_lm.SpeechLM, batch: Batch, max_new_tokens: int | None = None) -> list[Row]:
    """The rows of a data set's batch, with its references."""
    names = zip(batch.ids, batch.indices, batch.texts, batch.langs, batch.tasks, strict=True)
    return [
        Row(name, index, ref, found.text, lang, task, found.seconds, found.cut)
        for (name, index, ref, lang, task), found in zip(names, decode_batch(model, batch, max_new_tokens), strict=True)
    ]


def transcribe(
    model: speech_lm.SpeechLM,
    audio: Iterable[Audio],
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    task: str = "",
) -> Iterator[tuple[int, Transcript | BadSample]]:
    """Each recording's number and transcript, in order, as they are made; a broken one gives a BadSample."""
    for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if number is not None and number < 1:
            raise UserError(f"{name}: found {number}, expected at least 1; leave it out for the default")
    task = one_task("the weights", dict(model.initial_states.items()), task)
    device = next(model.trained_parameters()).device
    numbered = enumerate(audio)
    while window := list(itertools.islice(numbered, _WINDOW * batch_size)):
        samples = [_sample(item, index, task) for index, item in window]
        results: dict[int, Transcript | BadSample] = {s.index: s for s in samples if isinstance(s, BadSample)}
        good = sorted((s for s in samples if isinstance(s, Sample)), key=lambda s: s.duration)
        for start in range(0, len(good), batch_size):
            batch = collate(good[start : start + batch_size]).to(device)
            results.update(zip(batch.indices, decode_batch(model, batch, max_new_tokens), strict=True))
        yield from sorted(results.items())


def _sample(audio: Any, index: int, task: str) -> Sample | BadSample:
    name = str(audio) if isinstance(audio, (str, Path)) else f"audio {index + 1}"
    try:
        if isinstance(audio, (Tensor, np.ndarray)):
            waveform = _waveform(audio, name)
        elif isinstance(audio, (str, Path, bytes)):
            waveform = load_audio(audio)
        else:
            raise AudioError(
                f"{name}: found {type(audio).__name__}, expected a path, the bytes of a file or a waveform"
            )
    except AudioError as error:
        return BadSample(index, name, str(error))
    return Sample(name, waveform, "", [], len(waveform) / SAMPLE_RATE, index, task)


def _waveform(samples: Tensor | np.ndarray, name: str) -> Tensor:
    """(S,) float32; raises AudioError for other shapes and kinds."""
    kind = samples.dtype.name if isinstance(samples, np.ndarray) else str(samples.dtype).removeprefix("torch.")
    if samples.ndim != 1 or not ("float" in kind or kind == "int16"):
        raise AudioError(
            f"{name}: found {kind} of shape {tuple(samples.shape)}, expected samples at {SAMPLE_RATE} Hz of shape "
            "(S,), floating-point numbers between -1 and 1 or int16: convert them, or give a file"
        )
    if isinstance(samples, np.ndarray):
        samples = torch.from_numpy(samples.astype(np.float32))
    waveform = samples.detach().cpu().float() / (2**15 if kind == "int16" else 1)
    if not waveform.isfinite().all():
        raise AudioError(f"{name}: holds NaN or infinite samples; expected finite audio")
    return waveform


def length_note(model: speech_lm.SpeechLM, seconds: Iterable[float]) -> str:
    """A line about the recordings that are much longer than those of training; empty if none is."""
    known = model.trained_on
    longest = known.longest_seconds if known else _LONGEST_IF_UNKNOWN
    beyond = [s for s in seconds if s > _LENGTHS_BEYOND * longest]
    if not beyond:
        return ""
    trained = f"were trained on up to {longest:.1f} s" if known else "do not say what lengths they were trained on"
    return (
        f"{len(beyond)} recording(s) of up to {max(beyond):.1f} s, but the weights {trained}: words may be missing; "
        "cut the audio into shorter pieces"
    )
