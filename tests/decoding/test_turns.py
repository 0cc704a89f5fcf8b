"""A spoken conversation: where turns end, what is answered, and what is heard while an answer is spoken."""

import io
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding.long_audio import Segmenter
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.session import Session
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.turns import Speaker, Turns, converse_live, synthesised_by
from rwkv_speech.decoding.vad import WINDOW, Vad
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.predict import main
from rwkv_speech.synthetic.espeak import Synthesizer, Voice

RATE = 16_000


@pytest.fixture
def vad_by_loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(vad: Vad, samples: Tensor) -> Tensor:
        return torch.tensor([float(x.square().mean() > 1e-6) for x in samples.split(WINDOW)])

    monkeypatch.setattr(Vad, "block", block)


def spoken(*seconds: float) -> np.ndarray:
    """Noise and silence in turn, 16-bit; silence first."""
    draw = np.random.default_rng(0)
    parts = [
        (3_000 * (number % 2) * draw.standard_normal(round(RATE * x))).astype(np.int16)
        for number, x in enumerate(seconds)
    ]
    return np.concatenate(parts)


def turns_of(sound: np.ndarray, size: int = 1_000, **more: Any) -> list[Tensor]:
    turns = Turns(Segmenter(5.0), 0.7, RATE, **more)
    found = [turn for start in range(0, len(sound), size) for turn in turns.push(sound[start : start + size])]
    return found + turns.finish()


def test_a_long_silence_ends_a_turn_and_a_short_one_does_not(vad_by_loudness: None):
    sound = spoken(0.5, 1.0, 0.45, 1.0, 1.2, 2.0, 0.1)
    first, second = turns_of(sound)
    assert 2.0 <= len(first) / RATE < 2.0 + 0.45 and 2.0 <= len(second) / RATE < 2.4
    kept = torch.cat([first, second]).square().sum()
    assert torch.isclose(kept, torch.from_numpy(sound / 2**15).square().sum().float(), rtol=0.01)
    for size in (77, 50_000):
        again = turns_of(sound, size)
        assert [len(x) for x in again] == [len(first), len(second)]
        assert all(torch.equal(x, y) for x, y in zip(again, (first, second), strict=True))
    assert turns_of(spoken(3.0)) == []


def test_a_turn_without_an_end_is_answered_in_parts(vad_by_loudness: None):
    found = turns_of(spoken(0.5, 14.0, 1.0), most_seconds=6.0)
    assert len(found) >= 2 and max(map(len, found)) <= 6 * RATE


def test_a_turn_ends_while_the_microphone_goes_on(vad_by_loudness: None):
    turns = Turns(Segmenter(5.0), 0.7, RATE)
    assert turns.push(spoken(0.5, 1.0, 0.6)) == []
    assert len(turns.push(np.zeros(RATE // 2, np.int16))) == 1
    assert turns.push(np.zeros(3 * RATE, np.int16)) == []


def conversation(model: SpeechLM, sound: np.ndarray, speaker: Speaker | None = None) -> tuple[str, int]:
    out, saved = io.StringIO(), list[int]()
    session, options = Session(model, "asr"), Options.given(0.0, max_new_tokens=6)
    source: Any = io.BufferedReader(io.BytesIO(sound.tobytes()))  # type: ignore[arg-type]
    turns = Turns(Segmenter(5.0), 0.7, RATE)
    converse_live(session, options, turns, source, out, speaker, lambda: saved.append(session.num_turns))
    return out.getvalue(), len(saved)


def test_each_turn_is_answered_and_remembered(model: SpeechLM, vad_by_loudness: None):
    sound = spoken(0.5, 1.0, 1.2, 1.5, 1.2, 1.0)
    session, said = Session(model, "asr"), turns_of(sound)
    expected = [session.say(turn, temperature=0.0, max_new_tokens=6).text for turn in said]
    shown, num_saved = conversation(model, sound)
    lines = ["".join(x if x.isprintable() else " " for x in text) for text in expected]
    assert shown.split("\n") == [*lines, ""] and num_saved == len(said) == 3
    assert expected[2] != Session(model, "asr").say(said[2], temperature=0.0, max_new_tokens=6).text


def command(*words: str) -> str:
    return shlex.join([sys.executable, "-c", *words])


def test_another_program_speaks_and_another_plays(tmp_path: Path):
    copy = command('import sys; open(sys.argv[1], "ab").write(sys.stdin.buffer.read())', str(tmp_path / "played"))
    synthesise = synthesised_by(command("import sys; sys.stdout.write(sys.stdin.read().upper())"))
    speaker = Speaker(synthesise, copy)
    with (tmp_path / "input").open("wb+") as source:
        source.write(b"abc")
        source.seek(0)
        for text in ("one ", " ", "two"):
            speaker.say(text, source)
        assert source.read() == b"abc"  # a file waits
    assert (tmp_path / "played").read_bytes() == b"ONE TWO"


def test_a_microphone_is_not_heard_while_an_answer_is_spoken():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb", buffering=0) as microphone:
        is_spoken = threading.Event()

        def hum() -> None:  # more than a pipe holds
            while not is_spoken.wait(0.01):
                microphone.write(b"echo" * 2_000)

        humming = threading.Thread(target=hum)
        humming.start()
        Speaker(lambda text: b"", command("import time; time.sleep(0.5)")).say("hello", source)
        is_spoken.set()
        humming.join(10)
        microphone.write(b"speech")
        heard = os.read(reading, 1 << 20)
        assert not humming.is_alive() and heard.endswith(b"speech") and len(heard) < 30_000


@pytest.mark.parametrize("words", ["no-such-program", "", "'", command("exit(3)")])
def test_programs_that_fail_are_named(words: str, tmp_path: Path):
    with (tmp_path / "input").open("wb+") as source:
        with pytest.raises(UserError, match="--play: found"):
            Speaker(lambda text: b"", words).say("a", source)
        with pytest.raises(UserError, match="--speak: found"):
            Speaker(synthesised_by(words), "true").say("a", source)


def said_by_espeak(texts: Sequence[str]) -> bytes:
    silence, synthesizer = np.zeros(RATE, np.int16), Synthesizer()
    parts = [(20_000 * synthesizer.say(text, Voice()).waveform().numpy()).astype(np.int16) for text in texts]
    return np.concatenate([x for part in parts for x in (part, silence)]).tobytes()


def test_the_command_hears_answers_speaks_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Real speech and its VAD, on the embedded default with untrained weights."""
    SpeechLM.build(Parts("tiny"), task_names=["chat"]).save(tmp_path / "last.safetensors")
    (tmp_path / "speech").write_bytes(said_by_espeak(["the dog is called max", "what is my dog called"]))
    play = command('import sys; open(sys.argv[1], "ab").write(sys.stdin.buffer.read(4))', str(tmp_path / "played"))
    words = ["--proj_dir", str(tmp_path), "--stream", "-", "--chat", "1", "--temperature", "0", "--device", "cpu"]
    words += ["--max_new_tokens", "6", "--session", str(tmp_path / "talk")]
    for number, speak in enumerate((["--speak", "espeak", "--play", play], [])):
        with (tmp_path / "speech").open("rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            assert main([*words, *speak]) == 0
            captured = capsys.readouterr()
        assert len(captured.out.splitlines()) == 2 and ("synthetic voice" in captured.err) == bool(speak)
        model = SpeechLM.from_pretrained(tmp_path)
        assert Session.load(tmp_path / "talk", model).num_turns == 2 * (number + 1)
    assert (tmp_path / "played").read_bytes() == b"RIFF" * sum(map(bool, captured.out.split("\n")))


@pytest.mark.parametrize("more", [["--vad", "none"], ["--commit", "word"], ["--pace", "1"], ["--word_timestamps", "1"]])
def test_flags_that_make_no_conversation_are_refused(more: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["--stream", "-", "--chat", "1", *more]) == 2
    assert capsys.readouterr().err.startswith("error: --")
