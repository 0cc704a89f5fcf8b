from pathlib import Path

import pytest
from manifests import write_audio, write_manifest

from rwkv_speech.config import TrainConfig
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import Trained
from rwkv_speech.models.parts import Parts
from rwkv_speech.training.data import open_train_and_valid, state_names, transcribing

ROWS = [("asr", "en"), ("asr", "fr"), (None, "fr"), ("st", "en"), ("lid", "fr")]


def manifest(path: Path, pairs: list[tuple[str | None, str]]) -> str:
    write_audio(path.with_suffix(".wav"))
    rows = [
        {"audio_filepath": f"{path.stem}.wav", "text": "x", "task": task, "lang": lang, "id": str(number)}
        for number, (task, lang) in enumerate(pairs)
    ]
    return str(write_manifest(path, *rows))


def names(config: TrainConfig) -> list[str]:
    learned, states = state_names(config, *open_train_and_valid(config))
    assert learned == states
    return learned


def test_the_training_data_says_which_states_are_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = manifest(tmp_path / "m.jsonl", ROWS)
    assert names(TrainConfig(train_data=data)) == ["asr", "lid", "st_en"]
    assert "states: asr (3 utterances), lid (1 utterances), st_en (1 utterances)" in capsys.readouterr().out
    assert names(TrainConfig(train_data=data, state_by="lang")) == ["asr_en", "asr_fr", "lid", "st_en"]
    assert names(TrainConfig(train_data=data, task="caption", states="st_ru")) == [
        "asr", "caption", "lid", "st_en", "st_ru",
    ]  # fmt: skip


def test_one_state_is_not_worth_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert names(TrainConfig(train_data=manifest(tmp_path / "m.jsonl", ROWS[:3]))) == ["asr"]
    assert capsys.readouterr().out == ""


def test_validation_of_another_task_is_an_error_before_training(tmp_path: Path):
    data, other = manifest(tmp_path / "m.jsonl", ROWS), manifest(tmp_path / "v.jsonl", [("st", "ru"), ("asr", "de")])
    with pytest.raises(UserError, match="--valid_data: found utterances of the task 'st_ru', expected those of the"):
        names(TrainConfig(train_data=data, valid_data=other))
    assert names(TrainConfig(train_data=data, valid_data=data)) == ["asr", "lid", "st_en"]


def test_a_task_that_is_no_name_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="task 'ASR': expected a name of lower-case letters"):
        names(TrainConfig(train_data=manifest(tmp_path / "m.jsonl", [("ASR", "en")])))


def test_which_states_transcribe_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    learned = ["asr", "qa", "st_en", "st_ru", "topic"]
    assert transcribing(TrainConfig(transcribe_first="qa,st"), learned) == ["qa", "st_en", "st_ru"]
    assert capsys.readouterr().out == "transcribe first: qa, st_en, st_ru\n"
    assert transcribing(TrainConfig(transcribe_first="st_ru"), learned) == ["st_ru"]
    assert transcribing(TrainConfig(), learned) == []
    parts = Parts(transcribes=("st_en", "chat_old"))
    start = Trained(tmp_path, {}, {}, parts, None, (), {})
    assert transcribing(TrainConfig(transcribe_first="qa"), learned, start) == ["qa", "st_en"]
    with pytest.raises(UserError, match="--loss: found kl with st_en of --transcribe_first, or of --init_from"):
        transcribing(TrainConfig(loss="kl"), learned, start)
    for names, found in (
        ("qa,asr", "its text is what is heard"),
        ("chat", "its turns may be text"),
        ("lid", "found lid"),
    ):
        with pytest.raises(UserError, match=f"--transcribe_first: .*{found}"):
            transcribing(TrainConfig(transcribe_first=names), learned)
    with pytest.raises(UserError, match="--transcribe_first: found 'qa' with --input text, which hears nothing"):
        TrainConfig(transcribe_first="qa", input="text").check()
