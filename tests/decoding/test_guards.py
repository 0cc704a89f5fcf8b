"""Whisper's rules as a table, and what the CTC head says of speech."""

import math
import random
import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding.guards import compression_ratio, is_silence, is_unheard, needs_fallback, no_speech_prob
from rwkv_speech.decoding.options import Options
from rwkv_speech.models.ctc import CtcSpec

SENTENCE = "the black dog waits under the green apple"
LOOP = "ha " * 60


@pytest.mark.parametrize("text", ["", "a", SENTENCE, LOOP, "天気は良い" * 9, "half a pair \ud800"])
def test_compression_ratio_is_the_text_by_its_zlib(text: str):
    content = text.encode("utf-8", "backslashreplace")
    assert compression_ratio(text) == len(content) / len(zlib.compress(content))
    assert (compression_ratio(text) > 2.4) == (text in (LOOP, "天気は良い" * 9))


# (avg_logprob, text, no_speech_prob) -> decode again?, by whisper's defaults 2.4, -1.0, 0.6.
RULES = [
    (-0.2, SENTENCE, 0.0, False),
    (-0.2, SENTENCE, 1.0, False),
    (-0.2, LOOP, 0.0, True),
    (-0.2, LOOP, 1.0, True),
    (-1.5, SENTENCE, 0.0, True),
    (-1.5, SENTENCE, 0.6, True),  # a threshold itself is not beyond
    (-1.5, SENTENCE, 0.61, False),
    (-1.5, LOOP, 0.0, True),
    (-1.5, LOOP, 0.9, False),
    (-1.0, SENTENCE, 0.9, False),
    (-1.0, SENTENCE, 0.0, False),
    (-0.99, SENTENCE, 0.9, False),
    (-1.01, "", 0.0, True),
]


@pytest.mark.parametrize(("avg_logprob", "text", "no_speech", "again"), RULES)
def test_needs_fallback_is_whispers_rule(avg_logprob: float, text: str, no_speech: float, again: bool):
    assert needs_fallback(SimpleNamespace(avg_logprob=avg_logprob), text, no_speech, Options.given()) is again


def test_is_silence_above_the_threshold():
    assert [is_silence(p, Options.given()) for p in (0.0, 0.6, 0.61, 1.0)] == [False, False, True, True]
    assert not is_silence(1.0, Options.given(no_speech_threshold=1.0))  # keeps everything


def whisper_needs_fallback(ratio: float, avg_logprob: float, no_speech: float, options: Options) -> bool:
    """As openai/whisper writes it."""
    needs_fallback = False
    if ratio > options.compression_ratio_threshold:
        needs_fallback = True
    if avg_logprob < options.logprob_threshold:
        needs_fallback = True
    if no_speech > options.no_speech_threshold and avg_logprob < options.logprob_threshold:
        needs_fallback = False
    return needs_fallback


def test_needs_fallback_equals_whispers_for_any_thresholds():
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        options = Options.given(
            compression_ratio_threshold=rng.choice([0.5, 1.0, 2.4, 9.0]),
            logprob_threshold=rng.choice([-3.0, -1.0, -0.5]),
            no_speech_threshold=rng.choice([0.0, 0.3, 0.6, 1.0]),
        )
        text, no_speech = rng.choice([SENTENCE, LOOP, ""]), rng.choice([0.0, 0.3, 0.6, 0.7, 1.0])
        found = SimpleNamespace(avg_logprob=rng.choice([-4.0, -3.0, -2.0, -1.0, -0.7, -0.5, -0.1]))
        expected = whisper_needs_fallback(compression_ratio(text), found.avg_logprob, no_speech, options)
        assert needs_fallback(found, text, no_speech, options) == expected
        seen.add(expected)
    assert seen == {False, True}


def head(*frames: tuple[int, float]) -> Tensor:
    """Log-probabilities of so many frames with a blank of such a probability, the rest shared by two labels."""
    blank = torch.tensor([p for count, p in frames for _ in range(count)])
    return torch.stack((blank, (1 - blank) / 2, (1 - blank) / 2), 1).log()


def test_no_speech_prob_of_blanks_is_one_and_of_words_is_none():
    assert no_speech_prob(None, 50) == 0.0  # nothing is known
    assert no_speech_prob(head((200, 1.0)), 50) == 1.0 == no_speech_prob(torch.empty(0, 3), 50)
    assert no_speech_prob(head((100, 1.0), (8, 0.02), (1000, 1.0)), 50) < 0.15  # one short word
    assert no_speech_prob(head((1, 0.0)), 50) == pytest.approx(math.exp(-1 / 4))


def test_no_speech_prob_takes_the_second_that_holds_the_most():
    doubts = head((3000, 0.998))  # a minute of them
    assert no_speech_prob(doubts, 50) == pytest.approx(math.exp(-50 * 0.002 / 4), abs=1e-5)
    near, far = head((10, 1.0), (2, 0.5), (47, 1.0), (2, 0.5)), head((10, 1.0), (2, 0.5), (50, 1.0), (2, 0.5))
    assert no_speech_prob(near, 50) == pytest.approx(math.exp(-1.5 / 4), abs=1e-6)  # 50 frames hold three of the four
    assert no_speech_prob(far, 50) == pytest.approx(math.exp(-1.0 / 4), abs=1e-6)


def test_no_speech_prob_falls_with_every_frame_that_holds_more():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        ctc = torch.randn(130, 5, generator=draw).log_softmax(1)
        louder = ctc.clone()
        frames = torch.randint(0, 130, (30,), generator=draw)
        louder[frames, 0] -= 1
        assert no_speech_prob(louder.log_softmax(1), 50) <= no_speech_prob(ctc, 50)


@pytest.mark.parametrize(
    ("heard", "text", "unheard"),
    [
        ("", "abab", True),
        ("a", "abababa", True),
        ("ab", "abababab", False),  # a quarter
        ("abab", "abab", False),
        ("b", "a?!? 9", False),  # characters without a label are no witnesses
        ("", "", False),
        ("", "???", False),
    ],
)
def test_is_unheard_of_texts_of_which_the_head_hears_hardly_a_character(heard: str, text: str, unheard: bool):
    spec = CtcSpec("ab ")
    frames = [0, *(label for x in heard for label in (spec.labels.index(x) + 1, 0))]
    ctc = torch.eye(4)[frames].clamp(1e-6).log()
    assert is_unheard(text, ctc, spec, Options.given()) is unheard
    assert not is_unheard(text, ctc, spec, Options.given(no_speech_threshold=1.0))
