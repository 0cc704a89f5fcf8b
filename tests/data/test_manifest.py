import json
from pathlib import Path
from typing import Any

import pytest
from manifests import BAD_ROWS, write_audio, write_manifest

from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.source import Utterance
from rwkv_speech.errors import UserError


def test_read_manifest_reads_every_key(tmp_path: Path):
    write_audio(tmp_path / "clips" / "a.wav")
    outside = write_audio(tmp_path / "b.flac")
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        {"audio_filepath": "clips/a.wav", "text": "héllo", "duration": 0.05, "speaker": "x"},
        "",
        {"audio_filepath": str(outside), "text": "", "offset": 0, "lang": "en", "task": "asr", "id": "b"},
    )
    first, second = read_manifest(manifest)
    assert first == Utterance("clips/a.wav", str(tmp_path / "clips" / "a.wav"), "héllo", 0.05, speaker="x")
    assert second == Utterance("b", str(outside), "", None, 0.0, "en", "asr")


def test_read_manifest_reads_what_is_said_of_texts(tmp_path: Path):
    audio = {"audio_filepath": write_audio(tmp_path / "a.wav").name}
    rows = [
        {**audio, "text": "das Wetter", "lang": "de", "source_lang": "en", "source_text": "the weather"},
        {**audio, "text": "das Wetter", "transcript": "the weather", "prompt": "another corpus' own"},
        {**audio, "text": "two plus two", "answer": "four", "prompt": "Answer:"},
        {**audio, "answer": ["four", "4"], "text": "ignored", "transcript": "two plus two", "prompt": None},
        {**audio, "answer": "", "transcript": [5], "prompt": {"a": 1}},
    ]
    found = read_manifest(write_manifest(tmp_path / "m.jsonl", *rows))
    said = [(x.text, x.source_lang, x.source_text, x.answers, x.prompt) for x in found]
    assert said == [
        ("das Wetter", "en", "the weather", (), ""),
        ("das Wetter", None, "the weather", (), ""),
        ("four", None, "two plus two", ("four",), "Answer:"),
        ("four", None, "two plus two", ("four", "4"), ""),
        ("", None, None, ("",), ""),
    ]


def test_read_manifest_reads_conversations(tmp_path: Path):
    name = write_audio(tmp_path / "a.wav").name
    turns = [
        {"audio_filepath": name, "duration": 0.05, "answer": ["fine", "well"], "text": "how are you"},
        {"input": "and now?" * 15, "text": "the same"},
        {"audio_filepath": name, "offset": 0.01, "duration": 0.02, "answer": "bye", "lang": "de"},
    ]
    rows = [{"turns": turns, "task": "chat", "lang": "en", "id": "x"}, {"turns": turns[1:2], "input": 4}]
    first, second = read_manifest(write_manifest(tmp_path / "m.jsonl", *rows))
    path = str(tmp_path / "a.wav")
    one, two, three = first.turns
    known = {"source_text": "how are you", "answers": ("fine", "well"), "then": (two, three)}
    assert one == Utterance("x", path, "fine", 0.05, lang="en", task="chat", **known)
    assert two == Utterance(turns[1]["input"], None, "the same", lang="en", task="chat", input_text=turns[1]["input"])
    assert (three.text, three.offset, three.duration, three.lang, three.task) == ("bye", 0.01, 0.02, "de", "chat")
    assert first.seconds == pytest.approx(0.07 + 8) and second.then == () and second.input_text


def test_what_has_a_source_text_needs_no_audio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_audio(tmp_path / "a.wav")
    rows = [
        {"source_text": "good day", "text": "guten Tag"},
        {"transcript": "2 + 2", "answer": "four", "id": "q"},
        {"audio_filepath": "a.wav", "text": "x"},
    ]
    first, second, third = read_manifest(write_manifest(tmp_path / "m.jsonl", *rows))
    assert (first.id, first.audio, first.text, first.source_text) == ("good day", None, "guten Tag", "good day")
    assert (second.id, second.audio, second.text, second.source_text) == ("q", None, "four", "2 + 2")
    assert third.audio and "2 of 3 have no audio_filepath" in capsys.readouterr().out


def test_read_manifest_takes_byte_order_mark_crlf_and_null(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    line = json.dumps({"audio_filepath": "a.wav", "text": "x", "duration": None, "lang": None})
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert [u.text for u in read_manifest(tmp_path / "m.json")] == ["x"]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_read_manifest_names_the_bad_line(tmp_path: Path, row: dict[str, Any] | str | bytes, reason: str):
    write_audio(tmp_path / "a.wav")
    good = {"audio_filepath": "a.wav", "text": "x"}
    manifest = write_manifest(tmp_path / "m.jsonl", good, row)
    with pytest.raises(UserError, match=f"m.jsonl: 1 of 2 lines are bad.*\n  line 2: .*{reason}"):
        read_manifest(manifest)


def test_read_manifest_names_every_bad_line_at_once(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    same_id = {"audio_filepath": "a.wav", "text": "x", "id": "one"}
    rows = [same_id, same_id, {"audio_filepath": "gone.wav", "offset": -1}]
    with pytest.raises(UserError) as caught:
        read_manifest(write_manifest(tmp_path / "m.jsonl", *rows, *["?"] * 23))
    lines = str(caught.value).split("\n")
    assert "25 of 26" in lines[0] and "id 'one' is already that of line 1" in lines[1]
    assert all(part in lines[2] for part in ("line 3", "lacks 'text'", "'offset'", "no such audio file"))
    assert len(lines) == 22 and lines[-1] == "  ... and 5 more"


def test_read_manifest_rejects_an_empty_or_missing_file(tmp_path: Path):
    with pytest.raises(UserError, match="holds no utterance"):
        read_manifest(write_manifest(tmp_path / "m.jsonl", "", "  "))
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "gone.jsonl")


def test_read_manifest_makes_an_id_of_path_and_offset(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    offsets: list[float | None] = [None, 0, 1.5, 1.5]
    rows = [{"audio_filepath": "a.wav", "text": "x", "offset": offset} for offset in offsets]
    found = read_manifest(write_manifest(tmp_path / "m.jsonl", *rows))
    assert [utterance.id for utterance in found] == ["a.wav", "a.wav", "a.wav@1.5", "a.wav@1.5"]


def test_a_speaker_may_be_a_number_and_what_is_no_name_is_left_out(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    given = ["ann", 1089, None, True, ["ann"], {"a": 1}, 1.5, ""]
    rows = [{"audio_filepath": "a.wav", "text": "x", "speaker": speaker} for speaker in given]
    found = read_manifest(write_manifest(tmp_path / "m.jsonl", *rows))
    assert [utterance.speaker for utterance in found] == ["ann", "1089", None, None, None, None, None, ""]
