"""Every shipped shell script runs, by the shell it names, from another directory, on the tiny model."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.synthetic.make_corpus import make_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    make_corpus(folder, {"train": 4, "valid": 2, "test": 2}, seed=4)
    return folder


def shell(
    script: str, *words: str, cwd: Path, program: str = "sh", **variables: object
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [program, str(ROOT / "demo" / script), *words]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_state_tuning_and_prediction(corpus: Path, tmp_path: Path):
    model = {"load_model": "tiny", "encoder": "", "n_layer": 3, "n_embd": "", "device": "cpu", "proj_dir": tmp_path}
    training = {"micro_bsz": 2, "epoch_steps": 2, "epoch_count": 1, "train_data": corpus / "train.jsonl"}
    done = shell("demo-state-tuning.sh", "--workers", "0", cwd=tmp_path, OP="train", **model, **training)
    assert done.returncode == 0 and (tmp_path / "last.safetensors").is_file(), done.stderr
    done = shell("demo-state-tuning.sh", cwd=tmp_path, OP="eval", eval_data=corpus / "test.jsonl", **model)
    assert done.returncode == 0 and "WER" in done.stdout, done.stderr
    done = shell("demo-predict.sh", cwd=tmp_path, file_path=corpus / "test/00000.flac", **model)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr


def test_state_tuning_names_a_wrong_op_and_a_contradiction(corpus: Path, tmp_path: Path):
    done = shell("demo-state-tuning.sh", cwd=tmp_path, OP="trian")
    assert done.returncode == 2 and "OP=trian, expected train or eval" in done.stderr
    done = shell(
        "demo-state-tuning.sh",
        cwd=tmp_path,
        load_model="tiny",
        encoder="",
        device="cpu",
        train_data=corpus / "train.jsonl",
    )
    assert done.returncode == 2 and "--n_layer: given 32, but the model has 3" in done.stderr


def test_the_recipe_for_24_gb_is_the_published_one_with_other_sizes(corpus: Path, tmp_path: Path):
    tiny = {"load_model": "tiny", "encoder": "", "n_layer": "", "n_embd": "", "device": "cpu", "epoch_count": 1,
            "micro_bsz": 1, "train_data": corpus / "train.jsonl", "proj_dir": tmp_path}  # fmt: skip
    done = shell("state-tuning-24gb.sh", "--workers", "0", cwd=tmp_path, **tiny)
    assert done.returncode == 0, done.stderr
    assert load_trained(tmp_path / "last.safetensors").metrics["step"] == 2  # four utterances, two in each step
    done = shell("state-tuning-24gb.sh", cwd=tmp_path, OP="eval", eval_data=corpus / "test.jsonl", **tiny)
    assert done.returncode == 0 and "WER" in done.stdout, done.stderr


def test_slurm_script_passes_its_machines_on(corpus: Path, tmp_path: Path):
    """With a stand-in for srun that runs one task, as srun does on each GPU."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    srun.chmod(0o755)
    variables = {"load_model": "tiny", "encoder": "", "n_layer": "", "n_embd": "", "device": "cpu", "micro_bsz": 2,
                 "train_data": corpus / "train.jsonl", "epoch_count": 1, "proj_dir": tmp_path / "run",
                 "strategy": "auto", "SLURM_SUBMIT_DIR": ROOT,
                 "PATH": f"{srun.parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    done = shell("slurm.sh", "--workers", "0", cwd=tmp_path, program="bash", **variables)
    assert done.returncode == 0 and (tmp_path / "run" / "last.safetensors").is_file(), done.stderr


def test_published_setting_is_the_default():
    text = (ROOT / "demo/demo-state-tuning.sh").read_text()
    for line in ("device-4}", "micro_bsz-4}", "n_layer-32}", "n_embd-2560}", "train_data-librispeech:train-960}",
                 "encoder-microsoft/wavlm-large}", "RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth}"):  # fmt: skip
        assert line in text


def test_published_setting_names_the_missing_model(tmp_path: Path):
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


@pytest.mark.soak
def test_pretrain_tiny(tmp_path: Path):
    settings = {"steps": 2, "hours": 0.02, "epoch_count": 1}
    done = shell("pretrain-tiny.sh", str(tmp_path / "tiny"), cwd=tmp_path, program="bash", **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny/rwkv6.safetensors").is_file() and (tmp_path / "tiny/wavlm/model.safetensors").is_file()


def test_environment_names_an_interpreter_that_is_too_old_or_missing(tmp_path: Path):
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.10.1; exit 0; fi\nexit 1\n')
    old.chmod(0o755)
    for interpreter, message in (
        (str(old), "is Python 3.10.1, expected Python 3.11 or newer"),
        ("py9", "no such interpreter"),
    ):
        done = shell("quickstart.sh", cwd=tmp_path, program="bash", PYTHON=interpreter)
        assert done.returncode == 2 and message in done.stderr


def test_posix_shells_parse_the_demo_scripts():
    dash = shutil.which("dash") or "sh"
    for script in ("demo-state-tuning.sh", "demo-predict.sh"):
        assert subprocess.run([dash, "-n", str(ROOT / "demo" / script)], check=False).returncode == 0
