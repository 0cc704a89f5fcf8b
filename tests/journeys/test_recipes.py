"""The recorded experiments at the real sizes: what their scripts call has flags and values that there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_speech.config import AnswerConfig, EvalConfig, TrainConfig
from rwkv_speech.flags import Flags, parse
from rwkv_speech.synthetic import pretrain_lm, say_texts, vary_recordings

ROOT = Path(__file__).parents[2]
PARTS = ("train", "valid", "test")
FOLDERS = ("voice-qa.sh", "other-audio.sh", "conversation.sh")  # take a folder of manifests


@pytest.fixture
def pretender(tmp_path: Path) -> Path:
    """An interpreter that has every module, and prints its arguments, a call in a line, instead of running them."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\nif [ "$1" != -c ]; then printf \'%s\\037\' "$@"; echo; fi\n')
    path.chmod(0o755)
    return path


def run(script: str, *words: object, cwd: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "venv": "none", **{name: str(value) for name, value in variables.items()}}
    command = ["bash", str(ROOT / "demo" / script), *map(str, words)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def parsed(line: str) -> Flags:
    """What a call of an interpreter asks for."""
    first, *words = line[:-1].split("\x1f")
    if first == "-m":
        for module in (pretrain_lm, say_texts, vary_recordings):
            if words[0] == module.__name__:
                return parse(module.Flags, words[1:], "")
        assert words[:2] == ["rwkv_speech", "make_answers"]
        return parse(AnswerConfig, words[2:], "")
    return parse({"train.py": TrainConfig, "eval.py": EvalConfig}[Path(first).name], words, "")


@pytest.mark.parametrize("script", [*FOLDERS, "multilingual-asr.sh", "speech-translation.sh"])
def test_recipes_call_with_flags_that_there_are(script: str, pretender: Path, tmp_path: Path):
    for part in PARTS:
        (tmp_path / f"{part}.jsonl").touch()
    folder = [tmp_path] if script in FOLDERS else []
    for op, config in (("train", TrainConfig), ("eval", EvalConfig)):
        done = run(script, *folder, "--seed", 3, cwd=tmp_path, PYTHON=pretender, OP=op, proj_dir=tmp_path / "run")
        assert done.returncode == 0, done.stderr
        *_, last = map(parsed, done.stdout.splitlines())
        assert isinstance(last, config) and (last.seed, last.proj_dir) == (3, str(tmp_path / "run"))
    if folder:
        done = run(script, tmp_path / "no", cwd=tmp_path)
        assert done.returncode == 2 and "train.jsonl" in done.stderr


def test_real_tasks_trains_and_scores_on_a_small_base_model(pretender: Path, tmp_path: Path):
    """With a blank in every path, as all scripts."""
    base, data = tmp_path / "my base", tmp_path / "my data"
    for file in ("prompts/asr", "stamps/asr", "emotion/emotion"):
        (data / file).parent.mkdir(parents=True)
        (data / f"{file}.train.jsonl").touch()
    done = run("pretrain-small.sh", data, f"{base}@3", cwd=tmp_path, PYTHON=pretender, out=base, steps=7)
    small, *_ = done.stdout.splitlines()
    assert parsed(small) == pretrain_lm.Flags(str(base), texts=f"{data},{base}@3", steps=7)
    done = run("real-tasks.sh", data, cwd=tmp_path, PYTHON=pretender, base=base, proj_dir=tmp_path / "run")
    assert done.returncode == 2 and "demo/pretrain-small.sh" in done.stderr
    base.mkdir()
    (base / "rwkv6.safetensors").touch()
    own = {"base": base, "proj_dir": tmp_path / "run", "PYTHON": pretender}
    done = run("real-tasks.sh", data, cwd=tmp_path, texts=f"{data}@3,{base}", **own)
    calls = [parsed(line) for line in done.stdout.splitlines() if "\x1f" in line]
    kinds = [say_texts.Flags, vary_recordings.Flags, *[TrainConfig] * 3, *[EvalConfig] * 5]
    assert [type(call) for call in calls] == kinds, done.stderr
    said, varied, *rest = calls
    assert isinstance(said, say_texts.Flags) and said.texts == f"{data}@3,{base}"
    assert isinstance(varied, vary_recordings.Flags)
    assert all(x.vocab_file == str(base / "vocab.txt") for x in rest if isinstance(x, TrainConfig | EvalConfig))
    assert isinstance(rest[0], TrainConfig) and rest[0].train_data.endswith(
        f",{varied.out}/train.jsonl,{said.out}/train.jsonl"
    )


def test_voice_qa_learns_the_answers_that_it_makes(pretender: Path, tmp_path: Path):
    for part in PARTS:
        (tmp_path / f"{part}.jsonl").touch()
    done = run("voice-qa.sh", tmp_path, cwd=tmp_path, PYTHON=pretender, proj_dir=tmp_path / "run")
    *made, training = map(parsed, done.stdout.splitlines())
    outputs = [str(tmp_path / f"run/data/{part}.jsonl") for part in PARTS]
    assert [getattr(answers, "output", "") for answers in made] == outputs
    assert isinstance(training, TrainConfig) and training.loss == "kl" and training.valid_data == outputs[1]
    assert training.train_data.startswith(outputs[0])


@pytest.mark.soak
def test_voice_qa_on_the_tiny_model(tmp_path: Path):
    make = ["-m", "rwkv_speech.synthetic.make_corpus", "--out", str(tmp_path), "--train", "8", "--valid", "2", "--test"]
    subprocess.run([sys.executable, *make, "2"], check=True, capture_output=True)
    tiny = {"load_model": "tiny", "proj_dir": tmp_path / "run", "PYTHON": sys.executable, "device": "cpu",
            "epoch_count": 1, "micro_bsz": 2, "workers": 0,
            "form": "answer: {text}#"}  # fmt: skip
    done = run("voice-qa.sh", tmp_path, cwd=tmp_path, **tiny)
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr
    done = run("voice-qa.sh", tmp_path, cwd=tmp_path, OP="eval", **tiny)
    assert done.returncode == 0, done.stderr


def test_translation_trains_its_cascade_and_scores_beside_it(pretender: Path, tmp_path: Path):
    settings = {"PYTHON": pretender, "proj_dir": tmp_path / "run", "pairs": "en_de en_ja"}
    speech, text = (run("speech-translation.sh", cwd=tmp_path, OP=op, **settings) for op in ("train", "text"))
    speech, text = (parsed(done.stdout.splitlines()[-1]) for done in (speech, text))
    assert isinstance(speech, TrainConfig) and isinstance(text, TrainConfig)
    assert text.train_data == "covost:en_de:train,covost:en_ja:train" and text.input == "text"
    assert speech.train_data.startswith(text.train_data) and text.proj_dir == f"{speech.proj_dir}/text"
    Path(text.proj_dir).mkdir(parents=True)
    scores = parsed(run("speech-translation.sh", cwd=tmp_path, OP="eval", **settings).stdout.splitlines()[-1])
    assert isinstance(scores, EvalConfig) and scores.cascade == text.proj_dir
