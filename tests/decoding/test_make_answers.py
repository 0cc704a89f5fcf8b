import json
from pathlib import Path
from typing import Any

import pytest

from rwkv_speech.__main__ import main
from rwkv_speech.models.parts import Parts

LINES = [
    {"audio_filepath": "a.flac", "text": "the weather", "lang": "en", "duration": 1.5, "mine": [1, None], "speaker": 7},
    {"audio_filepath": "sub/b.flac", "text": "bueno", "source_text": "the weather is good", "task": "st"},
    {"audio_filepath": "/c.flac", "text": " ", "id": "c"},
    {"audio_filepath": "d.flac", "answer": "mine", "source_text": "is it?"},
    {"audio_filepath": "a.flac", "text": "good", "offset": 2, "prompt": "is"},
]  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(tiny_parts: Parts, data: Path, output: Path, **flags: object) -> int:
    base = {"load_model": tiny_parts.load_model, "vocab_file": tiny_parts.vocab_file, "device": "cpu",
            "data": data, "output": output, "max_new_tokens": 6, **flags}  # fmt: skip
    return main(["make_answers", *(word for name, value in base.items() for word in (f"--{name}", str(value)))])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_lines_get_answers_and_keep_all_else(
    tiny_parts: Parts, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "made" / "qa.jsonl"
    assert ask(tiny_parts, data, output) == 0
    shown = capsys.readouterr().out
    assert "answered 3 of 5 lines" in shown and f"written to {output}" in shown
    assert "1 without a text" in shown and "1 with an answer of their own" in shown
    first, second, third = read(output)
    assert first.pop("answer") and first.pop("answered_by").endswith("--max_new_tokens 6 --seed 1")
    assert first == {"audio_filepath": "../corpus/a.flac", "lang": "en", "duration": 1.5, "mine": [1, None],
                     "speaker": 7, "task": "qa", "source_text": "the weather"}  # fmt: skip
    assert (second["source_text"], second["task"], "text" in second) == ("the weather is good", "qa", False)
    assert third["prompt"] == "is" and third["offset"] == 2


@pytest.mark.parametrize("lost", [0, 1, 40])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tiny_parts: Parts, data: Path, tmp_path: Path, lost: int):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert ask(tiny_parts, data, whole, micro_bsz=1) == 0
    content = whole.read_bytes()
    broken.write_bytes(content[: content.index(b"\n") + 1 + lost])
    assert ask(tiny_parts, data, broken, micro_bsz=4) == 0
    assert broken.read_bytes() == content
    assert ask(tiny_parts, data, broken) == 0 and broken.read_bytes() == content


def test_answers_of_other_flags_and_the_manifest_itself_are_refused(
    tiny_parts: Parts, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "qa.jsonl"
    assert ask(tiny_parts, data, output) == 0
    assert ask(tiny_parts, data, output, form="continue") == 2
    assert ask(tiny_parts, data, data) == 2
    found = capsys.readouterr().err
    assert "--form user" in found and "give the same flags" in found and "expected another name" in found
