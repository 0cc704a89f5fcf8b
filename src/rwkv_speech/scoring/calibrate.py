"""Fit what the confidence of words is made of, on data that training has not seen, and keep it in the checkpoint."""

# S samples

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, AudioError
from rwkv_speech.batch import Sample
from rwkv_speech.config import ModelConfig
from rwkv_speech.data.augment import change_speed
from rwkv_speech.data.source import Source
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.confidence import Calibration, Evidence, evidence_of_words, fit, probability
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.decoding.guards import is_silence, no_speech_prob
from rwkv_speech.decoding.options import GREEDY
from rwkv_speech.decoding.timestamps import WordTimes
from rwkv_speech.devices import compute_of
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import add_confidence, find_checkpoint
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.reliability import Reliability, reliability, right_words
from rwkv_speech.tasks import Naming

# Validation data is often of the training's voices, which are hardly ever misheard: other speeds, which change the
# pitch, and noise make them strangers. Each utterance as it is, too.
_SPEEDS = (1.0, 0.8, 0.9, 1.1, 1.25)
_SNRS_DB = (0.0, 5.0, 10.0, 20.0)
_MOST = 4000  # utterances that are decoded in all
_FEWEST_WRONG = 20  # words, and as many right ones
_SLOTS = 16

Judged = tuple[Evidence, bool]  # a word, and whether it is right


def calibrate(run: Path, data: str, task: str = "") -> tuple[Path, Reliability, Reliability]:
    """Calibrate the checkpoint that `run` means, in place; the file, and how reliable confidence was and is.

    `data` is in any form of --valid_data. What confidence is now is measured on each half of the data by a fit of the
    other. Raises UserError for a checkpoint without a CTC head, and for data with too few wrong words.
    """
    path = find_checkpoint(run)
    model = SpeechLM.from_pretrained(path, compute=compute_of(ModelConfig()))
    if model.ctc is None:
        raise UserError(f"{path}: found no CTC head, whose agreement confidence needs; train one with --ctc 1 first")
    source = open_source(data)
    naming = Naming.among(list(model.initial_states), task)
    halves: tuple[list[Judged], list[Judged]] = [], []
    for index, found in _judged(model, source, naming):
        halves[index % 2].extend(found)
    words = halves[0] + halves[1]
    wrong = sum(not right for _, right in words)
    if min(wrong, len(words) - wrong) < _FEWEST_WRONG:
        raise UserError(
            f"--data: found {len(words)} words, {wrong} of them wrong, in what was recognised, expected at least "
            f"{_FEWEST_WRONG} right and {_FEWEST_WRONG} wrong ones; give more data"
        )
    add_confidence(path, asdict(_fitted(words)))
    crossed = [(_fitted(other).probability(x), right) for half, other in (halves, halves[::-1]) for x, right in half]
    before = reliability([probability(x, None) for x, _ in words], [right for _, right in words])
    return path, before, reliability([p for p, _ in crossed], [right for _, right in crossed])


def _fitted(words: Sequence[Judged]) -> Calibration:
    return fit([found for found, _ in words], [right for _, right in words])


def _judged(model: SpeechLM, source: Source, naming: Naming) -> Iterator[tuple[int, list[Judged]]]:
    """The number of each utterance, and the words that were recognised in it."""
    assert model.ctc is not None
    times = WordTimes(model.ctc, model.encoder)
    for done in Engine(model, GREEDY, _SLOTS).run(_requests(source, naming)):
        if done.ctc is None or is_silence(no_speech_prob(done.ctc, model.encoder.framing.frame_rate), GREEDY):
            continue
        best, index = done.hypotheses[0], done.request.key
        heard = times.align(model.tokenizer.decode(best.ids), done.ctc)
        tokens = [model.tokenizer.decode_bytes([token]) for token in best.ids]
        found = evidence_of_words(heard, best, tokens, done.ctc.numpy())
        right = right_words([word for word, *_ in heard], source.utterance(index).text)
        yield index, [(x, is_right) for x, is_right in zip(found, right, strict=True) if is_right is not None]


def _requests(source: Source, naming: Naming) -> Iterator[Request]:
    """The utterances, each as it is and changed, as many times as `_MOST` allows."""
    changes = len(_SPEEDS) + len(_SNRS_DB)
    times = max(1, min(changes, _MOST // max(1, len(source))))
    chosen = np.random.default_rng(0).permutation(len(source))[:_MOST].tolist()
    for number, index in enumerate(chosen):
        try:
            waveform = source.load(index)
        except AudioError:
            continue  # training and evaluation name what is broken
        for turn in range(times):
            changed = _changed(waveform, (number + turn) % changes, number)
            seconds = len(changed) / SAMPLE_RATE
            found = source.utterance(index)
            sample = Sample(str(index), changed, "", [], seconds, index, naming.state(found.task, found.lang))
            yield Request(index, sample, GREEDY.token_limit(seconds))


def _changed(waveform: Tensor, change: int, seed: int) -> Tensor:
    """(S,) -> (S / speed,), or with white noise."""
    if change < len(_SPEEDS):
        return change_speed(waveform, _SPEEDS[change])
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(seed))
    return waveform + noise * waveform.square().mean().sqrt() * 10 ** (-_SNRS_DB[change - len(_SPEEDS)] / 20)
