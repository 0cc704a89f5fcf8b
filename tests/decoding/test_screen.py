"""Lines come in the order of the inputs, whatever order the transcripts come in."""

from pathlib import Path

import pytest
import soundfile
import torch

from rwkv_speech.batch import BadSample
from rwkv_speech.data.inputs import Input
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.decoding.screen import Screen


def transcript(*texts: str, cut: bool = False) -> Transcript:
    segments = [Segment(i, float(i), i + 0.5, x, [], 0.0, -0.1, 1.0, 0.0, cut) for i, x in enumerate(texts)]
    return Transcript(" ".join(texts), segments, float(len(texts)), "asr")


def inputs(*names: str) -> list[Input]:
    return [Input(name, name) for name in names]


def test_lines_stand_in_the_order_of_the_inputs(capsys: pytest.CaptureFixture[str]):
    screen = Screen(inputs("a.wav", "b\nc.wav", "d.wav"), num_faults=0, verbose=False)
    screen.show(2, transcript("three\nlines"))
    screen.show(1, BadSample(1, "b", "b: broken"))
    assert capsys.readouterr().out == ""
    screen.show(0, transcript("one", cut=True))
    shown = capsys.readouterr()
    assert shown.out == "a.wav\tone\nd.wav\tthree lines\n"
    warning = "warning: a.wav: the text was cut off; raise --max_new_tokens"
    assert shown.err.splitlines() == [warning, "error: b: broken"]
    screen.close()
    assert screen.num_skipped == 1 and capsys.readouterr().err.startswith("2 files, 0.00 h of audio, 0.0 times real ")


def test_a_text_stands_alone_if_nothing_else_was_named(capsys: pytest.CaptureFixture[str]):
    for num_faults, expected in ((0, "one\n"), (1, "a.wav\tone\n")):
        screen = Screen(inputs("a.wav"), num_faults, verbose=False)
        screen.show(0, transcript("one"))
        screen.close()
        assert capsys.readouterr().out == expected and screen.num_skipped == num_faults


def test_verbose_gives_the_times_of_segments(capsys: pytest.CaptureFixture[str]):
    screen = Screen(inputs("a.wav", "b.wav"), num_faults=0, verbose=True)
    for number in range(2):
        screen.show(number, transcript("one", "two"))
    lines = ["[00:00.000 --> 00:00.500] one", "[00:01.000 --> 00:01.500] two"]
    assert capsys.readouterr().out.splitlines() == ["a.wav", *lines, "b.wav", *lines]


def test_what_waits_is_shown_at_an_interruption(capsys: pytest.CaptureFixture[str]):
    screen = Screen(inputs("a.wav", "b.wav"), num_faults=0, verbose=False)
    screen.show(1, transcript("two"))
    screen.close()
    assert capsys.readouterr().out == "b.wav\ttwo\n"


def test_the_bar_counts_seconds_of_audio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    soundfile.write(tmp_path / "a.flac", torch.zeros(16_000 * 90).numpy(), 16_000)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    found = [Input(str(tmp_path / "a.flac"), "a"), Input(str(tmp_path / "a.flac"), "a@80", 80.0, 5.0)]
    screen = Screen(found, num_faults=0, verbose=False)
    assert [sum(map(len, screen.watched(x))) / 16_000 for x in found] == [90.0, 5.0]
    screen.close()
    shown = capsys.readouterr().err
    assert " of 95 s of audio" in shown and "2 files" not in shown and "0 files, 0.03 h of audio" in shown
