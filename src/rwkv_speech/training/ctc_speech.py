"""What a CTC head learns from beside the plain data, and what its times are set by: recordings and their texts."""

# S samples · F frames · K labels

import math
import random
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech import tasks
from rwkv_speech.audio import SAMPLE_RATE, AudioError
from rwkv_speech.batch import Batch, Sample
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.loader import collate
from rwkv_speech.data.source import Source
from rwkv_speech.decoding.timestamps import WordTimes
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcHead, CtcSpec, align
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.synthetic.nonspeech import VOICES, nonspeech
from rwkv_speech.text import normalise_label

_SHORTEST, _LONGEST = 0.5, 10.0  # seconds of a sound without words
# Where the times of words are set: so many utterances, none longer than this.
_MEASURED, _MOST_SECONDS = 200, 30
_WINDOW, _HOP = 400, 80  # samples: loudness over 25 ms, each 5 ms
_SILENT_DB, _ABOVE_NOISE_DB = -40.0, 10.0
# A word begins before it is loud, as with the closure of its "b": synthesizers and phoneticians count it from there.
_CLOSURE_SECONDS = 0.025


class Speech:
    """The utterances of a source whose texts say what is spoken, which are those of the task asr.

    Raises UserError if there are none.
    """

    def __init__(self, source: Source, config: TrainConfig) -> None:
        self._source, self._config = source, config
        named = (source.utterance(i).task or config.task for i in range(len(source)))
        spoken = [i for i, task in enumerate(named) if tasks.base_of(task) == tasks.DEFAULT]
        self._indices = np.array(spoken)
        if not spoken:
            raise UserError(
                f"--ctc: found no utterance of the task {tasks.DEFAULT}, whose text says what is spoken; leave it out"
            )

    def characters(self) -> str:
        """The characters of all texts, sorted."""
        return "".join(sorted({character for i in self._indices.tolist() for character in self._text(i)}))

    def some(self, rng: random.Random, count: int) -> list[tuple[Tensor, str]]:
        """So many recordings, drawn at random, and their texts; fewer only where most cannot be decoded."""
        found: list[tuple[Tensor, str]] = []
        for _ in range(2 * count):
            index = int(rng.choice(self._indices))
            try:
                found.append((self._source.load(index), self._text(index)))
            except AudioError:  # it is reported where it is trained on
                continue
            if len(found) == count:
                break
        return found

    def extras(self, place: str) -> Batch:
        """Sounds without words and speech with silence around, half and half, so many as a batch has utterances.

        An empty text must mean that nobody speaks. They are drawn by the seed and `place`, a name.
        """
        rng = random.Random(f"{self._config.seed}/ctc/{place}")
        count = max(2, self._config.micro_bsz)
        voices = self.some(rng, max(VOICES, count // 2))
        samples = [
            _sample(F.pad(voice, (rng.randrange(SAMPLE_RATE), rng.randrange(SAMPLE_RATE))), text)
            for voice, text in voices[: count // 2]
        ]
        for _ in range(count - len(samples)):
            seconds = math.exp(rng.uniform(math.log(_SHORTEST), math.log(_LONGEST)))
            samples.append(_sample(nonspeech(rng, seconds, [voice for voice, _ in voices]), ""))
        return collate(samples)

    def _text(self, index: int) -> str:
        return normalise_label(self._source.utterance(index).text, self._config.label_mode)


def _sample(waveform: Tensor, text: str) -> Sample:
    return Sample("", waveform, text, [], len(waveform) / SAMPLE_RATE, 0, tasks.DEFAULT)


@torch.no_grad()
def with_times(head: CtcHead, encoder: SpeechEncoder, speech: Speech, seed: int) -> CtcSpec:
    """The head's record with its shifts: from the frames of first and last characters to where sound begins and ends.

    The median of some utterances of the training data, whose sound is told from silence by its loudness.
    """
    device = next(encoder.parameters()).device
    times, starts, ends = WordTimes(head, encoder), list[float](), list[float]()
    for waveform, text in speech.some(random.Random(seed), _MEASURED):
        padded = F.pad(waveform, (SAMPLE_RATE // 2, SAMPLE_RATE // 2))
        sounds = loud_span(padded.numpy())
        if len(waveform) > _MOST_SECONDS * SAMPLE_RATE or not text or sounds is None:
            continue
        frames, lengths = encoder(padded[None].to(device), torch.tensor([len(padded)]))
        spans = align(head(frames, lengths)[0].cpu().numpy(), head.spec.encode(text))
        if spans is not None:
            first, last = times.seconds(spans[[0, -1], [0, 1]])
            starts.append(sounds[0] - first)
            ends.append(sounds[1] - last)
    if not starts:
        return head.spec
    return replace(head.spec, start_shift=float(np.median(starts)) - _CLOSURE_SECONDS, end_shift=float(np.median(ends)))


def loud_span(waveform: NDArray[np.float32]) -> tuple[float, float] | None:
    """The seconds at which the sound of a recording (S,) begins and ends: 40 dB below its loudest, but above noise."""
    if len(waveform) < _WINDOW:
        return None
    power = np.lib.stride_tricks.sliding_window_view(np.square(waveform), _WINDOW)[::_HOP].mean(1)
    decibel = 10 * np.log10(power + 1e-12)
    inside = decibel[power > 0]
    if not len(inside):
        return None
    loudest = np.percentile(inside, 95)
    # Where sound never pauses there is no noise to be told from it.
    threshold = min(max(loudest + _SILENT_DB, inside.min() + _ABOVE_NOISE_DB), loudest - _ABOVE_NOISE_DB)
    loud = np.flatnonzero(decibel > threshold)
    if not len(loud):
        return None
    middle = _WINDOW / 2
    return float(loud[0] * _HOP + middle) / SAMPLE_RATE, float(loud[-1] * _HOP + middle) / SAMPLE_RATE
