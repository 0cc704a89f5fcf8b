import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.audio import AudioError, load_audio
from rwkv_speech.data import tar_shards
from rwkv_speech.data.sources import open_source
from rwkv_speech.data.tar_shards import open_tar
from rwkv_speech.errors import UserError

RNG = np.random.default_rng(0)


def audio(seconds: float = 0.1, form: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, RNG.uniform(-0.5, 0.5, round(16_000 * seconds)), 16_000, format=form)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """As Python's tarfile writes it, which is what WebDataset's own writer uses."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for i in range(3):
        members = {}
        for j in range(4):
            key = f"{i}-{j}"
            members[f"{key}.flac"] = audio(0.1 * (i + 1))
            members[f"{key}.txt"] = f" text {key} ü\n".encode()
        write_tar(tmp_path / f"train-{i:03d}.tar", members)
    return tmp_path


def test_a_shard_says_of_texts_what_a_manifest_does(tmp_path: Path):
    told = {"answer": ["four", "4"], "transcript": "2 + 2", "prompt": "Answer:", "source_lang": "en"}
    write_tar(tmp_path / "a.tar", {"a.flac": audio(), "a.json": json.dumps(told).encode()})
    found = open_tar(f"tar:{tmp_path}").utterance(0)
    assert (found.text, found.answers, found.source_text) == ("four", ("four", "4"), "2 + 2")
    assert (found.prompt, found.source_lang) == ("Answer:", "en")


def test_every_utterance_is_what_tarfile_reads(shards: Path):
    source = open_source(f"tar:{shards}")
    assert len(source) == 12
    index = 0
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.name.endswith(".flac"):
                    continue
                found = source.utterance(index)
                key = member.name.removesuffix(".flac")
                assert (found.id, found.audio, found.text) == (f"{path.name}/{key}", None, f"text {key} ü")
                content = archive.extractfile(member).read()
                assert torch.equal(source.load(index), load_audio(content))
                assert found.duration == soundfile.info(io.BytesIO(content)).duration
                index += 1
    assert index == 12
    np.testing.assert_allclose(source.durations(), np.repeat([0.1, 0.2, 0.3], 4), rtol=1e-6)
    with pytest.raises(IndexError):
        source.utterance(12)


def test_json_members_long_names_folders_and_other_kinds(tmp_path: Path):
    deep = "folder/" + "n" * 180
    fields = {"text": "this wins", "duration": 9.5, "lang": "de", "task": "st", "id": "ID", "speaker": 7, "x": 1}
    members = {
        "readme.md": b"x",
        "folder/._a.flac": b"a file of macOS",
        "a.txt": b"this loses",
        "a.json": json.dumps(fields).encode(),
        "a.wav": audio(form="WAV"),
        "a.cls": b"7",
        f"{deep}.flac": audio(),
        f"{deep}.json": b'{"text": "deep", "lang": null}',
        "b.audio.ogg": audio(0.5, "OGG"),
        "b.said.txt": b"",
    }
    source = open_tar(f"tar:{write_tar(tmp_path / 'x.tar', members)}")
    first, second, third = (source.utterance(i) for i in range(3))
    assert (first.id, first.text, first.duration, first.lang, first.task) == ("ID", "this wins", 9.5, "de", "st")
    assert (first.speaker, second.speaker) == ("7", None)
    assert (second.id, second.text, second.duration) == (f"x.tar/{deep}", "deep", 0.1) and second.lang is None
    assert (third.id, third.text) == ("x.tar/b", "") and third.duration == pytest.approx(0.5, abs=0.03)
    assert torch.equal(source.load(0), load_audio(members["a.wav"]))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("train-{000..001}.tar", 8), ("train-{1..2}.tar", 0), ("train-00{0..2}.tar", 12), ("*.tar", 12), ("{9..9}*", 0)],
)
def test_patterns(shards: Path, pattern: str, count: int):
    if count:
        assert len(open_tar(f"tar:{shards}/{pattern}")) == count
    else:
        with pytest.raises(UserError, match=f"data source 'tar:{shards}/.*: no file"):
            open_tar(f"tar:{shards}/{pattern}")


def test_several_ranges_multiply():
    names = list(tar_shards._braces("a{08..10}-{0..1}.tar"))
    assert names == ["a08-0.tar", "a08-1.tar", "a09-0.tar", "a09-1.tar", "a10-0.tar", "a10-1.tar"]
    assert list(tar_shards._braces("plain.tar")) == ["plain.tar"]


def test_index_is_made_once_and_again_for_a_changed_shard(shards: Path, monkeypatch: pytest.MonkeyPatch):
    open_tar(f"tar:{shards}")
    scanned = []
    scan = tar_shards._scan
    monkeypatch.setattr(tar_shards, "_scan", lambda path: scanned.append(path) or scan(path))
    assert len(open_tar(f"tar:{shards}")) == 12 and not scanned
    changed = write_tar(shards / "train-001.tar", {"k.flac": audio(), "k.txt": b"new"})
    source = open_tar(f"tar:{shards}")
    assert scanned == [str(changed)] and len(source) == 9 and source.utterance(4).text == "new"
    (shards / "train-001.tar.index").write_text("[]")
    assert len(open_tar(f"tar:{shards}")) == 9 and len(scanned) == 2


def test_index_goes_to_the_cache_beside_read_only_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home"
    monkeypatch.setattr(Path, "home", lambda: home)
    write = tar_shards.write_text_atomically

    def refuse_beside(path: Path, text: str) -> None:
        if path.parent == shards:
            raise PermissionError("read-only")
        write(path, text)

    monkeypatch.setattr(tar_shards, "write_text_atomically", refuse_beside)
    assert len(open_tar(f"tar:{shards}")) == 12
    assert not list(shards.glob("*.index")) and len(list(home.rglob("*.index"))) == 3
    monkeypatch.setattr(tar_shards, "_scan", None)  # the second time nothing is scanned
    assert len(open_tar(f"tar:{shards}")) == 12


def test_source_is_picklable_and_keeps_no_file_open(shards: Path):
    source = open_tar(f"tar:{shards}")
    open_files = len(os.listdir("/proc/self/fd"))
    expected = source.load(5)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.load(5), expected) and copy.utterance(5) == source.utterance(5)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_identity_changes_with_shard_and_place(shards: Path):
    names = [open_tar(f"tar:{shards}").utterance(i).identity for i in range(12)]
    assert len(set(names)) == 12
    os.utime(shards / "train-000.tar", (1, 1))
    again = [open_tar(f"tar:{shards}").utterance(i).identity for i in range(12)]
    assert again[4:] == names[4:] and not set(again[:4]) & set(names)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.flac", b""), ("a.flac", b""), ("a.txt", b"")], "a.flac: its key has such a member already"),
        ([("a.flac", b""), ("a.wav", b"")], "a.wav: its key has such a member already"),
        ([("a.flac", b""), ("a.txt", b"\xff")], "a.txt: .*can't decode"),
        ([("a.flac", b""), ("a.json", b"[]")], "a.json: is not a JSON object but list"),
        ([("a.flac", b""), ("a.json", b"{")], "a.json: Expecting property name"),
        ([("a.flac", b""), ("a.json", b'{"text": 3}')], "a.json: 'text' is 3, expected a string"),
        ([("a.flac", b""), ("a.json", b'{"duration": -1}')], "a.json: 'duration' is -1"),
        ([("a.xyz", b""), ("a.txt", b"")], "a: has a text but no audio"),
        ([("a.flac", b""), ("b.flac", b""), ("b.txt", b"")], "1 members do not fit.*\n  a: has no text.*$"),
        ([("a.png", b"")], "holds no utterance"),
    ],
)
def test_members_that_do_not_fit_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str):
    write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=rf"bad\.tar: (?s:.*){message}"):
        open_tar(f"tar:{tmp_path}")


def test_cut_off_and_damaged_shards_are_named(shards: Path):
    path = shards / "train-000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    header = members[4].offset  # that of 0-2.flac
    damaged = bytearray(whole)
    damaged[header] ^= 1
    end = members[-1].offset_data + 512
    cases = [
        (whole[: header + 700], "0-2.flac|0-1.txt"),
        (whole[:header], "0-1.txt, at byte"),
        (whole[: header + 100], "0-1.txt, at byte"),
        (bytes(damaged), "0-1.txt, at byte"),
        (whole[:header] + bytes(1024) + whole[header:], "0-1.txt, at byte"),
        (whole[:end], "0-3.txt, at byte"),
        (b"", "its start"),
        (b"\x1f\x8b" + whole, "its start"),
    ]
    for content, place in cases:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-000\.tar: is (cut off or )?damaged after ({place})"):
            open_tar(f"tar:{shards}")
    path.write_bytes(whole[: end + 1024])  # the two blocks of zeros that end an archive are enough
    assert len(open_tar(f"tar:{shards}")) == 12


def test_broken_recordings_name_shard_and_member(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", {"a.flac": b"not audio", "a.txt": b"", "b.flac": audio(), "b.txt": b""})
    source = open_tar(f"tar:{tmp_path}")
    assert source.utterance(0).duration is None and np.isnan(source.durations()[0])
    with pytest.raises(AudioError, match=r"x\.tar: a\.flac: cannot be decoded"):
        source.load(0)
    path.write_bytes(path.read_bytes()[:3_000])
    with pytest.raises(AudioError, match=r"x\.tar: b\.flac: is cut off"):
        source.load(1)
    path.unlink()
    with pytest.raises(AudioError, match=r"x\.tar: b\.flac: cannot be read .*No such file"):
        source.load(1)
