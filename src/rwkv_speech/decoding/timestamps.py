"""When each word of a text is heard, by the CTC head's log-probabilities of the frames that the text was made from."""

# F frames · K labels · U characters

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.decoding.results import Word
from rwkv_speech.models.ctc import BLANK, CtcHead, align
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.text import UNSPACED

_SHORTEST = 0.02  # seconds of a word
_UNHEARD = 1e-3  # the probability of a word for which there is no room


def split_words(text: str) -> list[str]:
    """The words of a text, each with the blanks before it; joined they are the text, but for blanks at its end.

    In scripts without blanks between words each character is one, with the marks that belong to it. What has no sound,
    such as a dash between blanks, belongs to the word before it; at the start to that behind.
    """
    words: list[str] = []
    for character in text.rstrip():
        last = words[-1] if words else ""
        if not last or not last.strip():
            new = not last
        elif character.isspace():
            new = True
        else:
            before = next(filter(_has_sound, reversed(last)), "")
            meets = UNSPACED.match(character) or UNSPACED.match(before)
            new = bool(before and _has_sound(character) and meets)
        if new:
            words.append(character)
        else:
            words[-1] += character
    return _merged(words)


def _merged(words: Sequence[str]) -> list[str]:
    """Words without a sound joined to the one before, at the start to the one behind."""
    merged: list[str] = []
    for word in words:
        if merged and not (_has_sound(word) and _has_sound(merged[-1])):
            merged[-1] += word
        else:
            merged.append(word)
    return merged


def _has_sound(text: str) -> bool:
    return any(unicodedata.category(character)[0] in "LN" for character in text)


class Heard(NamedTuple):
    """A word, the labels (U,) of its characters, and the first and the last frame of each (U, 2) if there is room."""

    word: str
    labels: NDArray[np.int64]
    frames: NDArray[np.int64] | None


Judge = Callable[[Sequence[Heard]], Sequence[float]]  # how sure each word is, 0 to 1


class WordTimes:
    """Finds the words of texts in the frames of `encoder`, by the log-probabilities of `head`."""

    def __init__(self, head: CtcHead, encoder: SpeechEncoder) -> None:
        self._spec = head.spec
        self._first, self._step = encoder.framing.centre / SAMPLE_RATE, 1 / encoder.framing.frame_rate

    def seconds(self, frames: NDArray[np.int64]) -> NDArray[np.float64]:
        """The middle of each frame, from the start of what the encoder was given."""
        return self._first + self._step * frames.astype(np.float64)

    def align(self, text: str, log_probs: Tensor) -> list[Heard]:
        """The words of a text and where they are heard in the (F, K) of its frames."""
        words = split_words(text)
        targets, owners = self._targets(words)
        labels, owner = np.array(targets), np.array(owners)
        frames = align(log_probs.numpy(), targets) if words else None
        own = [owner == number for number in range(len(words))]
        if frames is None or not all(places.any() for places in own):
            return [Heard(word, np.zeros(0, np.int64), None) for word in words]
        return [Heard(word, labels[places], frames[places]) for word, places in zip(words, own, strict=True)]

    def words(self, text: str, log_probs: Tensor, start: float, end: float, judge: Judge | None = None) -> list[Word]:
        """The words of a text that was recognised between `start` and `end` (s) of a recording, from its (F, K).

        They follow each other inside that time, none without length, none before the one before it has ended. A
        character without a label counts as any sound. The probabilities are those of `judge`; without one the mean
        (geometric) of a word's characters. Words of a text that is too long for the frames are spread evenly by their
        letters.
        """
        found = self.align(text, log_probs)
        words = [heard.word for heard in found]
        probabilities = judge(found) if judge else [self._probability(heard, log_probs.numpy()) for heard in found]
        frames = [heard.frames for heard in found if heard.frames is not None]
        if not words or len(frames) < len(words):
            return _spread(words, probabilities, start, end)
        starts = self.seconds(np.array([x[0, 0] for x in frames])) + self._spec.start_shift
        ends = self.seconds(np.array([x[-1, 1] for x in frames])) + self._spec.end_shift
        return _placed(words, start + starts, start + ends, probabilities, start, end)

    def _targets(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """The labels of the characters, and the word of each, -1 for the blanks between words."""
        targets, owners = list[int](), list[int]()
        blank = self._spec.encode(" ")[0]
        for number, word in enumerate(words):
            if number and word[0].isspace() and blank != self._spec.star:
                targets.append(blank)
                owners.append(-1)
            letters = unicodedata.normalize("NFC", word.strip())
            for letter, label in zip(letters, self._spec.encode(letters), strict=True):
                if label != self._spec.star or _has_sound(letter):
                    targets.append(label)
                    owners.append(number)
        return targets, owners

    def _probability(self, heard: Heard, rows: NDArray[np.float32]) -> float:
        """Of each label in its first frame, of a star that it is not blank."""
        if heard.frames is None:
            return _UNHEARD
        star = heard.labels == self._spec.star
        found = rows[heard.frames[:, 0], np.where(star, BLANK, heard.labels)].astype(np.float64)
        return float(np.exp(np.where(star, np.log1p(-np.exp(np.minimum(found, -1e-9))), found).mean()))


def _spread(words: Sequence[str], probabilities: Sequence[float], start: float, end: float) -> list[Word]:
    """Words of a length by their letters, side by side."""
    if not words:
        return []
    edges = start + (end - start) * np.cumsum([0, *(len(word.strip()) for word in words)]) / sum(
        len(word.strip()) for word in words
    )
    return _placed(words, edges[:-1], edges[1:], probabilities, start, end)


def _placed(
    words: Sequence[str],
    starts: NDArray[np.float64],
    ends: NDArray[np.float64],
    probabilities: Sequence[float],
    start: float,
    end: float,
) -> list[Word]:
    """Words moved as little as it takes for each to lie inside, to have a length and to leave the next its own."""
    count = len(words)
    room = min(_SHORTEST, (end - start) / count)
    # Starts at least `room` apart, from the first possible one to the last.
    steps = room * np.arange(count)
    starts = np.maximum.accumulate(np.maximum(starts, start) - steps) + steps
    starts = np.maximum(start, np.minimum(starts, end - room * np.arange(count, 0, -1)))
    limits = np.append(starts[1:], end)
    ends = np.minimum(np.maximum(ends, starts + room), limits)
    return [
        Word(word, float(first), float(last), probability)
        for word, first, last, probability in zip(words, starts, ends, probabilities, strict=True)
    ]
