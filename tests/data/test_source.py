from fractions import Fraction
from pathlib import Path

import pytest

from rwkv_speech.data.source import split_weight
from rwkv_speech.errors import UserError


@pytest.mark.parametrize(
    ("spec", "path", "weight"),
    [
        ("a.jsonl", "a.jsonl", "1"),
        ("a.jsonl@2", "a.jsonl", "2"),
        ("a.jsonl@0.5", "a.jsonl", "1/2"),
        ("a.jsonl@.25", "a.jsonl", "1/4"),
        ("a.jsonl@3.", "a.jsonl", "3"),
        ("hf:name:train[:1%]@2", "hf:name:train[:1%]", "2"),
        ("me@home/a.jsonl", "me@home/a.jsonl", "1"),
        ("me@2/a.jsonl", "me@2/a.jsonl", "1"),
        ("me@2/a@3.jsonl@0.1", "me@2/a@3.jsonl", "1/10"),
        ("a.jsonl@", "a.jsonl@", "1"),
        ("a.jsonl@nan", "a.jsonl@nan", "1"),
        ("a.jsonl@2@3", "a.jsonl@2", "3"),
    ],
)
def test_split_weight_takes_a_final_number(spec: str, path: str, weight: str):
    assert split_weight(spec) == (path, Fraction(weight))


def test_split_weight_leaves_a_file_of_that_name(tmp_path: Path):
    (tmp_path / "set@2").mkdir()
    (tmp_path / "a.jsonl@2").touch()
    for name in ("set@2", "a.jsonl@2"):
        assert split_weight(str(tmp_path / name)) == (str(tmp_path / name), 1)
    assert split_weight(str(tmp_path / "set@2@2")) == (str(tmp_path / "set@2"), 2)
    assert split_weight(str(tmp_path / "set@3")) == (str(tmp_path / "set"), 3)


@pytest.mark.parametrize("weight", ["0", "0.0", "-1", "1001", "1" + "0" * 400])
def test_split_weight_names_the_part_that_cannot_be(weight: str):
    with pytest.raises(UserError, match=rf"data source 'b.jsonl@{weight}': weight {weight}; expected above 0"):
        split_weight(f"b.jsonl@{weight}")
