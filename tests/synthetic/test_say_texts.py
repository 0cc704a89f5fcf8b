import json
import shlex
import sys
from pathlib import Path

import pytest
import soundfile

from rwkv_speech.synthetic.say_texts import main
from rwkv_speech.synthetic.texts import read_texts

# Speaks each letter for 0.1 s, but no long line.
CODE = """import sys, numpy, soundfile
text = (sys.argv[2:] or [sys.stdin.read()])[0]
len(text) > 30 and (print("too long", file=sys.stderr), sys.exit(3))
soundfile.write(sys.argv[1], numpy.full(800 * len(text), 0.5), 8000)"""
COMMAND = shlex.join([sys.executable, "-c", CODE]).replace("\n", ";")

ENGLISH = [
    "Good morning.",
    "- - ...",
    "Press 1 to go on",
    "<b>never</b>",
    "One two three four",
    "Hello",
    "Don't wait, please!",
]
SPANISH = ["Buenos días.", "¡ . !", "Pulse 1 para seguir", "<b>nunca</b>", "One two three four", "Hola", "¡No!"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for lang, lines in (("en", ENGLISH), ("es", SPANISH), ("de", ["Guten Morgen allerseits"])):
        (tmp_path / "texts" / lang).mkdir(parents=True)
        (tmp_path / "texts" / lang / "a.txt").write_text("\n".join(lines * 2), encoding="utf-8")
    return tmp_path / "texts"


def test_plain_lines_are_spoken_once_in_their_language(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "spoken"
    assert main(["--texts", str(texts), "--out", str(out), "--count", "9", "--most_words", "4"]) == 0
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    kept = {row for lines in read_texts(str(texts)) for row in lines.kept().rows}
    # Not what is one word, has digits, signs or no letters, is not translated, or is of a language without voices.
    expected = {("en", "Good morning."), ("en", "Don't wait, please!"), ("es", "Buenos días.")}
    expected = {(lang, text) for lang, text in expected if any(text in row for row in kept)}
    assert expected and {(row["lang"], row["text"]) for row in rows} == expected and len(rows) == len(expected)
    for row in rows:
        info = soundfile.info(out / row["audio_filepath"])
        assert info.samplerate == 16_000 and info.duration == pytest.approx(row["duration"], abs=1e-3)
        assert row["task"] == "asr" and row["speaker"].startswith(row["lang"]) and row["duration"] > 0.3
    assert f"{len(rows)} lines" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main(["--texts", str(texts), "--out", str(again), "--count", "9", "--most_words", "4"]) == 0
    assert [json.loads(line)["text"] for line in (again / "train.jsonl").read_text().splitlines()] == [
        row["text"] for row in rows
    ]


def test_texts_without_a_line_to_speak_are_an_error(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--texts", str(texts / "de"), "--out", str(tmp_path / "spoken")]) == 2
    assert "holds no line of 2 to 25 words" in capsys.readouterr().err


def test_other_voices_take_turns(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "voices").write_text(f"en {COMMAND} {{wav}} {{text}}\nes {COMMAND} {{wav}}\n")
    out = tmp_path / "spoken"
    flags = ["--texts", str(texts), "--voices", str(tmp_path / "voices"), "--most_words", "4"]
    assert main([*flags, "--out", str(out), "--seed", "2"]) == 0
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["speaker"] in ("en-1", "es-2")]
    assert mine and len(mine) < len(rows)
    for row in mine:  # 0.1 s a letter, and as if by another person
        assert row["lang"] == row["speaker"][:2] and 0.085 < row["duration"] / len(row["text"]) < 0.118
    capsys.readouterr()
    (tmp_path / "voices").write_text(f"en {COMMAND} {{wav}} 'Not a {{text}}, but longer'\n")
    assert [main([*flags, "--out", str(tmp_path / str(seed)), "--seed", str(seed)]) for seed in range(3)].count(2)
    assert "en-1: " in (said := capsys.readouterr().err) and "ended with 3: too long" in said
