import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.audio import AudioError
from rwkv_speech.data import huggingface
from rwkv_speech.data.huggingface import HuggingFaceSource
from rwkv_speech.data.source import Columns
from rwkv_speech.data.sources import open_source
from rwkv_speech.errors import UserError


def flac(samples: int, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, samples), rate, format="FLAC")
    return buffer.getvalue()


def make_rows(count: int = 3, **more: list[Any]) -> datasets.Dataset:
    audio = [{"bytes": flac(500 + 100 * i), "path": f"{i}.flac"} for i in range(count)]
    rows = datasets.Dataset.from_dict({"audio": audio, "text": [f"TEXT {i}" for i in range(count)], **more})
    return rows.cast_column("audio", datasets.Audio(sampling_rate=16_000, decode=False))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_source_decodes_bytes_and_takes_further_columns():
    rows = make_rows(id=["x", "y", "z"], duration=[0.03, None, -1.0], lang=["en"] * 3, other=[1] * 3)
    # With decoding on, as hub datasets come: the source has to turn it off, for torchcodec is not there.
    source = HuggingFaceSource(rows.cast_column("audio", datasets.Audio()), Columns())
    assert len(source) == 3
    assert [len(source.load(i)) for i in range(3)] == [500, 600, 700]
    assert source.load(0).dtype == torch.float32
    first = source.utterance(0)
    assert (first.id, first.text, first.duration, first.lang, first.task) == ("x", "TEXT 0", 0.03, "en", None)
    assert [source.utterance(i).duration for i in (1, 2)] == [None, None]


def test_tasks_are_counted_by_language():
    assert HuggingFaceSource(make_rows(2), Columns()).tasks() == {(None, None): 2}
    rows = make_rows(3, task=["st", "st", None], lang=["es", "es", "fr"])
    assert HuggingFaceSource(rows, Columns()).tasks() == {("st", "es"): 2, (None, "fr"): 1}
    assert HuggingFaceSource(rows.select([2]), Columns()).tasks() == {(None, "fr"): 1}


def test_source_takes_what_is_said_of_texts():
    rows = make_rows(answer=[["four", "4"], None, []], transcript=["2 + 2", "x", None], source_lang=["en"] * 3)
    source = HuggingFaceSource(rows, Columns(), label_mode="lower")
    found = [source.utterance(i) for i in range(3)]
    assert [(x.text, x.answers, x.source_text, x.source_lang) for x in found] == [
        ("four", ("four", "4"), "2 + 2", "en"),
        ("text 1", (), "x", "en"),
        ("text 2", (), None, "en"),
    ]


def test_durations_are_nan_where_unknown():
    rows = make_rows(4, duration=[0.5, None, -1.0, 2.0])
    np.testing.assert_array_equal(
        HuggingFaceSource(rows, Columns()).durations(), np.array([0.5, np.nan, np.nan, 2], np.float32)
    )
    chosen = HuggingFaceSource(rows.select([3, 0]), Columns()).durations()
    assert chosen.dtype == np.float32 and chosen.tolist() == [2, 0.5]
    assert HuggingFaceSource(make_rows(2, duration=[1, 3]), Columns()).durations().tolist() == [1, 3]
    for unknown in (make_rows(2), make_rows(2, duration=["1", "2"])):
        assert np.isnan(HuggingFaceSource(unknown, Columns()).durations()).tolist() == [True, True]


def test_source_resamples_from_the_rate_of_the_bytes():
    rows = datasets.Dataset.from_dict({"audio": [{"bytes": flac(400, rate=8_000), "path": None}], "text": ["a"]})
    # The column claims 16 kHz; the file knows better.
    rows = rows.cast_column("audio", datasets.Audio(sampling_rate=16_000, decode=False))
    assert len(HuggingFaceSource(rows, Columns()).load(0)) == 800


def test_source_reads_paths_and_names_broken_rows(tmp_path: Path):
    (tmp_path / "a.flac").write_bytes(flac(500))
    paths = [str(tmp_path / "a.flac"), str(tmp_path / "gone.flac"), None]
    source = HuggingFaceSource(datasets.Dataset.from_dict({"file": paths, "text": ["a"] * 3}), Columns("file"))
    assert len(source.load(0)) == 500
    with pytest.raises(AudioError, match=r"dataset row 1 \(.*gone.flac\)"):
        source.load(1)
    with pytest.raises(AudioError, match="row 2: has neither bytes nor a path"):
        source.load(2)


def test_ids_are_those_of_the_column():
    source = HuggingFaceSource(make_rows(id=["x", "x", "y"]), Columns(), label="set")
    assert [source.utterance(i).id for i in range(3)] == ["x", "x", "y"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            Columns(audio="sound"),
            r"no audio column 'sound'; found: audio \(audio\), text \(string\), n \(int64\)",
        ),
        (Columns(text="transcript"), "no text column 'transcript'"),
        (Columns(audio="n"), "'n' holds no audio"),
        (Columns(text="n"), "'n' holds no strings"),
    ],
)
def test_source_lists_the_columns_found(columns: Columns, message: str):
    with pytest.raises(UserError, match=message):
        HuggingFaceSource(make_rows(n=[1, 2, 3]), columns)


def test_rows_without_a_text_and_empty_sets_are_refused():
    with_gap = make_rows().remove_columns("text").add_column("text", ["a", None, "b"])
    with pytest.raises(UserError, match="rows without a text"):
        HuggingFaceSource(with_gap, Columns())
    with pytest.raises(UserError, match="holds no row"):
        HuggingFaceSource(make_rows().select([]), Columns())


def test_identity_names_kept_bytes_but_no_paths(tmp_path: Path):
    make_rows().save_to_disk(tmp_path / "one")
    make_rows().map(lambda row: {"text": "changed"}).save_to_disk(tmp_path / "other")
    names = [open_source(str(tmp_path / "one")).utterance(i).identity for i in (0, 1, 2)]
    assert len(set(names)) == 3
    assert [open_source(str(tmp_path / "one")).utterance(i).identity for i in (0, 1, 2)] == names
    assert open_source(str(tmp_path / "other")).utterance(0).identity not in names
    paths = datasets.Dataset.from_dict({"audio": ["/a.wav"], "text": ["a"]})
    found = HuggingFaceSource(paths, Columns()).utterance(0)
    assert found.identity is None and found.audio == "/a.wav"


def test_open_source_reads_saved_datasets(tmp_path: Path):
    make_rows().save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"train": make_rows(2), "test": make_rows(1)})
    both.save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"train": make_rows(2)}).save_to_disk(tmp_path / "only")
    sizes = {"one": 3, "both:train": 2, "both:test": 1, "both:test+train": 3, "only": 2}
    for spec, size in sizes.items():
        assert len(open_source(str(tmp_path / spec))) == size
    assert open_source(str(tmp_path / "both:train")).utterance(1).text == "TEXT 1"
    for spec in ("both", "both:dev", "both:train+dev"):
        with pytest.raises(UserError, match="splits are train, test"):
            open_source(str(tmp_path / spec))
    with pytest.raises(UserError, match="drop ':train'"):
        open_source(str(tmp_path / "one:train"))


def write_hub_folder(folder: Path) -> Path:
    """A folder laid out as a repository on the hub: two configurations, dotted split names, Parquet."""
    folder.mkdir()
    for split, count in (("train.clean", 3), ("test.clean", 2), ("test.other", 1)):
        (folder / "all" / split).mkdir(parents=True)
        make_rows(count).to_parquet(folder / "all" / split / "0000.parquet")
    splits = "".join(
        f"  - split: {split}\n    path: all/{split}/*.parquet\n"
        for split in ("train.clean", "test.clean", "test.other")
    )
    configs = f"configs:\n- config_name: all\n  data_files:\n{splits}"
    (folder / "README.md").write_text(f"---\n{configs}- config_name: more\n  data_files: all/*/*.parquet\n---\n")
    return folder


def test_open_source_loads_configurations_and_splits(tmp_path: Path):
    hub = write_hub_folder(tmp_path / "hub")
    assert len(open_source(f"hf:{hub}:all:test.clean")) == 2
    joined = open_source(f"hf:{hub}:all:test.clean+test.other")
    assert [joined.utterance(i).text for i in range(3)] == ["TEXT 0", "TEXT 1", "TEXT 0"]
    assert len(joined.load(2)) == 500
    assert len(open_source(f"hf:{hub}:all:train.clean[:1]")) == 1
    assert len(open_source(f"hf:{hub}:more:train")) == 6
    for spec in (f"hf:{hub}:none:train", f"hf:{hub}:all:none", f"hf:{tmp_path}/gone:train"):
        with pytest.raises(UserError, match="cannot be loaded"):
            open_source(spec)


def test_open_source_fetches_only_the_split_asked_for(tmp_path: Path):
    hub = write_hub_folder(tmp_path / "hub")
    (hub / "all" / "train.clean" / "0000.parquet").write_bytes(b"reading this fails")
    assert len(open_source(f"hf:{hub}:all:test.clean")) == 2


def test_librispeech_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = write_hub_folder(tmp_path / "hub")
    monkeypatch.setattr(huggingface, "LIBRISPEECH", (str(hub), "all"))
    source = open_source("librispeech:test-clean")
    assert (source.utterance(1).text, len(source)) == ("text 1", 2)
    for split in ("train", "train-960:x", ""):
        with pytest.raises(UserError, match="expected librispeech: and one of train-960, train-100"):
            open_source(f"librispeech:{split}")


def test_speakers_come_from_either_column_and_leave_the_fingerprint_alone():
    plain = HuggingFaceSource(make_rows(), Columns())
    numbers = HuggingFaceSource(make_rows(speaker_id=[1089, None, 7], speaker=["a", "b", "c"]), Columns())
    names = HuggingFaceSource(make_rows(speaker=["a", "b", "c"]), Columns())
    speakers = [[source.utterance(i).speaker for i in range(3)] for source in (plain, numbers, names)]
    assert speakers == [[None] * 3, ["1089", None, "7"], ["a", "b", "c"]]
    assert plain.fingerprint() == numbers.fingerprint() == names.fingerprint()
