"""A small corpus, and a run on it that no test changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import train as train_script
from run_files import tiny_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training, four validation, three test utterances; of a new process, so that they are always the same."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["--out", str(folder), "--train", "8", "--valid", "4", "--test", "3", "--seed", "3"]
    subprocess.run([sys.executable, "-m", "rwkv_speech.synthetic.make_corpus", *words], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    flags = {"valid_data": corpus / "valid.jsonl", "epoch_count": 2, "lr_adapter": 1e-3, "score_first": 1}
    assert train_script.main(tiny_run(corpus, folder, **flags)) == 0
    return folder
