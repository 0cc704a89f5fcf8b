import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.audio import AudioError
from rwkv_speech.data.sources import (
    ConcatSource,
    FileSource,
    Utterance,
    open_source,
    open_sources,
    read_folder,
    read_manifest,
)
from rwkv_speech.errors import UserError


def write_audio(file: Path, samples: int = 800, rate: int = 16_000) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.linspace(-0.5, 0.5, samples, dtype=np.float32), rate)
    return file


def write_manifest(file: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    lines = [row if isinstance(row, (bytes, str)) else json.dumps(row) for row in rows]
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return file


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
    assert first == Utterance("clips/a.wav", str(tmp_path / "clips" / "a.wav"), "héllo", 0.05)
    assert second == Utterance("b", str(outside), "", None, 0.0, "en", "asr")


def test_read_manifest_takes_byte_order_mark_crlf_and_null(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    line = json.dumps({"audio_filepath": "a.wav", "text": "x", "duration": None, "lang": None})
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert [u.text for u in read_manifest(tmp_path / "m.json")] == ["x"]


BAD_ROWS: list[tuple[dict[str, Any] | str | bytes, str]] = [
    ("{not json", "is not JSON"),
    ("[1]", "is not a JSON object but list"),
    ("[" * 100_000, "is not JSON"),
    (b'{"audio_filepath": "a.wav", "text": "\xff"}', "is not UTF-8"),
    ({"audio_filepath": "a.wav"}, "lacks 'text'"),
    ({"text": "x"}, "lacks 'audio_filepath'"),
    ({"audio_filepath": "a.wav", "text": None}, "lacks 'text'"),
    ({"audio_filepath": "a.wav", "text": 5}, "'text' is 5, expected a string"),
    ({"audio_filepath": ["a.wav"], "text": "x"}, "'audio_filepath' is"),
    ({"audio_filepath": "a.wav", "text": "x", "lang": 1}, "'lang' is 1"),
    ({"audio_filepath": "a.wav", "text": "x", "id": 1}, "'id' is 1"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": -1}, "'duration' is -1, expected above 0"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": 0}, "'duration' is 0"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": float("nan")}, "'duration' is nan"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": 10**400}, "'duration' is 1000"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": True}, "'duration' is True"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": "2"}, "'duration' is '2'"),
    ({"audio_filepath": "a.wav", "text": "x", "offset": -0.1}, "'offset' is -0.1, expected 0 or more"),
    ({"audio_filepath": "gone.wav", "text": "x"}, "no such audio file .*gone.wav"),
    ({"audio_filepath": "a\0.wav", "text": "x"}, "no such audio file"),
    ('{"audio_filepath": "a.wav", "text": "\\ud800"}', "lone surrogate"),
]


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


def test_read_manifest_text_is_optional_for_prediction(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio_filepath": "a.wav"})
    assert read_manifest(manifest, require_text=False)[0].text == ""


def test_read_manifest_default_ids_are_unique(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    write_audio(tmp_path / "b.wav")
    rows: list[dict[str, Any]] = [
        {"audio_filepath": "a.wav", "offset": 0},
        {"audio_filepath": "a.wav", "offset": 1.5},
        {"audio_filepath": "./a.wav"},
        {"audio_filepath": "a.wav", "offset": 1.5},
        {"audio_filepath": "b.wav"},
        {"audio_filepath": "b.wav", "id": "a.wav@0"},
    ]
    found = read_manifest(write_manifest(tmp_path / "m.jsonl", *[{**row, "text": "x"} for row in rows]))
    ids = [utterance.id for utterance in found]
    assert len(set(ids)) == len(ids)
    assert ids[1] == "a.wav@1.5" and ids[5] == "a.wav@0"


def test_read_folder_pairs_audio_with_text(tmp_path: Path):
    for name in ("b.wav", "sub/a.FLAC", "sub/c.ogg"):
        file = write_audio(tmp_path / name)
        file.with_suffix(".txt").write_text(f"text of {name}\n", encoding="utf-8")
    write_audio(tmp_path / ".hidden.wav")
    (tmp_path / "README.txt").write_text("not a transcript")
    found = read_folder(tmp_path)
    assert [u.id for u in found] == ["b.wav", "sub/a.FLAC", "sub/c.ogg"]
    assert found[1] == Utterance("sub/a.FLAC", str(tmp_path / "sub" / "a.FLAC"), "text of sub/a.FLAC")


def test_read_folder_lists_audio_without_text(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    write_audio(tmp_path / "b.wav").with_suffix(".txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="(?s)2 of 2 audio files.*a.wav: no a.txt.*b.txt cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "b.txt").unlink()
    assert [u.text for u in read_folder(tmp_path, require_text=False)] == ["", ""]
    with pytest.raises(UserError, match="holds no audio file"):
        read_folder(tmp_path / "gone")


def test_file_source_loads_the_segment(tmp_path: Path):
    file = write_audio(tmp_path / "a.wav", samples=1_600)
    manifest = write_manifest(
        tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "text": "x", "offset": 0.05, "duration": 0.025}
    )
    whole = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    assert torch.equal(open_source(str(manifest)).load(0), whole[800:1_200])
    with pytest.raises(AudioError, match="has no audio file"):
        FileSource([Utterance("a", None, "")]).load(0)


def test_open_sources_joins_in_order(tmp_path: Path):
    for name, samples in (("one", 500), ("two", 600)):
        write_audio(tmp_path / name / "a.wav", samples).with_suffix(".txt").write_text(name)
    write_audio(tmp_path / "c.wav", 700)
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio_filepath": "c.wav", "text": "three"})
    joined = open_sources(f"{tmp_path / 'one'}, {manifest},{tmp_path / 'two'}")
    assert isinstance(joined, ConcatSource) and len(joined) == 3
    assert [joined.utterance(i).text for i in range(3)] == ["one", "three", "two"]
    assert [len(joined.load(i)) for i in range(3)] == [500, 700, 600]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            joined.utterance(index)
    assert len(open_sources(str(manifest))) == 1


@pytest.mark.parametrize("spec", ["gone.jsonl", "gone", "gone:train", "hf:", "hf:name", "hf:a:b:c:d", "s3:x", "a.wav"])
def test_open_source_lists_the_accepted_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str):
    monkeypatch.chdir(write_audio(tmp_path / "a.wav").parent)
    with pytest.raises(UserError, match="(?s)FILE.jsonl.*FOLDER.*hf:NAME:SPLIT.*librispeech:SPLIT"):
        open_source(spec)


def test_open_sources_rejects_an_empty_list():
    with pytest.raises(UserError, match="(?s)names nothing.*librispeech:SPLIT"):
        open_sources(" , ")
