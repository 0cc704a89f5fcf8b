import json
from pathlib import Path

import pytest

from rwkv_speech.batch import BadSample
from rwkv_speech.data.bad_files import BadFileLog
from rwkv_speech.errors import UserError

BROKEN, LONG = BadSample(3, "a", "broken\u2028ü"), BadSample(4, "long", "lasts", too_long=True)


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def test_log_lists_each_once_and_stops_at_the_limit(tmp_path: Path):
    path = tmp_path / "run" / "bad.jsonl"
    log = BadFileLog(path, max_bad=1)
    log.add([], "x.jsonl")
    assert not path.exists() and not log.summary()
    log.add([BROKEN, BROKEN], "x.jsonl")
    log.add([LONG, BROKEN], "x.jsonl")
    assert log.summary() == f"skipped 2 recordings: 1 broken, 1 too long for --ctx_len; listed in {path}"
    with pytest.raises(UserError, match="bad.jsonl: 2 recordings .* expected 1 at most.*--max_bad"):
        log.add([BadSample(5, "b", "gone")], "x.jsonl")
    assert rows_of(path)[0] == {"data": "x.jsonl", "index": 3, "id": "a", "reason": "broken\u2028ü"}
    assert [row["index"] for row in rows_of(path)] == [3, 4, 5]


def test_log_keeps_equal_ids_of_two_sets_and_of_one_apart(tmp_path: Path):
    log = BadFileLog(tmp_path / "bad.jsonl", max_bad=9)
    log.add([BadSample(0, "a", "broken"), BadSample(1, "a", "broken")], "x")
    log.add([BadSample(0, "a", "broken")], "y")
    assert log.num_bad == len(rows_of(log.path)) == 3


def test_log_continues_a_list_but_counts_from_0(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    BadFileLog(path, max_bad=5).add([BROKEN], "x")
    resumed = BadFileLog(path, max_bad=1)
    resumed.add([BROKEN], "x")
    assert resumed.num_bad == 1 and len(rows_of(path)) == 1
    path.write_text("something else")
    with pytest.raises(UserError, match="not a list of bad files"):
        BadFileLog(path, max_bad=1)


def test_require_used_names_the_remedy(tmp_path: Path):
    log = BadFileLog(tmp_path / "bad.jsonl", max_bad=9)
    log.add([LONG, BROKEN], "mixed")
    log.add([BROKEN], "broken")
    log.require_used(1, "broken")
    with pytest.raises(UserError, match="mixed: .*1 broken, 1 too long.*expected at least one: raise --ctx_len"):
        log.require_used(0, "mixed")
    with pytest.raises(UserError, match="broken: .*1 broken, 0 too long.*bad.jsonl.*mend or replace"):
        log.require_used(0, "broken")
