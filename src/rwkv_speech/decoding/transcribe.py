"""The one road from audio to text: prediction, evaluation, validation and Python all take it."""

# S samples · U utterances

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, AudioError, load_audio
from rwkv_speech.batch import BadSample, Batch, Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.engine import greedy
from rwkv_speech.decoding.results import Row, Transcript
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
        self, audio: Audio | Sequence[Audio], batch_size: int = 8, max_new_tokens: int | None = None, task: str = ""
    ) -> list[Transcript]:
        """A file, its bytes or a waveform (S,) at 16 kHz, or a list of these -> a Transcript of each, in order.

        `task` names a learned state where there are several. Raises AudioError for what cannot be decoded; warns of
        audio much longer than the weights were trained on.
        """
        items: Sequence[Audio] = [audio] if isinstance(audio, Audio) else audio
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
    if not len(batch):
        return []
    seconds = [samples / SAMPLE_RATE for samples in batch.num_samples.tolist()]
    limits = [
        max(MIN_NEW_TOKENS, int(TOKENS_PER_SECOND * s)) if max_new_tokens is None else max_new_tokens for s in seconds
    ]
    logits, state = model.prefill(batch)
    ids, cut = greedy(model.lm, logits, state, limits, model.tokenizer.eos_id)
    return [Transcript(model.tokenizer.decode(i), i, s, c) for i, s, c in zip(ids, seconds, cut, strict=True)]


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


def _sample(audio: Audio, index: int, task: str) -> Sample | BadSample:
    name = str(audio) if isinstance(audio, (str, Path)) else f"audio {index + 1}"
    try:
        waveform = load_audio(audio) if isinstance(audio, (str, Path, bytes)) else _waveform(audio, name)
    except AudioError as error:
        return BadSample(index, name, str(error))
    return Sample(name, waveform, "", [], len(waveform) / SAMPLE_RATE, index, task)


def _waveform(samples: Tensor | np.ndarray, name: str) -> Tensor:
    """(S,) float32; raises AudioError for other shapes and kinds."""
    waveform = samples if isinstance(samples, Tensor) else torch.from_numpy(np.ascontiguousarray(samples))
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise AudioError(
            f"{name}: found {waveform.dtype} of shape {tuple(waveform.shape)}, expected samples between -1 and 1 at "
            f"{SAMPLE_RATE} Hz as floating-point numbers of shape (S,): convert them, or give a file"
        )
    if not waveform.isfinite().all():
        raise AudioError(f"{name}: holds NaN or infinite samples; expected finite audio")
    return waveform.float().cpu()


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
