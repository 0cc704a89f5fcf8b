"""Words that are committed while they are said: with scripted readings, and on random weights."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding import forks, word_stream
from rwkv_speech.decoding.agreement import Agreement
from rwkv_speech.decoding.forks import Reading
from rwkv_speech.decoding.long_audio import Piece
from rwkv_speech.decoding.results import Segment, Word
from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.decoding.streaming import Committed, Event, Partial
from rwkv_speech.decoding.timestamps import split_words
from rwkv_speech.decoding.transcribe import SpeechLM, watched_stream
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.decoding.word_stream import WordListener, num_covered
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcHead, CtcSpec

RATE = 16_000


@pytest.fixture(scope="module")
def with_head(model: SpeechLM) -> Iterator[SpeechLM]:
    torch.manual_seed(0)
    model.ctc = CtcHead(model.encoder.width, CtcSpec(" abcdefghiklmnopqrstuvwxyz", hidden=8)).eval()
    with torch.no_grad():
        model.lm.head.weight[257:] *= 30  # whole words, else there is hardly a blank
    yield model
    model.ctc = None


@dataclass
class Script:
    """Stands for an open piece: a text for each reading, each word of which takes 0.2 s."""

    texts: list[str]
    given: list[str]

    def read(self, piece: Piece, committed: str = "", draft: str = "") -> Reading:
        self.given.append(committed)
        text = self.texts.pop(0)
        assert text.startswith(committed)
        return Reading(text, Hypothesis((), (-0.1,), (0.1,), False), torch.zeros(len(piece.waveform), 27))


def times(text: str, log_probs: Tensor, start: float, end: float) -> list[Word]:
    return [Word(x, start + 0.2 * i, start + 0.2 * (i + 1), 0.9) for i, x in enumerate(split_words(text))]


@pytest.fixture
def script(with_head: SpeechLM, monkeypatch: pytest.MonkeyPatch) -> tuple[WordListener, Script]:
    script = Script([], [])
    monkeypatch.setattr(forks, "OpenPiece", lambda *_: script)
    monkeypatch.setattr(word_stream.guards, "no_speech_prob", lambda *_: 0.0)
    listener = WordListener(with_head, word_stream.Options.given(), "asr", 0.5)
    listener._times.words = times  # type: ignore[method-assign]
    return listener, script


def piece(start: float, end: float) -> Piece:
    return Piece(round(start * RATE), torch.zeros(round((end - start) * RATE)))


def told(events: list[Event]) -> list[str]:
    return [f"{'+' if isinstance(event, Committed) else '?'}{event.text}" for event in events]


def test_words_are_committed_once_and_the_segment_holds_them(script: tuple[WordListener, Script]):
    listener, readings = script
    readings.texts = ["one", "one two", "one two three", "one two tree four", "one two tree four five."]
    found = [told(listener.hear(piece(1.0, 1.6 + 0.2 * number))) for number in range(4)]
    [end] = listener.close(piece(1.0, 3.0))
    committed = [text[1:] for events in found for text in events if text[0] == "+"]
    assert committed[0] == "one" and len(committed) == 2 and isinstance(end, Committed) and end.segment
    assert "".join(committed) + end.text == end.segment.text == "one two tree four five."
    assert found == [["?one"], ["+one", "? two"], ["+ two", "? three"], ["? tree four"]]
    assert [word.word for word in end.segment.words or []] == ["one", " two", " tree", " four", " five."]
    assert (end.segment.id, end.segment.start, end.segment.end) == (0, 1.0, 3.0)
    # Each reading was given what was committed until then.
    assert readings.given[-1] == "".join(committed) and readings.given == sorted(readings.given, key=len)


def commit(listener: WordListener, readings: Script, text: str, start: float) -> list[Event]:
    """Have a text committed that is 0.2 s a word long."""
    readings.texts = [text] * 2
    return [event for _ in range(2) for event in listener.hear(piece(start, start + 9.0))]


def test_words_behind_the_end_of_a_piece_are_the_first_of_the_next(script: tuple[WordListener, Script]):
    listener, readings = script
    assert "+a b c d e" in told(commit(listener, readings, "a b c d e", 0.0))
    readings.texts = ["a b c d e f g"]
    [end] = listener.close(piece(0.0, 0.65))
    # Nothing can come between them any more.
    assert isinstance(end, Committed) and end.text == "" and end.segment and end.segment.text == "a b c"
    assert told(commit(listener, readings, "d e f", 0.65))[-2:] == ["+ f", "?"]
    readings.texts = ["d e f g"]
    [end] = listener.close(piece(0.65, 9.0))
    assert isinstance(end, Committed) and end.text == " g" and end.segment and end.segment.text == "d e f g"
    assert [word.word for word in end.segment.words or []] == ["d", " e", " f", " g"]


def test_words_of_a_piece_that_is_dropped_stay(script: tuple[WordListener, Script]):
    listener, readings = script
    commit(listener, readings, "a b", 0.0)
    [end] = listener.hear(None)
    assert isinstance(end, Committed) and (end.text, end.words) == ("", [])
    assert end.segment and (end.segment.text, end.segment.start, end.segment.end) == ("a b", 0.0, 0.4)
    assert "+ c" in told(commit(listener, readings, "c", 20.0))  # joined to what was committed before
    readings.texts = ["x"]
    found = listener.hear(piece(40.0, 41.0))
    assert told(found) == ["+", "? x"] and isinstance(found[0], Committed) and found[0].segment


def test_what_a_reading_adds_to_a_committed_word_comes_with_the_next(script: tuple[WordListener, Script]):
    listener, readings = script
    assert "+well" in told(commit(listener, readings, "well", 0.0))
    assert "+, yes" in told(commit(listener, readings, "well, yes", 0.0))
    readings.texts = ["well, yes."]
    [end] = listener.close(piece(0.0, 9.0))
    assert isinstance(end, Committed) and end.text == "." and end.segment and end.segment.text == "well, yes."


def test_with_a_way_to_decode_the_segment_says_what_the_whole_piece_does(script: tuple[WordListener, Script]):
    listener, readings = script
    heard = ["a b", "a c", "", "d e", "a c d. e", "x y z"]

    def decode(piece: Piece) -> list[Segment]:
        text = heard.pop(0)
        return [Segment(9, 0.0, 1.0, text, [], 0.0, 0.0, 1.0, 0.0)] if text else []

    listener._decode = decode
    commit(listener, readings, "a b", 0.0)
    for number, text in enumerate(("a b", "a c")):  # what was committed is not taken back
        [end] = listener.close(piece(0.0, 9.0))
        assert isinstance(end, Committed) and end.segment and end.text == ""
        assert (end.segment.text, end.segment.id) == (text, number)
        commit(listener, readings, "a b", 0.0)
    assert listener.close(piece(0.0, 9.0)) == []
    commit(listener, readings, "d", 20.0)
    assert told(listener.close(piece(20.0, 29.0))) == ["+ e"]
    commit(listener, readings, "a b d", 40.0)
    assert told(listener.close(piece(40.0, 49.0))) == ["+ e"]  # what the whole says behind it
    commit(listener, readings, "a", 50.0)
    assert told(listener.close(piece(50.0, 59.0))) == ["+ y z"]
    commit(listener, readings, "d", 60.0)
    assert listener.hear(None) == []  # of a piece that is dropped nothing is told


def test_a_piece_in_two_adds_what_lies_behind_the_words_that_were_committed(script: tuple[WordListener, Script]):
    listener, readings = script
    texts = ["a b c", "d e."]
    listener._decode = lambda piece: [
        Segment(9, float(i), i + 1.0, text, list(text.encode()), 0.0, 0.0, 1.0, 0.0, logprobs=(-0.5,) * len(text))
        for i, text in enumerate(texts)
    ]
    listener._tokenizer = Bytes()  # type: ignore[assignment]
    commit(listener, readings, "a b c d", 0.0)
    ends = [event for event in listener.close(piece(0.0, 9.0)) if isinstance(event, Committed)]
    assert [(end.text, bytes(token for token, _ in end.logprobs)) for end in ends] == [("", b""), (" e.", b" e.")]
    commit(listener, readings, "a b c d e", 20.0)
    assert told(listener.close(piece(20.0, 29.0))) == ["+", "+."]
    assert told(listener.close(piece(40.0, 49.0))) == ["+ a b c", "+ d e."]


class Bytes:
    """A token is a byte."""

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        return bytes(tokens)


@pytest.mark.parametrize(
    ("known", "text", "behind"),
    [
        ("", "one two", "one two"),
        ("one", "one two", " two"),
        ("one to", "one two three", " three"),
        ("one", "well, one two", " two"),
        ("oh one", "one two", " two"),
        ("One two,", "one two three", " three"),
        ("one two three", "one", ""),
        ("a b", "", ""),
        ("语言", "语音很好", "很好"),
    ],
)
def test_what_lies_behind_words_that_are_known(known: str, text: str, behind: str):
    assert text[num_covered(known, text) :] == behind


@pytest.fixture(scope="module")
def speech() -> Tensor:
    """Two bursts of noise of changing colour and loudness; to random weights speech is no more than that."""
    draw = torch.Generator().manual_seed(2)
    said = []
    for seconds in (1.2, 1.6):
        noise = torch.randn(round(RATE * seconds), generator=draw)
        colour = torch.linspace(-0.9, 0.9, len(noise)) * noise.roll(1)
        said.append(0.1 * (noise + colour) * (torch.arange(len(noise)) / 1500).sin())
    return torch.cat([x for waveform in said for x in (waveform, torch.zeros(9_000))])


def heard(model: SpeechLM, parts: list[Tensor]) -> list[Event]:
    stream = model.stream("word", hold=0.1, max_new_tokens=9, vad="none", max_segment=2.5, logprob_threshold=-100.0)
    return [*(event for part in parts for event in stream.push(part)), *stream.finish()]


def check(model: SpeechLM, speech: Tensor, count: int) -> None:
    """Events are the same for any parts; committed text only grows, and is that of the segments."""
    expected, rng = heard(model, [speech]), random.Random(0)
    assert sum(isinstance(event, Committed) and event.segment is None for event in expected) >= 1
    assert any(isinstance(event, Partial) and event.text for event in expected)
    committed = [event for event in expected if isinstance(event, Committed)]
    segments: list[Segment] = [event.segment for event in committed if event.segment]
    assert "".join(event.text for event in committed).split() == " ".join(x.text for x in segments).split()
    assert len(segments) >= 2 and [segment.id for segment in segments] == list(range(len(segments)))
    for segment in segments:
        assert "".join(word.word for word in segment.words or []) == segment.text
    for _ in range(count):
        longest = round(RATE * 0.02 * 250 ** rng.random())
        sizes = [rng.randint(RATE // 50, max(longest, RATE // 50)) for _ in range(len(speech) // (RATE // 50))]
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1) if sum(sizes[:i]) < len(speech)]
        parts = [speech[a:b] for a, b in zip(bounds, [*bounds[1:], len(speech)], strict=True)]
        assert heard(model, parts) == expected


class Eager(Agreement):
    """Asks no second reading: those of random weights do not agree."""

    def add(self, words: Sequence[Word], now: float) -> list[Word]:
        self._before = [word.word for word in words]
        return super().add(words, now)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_stream, "Agreement", Eager)


@pytest.mark.usefixtures("eager")
def test_events_are_the_same_for_any_parts(with_head: SpeechLM, speech: Tensor):
    check(with_head, speech, 3)


@pytest.mark.soak
@pytest.mark.usefixtures("eager")
def test_events_are_the_same_for_a_thousand_chunkings(with_head: SpeechLM, speech: Tensor):
    check(with_head, speech, 1000)


def test_what_words_cannot_be_decoded_with_is_named(with_head: SpeechLM):
    for options in ({"beam": 2}, {"draft": 1}, {"temperature": 0.5}, {"condition_on_previous_text": 1}):
        with pytest.raises(UserError, match="commit: found word with .*, expected none of them"):
            with_head.stream("word", **options)
    with pytest.raises(UserError, match="hold: found -1, expected"):
        with_head.stream("word", hold=-1)
    with pytest.raises(UserError, match="commit: found 'words', expected segment or word"):
        with_head.stream("words")
    head, with_head.ctc = with_head.ctc, None
    with pytest.raises(UserError, match="have no CTC head, .* train one with --ctc 1, or take commit=segment"):
        with_head.stream("word")
    with_head.ctc = head


def test_silence_has_no_words(with_head: SpeechLM, speech: Tensor, monkeypatch: pytest.MonkeyPatch):
    assert any(isinstance(event, Committed) for event in heard(with_head, [speech]))
    for commit in ("word", "segment"):
        stream = with_head.stream(commit, pace=0.25, max_new_tokens=9, vad="none", temperature=0.0)
        monkeypatch.setattr(forks.guards, "no_speech_prob", lambda *_: 0.9)
        assert {event.text for event in [*stream.push(speech), *stream.finish()]} == {""}


def test_segments_are_those_of_the_whole_recording_however_often_it_is_looked_at(with_head: SpeechLM, speech: Tensor):
    given: dict[str, Any] = {"max_new_tokens": 6, "no_speech_threshold": 1.0, "vad": "none", "max_segment": 1.5}
    options = word_stream.Options.given(**given)
    [expected] = with_head.transcribe(speech, **given)
    transcriber, rng = Transcriber(with_head, options, slots=1), random.Random(0)
    seen = set[int]()
    for chance in (0.0, 0.3, 1.0):
        stream = watched_stream(transcriber, with_head, options, RATE, "asr", 0.1, None)
        events = list[Event]()
        for part in speech.split(RATE // 10):
            events += stream.push(part)
            events += stream.look() if rng.random() < chance else []
        committed = [event for event in [*events, *stream.finish()] if isinstance(event, Committed)]
        assert [event.segment for event in committed if event.segment] == expected.segments
        seen.add(len(committed))
    assert len(expected.segments) >= 2 and max(seen) > len(expected.segments)
