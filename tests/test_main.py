import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import write_texts

from rwkv_speech.__main__ import main
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.speech_lm import SpeechLM

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoints(tiny_parts: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("checkpoints") / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        SpeechLM.build(tiny_parts).save(path)
    return paths


def test_average_writes_a_checkpoint_and_says_so(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "mean.safetensors"
    assert main(["average", "--checkpoints", ",".join(map(str, checkpoints)), "--output", str(output)]) == 0
    assert len(load_trained(output).metrics["averaged"]) == 2
    assert capsys.readouterr().out == f"written to {output}\n"


def test_export_writes_the_published_layout_and_no_other(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["export", str(checkpoints[0]), str(tmp_path / "adapter.bin")]) == 2
    assert "adapter.bin: found .bin, expected the name of a .pth file" in capsys.readouterr().err
    assert main(["export", str(checkpoints[0]), str(tmp_path / "adapter.pth")]) == 0
    tensors = torch.load(tmp_path / "adapter.pth", weights_only=True)
    assert {"speech_encoder.adapter.0.weight", "language_model.blocks.0.att.time_state"} <= set(tensors)


def test_report_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_texts(tmp_path, [("a", "one", "two")])
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "VERB: found none, expected average, calibrate, export, make_answers, merge, page, predict, push, report",
        ),
        (["avrage"], "VERB: invalid choice: 'avrage' (choose from"),
        (["average", "--checkpoints", "a"], "required: --output"),
        (["average", "--checkpoints", "a", "--output", "b"], "a: found no trained weights"),
        (["average", "--check", "a", "--output", "b"], "required: --checkpoints"),
        (["export", "a"], "required: FILE"),
        (["make_answers", "--data", "a"], "--output: found nothing, expected the name of a manifest to write"),
        (["make_answers", "--form", "hello"], "--form: found 'hello', expected one of user, instruction, continue, or"),
        (["make_answers", "--data", "a", "--output", "b"], "manifest a: cannot be read"),
        (["serve", "--port", "70000"], "--port: found 70000, expected a whole number at least 0 and at most 65535"),
        (["page", "--beam", "0"], "--beam: found 0, expected a whole number at least 1"),
        (["serve", "--word_timestamps", "1"], "--word_timestamps: has no effect on a server, whose clients ask for"),
        (["serve", "--proj_dir", "a"], "a: found no trained weights"),
        (["predict", "--proj_dir", "a", "b.wav"], "a: found no trained weights"),
        (["predict", "--no"], "--no: "),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["report", "a"], "a: found neither metrics nor validation.jsonl"),
    ],
)
def test_wrong_words_end_with_two_and_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("error: ") and found.err.count("\n") == 1
    assert message in found.err


def test_report_names_the_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_texts(tmp_path, [("a", "one", "two")])
    monkeypatch.delitem(sys.modules, "rwkv_speech.reports.charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path)]) == 2
    assert "no package matplotlib" in capsys.readouterr().err


def test_serve_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delitem(sys.modules, "rwkv_speech.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "found no package uvicorn; install rwkv-speech[serve]" in capsys.readouterr().err


def test_page_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delitem(sys.modules, "rwkv_speech.serving.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["page"]) == 2
    assert "found no package gradio; install rwkv-speech[page]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["average", "--help"],
        ["make_answers", "--help"],
        ["page", "--help"],
        ["serve", "--help"],
        ["predict", "--help"],
        ["nothing"],
    ],
)
def test_help_is_light(argv: list[str]):
    code = (
        "import sys; from rwkv_speech.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'numpy', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *argv], check=False, capture_output=True).returncode == 0


def test_readme_names_verbs_and_modules_that_there_are():
    named = re.findall(r"python -m (rwkv_speech[\w.]*|benchmarks[\w.]*) ?(\w*)", (ROOT / "README.md").read_text())
    assert ("rwkv_speech", "average") in named and ("rwkv_speech", "export") in named
    for module, verb in named:
        place = ROOT / ("" if module.startswith("benchmarks") else "src") / module.strip(".").replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()
        assert module != "rwkv_speech" or not verb or f'add_parser("{verb}"' in (place / "__main__.py").read_text()
