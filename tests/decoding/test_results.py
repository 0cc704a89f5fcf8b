from pathlib import Path

import pytest

from rwkv_speech.decoding.results import Row, Segment, read_rows, whole_text, write_rows
from rwkv_speech.errors import UserError

ROWS = [
    Row("a", 0, "The weather is good.", "the weather is god", None, "asr", 1.5, False),
    Row("b\udcff", 1, "天气 很好\u2028\x85", "\r\n\x00", "zh", "asr", 1e-3, True),
    Row("a", 2, "", "", "de", "st", 0.0, False),
]


def test_rows_come_back_in_the_sets_order(tmp_path: Path):
    write_rows(tmp_path / "r.jsonl", reversed(ROWS))
    assert read_rows(tmp_path / "r.jsonl") == ROWS
    assert "天气" in (tmp_path / "r.jsonl").read_text(encoding="utf-8")


def test_no_file_has_no_rows(tmp_path: Path):
    assert read_rows(tmp_path / "none.jsonl") == []


def test_what_a_later_version_adds_to_a_row_is_left_out(tmp_path: Path):
    write_rows(tmp_path / "r.jsonl", ROWS[:1])
    line = (tmp_path / "r.jsonl").read_text().replace('{"id"', '{"more": 1, "id"')
    (tmp_path / "r.jsonl").write_text(line)
    assert read_rows(tmp_path / "r.jsonl") == ROWS[:1]


def test_rows_of_earlier_versions_are_read(tmp_path: Path):
    line = '{"id": "a", "index": 0, "ref": "b", "hyp": "c", "lang": null, "task": "asr", "seconds": 1.5, "cut": false}'
    (tmp_path / "r.jsonl").write_text(line + "\n")
    assert read_rows(tmp_path / "r.jsonl") == [Row("a", 0, "b", "c", None, "asr", 1.5, False)]


@pytest.mark.parametrize("line", [b'{"id": "a", "ref": "b", "hyp": "c"}', b"[]", b"{", b"\xff\xfe", b"", b"7"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes):
    path = tmp_path / "r.jsonl"
    write_rows(path, ROWS[:1])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=r"r.jsonl, line 2: found .*, expected a JSON object with id, index, ref, hyp"):
        read_rows(path)


@pytest.mark.parametrize("name", ["id", "ref", "hyp"])
def test_a_text_that_is_none_is_named(tmp_path: Path, name: str):
    path = tmp_path / "r.jsonl"
    write_rows(path, ROWS[2:])
    path.write_text(path.read_text().replace(f'"{name}": "', f'"{name}": 7, "x": "'))
    with pytest.raises(UserError, match=r"r.jsonl, line 1: found"):
        read_rows(path)


def test_pieces_are_joined_and_vote_on_a_class():
    said = [("Spanish", 3), ("Italian", 10), (" Spanish", 8), ("", 5)]
    pieces = [
        Segment(i, 20.0 * i, 20.0 * i + seconds, text, [], 0.0, 0.0, 1.0, 0.0) for i, (text, seconds) in enumerate(said)
    ]
    assert whole_text("lid", pieces) == "Spanish"
    assert whole_text("asr", pieces) == whole_text("st_es", pieces) == "Spanish Italian Spanish"
    assert whole_text("lid", []) == whole_text("asr", []) == ""
