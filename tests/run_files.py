"""What a finished run left in its folder, for the tests of several ranks."""

import csv
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import train as train_script
from safetensors.torch import load_file
from torch import Tensor

from rwkv_speech.decoding.results import Row, write_rows
from rwkv_speech.models.checkpoint import named_tensors
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.reports.record import VALIDATION

# With a large epsilon AdamW's step is all but linear in the gradient: a small one would make the rounding of gradients
# near zero as large as a step. The rates keep what is learned far above float32's resolution.
LINEAR_STEPS = {"adam_eps": 1e-2, "lr_adapter": 1e-3, "lr_state": 1e-2}


def finish(argv: list[str]) -> None:
    """A training to its end in this process, on one thread, as processes of their own are started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_script.main(argv) == 0
    finally:
        torch.set_num_threads(threads)


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
    torch.manual_seed(seed)
    start = SpeechLM.build(Parts("tiny"))
    before = named_tensors(start.adapter.state_dict(), dict(start.initial_states.items()))
    return {name: x - before[name] for name, x in load_file(run / "last.safetensors").items()}
