"""Small folders in the layout of the public corpora, and rows with the columns of the hub's."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from manifests import write_audio

from data.test_huggingface import flac
from rwkv_speech.data import huggingface
from rwkv_speech.data.recipes import COVOST, FLEURS, MLS, iso
from rwkv_speech.data.source import Source, Utterance
from rwkv_speech.data.sources import open_source, open_sources
from rwkv_speech.errors import UserError


def write(file: Path, *rows: tuple[object, ...]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def utterances(spec: str) -> list[Utterance]:
    source = open_source(spec)
    return [source.utterance(i) for i in range(len(source))]


@pytest.fixture
def common_voice(tmp_path: Path) -> Path:
    folder = tmp_path / "cv-corpus-23.0" / "zh-CN"
    head = ("client_id", "path", "sentence_id", "sentence", "sentence_domain", "locale", "segment")
    rows = [(f"c{i}", f"{i}.mp3", "x", text, "", "zh-CN", "") for i, text in enumerate(['"天气" 好', "Ünd so."])]
    write(folder / "train.tsv", head, *rows)
    write(folder / "validated.tsv", head, *rows)
    write(folder / "clip_durations.tsv", ("clip", "duration[ms]"), ("0.mp3", 50), ("other.mp3", 9))
    for row in rows:
        write_audio(folder / "clips" / f"{row[1]}.wav").rename(folder / "clips" / row[1])
    return folder


def test_common_voice_keeps_what_is_written(common_voice: Path):
    first, second = utterances(f"commonvoice:{common_voice}:train")
    assert (first.text, first.lang, first.speaker, first.duration) == ('"天气" 好', "zh", "c0", 0.05)
    assert (second.id, second.text, second.duration) == ("1.mp3", "Ünd so.", None)
    assert len(open_sources(f"commonvoice:{common_voice}:train@2")) == 2
    assert len(open_source(f"commonvoice:{common_voice}:train").load(0)) == 800


def test_covost_joins_translations_with_common_voice(common_voice: Path):
    spec = f"covost:{common_voice}:zh-CN_en:train"
    rows = [("0.mp3", "Nice weather", "train"), ("1.mp3", "And so.", "test"), ("gone.mp3", "?", "train_covost")]
    write(common_voice / "covost_v2.zh-CN_en.tsv", ("path", "translation", "split"), *rows)
    [found] = utterances(spec)
    assert (found.text, found.lang, found.task, found.speaker) == ("Nice weather", "en", "st", "c0")
    assert (found.source_text, found.source_lang, found.duration) == ('"天气" 好', "zh", 0.05)
    own = [("path", "sentence", "translation", "client_id"), ("1.mp3", "Ünd so.", "And so.", "c1")]
    write(common_voice / "covost_v2.zh-CN_en.train.tsv", *own)
    assert [found.text for found in utterances(spec)] == ["And so."]


def test_fleurs_keeps_case(tmp_path: Path):
    folder = tmp_path / "a:b" / "cmn_hans_cn"
    write(folder / "dev.tsv", (7, "1.wav", "Das ist „Es“.", "das ist es", "d a s |", 800, "MALE"))
    write_audio(folder / "audio" / "dev" / "1.wav")
    for split in ("dev", "validation"):
        [found] = utterances(f"fleurs:{folder}:{split}")
        assert (found.text, found.lang, found.duration) == ("Das ist „Es“.", "zh", 0.05)


def test_mls_takes_flac_and_opus(tmp_path: Path):
    folder = tmp_path / "mls_german_opus" / "dev"
    write(folder / "transcripts.txt", ("10_20_000000", "das wetter"), ("11_20_000001", "es"))
    write_audio(folder / "audio" / "10" / "20" / "10_20_000000.flac")
    write_audio(folder / "audio" / "11" / "20" / "11_20_000001.wav").rename(
        folder / "audio" / "11" / "20" / "11_20_000001.opus"
    )
    first, second = utterances(f"mls:{folder.parent}:dev")
    assert (first.text, first.lang, first.speaker, second.text, second.speaker) == (
        "das wetter",
        "de",
        "10",
        "es",
        "11",
    )


def test_aishell_joins_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = tmp_path / "transcript" / "aishell_transcript_v0.8.txt"
    texts.parent.mkdir()
    texts.write_text("BAC009S0002W0122 而 对 楼市\nBAC009S0002W0123 限 购\n", encoding="utf-8")
    for name in ("W0122", "W0123", "W0999"):
        write_audio(tmp_path / "wav" / "train" / "S0002" / f"BAC009S0002{name}.wav")
    found = utterances(f"aishell:{tmp_path}:train")
    assert [(x.text, x.lang, x.speaker) for x in found] == [("而对楼市", "zh", "S0002"), ("限购", "zh", "S0002")]
    assert "1 of 3 recordings have no line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("commonvoice:train", "1 parts after 'commonvoice:'; expected commonvoice:FOLDER:SPLIT"),
        ("commonvoice:FOLDER:dev", "found no .*dev.tsv; expected commonvoice:FOLDER:SPLIT"),
        ("commonvoice:FOLDER/gone:dev", "found no .*gone; expected commonvoice"),
        ("covost:FOLDER:zh-CN_en:dev", "found no .*covost_v2.zh-CN_en.dev.tsv"),
        ("covost:FOLDER:english:dev", "found 'english', expected two languages, as en_de"),
        ("mls:klingon:dev", "found the language 'klingon', expected one of dutch"),
        ("aishell:FOLDER:dev", "found no .*aishell_transcript_v0.8.txt"),
    ],
)
def test_what_is_missing_is_named(common_voice: Path, spec: str, message: str):
    with pytest.raises(UserError, match=message):
        open_source(spec.replace("FOLDER", str(common_voice)))


def test_recordings_and_columns_that_are_missing_are_named(common_voice: Path):
    (common_voice / "clips" / "1.mp3").unlink()
    with pytest.raises(UserError, match=r"1 of 2 recordings are missing.*\n.*clips/1.mp3"):
        open_source(f"commonvoice:{common_voice}:train")
    write(common_voice / "train.tsv", ("path", "text"), ("1.mp3", "x"))
    with pytest.raises(UserError, match=r"train.tsv: has no column 'sentence'; found path, text"):
        open_source(f"commonvoice:{common_voice}:train")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is asked of the hub; rows with the columns of the three sets there."""
    asked: dict[str, Any] = {}
    audio = [{"bytes": flac(800), "path": "a.flac"}] * 2
    columns: dict[str, dict[str, list[Any]]] = {
        FLEURS: {"id": [7, 7], "transcription": ["das", "es"], "raw_transcription": ["Das.", "Es."], "lang_id": [1, 1]},
        MLS: {"transcript": ["das", "es"], "audio_duration": [0.05, 0.05], "speaker_id": ["5", "6"], "id": ["x", "y"]},
        COVOST: {
            "client_id": ["c", "d"],
            "sentence": ["The.", "It."],
            "translation": ["Das.", "Es."],
            "id": ["1", "2"],
        },
    }

    def load(name: str, config: str, split: str, spec: str, revision: str | None = None) -> datasets.Dataset:
        asked.update(name=name, config=config, split=split, revision=revision)
        rows = datasets.Dataset.from_dict({"audio": audio, **columns[name]})
        return rows.cast_column("audio", datasets.Audio(sampling_rate=16_000, decode=False))

    monkeypatch.setattr(huggingface, "load_hub", load)
    return asked


def test_sets_of_the_hub(hub: dict[str, Any]):
    source: Source = open_source("fleurs:de_de:dev")
    assert hub == {"name": FLEURS, "config": "de_de", "split": "validation", "revision": "refs/convert/parquet"}
    first, second = (source.utterance(i) for i in range(2))
    assert (first.text, first.lang, first.source_text) == ("Das.", "de", None) and first.id != second.id
    assert source.tasks() == {(None, "de"): 2} and len(source.load(1)) == 800
    first = open_source("mls:german:dev").utterance(0)
    assert (first.text, first.lang, first.speaker, first.source_text) == ("das", "de", "5", None)
    assert first.duration == pytest.approx(0.05) and hub["config"] == "german"
    source = open_source("covost:en_sv-SE:test")
    first = source.utterance(0)
    assert (first.text, first.lang, first.task, first.speaker) == ("Das.", "sv", "st", "c")
    assert (first.source_text, first.source_lang, hub["config"]) == ("The.", "en", "en_sv-SE")
    assert source.tasks() == {("st", "sv"): 2}


def test_codes_of_languages():
    assert [iso(x) for x in ("de_de", "zh-CN", "cmn_hans_cn", "yue", "en")] == ["de", "zh", "zh", "yue", "en"]
