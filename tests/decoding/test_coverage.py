import random

import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding.coverage import halves, num_errors, word_gaps
from rwkv_speech.decoding.long_audio import Piece

LABELS = " abcdefghijklmnopqrstuvwxyz"
FRAMES = 3  # of each character, the second being that in which it is heard


def ctc_of(text: str, labels: str = LABELS, probability: float = 0.95) -> Tensor:
    """Log-probabilities of a head that hears `text`, a character in every third frame."""
    rest = (1 - probability) / len(labels)
    table = torch.full((FRAMES * len(text), len(labels) + 1), rest)
    table[:, 0] = probability
    for number, character in enumerate(text):
        if "  " in text[max(0, number - 1) : number + 2] and character == " ":  # a pause
            continue
        table[FRAMES * number + 1, 0] = rest
        table[FRAMES * number + 1, labels.index(character) + 1] = probability
    return table.log()


def test_gaps_lie_between_words():
    # The o at frame 4, the t at 10.
    assert word_gaps(ctc_of("no time"), LABELS, 320) == [(5 + 10) * 160]
    assert word_gaps(ctc_of("one"), LABELS, 320) == [] == word_gaps(ctc_of(""), LABELS, 320)
    assert word_gaps(ctc_of("ab", "ab"), "ab", 320) == [(2 + 4) * 160]


PAUSE = "   "  # heard as nothing
SENTENCES = "the dog waits" + PAUSE + "call the man"


def loud_where(text: str) -> Tensor:
    """Noise where characters are heard, much less of it in pauses."""
    waveform = torch.randn(FRAMES * len(text) * 320, generator=torch.Generator().manual_seed(0))
    for number in range(len(text)):
        if text[number : number + 3] == PAUSE:
            waveform[FRAMES * number * 320 : FRAMES * (number + 3) * 320] *= 1e-4
    return waveform


@pytest.mark.parametrize(
    ("heard", "text", "parts"),
    [
        (SENTENCES, "the dog waits", ["the dog waits", "call the man"]),
        (SENTENCES, "the dog wants all the men", None),  # not far from what is heard
        (SENTENCES, "The dog waits. Call the man.", None),
        (SENTENCES, "my cat", ["the dog waits", "call the man"]),
        ("one two" + PAUSE + "three four five", "one", ["one two", "three four five"]),
        ("the dog waits call the man", "the dog waits", None),  # without a pause
        ("the dog waits" + PAUSE + "oh", "the dog", None),  # too little behind it
        (SENTENCES, "", ["the dog waits", "call the man"]),
        ("the dog", "the dog waits here", None),
        ("", "the dog", None),
        ("", "", None),
    ],
)
def test_a_piece_whose_text_lacks_words_is_parted_in_its_pause(heard: str, text: str, parts: list[str] | None):
    piece = Piece(1_000, loud_where(heard))
    found = halves(piece, ctc_of(heard), LABELS, text, 320)
    if parts is None:
        assert found is None
        return
    assert found is not None
    first, second = found
    # All but the silence between them, of which a margin stays.
    assert first.start == piece.start and second.end == piece.end
    place = (len(parts[0]) * FRAMES) * 320
    assert 0 < first.end - 1_000 - place < 500 and 0 < place + 3 * FRAMES * 320 - (second.start - 1_000) < 500
    for part in found:
        at = part.start - piece.start
        assert torch.equal(part.waveform, piece.waveform[at : at + len(part.waveform)])


def test_the_quietest_pause_counts_not_the_longest():
    heard = "the dog waits" + PAUSE + "call the man"
    log_probs, waveform = ctc_of(heard), loud_where(heard)
    log_probs = torch.cat([log_probs[:9], log_probs[9:10].repeat(40, 1), log_probs[9:]])  # a long vowel
    waveform = torch.cat([waveform[: 9 * 320], waveform[: 40 * 320], waveform[9 * 320 :]])
    found = halves(Piece(0, waveform), log_probs, LABELS, "the dog", 320)
    assert found is not None and found[0].end == pytest.approx((40 + len("the dog waits") * FRAMES) * 320, abs=500)


def test_errors_are_counted_in_letters():
    rng = random.Random(0)
    for _ in range(60):
        heard, text = ("".join(rng.choices("abc ", k=rng.randint(1, 6))) for _ in range(2))
        assert num_errors(ctc_of(heard), LABELS, text.upper() + ".") == edits(
            heard.replace(" ", ""), text.replace(" ", "")
        )


def edits(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))
