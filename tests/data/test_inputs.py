"""What is found behind the names that people give to prediction."""

import json
import os
from pathlib import Path

import pytest

from rwkv_speech.data.inputs import Input, find_inputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with audio files that nobody opens here."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.wav", "a.mp3", "rec/x/one.FLAC", "rec/y/one.flac", "rec/y/notes.txt", "rec/.hidden/z.wav",
                 "rec/.z.wav", "empty/notes.txt"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


def names(*given: str) -> list[tuple[str, str]]:
    found, faults = find_inputs(given)
    assert faults == []
    return [(x.audio, x.output) for x in found]


def test_files_folders_and_patterns_several_at_once(folder: Path):
    assert names("b.wav", "rec", "*.mp3") == [
        ("b.wav", "b"),
        ("rec/x/one.FLAC", "x/one"),
        ("rec/y/one.flac", "y/one"),
        ("a.mp3", "a"),
    ]
    assert names("rec/**/*.flac") == [("rec/y/one.flac", "one")]
    assert names("rec/*") == [("rec/x/one.FLAC", "one"), ("rec/y/one.flac", "one-2")]
    assert names(f"{folder}/b.wav") == [(f"{folder}/b.wav", "b")]


def test_a_file_that_is_named_twice_is_read_once(folder: Path):
    assert names("b.wav", "./b.wav", str(folder / "b.wav"), "b*") == [("b.wav", "b")]


ODD = ["my talk.wav", "a,b.wav", 'it\'s "x".wav', "-5.wav", "--.wav", "two\nlines.wav", "[x]*.wav", "名前.wav",
       os.fsdecode(b"caf\xe9.wav"), " .wav", "no ending", ".wav", "a.b.c.wav"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_names_of_any_kind(folder: Path, name: str):
    Path(name).touch()
    found = find_inputs([name])[0]
    assert [(x.audio, x.output) for x in found] == [(name, os.path.splitext(name)[0])]
    assert found[0].label.isprintable() and "\n" not in found[0].label
    assert Path(found[0].audio).is_file()


def test_outputs_have_names_of_their_own(folder: Path):
    for name in ("p/a.wav", "q/a.wav", "q/a-2.wav", "q/a.ogg"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    found = names("p/a.wav", "q/a.wav", "q/a.ogg", "q/a-2.wav")
    # What has the name by itself keeps it.
    assert [output for _, output in found] == ["a", "a-3", "a-4", "a-2"]


def test_a_manifest_names_recordings_and_parts_of_them(folder: Path):
    rows = [{"audio_filepath": "x/one.FLAC"}, {"audio_filepath": "x/one.FLAC", "offset": 12.5, "duration": 2},
            {"audio_filepath": str(folder / "b.wav"), "duration": 3.5, "lang": "en", "task": "st", "text": None},
            {"audio_filepath": "../a.mp3", "text": "a", "id": "7"}]  # fmt: skip
    Path("rec/m.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    assert find_inputs(["rec/m.jsonl", "a.mp3"])[0] == [
        Input("rec/x/one.FLAC", "x/one"),
        Input("rec/x/one.FLAC", "x/one@12.5", 12.5, 2.0),
        Input(str(folder / "b.wav"), "b", 0.0, 3.5, "st", "en"),
        Input("rec/../a.mp3", "a"),
    ]
    assert find_inputs(["rec/m.jsonl"])[0][1].label == "rec/x/one.FLAC@12.5"


def test_faults_are_lines_and_the_rest_is_found(folder: Path):
    lines = ["{", '{"text": "a"}', '{"audio_filepath": 3}', '{"audio_filepath": "b.wav", "offset": -1}', "[]",
             '{"audio_filepath": "b.wav"}', '{"turns": [{"audio_filepath": "b.wav", "text": "a"}]}']  # fmt: skip
    Path("bad.jsonl").write_text("\n".join(lines))
    Path("none.jsonl").write_text("\n \n")
    found, faults = find_inputs(["gone.wav", "*.opus", "empty", "bad.jsonl", "none.jsonl", "", "a.mp3"])
    assert [x.audio for x in found] == ["b.wav", "a.mp3"]
    starts = ["gone.wav: no such file", "*.opus: no file matches", "empty: a folder without an audio file",
              "bad.jsonl, line 1: is not JSON", "bad.jsonl, line 2: lacks 'audio_filepath'",
              "bad.jsonl, line 3: 'audio_filepath' is 3", "bad.jsonl, line 4: 'offset' is -1",
              "bad.jsonl, line 5: is not a JSON object", "bad.jsonl, line 7: has 'turns', but",
              "none.jsonl: a manifest without a line",
              "'': no such file"]  # fmt: skip
    assert [fault.startswith(start) for fault, start in zip(faults, starts, strict=True)] == [True] * len(starts)
    assert all("\n" not in fault and len(fault) < 400 for fault in faults)


def test_links_and_pipes_are_left_to_the_reader_and_block_nothing(folder: Path):
    os.symlink("nowhere.wav", "broken.wav")
    os.symlink("b.wav", "link.wav")
    os.symlink(".", "rec/loop")
    os.mkfifo("pipe.jsonl")
    assert [audio for audio, _ in names("broken.wav", "link.wav", "pipe.jsonl", "rec")] == [
        "broken.wav", "link.wav", "pipe.jsonl", "rec/x/one.FLAC", "rec/y/one.flac",
    ]  # fmt: skip
