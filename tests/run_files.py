"""Trainings as processes of their own or in this one, and what a run left in its folder."""

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train as train_script
from torch import Tensor

from rwkv_speech import tiny
from rwkv_speech.decoding.results import Row, write_rows
from rwkv_speech.files import sha256_file
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.reports.record import VALIDATION
from rwkv_speech.tokenizer import WorldTokenizer

ROOT = Path(__file__).parents[1]
# With a large epsilon AdamW's step is all but linear in the gradient: a small one would make the rounding of gradients
# near zero as large as a step. The rates keep what is learned far above float32's resolution.
LINEAR_STEPS = {"adam_eps": 1e-2, "lr_adapter": 1e-3, "lr_state": 1e-2}
# What a run says when a signal asks it to end: steps of such small models are short, so it may come in either.
SAID_TO_END = re.compile("this run ends after this (?:step|validation)")


def command_line(**values: object) -> list[str]:
    """The words of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def tiny_run(corpus: Path, run: Path, **more: object) -> list[str]:
    """The embedded default on a corpus of make_corpus."""
    values: dict[str, object] = {"load_model": "tiny", "device": "cpu", "micro_bsz": 4, "workers": 0, "log_every": 1}
    values |= {"warmup_steps": 1, "proj_dir": run, "train_data": corpus / "train.jsonl"}
    return command_line(**values | more)


def random_base(path: Path, tensors: Callable[..., dict[str, Tensor]], **sizes: int) -> dict[str, object]:
    """Writes a random model with the embedded vocabulary: the flags of a run on it and the embedded encoder."""
    vocab = WorldTokenizer(tiny.VOCAB_FILE).vocab_size
    torch.save(tensors(vocab=vocab, **sizes), path)
    return {"load_model": path, "encoder": "tiny", "vocab_file": "tiny", "stack": 3, "adapter_hidden": 16}


def start(argv: list[str], **options: Any) -> "subprocess.Popen[str]":
    """The real command, as a user gives it; each process on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def wait_for_a_point(process: "subprocess.Popen[str]", run: Path) -> None:
    """Until the run has saved what it can be resumed from."""
    while not list((run / "resume").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)


def finish(argv: list[str]) -> None:
    """A training to its end in this process, on one thread, as processes of their own are started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_script.main(argv) == 0
    finally:
        torch.set_num_threads(threads)


def results(run: Path) -> dict[str, str]:
    """SHA-256 of all checkpoints, and the losses that were logged."""
    found = {path.name: sha256_file(path) for path in run.glob("*.safetensors")}
    rows = (run / "logs/csv/metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    kept = [columns.index(name) for name in ("step", "loss", "lr_adapter", "lr_state", "grad_norm", "wer")]
    return found | {"metrics": "\n".join(",".join(row.split(",")[i] for i in kept) for row in rows)}


def write_texts(folder: Path, texts: Iterable[tuple[str, str, str]]) -> None:
    """A validation's (id, reference, hypothesis)."""
    rows = [Row(name, i, ref, hyp, None, "asr", 1.0, False) for i, (name, ref, hyp) in enumerate(texts)]
    write_rows(folder / VALIDATION, rows)


def column(run: Path, name: str) -> list[float]:
    """One column of the table of metrics, where it has a value."""
    with (run / "logs/csv/metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def assert_steps_alike(run: Path, other: Path, first_norm: float, later_norms: float) -> None:
    """The loss of every step, and the gradient's norm: relative errors of the first step's and of the later ones'.

    On five corpora losses differed by 3e-7 at most. The norm of a gradient hangs on few of its numbers: rounding of the
    steps before showed in it by up to 2e-5, and by 6e-4 where a ReLU flipped.
    """
    assert column(run, "loss") == pytest.approx(column(other, "loss"), rel=5e-6)
    (one, *rest), (two, *others) = column(run, "grad_norm"), column(other, "grad_norm")
    assert one == pytest.approx(two, rel=first_norm)
    assert rest == pytest.approx(others, rel=later_norms)


def learned(run: Path, seed: int = 1) -> dict[str, Tensor]:
    """How far each trained tensor of a run with this seed is from what it began with."""
    trained = load_trained(run / "last.safetensors")
    torch.manual_seed(seed)
    assert trained.parts is not None
    model = SpeechLM.build(replace(trained.parts, quant=None), task_names=list(trained.initial_states))
    model.add_soft_prompts(sorted(trained.soft_prompts), max(map(len, trained.soft_prompts.values()), default=0))
    before = {name: x.detach() for name, x in model.named_parameters()}
    return {name: x - before[name] for name, x in trained.named_tensors().items()}
