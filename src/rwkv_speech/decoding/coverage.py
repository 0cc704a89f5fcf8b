"""What the CTC head hears in a piece of audio: the places between words, and words that the decoded text lacks.

A language model that was trained on single sentences makes one of two, or ends behind the first.
"""

# F frames · K labels of the CTC head, the first being blank

import itertools
from typing import NamedTuple

import jiwer
from torch import Tensor
from torch.nn import functional

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.decoding.long_audio import Piece, sound

# Of the letters, the edits from what is heard to the text: of single sentences up to 0.21, of two together from 0.37.
_MOST_ERRORS = 0.3
# Samples between the letters of two sentences, and the letters that each of them has at least.
_MIN_GAP, _MIN_LETTERS = round(0.14 * SAMPLE_RATE), 3


class _Heard(NamedTuple):
    """A character on the CTC head's likeliest path, with its first and last frame."""

    character: str
    first: int
    last: int


def _heard(ctc: Tensor, labels: str) -> list[_Heard]:
    """The characters of the likeliest path through log-probabilities (F, K); character i has label i + 1."""
    found = []
    for label, run in itertools.groupby(enumerate(ctc.argmax(-1).tolist()), lambda frame: frame[1]):
        frames = [number for number, _ in run]
        if label:
            found.append(_Heard(labels[label - 1], frames[0], frames[-1]))
    return found


def _place(before: _Heard, after: _Heard, step: int) -> int:
    """The sample in the middle between two characters."""
    return (before.last + 1 + after.first) * step // 2


def word_gaps(ctc: Tensor, labels: str, step: int) -> list[int]:
    """The samples between two words in log-probabilities (F, K), between two letters if no label is a blank.

    `step` is the number of samples from one frame to the next.
    """
    heard, has_blanks = _heard(ctc, labels), " " in labels
    letters = [(number, x) for number, x in enumerate(heard) if not x.character.isspace()]
    return [
        _place(before, after, step)
        for (i, before), (j, after) in itertools.pairwise(letters)
        if j > i + 1 or not has_blanks
    ]


def num_errors(ctc: Tensor, labels: str, text: str) -> int:
    """The edits, in letters, from what is heard in log-probabilities (F, K) to the text."""
    heard, said = _letters("".join(x.character for x in _heard(ctc, labels))), _letters(text)
    if not heard or not said:
        return len(heard) + len(said)
    found = jiwer.process_characters(heard, said)
    return found.substitutions + found.insertions + found.deletions


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def halves(piece: Piece, ctc: Tensor, labels: str, text: str, step: int) -> tuple[Piece, Piece] | None:
    """A piece in two, parted in the quietest pause that is heard in it, if its text is far from what is heard.

    `step` is the number of samples from one frame of `ctc` to the next.
    """
    letters = [x for x in _heard(ctc, labels) if x.character.isalnum()]
    if num_errors(ctc, labels, text) <= _MOST_ERRORS * max(len(letters), len(_letters(text))):
        return None
    pairs = list(itertools.pairwise(letters))[_MIN_LETTERS - 1 : len(letters) - _MIN_LETTERS]
    gaps = [(before.last + 1, after.first) for before, after in pairs if (after.first - before.last) * step >= _MIN_GAP]
    if not gaps:
        return None
    place = min(_quietest(piece.waveform, step, *gap) for gap in gaps)[1]
    before, after = piece.waveform[:place], piece.waveform[place:]
    end, begin = sound(before)[1], sound(after)[0]
    return Piece(piece.start, before[:end]), Piece(piece.start + place + begin, after[begin:])


def _quietest(waveform: Tensor, step: int, first: int, last: int) -> tuple[float, int]:
    """The power of the three quietest frames between two frames, and the sample in their middle."""
    samples = waveform[first * step : last * step]
    power = functional.avg_pool1d(samples.square()[None], 3 * step, step // 2)[0]
    quietest = int(power.argmin())
    return float(power[quietest]), first * step + (quietest + 3) * step // 2
