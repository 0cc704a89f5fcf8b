import random

import pytest
import torch
from jiwer import process_characters
from torch import Tensor

from rwkv_speech.decoding.coverage import halves, word_gaps
from rwkv_speech.decoding.long_audio import Piece

LABELS = " abcdefghijklmnopqrstuvwxyz"
FRAMES = 4  # of each character, one in which it is heard


def ctc_of(text: str, labels: str = LABELS, probability: float = 0.95) -> Tensor:
    """Log-probabilities of a head that hears `text`, a character in the second of every four frames."""
    rest = (1 - probability) / len(labels)
    table = torch.full((FRAMES * len(text), len(labels) + 1), rest)
    table[:, 0] = probability
    for number, character in enumerate(text):
        table[FRAMES * number + 1, 0] = rest
        table[FRAMES * number + 1, labels.index(character) + 1] = probability
    return table.log()


def piece_of(text: str) -> Piece:
    samples = FRAMES * len(text) * 320
    return Piece(1_000, torch.arange(samples, dtype=torch.float32))


def test_gaps_lie_between_words():
    # The o at frame 4 x 1 + 1, the t at 4 x 3 + 1: between the two, frames 6 to 12.
    assert word_gaps(ctc_of("no time"), LABELS) == [(6 + 13) * 160]
    assert word_gaps(ctc_of("one"), LABELS) == [] == word_gaps(ctc_of(""), LABELS)
    assert word_gaps(ctc_of("ab", "ab"), "ab") == [(2 + 5) * 160]


@pytest.mark.parametrize(
    ("heard", "text", "rest"),
    [
        ("the dog waits call the man", "the dog waits", "call the man"),
        ("the dog waits call the man", "The dog waits.", "call the man"),
        ("the dogg waits kall the man", "the dog waits", "kall the man"),
        ("seven seven seven", "seven seven", "seven"),
        ("the dog waits", "the dog waits", None),
        ("the dog weightz", "the dog waits", None),  # another spelling
        ("the dog waits uh", "the dog waits", None),  # too little
        ("the dog", "the dog waits here", None),
        ("the dog waits call the man", "der hund", None),  # a translation
        ("the dog waits", "", None),  # the whole of it: the piece cannot be parted
        ("", "the dog", None),
        ("", "", None),
    ],
)
def test_a_piece_is_parted_behind_the_last_word_of_its_text(heard: str, text: str, rest: str | None):
    piece = piece_of(heard)
    found = halves(piece, ctc_of(heard), LABELS, text)
    if rest is None:
        assert found is None
        return
    assert found is not None
    first, second = found
    assert first.start == piece.start and second.start == first.end and second.end == piece.end
    assert torch.equal(torch.cat([first.waveform, second.waveform]), piece.waveform)
    # In the middle of the pause before the first letter of the rest.
    letter = FRAMES * heard.index(rest, len(heard) - len(rest)) + 1
    assert len(first.waveform) == (letter - 2 * FRAMES + 1 + letter) * 160


def test_doubtful_letters_are_no_words():
    heard = "the dog waits call the man"
    assert halves(piece_of(heard), ctc_of(heard, probability=0.6), LABELS, "the dog waits") is None


def test_the_beginning_that_a_text_matches_is_the_nearest_and_the_longest_such():
    from rwkv_speech.decoding.coverage import _matched

    rng = random.Random(0)
    for _ in range(60):
        heard, text = ("".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(2))
        distances = []
        for length in range(len(heard) + 1):
            if length:
                x = process_characters(heard[:length], text)
                distances.append(x.substitutions + x.insertions + x.deletions)
            else:
                distances.append(len(text))
        nearest = max(length for length, distance in enumerate(distances) if distance == min(distances))
        assert _matched(heard, text) == (nearest, min(distances)), (heard, text)
