import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from manifests import BAD_ROWS, write_audio, write_manifest

from rwkv_speech.data import tables
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.source import Utterance
from rwkv_speech.data.tables import TableSource, open_table
from rwkv_speech.errors import UserError


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and blocks of a few lines."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(tables, "_BLOCK", 300)
    for name in ("a.wav", "b.wav", "sub/a.wav"):
        write_audio(tmp_path / "data" / name)
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def utterances(source: TableSource) -> list[Utterance]:
    return [source.utterance(index) for index in range(len(source))]


def row(audio: str = "a.wav", **more: Any) -> dict[str, Any]:
    return {"audio_filepath": audio, "text": "x", **more}


ROWS: list[dict[str, Any] | str | bytes] = [
    row(duration=3, offset=0, lang="en", speaker="ann"),
    row(speaker=1089),
    row(duration=0.1, offset=1.25, task="asr", id="given"),
    row(duration=None, offset=None, lang=None, text='grüße \U0001f600 \u2028 \\ " \n'),
    row("b.wav", duration=123456789.123456789, speaker={"a": [1, None, {"b": "}\n{"}]}),
    '{"text": "\\ud83d\\ude00\\u0000\\/", "audio_filepath": "sub\\/a.wav", "duration": 1e-3}',
    '  {"audio_filepath": "a.wav", "text": "indented"}  ',
    "",
    " \t\r",
    '{"audio_filepath": "a.wav", "text": "x", "text": "the last one counts"}',
    '{"audio_filepath": "a.wav", "text": "x", "other": NaN, "more": Infinity, "big": ' + "9" * 400 + "}",
    row(text="long " * 200),
    row(answer="four", prompt="Answer:", transcript="2 + 2"),
    row(source_lang="en", source_text="the weather", prompt={"a": 1}, transcript=[1]),
    *[row(answer=["four", "4"], source_text="2 + 2")] * 3,
    *[{"audio_filepath": "b.wav", "answer": f"{i}"} for i in range(9)],
    {"source_text": "good day", "text": "guten Tag"},
    {"transcript": "2 + 2", "answer": "four"},
    *[row("b.wav", offset=i, duration=i + 0.5) for i in range(30)],
]


def test_big_manifests_hold_what_small_ones_do(folder: Path):
    manifest = write_manifest(folder / "m.jsonl", *ROWS)
    assert utterances(open_table(manifest)) == read_manifest(manifest)
    content = manifest.read_bytes()
    for name, changed in {
        "bom": b"\xef\xbb\xbf" + content,
        "crlf": content.replace(b"\n", b"\r\n"),
        "no end": content.rstrip(b"\n"),
    }.items():
        other = folder / f"{name}.jsonl"
        other.write_bytes(changed)
        assert utterances(open_table(other)) == read_manifest(other)


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_plain_lines_are_never_parsed_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch, end: str):
    monkeypatch.setattr(tables, "parse_lines", None)
    lines = [json.dumps(row(text="} {", duration=i + 1, other={"b": []}), ensure_ascii=False) for i in range(40)]
    (folder / "m.jsonl").write_bytes("".join(line + end for line in lines).encode())
    assert len(open_table(folder / "m.jsonl")) == 40
    for answer in ("four", ["four", "4"]):
        lines = [json.dumps(row(answer=answer, prompt="Say it:")), json.dumps(row())] * 20
        (folder / "m.jsonl").write_bytes("".join(line + end for line in lines).encode())
        assert len({x.answers for x in utterances(open_table(folder / "m.jsonl"))}) == 2


def complaint(manifest: Path, read: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(manifest)
    return str(caught.value)


@pytest.mark.parametrize(
    "bad", [bad for bad, reason in BAD_ROWS if "no such audio file" not in reason], ids=lambda bad: str(bad)[:40]
)
def test_bad_lines_are_named_alike(folder: Path, bad: dict[str, Any] | str | bytes):
    for rows in ([bad], [bad, row()], [row(), bad, *[row()] * 20], [*[row()] * 20, "", bad]):
        manifest = write_manifest(folder / "m.jsonl", *rows)
        assert complaint(manifest, open_table) == complaint(manifest, read_manifest)
        assert not list(folder.glob(".*"))


def test_every_bad_line_and_repeated_id_is_named_alike(folder: Path):
    rows = [row(duration=-1), row(id="one"), "", *[row(id=f"{i % 7}") for i in range(20)], row(id="one"), "?"]
    manifest = write_manifest(folder / "m.jsonl", *rows, *["?"] * 9)
    found = complaint(manifest, open_table)
    assert "25 of 33 lines" in found and "id '0' is already that of line 4" in found and "... and 5 more" in found
    assert found == complaint(manifest, read_manifest)
    for rows in (["", "  "], []):
        write_manifest(manifest, *rows)
        assert complaint(manifest, open_table) == complaint(manifest, read_manifest)


def test_reading_stops_after_many_bad_lines(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "_MANY", 3)
    found = complaint(write_manifest(folder / "m.jsonl", row(), *["?"] * 1_000), open_table)
    assert "of the first " in found and "of 1001" not in found


def test_a_table_is_written_once(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    manifest = write_manifest(folder / "m.jsonl", row())
    open_table(manifest)
    assert "m.jsonl: 1 utterances, now also in" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_write", None)
        assert len(open_table(manifest)) == 1
    assert not capsys.readouterr().out
    write_manifest(manifest, row(), row())
    assert len(open_table(manifest)) == 2
    # The same length at another time.
    os.utime(write_manifest(manifest, row(), row(text="y")), ns=(0, 1))
    assert open_table(manifest).utterance(1).text == "y"
    (table,) = folder.glob(".m.jsonl.*")  # those of the manifest's earlier states are gone
    table.write_bytes(table.read_bytes()[:100])
    assert len(open_table(manifest)) == 2


def test_processes_that_open_a_manifest_at_once_write_one_table(folder: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = write_manifest(folder / "m.jsonl", *[row()] * 100)
    barrier, written, write = threading.Barrier(4), [], tables._write

    def open_together(_: int) -> int:
        barrier.wait()
        return len(open_table(manifest))

    monkeypatch.setattr(tables, "_write", lambda *args: written.append(args) or write(*args))
    # Locks of separately opened files hold between threads as they do between processes.
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(open_together, range(4))) == [100] * 4
    assert len(written) == 1


def test_a_table_lies_in_the_cache_where_the_folder_cannot_be_written(
    folder: Path, private_home: Path, monkeypatch: pytest.MonkeyPatch
):
    manifest = write_manifest(folder / "m.jsonl", row())
    write = tables.write_atomically

    def only_at_home(path: Path, fill: Any) -> None:
        if private_home not in path.parents:
            raise PermissionError(13, "Permission denied")
        write(path, fill)

    monkeypatch.setattr(tables, "write_atomically", only_at_home)
    assert len(open_table(manifest)) == 1
    assert len(list(private_home.rglob(".m.jsonl.*.arrow"))) == 1 and not list(folder.glob(".*"))
    monkeypatch.setattr(tables, "_write", None)
    assert len(open_table(manifest)) == 1


def test_no_place_for_the_table_and_a_full_disk_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "_write", fail)
    with pytest.raises(UserError, match=r"m.jsonl: its table can be written neither .* nor .*home.* \(.*No space left"):
        open_table(write_manifest(folder / "m.jsonl", row()))


def test_workers_open_the_table_themselves(folder: Path):
    manifest = write_manifest(folder / "m.jsonl", *[row(duration=0.01 * (i + 1), offset=0.01) for i in range(500)])
    source = open_table(manifest)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1_000
    there = pickle.loads(pickled)
    assert utterances(there) == utterances(source)
    assert torch.equal(there.load(1), source.load(1)) and len(there.load(1)) == 320
    for index in (-1, 500):
        with pytest.raises(IndexError):
            there.utterance(index)
    write_manifest(manifest, row())
    open_table(manifest)
    with pytest.raises(UserError, match="its manifest was changed while it was in use"):
        pickle.loads(pickled)
    assert len(utterances(source)) == 500  # what is open stays


def test_durations_are_one_array(folder: Path):
    seconds = [0.5, None, 2, *range(1, 30)]
    source = open_table(write_manifest(folder / "m.jsonl", *[row(duration=value) for value in seconds]))
    durations = source.durations()
    assert durations.dtype == np.float32
    np.testing.assert_array_equal(durations, np.array(seconds, np.float32))


def test_a_sample_of_the_audio_is_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = write_manifest(folder / "m.jsonl", row(), *[row("gone.wav")] * 30, row("b.wav"))
    with pytest.raises(UserError, match=r"30 of 32 utterances looked at are bad.*\n  utterance 2: no such .*gone.wav"):
        open_table(manifest)
    monkeypatch.setattr(tables, "_FILES_LOOKED_FOR", 2)
    assert len(open_table(manifest)) == 32


def write_table_file(file: Path, table: pa.Table) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=2)
        return file
    new = pa.ipc.new_stream if "stream" in file.name else pa.ipc.new_file
    with new(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file


TABLES = ["m.parquet", "m.arrow", "stream.ARROW"]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_manifests_too(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(tables, "_ROWS", 1)
    columns = {
        "text": pa.array(["x", "grüße", "y"]).dictionary_encode(),
        "audio_filepath": pa.array(["a.wav", "b.wav", "a.wav"], pa.large_string()),
        "duration": pa.array([1, None, 3], pa.int32()),
        "offset": pa.array([0.0, None, 2.5], pa.float32()),
        "lang": pa.nulls(3),
        "speaker": pa.array([[1], [2], None]),
    }
    found = utterances(open_table(write_table_file(folder / name, pa.table(columns))))
    lines = [row(duration=1, offset=0), row("b.wav", text="grüße"), row(text="y", duration=3, offset=2.5)]
    assert found == read_manifest(write_manifest(folder / "m.jsonl", *lines))


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_answers(folder: Path, name: str):
    for answers in (["four", None, "5"], [["four", "4"], None, ["5"]]):
        columns = {"audio_filepath": ["a.wav"] * 3, "text": ["x", "y", None], "answer": answers, "prompt": [1, 2, 3]}
        lines = [{key: values[i] for key, values in columns.items()} for i in range(3)]
        found = utterances(open_table(write_table_file(folder / name, pa.table(columns))))
        assert found == read_manifest(write_manifest(folder / "m.jsonl", *lines))
    bad = pa.table({"audio_filepath": ["a.wav"] * 2, "answer": pa.array([[], None], pa.list_(pa.string()))})
    found = complaint(write_table_file(folder / name, bad), open_table)
    assert "row 1: 'answer' is []" in found and "row 2: lacks 'text'" in found
    numbers = write_table_file(folder / name, pa.table({"audio_filepath": ["a.wav"], "answer": [4]}))
    assert "column 'answer' holds int64; expected strings or lists of them" in complaint(numbers, open_table)


@pytest.mark.parametrize("name", TABLES)
def test_bad_rows_of_tables_are_named(folder: Path, name: str):
    def table(**columns: Any) -> Path:
        given = {"audio_filepath": ["a.wav"] * 3, "text": ["x"] * 3, **columns}
        return write_table_file(
            folder / name, pa.table({key: value for key, value in given.items() if value is not None})
        )

    found = complaint(table(duration=[1.0, float("nan"), -1.0], id=["a", "a", "b"]), open_table)
    assert "2 of 3 rows are bad" in found and "\n  row 3: 'duration' is -1.0" in found
    assert "\n  row 2: 'duration' is nan, expected above 0 and finite; id 'a' is already that of row 1" in found
    assert "row 2: lacks 'text'" in complaint(table(text=["x", None, "x"]), open_table)
    assert "3 of 3 rows are bad" in complaint(table(audio_filepath=None), open_table)
    assert "column 'text' holds int64; expected strings" in complaint(table(text=[1, 2, 3]), open_table)
    assert "'duration' holds string; expected numbers" in complaint(table(duration=["1", "2", "3"]), open_table)
    not_utf8 = pa.StringArray.from_buffers(3, pa.py_buffer(np.arange(4, dtype=np.int32)), pa.py_buffer(b"x\xffx"))
    assert "cannot be read" in complaint(table(text=not_utf8), open_table)
    whole = table().read_bytes()
    (folder / name).write_bytes(whole[: len(whole) * 2 // 3])
    assert "cannot be read" in complaint(folder / name, open_table)
    (folder / name).write_bytes(b"something else")
    assert "cannot be read" in complaint(folder / name, open_table)


def test_a_missing_manifest_is_named(folder: Path):
    with pytest.raises(UserError, match="gone.jsonl: cannot be read"):
        open_table(folder / "gone.jsonl")
