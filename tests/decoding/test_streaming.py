"""Streams on random weights: what is committed is what the whole recording gives, whatever the parts are."""

import gc
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_speech.audio import AudioError
from rwkv_speech.decoding.results import Segment
from rwkv_speech.decoding.streaming import Committed, Event, Partial, Stream
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.synthetic.espeak import Synthesizer, Voice

RATE = 16_000
SENTENCES = ("call the man on sunday", "the black dog waits under the green apple", "seven four three")


@pytest.fixture(scope="module")
def model(tiny_parts: Parts, rwkv7_parts: Parts, family: str) -> SpeechLM:
    model = SpeechLM.build(rwkv7_parts if family == "x070" else tiny_parts, task_names=["asr", "emotion", "qa"])
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    return model.eval()


@pytest.fixture(scope="module")
def speech() -> Tensor:
    synthesizer = Synthesizer()
    parts = [torch.zeros(5_000)]
    for number, sentence in enumerate(SENTENCES):
        parts += [synthesizer.say(sentence, Voice("en-us")).waveform(), torch.zeros(3_000 + 7_001 * number)]
    return torch.cat(parts)


def chunks(waveform: Tensor, rng: random.Random) -> list[Tensor]:
    """Parts of 20 ms to 5 s, each chunking with a longest of its own."""
    longest, sizes = round(RATE * 0.02 * 250 ** rng.random()), list[int]()
    while (left := len(waveform) - sum(sizes)) > 0:
        sizes.append(min(left, rng.randint(RATE // 50, max(longest, RATE // 50))))
    return list(waveform.split(sizes))


def events_of(stream: Stream, parts: list[Tensor]) -> list[Event]:
    return [*(event for part in parts for event in stream.push(part)), *stream.finish()]


def segments_of(events: list[Event]) -> list[Segment]:
    return [event.segment for event in events if isinstance(event, Committed) and event.segment]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Committed))


OPTIONS = [
    {"max_segment": 3.0, "temperature": (0.0, 0.4), "best_of": 1},
    {"vad": "none", "max_segment": 1.3, "temperature": 0.0},
    {"condition_on_previous_text": 1, "initial_prompt": "the weather", "logprob_threshold": -100.0},
    {"temperature": (0.0, 0.7), "sampling_seed": 5, "best_of": 2},
    {"beam": 3, "temperature": 0.0},
]


def check(model: SpeechLM, speech: Tensor, options: dict[str, object], count: int) -> None:
    options = {"max_new_tokens": 6, **options}
    [expected] = model.transcribe(speech, **options)
    assert len(expected.segments) >= 2 and expected.text
    rng = random.Random(0)
    for number in range(count):
        parts = chunks(speech, rng)
        events = events_of(model.stream(pace=0.5 if number % 10 == 0 else None, **options), parts)
        assert segments_of(events) == expected.segments
        assert text_of(events) == expected.text
        assert any(isinstance(event, Partial) and event.text for event in events) == (number % 10 == 0)


def test_segments_are_those_of_the_whole_recording_for_any_parts(model: SpeechLM, speech: Tensor):
    check(model, speech, OPTIONS[0], 26)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_segments_are_those_of_the_whole_recording_with_any_options(
    model: SpeechLM, speech: Tensor, options: dict[str, object]
):
    check(model, speech, options, 2)


@pytest.mark.parametrize("family", ["x070"], scope="module")
def test_segments_of_an_rwkv7_model_are_those_of_the_whole_recording(model: SpeechLM, speech: Tensor):
    check(model, speech, OPTIONS[1], 3)


def test_pieces_of_a_task_of_classes_vote_and_its_text_comes_at_the_end(model: SpeechLM, speech: Tensor):
    options = {"max_new_tokens": 1, "temperature": 0.0, "vad": "none", "max_segment": 1.3}
    [expected] = model.transcribe(speech, task="emotion", **options)
    stream = model.stream(pace=0.5, task="emotion", **options)
    before, last = stream.push(speech), stream.finish()
    assert text_of(before) == "" and text_of(last) == expected.text != ""
    assert segments_of([*before, *last]) == expected.segments and len(expected.segments) > 2
    assert {x.text for x in before if isinstance(x, Partial)} >= {expected.text}


def test_a_question_is_answered_once_however_long_its_pauses_are(model: SpeechLM, speech: Tensor):
    options = {"max_new_tokens": 6, "temperature": 0.0}
    [expected] = model.transcribe(speech, task="qa", **options)
    events = events_of(model.stream(task="qa", **options), list(speech.split(RATE // 3)))
    assert segments_of(events) == expected.segments and len(expected.segments) == 1
    assert text_of(events) == expected.text != ""


@pytest.mark.soak
def test_segments_are_those_of_the_whole_recording_for_a_thousand_chunkings(model: SpeechLM, speech: Tensor):
    check(model, speech, {"max_segment": 3.0, "temperature": 0.0}, 1000)


def test_a_segment_is_committed_in_the_pause_behind_it(model: SpeechLM, speech: Tensor):
    stream, heard, found = model.stream(max_new_tokens=6), 0.0, []
    for part in speech.split(RATE // 50):
        heard += len(part) / RATE
        found += [heard - segment.end for segment in segments_of(stream.push(part))]
    # 0.3 s make a pause, up to 0.1 s of it are heard late, and a quarter of a second is looked at at once.
    assert len(found) >= 2 and all(0 < delay <= 0.3 + 0.1 + 0.25 + 0.05 for delay in found)


def test_partial_texts_are_replaced_and_joined_to_what_is_committed(model: SpeechLM, speech: Tensor):
    events = events_of(model.stream(pace=0.25, max_new_tokens=6), [speech])
    first = next(i for i, event in enumerate(events) if isinstance(event, Committed))
    assert first >= 4 and all(not event.text.startswith(" ") for event in events[: first + 1])
    later = [event.text for event in events[first + 1 :] if event.text]
    assert later and all(text.startswith(" ") for text in later)


@pytest.mark.parametrize("rate", [8_000, 44_100, 15_999])
def test_other_rates_are_resampled_the_same_for_any_parts(model: SpeechLM, speech: Tensor, rate: int):
    resampled = torch.nn.functional.interpolate(speech[None, None], size=len(speech) * rate // RATE, mode="linear")
    rng = random.Random(0)
    found = [
        segments_of(events_of(model.stream(sample_rate=rate, max_new_tokens=6), parts))
        for parts in ([resampled[0, 0]], chunks(resampled[0, 0], rng), chunks(resampled[0, 0], rng))
    ]
    assert found[0] == found[1] == found[2]
    [expected] = model.transcribe(speech, max_new_tokens=6)
    assert [x.end for x in found[0]] == pytest.approx([x.end for x in expected.segments], abs=0.05)


def test_samples_are_taken_in_every_form_that_transcribe_takes(model: SpeechLM, speech: Tensor):
    fixed = (speech * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    forms = [fixed, fixed.numpy(), fixed.double() / 2**15, fixed.numpy().astype(np.float32) / 2**15]
    found = [segments_of(events_of(model.stream(max_new_tokens=4), [form])) for form in forms]  # type: ignore[list-item]
    assert found[0] and all(x == found[0] for x in found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 9), np.float32), r"stream: found float32 of shape \(2, 9\), expected samples"),
        (torch.zeros(9, dtype=torch.int32), "stream: found int32"),
        (torch.full((9,), torch.nan), "stream: holds NaN"),
    ],
)
def test_other_samples_are_named_and_leave_the_stream_as_it_was(
    model: SpeechLM, speech: Tensor, wrong: Tensor, message: str
):
    stream = model.stream(max_new_tokens=4)
    before = stream.push(speech[:20_000])
    with pytest.raises(AudioError, match=message):
        stream.push(wrong)
    [expected] = model.transcribe(speech, max_new_tokens=4)
    assert segments_of([*before, *stream.push(speech[20_000:]), *stream.finish()]) == expected.segments


def test_a_stream_of_nothing_and_a_finished_one(model: SpeechLM):
    stream = model.stream()
    assert stream.push(torch.zeros(0)) == [] == stream.finish()
    for call in (stream.finish, lambda: stream.push(torch.zeros(9))):
        with pytest.raises(UserError, match="stream: has been finished"):
            call()


def test_options_are_checked(model: SpeechLM):
    with pytest.raises(UserError, match="--beam: found 0"):
        model.stream(beam=0)
    with pytest.raises(UserError, match="sample_rate: found 0, expected"):
        model.stream(sample_rate=0)
    with pytest.raises(UserError, match="pace: found -1, expected"):
        model.stream(pace=-1)
    with pytest.raises(UserError, match="found no state named 'st'"):
        model.stream(task="st")


def samples_kept() -> int:
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if issubclass(type(x), Tensor))


@pytest.mark.parametrize("vad", ["silero", "none"])
def test_a_long_silence_is_not_kept(model: SpeechLM, vad: str):
    stream = model.stream(pace=1.0, vad=vad, max_segment=2.0, max_new_tokens=1, temperature=0.0)
    stream.push(torch.zeros(5 * RATE))
    before = samples_kept()
    for _ in range(30):
        stream.push(torch.zeros(RATE))
    assert samples_kept() < before + 2 * RATE
