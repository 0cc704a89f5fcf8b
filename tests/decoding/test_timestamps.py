import random
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding.confidence import Calibration
from rwkv_speech.decoding.results import Word
from rwkv_speech.decoding.timestamps import WordTimes, split_words
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import Parts

SPEC = CtcSpec(" abcdeß天気ก", start_shift=-0.03, end_shift=0.01)
SILENT = 1e-4


@pytest.fixture(scope="module")
def encoder(tiny_parts: Parts) -> SpeechEncoder:
    return SpeechEncoder.from_pretrained(tiny_parts.encoder)


@pytest.fixture(scope="module")
def times(encoder: SpeechEncoder) -> WordTimes:
    return WordTimes(CtcHead(encoder.width, SPEC), encoder)


def heard(num_frames: int, at: dict[int, str], probability: float = 0.9) -> Tensor:
    """Log-probabilities in which each character is heard in one frame, and nothing elsewhere."""
    rows = torch.full((num_frames, len(SPEC.labels) + 1), SILENT)
    rows[:, 0] = 1 - SILENT * len(SPEC.labels)
    for frame, character in at.items():
        rows[frame] = (1 - probability) / len(SPEC.labels)
        rows[frame, 1 + SPEC.labels.index(character)] = probability
    return rows.log()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the weather, is good.", ["the", " weather,", " is", " good."]),
        (" a  b ", [" a", "  b"]),
        ("天気は good です。", ["天", "気", "は", " good", " で", "す。"]),
        ("天気ok気", ["天", "気", "ok", "気"]),
        ("天。ok", ["天。", "ok"]),
        ("กิไร", ["กิ", "ไ", "ร"]),
        ("a - b", ["a -", " b"]),
        ("- a (b) 50 %", ["- a", " (b)", " 50 %"]),
        ("...", ["..."]),
        ("", []),
        (" ", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]):
    assert split_words(text) == words
    assert "".join(words) == text.rstrip()


def test_words_are_where_their_characters_are_heard(times: WordTimes):
    log_probs = heard(100, {10: "a", 12: "b", 13: " ", 40: "c", 43: " ", 60: "d", 62: "e"})
    found = times.words("ab c de", log_probs, 7.0, 9.0)

    def middle(frame: int) -> float:  # WavLM: 400 samples, each 320
        return (200 + 320 * frame) / 16_000

    assert [word.word for word in found] == ["ab", " c", " de"]
    for word, first, last in zip(found, (10, 40, 60), (12, 40, 62), strict=True):
        assert word.start == pytest.approx(7 + middle(first) - 0.03)
        assert word.end == pytest.approx(7 + middle(last) + 0.01)
        assert word.probability == pytest.approx(0.9, rel=1e-5)


def test_characters_without_a_label_count_as_sound_and_marks_not_at_all(times: WordTimes):
    log_probs = heard(60, {5: "a", 20: "b", 22: "c", 40: "d"})
    found = times.words("a! é1, D", log_probs, 0.0, 1.2)
    assert [word.word for word in found] == ["a!", " é1,", " D"]
    starts = [(word.start + 0.03 - 0.0125) / 0.02 for word in found]
    assert starts == pytest.approx([5, 20, 40])
    assert found[1].probability == pytest.approx(1 - 0.1 / len(SPEC.labels), rel=1e-3)


def test_a_composed_and_a_decomposed_letter_are_one(times: WordTimes):
    spec = CtcSpec("é")
    assert spec.encode("é") == [1]
    log_probs = heard(20, {4: "天", 9: "気"})
    assert [word.word for word in times.words("天気", log_probs, 0, 1)] == ["天", "気"]


def assert_in_order(words: list[Word], start: float, end: float) -> None:
    assert all(word.start < word.end and 0 <= word.probability <= 1 for word in words)
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert words[0].start >= start and words[-1].end <= end


def test_any_text_over_any_frames_is_in_order(times: WordTimes):
    rng, draw = random.Random(0), torch.Generator().manual_seed(0)
    spread = 0
    for number in range(200):
        text = "".join(rng.choices(SPEC.labels + "  xé!", k=rng.randint(1, 40)))
        frames = rng.choice([1, 3, 30, 100])
        log_probs = (rng.choice([1, 5]) * torch.randn(frames, len(SPEC.labels) + 1, generator=draw)).log_softmax(-1)
        start = rng.choice([0.0, 0.3, 86_400.0 * number])
        end = start + 0.02 * frames + 0.005
        words = times.words(text, log_probs, start, end)
        assert "".join(word.word for word in words) == text.rstrip()
        if words:
            assert_in_order(words, start, end)
        spread += any(word.probability == 1e-3 for word in words)
    assert 20 < spread < 150  # texts too long for their frames are among them


def test_times_are_right_after_hours(times: WordTimes):
    log_probs = heard(100, {10: "a", 40: "c", 60: "d"})
    near, far = (times.words("a c d", log_probs, start, start + 2.0) for start in (0.0, 100 * 3600.0))
    for a, b in zip(near, far, strict=True):
        assert b.start - 360_000 == pytest.approx(a.start, abs=1e-9)
        assert b.end - 360_000 == pytest.approx(a.end, abs=1e-9)


def test_transcribe_gives_words_where_asked(tiny_parts: Parts):
    model = SpeechLM.build(tiny_parts)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    audio = 0.1 * torch.randn(2, 20_000, generator=draw)
    options = {"vad": "none", "temperature": 0.0, "max_new_tokens": 9}
    with pytest.raises(UserError, match="--word_timestamps 1: the weights have no CTC head, .* --ctc 1"):
        model.transcribe(list(audio), word_timestamps=1, **options)
    model.ctc = CtcHead(model.encoder.width, SPEC).eval()
    plain = model.transcribe(list(audio), no_speech_threshold=1.0, **options)
    timed = model.transcribe(list(audio), no_speech_threshold=1.0, word_timestamps=1, **options)
    assert [t.text for t in plain] == [t.text for t in timed]
    assert all(segment.words is None for t in plain for segment in t.segments)
    found = [segment for t in timed for segment in t.segments]
    for segment in found:
        assert segment.words and "".join(word.word for word in segment.words) == segment.text.rstrip()
        assert_in_order(segment.words, segment.start, segment.end)
    assert found and np.all([segment.end <= 20_000 / 16_000 for segment in found])
    model.confidence = asdict(Calibration(bias=2.0, logprob=0.0, entropy=0.0, margin=0.0, worst=0.0))
    judged = model.transcribe(list(audio), no_speech_threshold=1.0, word_timestamps=1, **options)
    sure = {word.probability for t in judged for segment in t.segments for word in segment.words or []}
    assert sure == {1 / (1 + np.exp(-2.0))}
    assert not sure & {word.probability for segment in found for word in segment.words or []}
