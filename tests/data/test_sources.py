import json
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from manifests import write_audio, write_manifest

from rwkv_speech.audio import AudioError
from rwkv_speech.config import DATA_FORMS
from rwkv_speech.data import sources
from rwkv_speech.data.folder import FileSource, read_folder
from rwkv_speech.data.source import ConcatSource, Part, Utterance, parts_of
from rwkv_speech.data.sources import open_source, open_sources
from rwkv_speech.data.tables import TableSource
from rwkv_speech.errors import UserError


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


def test_open_sources_weighs_its_parts(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    row = {"audio_filepath": "a.wav", "text": "x"}
    one = write_manifest(tmp_path / "one.jsonl", row)
    two = write_manifest(tmp_path / "two@2.jsonl", row, row)
    joined = open_sources(f"{one}@0.5, {two},{two}@3")
    assert parts_of(joined) == [Part(1, Fraction(1, 2)), Part(2), Part(2, Fraction(3))]
    assert parts_of(open_sources(f"{one}@2")) == [Part(1, Fraction(2))]
    assert parts_of(open_sources(str(two))) == [Part(2)]
    with pytest.raises(UserError, match="two@2.jsonl@0': weight 0; expected above 0"):
        open_sources(f"{one},{two}@0")
    with pytest.raises(UserError, match="gone.jsonl': no such file"):
        open_sources("gone.jsonl@2")


def test_durations_are_nan_where_unknown(tmp_path: Path):
    write_audio(tmp_path / "a.wav")
    rows = [{"audio_filepath": "a.wav", "text": "x", "duration": seconds} for seconds in (0.5, None, 2)]
    manifest = write_manifest(tmp_path / "m.jsonl", *rows)
    durations = open_sources(f"{manifest},{manifest}").durations()
    assert durations.dtype == np.float32
    np.testing.assert_array_equal(durations, np.array([0.5, np.nan, 2.0] * 2, np.float32))
    assert ConcatSource([]).durations().shape == (0,)


def test_tasks_are_counted_by_language_in_every_kind_of_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_audio(tmp_path / "a.wav")
    pairs = [("st", "es"), ("st", "es"), ("st", None), (None, "fr"), (None, None)]
    rows = [{"audio_filepath": "a.wav", "text": "x", "task": task, "lang": lang} for task, lang in pairs]
    manifest = write_manifest(tmp_path / "m.jsonl", *rows)
    expected = {("st", "es"): 2, ("st", None): 1, (None, "fr"): 1, (None, None): 1}
    assert open_sources(str(manifest)).tasks() == expected
    monkeypatch.setattr(sources, "BIG_MANIFEST", 0)
    source = open_source(str(manifest))
    assert isinstance(source, TableSource) and source.tasks() == expected
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for number, row in enumerate(rows):
            (tmp_path / f"{number}.json").write_text(json.dumps(row))
            archive.add(tmp_path / "a.wav", f"{number}.wav")
            archive.add(tmp_path / f"{number}.json", f"{number}.json")
    assert open_source(f"tar:{tmp_path / 's.tar'}").tasks() == expected
    both = open_sources(f"{manifest},{manifest}@3")
    assert both.tasks() == {pair: 2 * count for pair, count in expected.items()}


def test_open_source_keeps_a_big_manifest_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_audio(tmp_path / "a.wav")
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "text": "x", "duration": 0.05})
    assert isinstance(open_source(str(manifest)), FileSource)
    monkeypatch.setattr(sources, "BIG_MANIFEST", 10)
    found = open_source(str(manifest))
    assert isinstance(found, TableSource) and len(found.load(0)) == 800


def test_a_new_kind_is_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch):
    made = FileSource([Utterance("a", "/a.wav", "x", 1.0)])
    monkeypatch.setitem(sources.KINDS, "mine", lambda spec, columns: made)
    joined = open_sources("mine:one, mine:two@2")
    assert len(joined) == 2 and parts_of(joined)[1] == Part(1, Fraction(2))


def test_every_kind_is_in_the_help():
    assert {form.split(":")[0] for form in DATA_FORMS if form[0].islower()} == set(sources.KINDS)


def test_open_sources_rejects_an_empty_list():
    with pytest.raises(UserError, match="(?s)names nothing.*librispeech:SPLIT"):
        open_sources(" , ")


def write_forms(folder: Path, text: str = "text") -> dict[str, Path]:
    """The same two recordings as a manifest, a folder, a table, a saved set, and a tar shard."""
    import datasets

    rows = [{"audio_filepath": f"{name}.wav", "text": f"{text} {name}", "duration": 0.0625} for name in "ab"]
    for row in rows:
        write_audio(folder / "audio" / row["audio_filepath"]).with_suffix(".txt").write_text(row["text"])
    manifest = write_manifest(folder / "audio" / "m.jsonl", *rows)
    files = [folder / "audio" / row["audio_filepath"] for row in rows]
    bytes_ = [{"bytes": file.read_bytes(), "path": None} for file in files]
    saved = datasets.Dataset.from_dict({"audio": bytes_, "text": [row["text"] for row in rows]})
    saved.save_to_disk(folder / "saved")
    datasets.Dataset.from_list(rows).to_parquet(folder / "audio" / "m.parquet")
    with tarfile.open(folder / "a.tar", "w") as shard:
        for file in files:
            shard.add(file, file.name)
            shard.add(file.with_suffix(".txt"), file.stem + ".txt")
    return {"manifest": manifest, "folder": folder / "audio", "table": folder / "audio" / "m.parquet",
            "saved": folder / "saved", "tar": folder / "a.tar"}  # fmt: skip


def test_fingerprints_follow_the_content_not_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def opened(folder: Path, text: str) -> dict[str, str]:
        forms = write_forms(folder, text).items()
        return {name: open_source(f"tar:{path}" if name == "tar" else str(path)).fingerprint() for name, path in forms}

    here, there, other = (opened(tmp_path / name, text) for name, text in (("x", "a"), ("y", "a"), ("z", "b")))
    assert here == there
    assert all(here[name] != other[name] for name in here)
    # Other audio under the same names and texts.
    write_audio(tmp_path / "y" / "audio" / "b.wav", samples=1_200)
    for name in ("audio", "audio/m.jsonl"):
        assert (
            open_source(str(tmp_path / "y" / name)).fingerprint()
            != open_source(str(tmp_path / "x" / name)).fingerprint()
        )


def test_fingerprint_of_a_mixture_knows_order_and_weight(tmp_path: Path):
    write_forms(tmp_path)
    write_audio(tmp_path / "more" / "c.wav").with_suffix(".txt").write_text("c")
    one, two = tmp_path / "audio", tmp_path / "more"
    found = [open_sources(spec).fingerprint() for spec in (f"{one},{two}", f"{two},{one}", f"{one}@2,{two}")]
    assert len(set(found)) == 3
