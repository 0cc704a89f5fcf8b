"""Output files are those of whisper's writers, and other people's parsers read every one of them back."""

import csv
import html
import io
import json
import random
from pathlib import Path

import av
import pytest
import srt
import webvtt
from webvtt.models import Timestamp

from rwkv_speech.config import OUTPUT_FORMATS
from rwkv_speech.decoding.results import Segment, Transcript, Word
from rwkv_speech.decoding.writers import Layout, clock, render, write_transcript


def segment(number: int, start: float, end: float, text: str, words: list[Word] | None = None) -> Segment:
    return Segment(number, start, end, text, [5, 6], 0.0, -0.25, 1.5, 0.125, False, words)


def transcript(*segments: Segment) -> Transcript:
    text = " ".join(found.text.strip() for found in segments)
    return Transcript(text, list(segments), segments[-1].end if segments else 0.0, "asr", "en", 0.5)


def of_texts(texts: list[str], start: float = 0.0) -> Transcript:
    return transcript(*(segment(i, start + 2 * i, start + 2 * i + 1.5, text) for i, text in enumerate(texts)))


def without_words(found: Transcript) -> Transcript:
    return transcript(*(segment(x.id, x.start, x.end, x.text) for x in found.segments))


def words(*rows: tuple[str, float, float]) -> list[Word]:
    return [Word(*row, 0.5) for row in rows]


SAMPLE = transcript(
    segment(
        0, 0.0, 2.5, " The weather is good --> today.",
        words((" The", 0.1, 0.3), (" weather", 0.3, 0.9), (" is", 0.9, 1.1), (" good", 1.1, 1.5),
              (" today.", 1.6, 2.4)),
    ),
    segment(1, 3599.9996, 7201.25, " 天气\t很好", words((" 天气", 3600.5, 3601.0), ("很好", 7200.0, 7201.2))),
)  # fmt: skip

# What the writers of whisper 20250625 make of SAMPLE.
WHISPER = [
    ("txt", None, "The weather is good --> today.\n天气 很好\n"),  # there with a tab
    ("tsv", None, "start\tend\ttext\n0\t2500\tThe weather is good --> today.\n3600000\t7201250\t天气 很好\n"),
    (
        "srt",
        None,
        "1\n00:00:00,000 --> 00:00:02,500\nThe weather is good -> today.\n\n"
        "2\n01:00:00,000 --> 02:00:01,250\n天气 很好\n\n",
    ),
    (
        "vtt",
        Layout(),
        "WEBVTT\n\n00:00.100 --> 00:02.400\nThe weather is good today.\n\n01:00:00.500 --> 02:00:01.200\n天气很好\n\n",
    ),
    (
        "srt",
        Layout(max_words_per_line=2),
        "1\n00:00:00,100 --> 00:00:00,900\nThe weather\n\n2\n00:00:00,900 --> 00:00:01,500\nis good\n\n"
        "3\n00:00:01,600 --> 00:00:02,400\ntoday.\n\n4\n01:00:00,500 --> 02:00:01,200\n天气很好\n\n",
    ),
    (
        "vtt",
        Layout(max_line_width=12),
        "WEBVTT\n\n00:00.100 --> 00:02.400\nThe weather\nis good\ntoday.\n\n"
        "01:00:00.500 --> 02:00:01.200\n天气很好\n\n",
    ),
    (
        "srt",
        Layout(max_line_width=12, max_line_count=2),
        "1\n00:00:00,100 --> 00:00:01,500\nThe weather\nis good\n\n2\n00:00:01,600 --> 00:00:02,400\ntoday.\n\n"
        "3\n01:00:00,500 --> 01:00:01,000\n天气\n\n4\n02:00:00,000 --> 02:00:01,200\n很好\n\n",
    ),
]


@pytest.mark.parametrize(("form", "layout", "expected"), WHISPER)
def test_render_gives_what_whisper_writes(form: str, layout: Layout | None, expected: str):
    found = SAMPLE if layout is not None else without_words(SAMPLE)
    assert render(found, form, layout or Layout()) == expected


def srt_cues(content: str) -> list[tuple[float, float, str]]:
    return [(x.start.total_seconds(), x.end.total_seconds(), x.content) for x in srt.parse(content)]


def milliseconds(time: str) -> int:
    return Timestamp.from_string(time).in_milliseconds()


def vtt_cues(content: str) -> list[tuple[float, float, str]]:
    found, ms = webvtt.from_buffer(io.StringIO(content)), milliseconds
    return [(ms(x.start) / 1000, ms(x.end) / 1000, html.unescape(x.raw_text)) for x in found]


def ffmpeg_cues(content: str, form: str) -> list[tuple[float, float, str]]:
    cues = []
    with av.open(io.BytesIO(content.encode()), format=form) as container:
        for packet in container.demux(container.streams.subtitles[0]):
            if packet.pts is not None:
                start, end = packet.pts / 1000, (packet.pts + packet.duration) / 1000
                lines = [rect.dialogue.decode() for rect in packet.decode()]
                cues.append((start, end, "\n".join(lines)))
    return cues


HARD = ["a --> b", "00:00:01,000 --> 00:00:02,000", "one\n\ntwo\r\nthree\u2028four\x85five", "7", "NOTE x", "WEBVTT",
        "a\tb\x00c\x1bd", "--->-->", "AT&T <b>bold & a < b", '"to be', "STYLE", "你好，世界", "עברית",
        "\ufffd\U0001f600", "X-TIMESTAMP-MAP=1", "- said he", "&lt;", "\v\f x \x1c", "REGION", "{\\an8}"]  # fmt: skip


def one_line(text: str) -> str:
    """What is to be read back: line breaks and what is no text become blanks, an arrow is shortened."""
    return flat(kept(text).replace("--->", "->").replace("-->", "->"))


def kept(text: str) -> str:
    return "".join(x if x.isprintable() else " " for x in text)


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("start", [0.0, 3590.0, 359_990.0], ids=["start", "an hour", "100 hours"])
def test_no_text_breaks_a_file(start: float):
    found = of_texts(HARD, start)
    times = [(start + 2 * i, start + 2 * i + 1.5) for i in range(len(HARD))]
    for cues in (srt_cues(render(found, "srt")), vtt_cues(render(found, "vtt"))):
        assert [cue[:2] for cue in cues] == times
        assert [flat(cue[2]) for cue in cues] == list(map(one_line, HARD))
    for form, name in (("srt", "srt"), ("vtt", "webvtt")):
        cues = ffmpeg_cues(render(found, form), name)
        assert [cue[:2] for cue in cues] == times
        # Its reader of SRT takes <b> and {\an8} for marks; so do players.
        marks = [i for i, text in enumerate(HARD) if set("<{&") & set(text)] if form == "srt" else [len(HARD) - 1]
        assert [flat(cue[2]) for i, cue in enumerate(cues) if i not in marks] == [
            one_line(text) for i, text in enumerate(HARD) if i not in marks
        ]
    texts = [flat(kept(text)) for text in HARD]
    rows = list(csv.DictReader(io.StringIO(render(found, "tsv")), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [(int(row["start"]) / 1000, int(row["end"]) / 1000) for row in rows] == times
    assert [flat(row["text"]) for row in rows] == texts
    assert [flat(line) for line in render(found, "txt").split("\n")[:-1]] == texts
    assert [x["text"] for x in json.loads(render(found, "json"))["segments"]] == HARD


def test_no_text_by_words_breaks_a_file():
    rng = random.Random(1)
    for _ in range(100):
        at, segments = 0.0, []
        for number in range(rng.randrange(4)):
            row = []
            for _ in range(rng.randrange(8)):
                start = at + rng.choice([0.0, 0.0001, 0.3, 4.0])
                at = start + rng.choice([0.0002, 0.2])
                row.append(Word(rng.choice(["", " "]) + rng.choice([*HARD, "", "\n"]), start, at, 0.5))
            segments.append(segment(number, row[0].start if row else at, at + 0.001, "".join(x.word for x in row), row))
        layout = rng.choice([Layout(), Layout(8), Layout(20, 2), Layout(None, None, 3)])
        found = transcript(*segments)
        shown = [one_line(x.word) for s in segments for x in s.words or [] if one_line(x.word)]
        for cues in (srt_cues(render(found, "srt", layout)), vtt_cues(render(found, "vtt", layout))):
            assert all(start < end for start, end, _ in cues) and all(text.strip() for _, _, text in cues)
            assert [start for start, _, _ in cues] == sorted(start for start, _, _ in cues)
            text = "".join(text for _, _, text in cues)
            assert flat(text).replace(" ", "") == "".join(shown).replace(" ", "")


def test_a_cue_has_a_length_and_a_text():
    found = transcript(segment(0, 1.0, 1.0002, "a"), segment(1, 2.0, 3.0, " \n"), segment(2, 4.0, 5.0, "b"))
    assert srt_cues(render(found, "srt")) == [(1.0, 1.001, "a"), (4.0, 5.0, "b")]
    assert render(transcript(), "srt") == "" and render(transcript(), "vtt") == "WEBVTT\n\n"
    assert ffmpeg_cues(render(transcript(), "vtt"), "webvtt") == []


def test_a_segment_without_words_keeps_its_text_among_those_that_have_them():
    found = transcript(SAMPLE.segments[0], segment(1, 3.0, 4.0, " no times", []))
    assert srt_cues(render(found, "srt", Layout(max_words_per_line=4)))[-1] == (3.0, 4.0, "no times")


def test_json_has_the_fields_of_whisper():
    found = json.loads(render(SAMPLE, "json"))
    assert {"text", "segments", "language"} <= set(found)
    theirs = {"id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio",
              "no_speech_prob", "words"}  # fmt: skip
    assert theirs <= set(found["segments"][0]) and found["segments"][1]["seek"] == 359_999
    assert found["segments"][0]["words"][1] == {"word": " weather", "start": 0.3, "end": 0.9, "probability": 0.5}
    assert (found["duration"], found["removed_seconds"], found["language"]) == (7201.25, 0.5, "en")
    assert "words" not in json.loads(render(of_texts(["a"]), "json"))["segments"][0]


def test_clock():
    assert [clock(x) for x in (0, 59.9996, 3599.9996, 360_000)] == [
        "00:00.000", "01:00.000", "01:00:00.000", "100:00:00.000",
    ]  # fmt: skip
    assert clock(1.5, ",", always_hours=True) == "00:00:01,500"


def test_write_transcript_puts_every_format_in_place(tmp_path: Path):
    stem = tmp_path / "new" / "talk.v1"
    for _ in range(2):  # the second time over what is there
        files = write_transcript(SAMPLE, stem, OUTPUT_FORMATS)
    assert [path.name for path in files] == [f"talk.v1.{form}" for form in OUTPUT_FORMATS]
    assert sorted(files) == sorted(stem.parent.iterdir())
    assert all(
        path.read_bytes().decode() == render(SAMPLE, form) for path, form in zip(files, OUTPUT_FORMATS, strict=True)
    )
