"""Every shipped shell script runs, by the shell it names, from another directory, on the tiny model."""

import filecmp
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.synthetic.make_corpus import Flags, make_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    make_corpus(Flags(str(folder), seed=4, train=4, valid=2, test=2))
    return folder


def shell(
    script: str, *words: str, cwd: Path, program: str = "sh", **variables: object
) -> subprocess.CompletedProcess[str]:
    """A demo script in the environment of the tests, with these variables."""
    mine = {"venv": "none", "PYTHON": sys.executable, "CDPATH": str(ROOT), **variables}
    environment = {**os.environ, **{name: str(value) for name, value in mine.items()}}
    command = [program, str(ROOT / "demo" / script), *words]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_state_tuning_and_prediction(corpus: Path, tmp_path: Path):
    """The tiny model needs its name and data; scoring and prediction need the run's folder alone."""
    training = {"micro_bsz": 2, "epoch_steps": 2, "epoch_count": 1, "train_data": corpus / "train.jsonl"}
    done = shell("demo-state-tuning.sh", cwd=tmp_path, load_model="tiny", proj_dir=tmp_path, **training)
    assert done.returncode == 0 and (tmp_path / "last.safetensors").is_file(), done.stderr
    evaluation = {"OP": "eval", "proj_dir": tmp_path, "eval_data": corpus / "test.jsonl"}
    done = shell("demo-state-tuning.sh", cwd=tmp_path, **evaluation)
    assert done.returncode == 0 and "WER" in done.stdout, done.stderr
    done = shell("demo-predict.sh", cwd=tmp_path, file_path=corpus / "test/00000.flac", proj_dir=tmp_path)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr


@pytest.fixture
def pretender(tmp_path: Path) -> Path:
    """An interpreter that has every module, and prints its arguments, one in a line, instead of running them."""
    path = tmp_path / "my python"
    path.write_text('#!/bin/sh\nif [ "$1" != -c ]; then printf \'%s\\n\' "$@"; fi\n')
    path.chmod(0o755)
    return path


def flags_of(words: str) -> dict[str, str]:
    lines = words.splitlines()
    return {name: value for name, value in itertools.pairwise(lines) if name.startswith("--")}


@pytest.mark.parametrize(
    "script", ["demo-state-tuning.sh", "state-tuning-24gb.sh", "demo-predict.sh", "demo-server.sh", "demo-chat.sh"]
)
def test_every_variable_that_the_readme_names_has_an_effect(script: str, pretender: Path, tmp_path: Path):
    rows = re.search(r"\| variable \| meaning \|\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    assert rows
    names = {name for row in rows[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])} - {"OP"}
    odd = 'it\'s $HOME, "my" '
    variables = {name: f"{odd}{name}" for name in names}
    runs = [shell(script, cwd=tmp_path, PYTHON=pretender, OP=op, **variables) for op in ("train", "eval")]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    flags = {name: value for run in runs for name, value in flags_of(run.stdout).items()}
    heeded = {name for name in names if flags.get(f"--{name}") == f"{odd}{name}"}
    if script == "demo-predict.sh":
        expected = {"load_model", "encoder", "proj_dir", "n_layer", "n_embd", "device", "wkv6", "file_path"}
        assert expected <= names and heeded == expected
    elif script in ("demo-server.sh", "demo-chat.sh"):
        assert heeded == {"load_model", "encoder", "proj_dir", "n_layer", "n_embd", "device", "wkv6"}
    else:
        assert heeded == names - {"file_path"} >= {"wkv6", "train_data", "valid_data", "eval_data", "epoch_steps"}


def test_published_setting_is_the_default(pretender: Path, tmp_path: Path):
    flags = flags_of(shell("demo-state-tuning.sh", cwd=tmp_path, PYTHON=pretender).stdout)
    published = {"device": "4", "micro_bsz": "4", "n_layer": "32", "n_embd": "2560", "grad_cp": "1", "ctx_len": "1024",
                 "epoch_count": "5", "train_data": "librispeech:train-960", "lr_adapter": "1e-4", "lr_state": "1e-2",
                 "load_model": str(ROOT / "RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth")}  # fmt: skip
    assert {name: flags[f"--{name}"] for name in published} == published
    other = flags_of(shell("demo-state-tuning.sh", cwd=tmp_path, PYTHON=pretender, load_model="7B.pth").stdout)
    assert other["--n_layer"] == other["--n_embd"] == ""


@pytest.mark.parametrize("name", ["tiny", "tiny7"])
def test_tiny_makes_its_data_when_none_is_named(pretender: Path, tmp_path: Path, name: str):
    settings = {"PYTHON": pretender, "load_model": name, "proj_dir": tmp_path / "run"}
    done = shell("demo-state-tuning.sh", cwd=tmp_path, **settings)
    assert "rwkv_speech.synthetic.make_corpus\n--out\n" in done.stdout
    flags = flags_of(done.stdout)
    assert flags["--train_data"] == str(tmp_path / "run/data/train.jsonl") and flags["--device"] == "cpu"
    done = shell("demo-state-tuning.sh", cwd=tmp_path, train_data="a.jsonl", **settings)
    assert "make_corpus" not in done.stdout and flags_of(done.stdout)["--valid_data"] == ""


def test_state_tuning_names_a_wrong_op_and_a_contradiction(corpus: Path, tmp_path: Path):
    done = shell("demo-state-tuning.sh", cwd=tmp_path, OP="trian")
    assert done.returncode == 2 and "OP=trian, expected train or eval" in done.stderr
    settings = {"load_model": "tiny", "n_layer": 32, "train_data": corpus / "train.jsonl"}
    done = shell("demo-state-tuning.sh", cwd=tmp_path, proj_dir=tmp_path, **settings)
    assert done.returncode == 2 and "--n_layer: given 32, but tiny has 4" in done.stderr


def test_the_recipe_for_24_gb_is_the_published_one_with_other_sizes(corpus: Path, tmp_path: Path):
    tiny = {"load_model": "tiny", "device": "cpu", "epoch_count": 1, "micro_bsz": 1, "workers": 0,
            "train_data": corpus / "train.jsonl", "proj_dir": tmp_path}  # fmt: skip
    done = shell("state-tuning-24gb.sh", cwd=tmp_path, **tiny)
    assert done.returncode == 0, done.stderr
    assert load_trained(tmp_path / "last.safetensors").metrics["step"] == 2  # four utterances, two in each step


def test_slurm_script_passes_its_machines_on(corpus: Path, tmp_path: Path):
    """With a stand-in for srun that runs one task, as srun does on each GPU."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    srun.chmod(0o755)
    variables = {"load_model": "tiny", "device": "cpu", "micro_bsz": 2,
                 "train_data": corpus / "train.jsonl", "epoch_count": 1, "proj_dir": tmp_path / "run",
                 "strategy": "auto", "SLURM_SUBMIT_DIR": ROOT,
                 "PATH": f"{srun.parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    done = shell("slurm.sh", cwd=tmp_path, program="bash", **variables)
    assert done.returncode == 0 and (tmp_path / "run" / "last.safetensors").is_file(), done.stderr


def test_prediction_names_what_is_missing(tmp_path: Path):
    done = shell("demo-predict.sh", cwd=tmp_path, proj_dir=tmp_path, device="cpu")
    assert done.returncode == 2 and "found no trained weights there" in done.stderr


def test_digits(corpus: Path, tmp_path: Path):
    settings = {"proj_dir": tmp_path / "run", "epoch_count": 1, "micro_bsz": 2}
    done = shell("digits.sh", str(corpus), cwd=tmp_path, program="bash", **settings)
    assert done.returncode == 0 and "WER" in done.stdout, done.stderr
    done = shell("digits.sh", str(tmp_path), cwd=tmp_path, program="bash")
    assert done.returncode == 2 and "train.jsonl" in done.stderr


def test_quickstart(tmp_path: Path):
    settings = {"proj_dir": tmp_path / "run", "train_utterances": 8, "test_utterances": 3, "epoch_count": 1}
    done = shell("quickstart.sh", cwd=tmp_path, program="bash", micro_bsz=4, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WER") >= 3 and "4 of 4" in done.stdout
    assert load_trained(tmp_path / "run" / "best.safetensors").ctc is not None


@pytest.mark.soak
def test_pretrain_tiny(tmp_path: Path):
    settings = {"steps": 2, "steps7": 2, "hours": 0.02, "epoch_count": 1}
    done = shell("pretrain-tiny.sh", str(tmp_path / "tiny"), cwd=tmp_path, program="bash", **settings)
    assert done.returncode == 0, done.stderr
    for file in ("rwkv6.safetensors", "rwkv7/rwkv7.safetensors", "wavlm/model.safetensors"):
        assert (tmp_path / "tiny" / file).is_file()
    assert filecmp.cmp(tmp_path / "tiny/vocab.txt", tmp_path / "tiny/rwkv7/vocab.txt", shallow=False)
