"""What the CTC head hears in a piece of audio: the places between words, and words that the decoded text lacks."""

# F frames · K labels of the CTC head, the first being blank

import itertools
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rwkv_speech.audio import SAMPLES_PER_FRAME
from rwkv_speech.decoding.long_audio import Piece

# So many letters behind the text's last word, of such a mean probability, are words that it lacks.
_MIN_LETTERS, _MIN_PROBABILITY = 4, 0.7
# The edits, of the letters of a text, by which it may differ from what is heard.
_MOST_DISTANCE = 0.5


class _Heard(NamedTuple):
    """A character on the CTC head's likeliest path, with its first and last frame."""

    character: str
    first: int
    last: int
    probability: float


def _heard(ctc: Tensor, labels: str) -> list[_Heard]:
    """The characters of the likeliest path through log-probabilities (F, K); character i has label i + 1."""
    best, found = ctc.max(-1), []
    path = zip(itertools.count(), best.indices.tolist(), best.values.exp().tolist(), strict=False)
    for label, run in itertools.groupby(path, lambda frame: frame[1]):
        frames = list(run)
        if label:
            found.append(_Heard(labels[label - 1], frames[0][0], frames[-1][0], max(frame[2] for frame in frames)))
    return found


def _place(before: _Heard, after: _Heard) -> int:
    """The sample in the middle between two characters."""
    return (before.last + 1 + after.first) * SAMPLES_PER_FRAME // 2


def word_gaps(ctc: Tensor, labels: str) -> list[int]:
    """The samples between two words in log-probabilities (F, K), between two letters if no label is a blank."""
    heard, has_blanks = _heard(ctc, labels), " " in labels
    letters = [(number, x) for number, x in enumerate(heard) if not x.character.isspace()]
    return [
        _place(before, after) for (i, before), (j, after) in itertools.pairwise(letters) if j > i + 1 or not has_blanks
    ]


def halves(piece: Piece, ctc: Tensor, labels: str, text: str) -> tuple[Piece, Piece] | None:
    """A piece in two, cut behind the last word of `text`, if the CTC head (F, K) clearly hears words behind that."""
    heard = _heard(ctc, labels)
    letters = [(number, x) for number, x in enumerate(heard) if x.character.isalnum()]
    said = "".join(character.lower() for character in text if character.isalnum())
    used, distance = _matched("".join(x.character.lower()[:1] for _, x in letters), said)
    # A word begins behind a blank.
    while 0 < used < len(letters) and " " in labels and letters[used][0] == letters[used - 1][0] + 1:
        used += 1
    rest = [x for _, x in letters[used:]]
    # A translation is no part of what is heard.
    if not used or distance > _MOST_DISTANCE * len(said) or len(rest) < _MIN_LETTERS:
        return None
    if np.mean([x.probability for x in rest]) < _MIN_PROBABILITY:
        return None
    place = _place(letters[used - 1][1], rest[0])
    return (
        Piece(piece.start, piece.waveform[:place]),
        Piece(piece.start + place, piece.waveform[place:]),
    )


def _matched(heard: str, text: str) -> tuple[int, int]:
    """The length of the beginning of `heard` that is nearest to `text`, the longest such, and their edit distance."""
    letters = np.frombuffer(heard.encode("utf-32-le"), np.uint32)
    steps = np.arange(len(letters) + 1)
    distances = steps.copy()  # of the text so far from each beginning
    for character in text:
        replaced = distances[:-1] + (letters != ord(character))
        distances = np.concatenate([distances[:1] + 1, np.minimum(distances[1:] + 1, replaced)])
        # Letters that were heard and are not in the text.
        distances = np.minimum.accumulate(distances - steps) + steps
    return int(len(letters) - distances[::-1].argmin()), int(distances.min())
