"""The package as a wheel, in an environment of its own, far from any checkout."""

import fnmatch
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import openai
import pytest
import soundfile as sf
import torch

from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.parts import Parts

ROOT = Path(__file__).parents[2]


def tracked() -> list[str]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [name for name in found.split("\0") if name and (ROOT / name).exists()]


def test_each_file_of_the_package_is_in_the_wheel():
    """By the patterns of pyproject.toml; the kernels' sources by a link."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    known = [f"{package.replace('.', '/')}/{name}" for package, names in patterns.items() for name in names]
    here = [name.removeprefix("src/") for name in tracked() if name.startswith("src/") and not name.endswith(".py")]
    sources = [f"rwkv_speech/ops/sources/{name[5:]}" for name in tracked() if name.startswith("cuda/")]
    missed = [x for x in here + sources if not any(fnmatch.fnmatch(x, pattern) for pattern in known)]
    assert missed == ["rwkv_speech/ops/sources", "rwkv_speech/ops/sources/README.md"]
    assert (ROOT / "src/rwkv_speech/ops/sources").resolve() == ROOT / "cuda"


def build(folder: Path) -> Path:
    """The wheel of what is tracked, copied so that nothing else can get into it."""
    for name in tracked():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "wheels"]
    subprocess.run([sys.executable, "-m", "pip", *words, folder / "source"], check=True)
    return next((folder / "wheels").glob("*.whl"))


def environment(folder: Path, wheel: Path) -> Path:
    """A new one's interpreter: the wheel installed, all else borrowed from the environment of the tests."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    borrow(folder)
    return python


def borrow(folder: Path) -> None:
    """Let an environment find the packages of this one behind its own."""
    home = next(folder.glob("lib/python*/site-packages"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (home / "borrowed.pth").write_text("\n".join(borrowed) + "\n")


@pytest.mark.soak
def test_predict_and_serve_run_from_a_wheel(tmp_path: Path):
    """In an empty folder: the kernel is built from the wheel's sources, and without a compiler a line says so."""
    torch.manual_seed(1)
    model = SpeechLM.build(Parts("tiny"))
    torch.nn.init.normal_(model.initial_states["asr"], 0, 0.3)
    model.save(tmp_path / "run/best.safetensors")
    sf.write(tmp_path / "a.wav", 0.1 * torch.randn(16_000).numpy(), 16_000)
    wheel = build(tmp_path)
    with zipfile.ZipFile(wheel) as file:
        assert not any(name.startswith(("tests/", "predict", "build/")) for name in file.namelist())
    python, empty = environment(tmp_path / "venv", wheel), tmp_path / "empty"
    empty.mkdir()
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "default"}
    options = ["--vad", "none", "--temperature", "0", "--no_speech_threshold", "1", "--max_new_tokens", "8"]
    known = ["--proj_dir", str(tmp_path / "run"), *options]

    def run(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [str(python), "-m", "rwkv_speech", *words]
        return subprocess.run(
            command, cwd=empty, env={**variables, **more}, capture_output=True, text=True, check=False
        )

    where = subprocess.run(
        [python, "-c", "import rwkv_speech; print(rwkv_speech.__file__)"], cwd=empty, env=variables, capture_output=True
    )
    assert str(tmp_path / "venv") in where.stdout.decode()
    first = run("predict", *known, str(tmp_path / "a.wav"))
    assert first.returncode == 0 and "PyTorch form" not in first.stderr, first.stderr
    assert list((tmp_path / "home/.cache/rwkv_speech").glob("wkv_cpu-*/libwkv_cpu.so"))
    (tmp_path / "nothing").mkdir()
    without = run("predict", *known, str(tmp_path / "a.wav"), PATH=str(tmp_path / "nothing"))
    assert without.returncode == 0 and "no C++ compiler found" in without.stderr and without.stdout == first.stdout
    text = model.transcribe(tmp_path / "a.wav", vad="none", temperature=0.0, no_speech_threshold=1.0, max_new_tokens=8)[
        0
    ].text
    assert text and first.stdout.strip() == text
    command = [str(python), "-m", "rwkv_speech", "serve", "--port", "0", *known]
    with subprocess.Popen(command, cwd=empty, env=variables, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        address = next(line for line in server.stderr if "running on" in line).split(" on ")[1].split()[0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        assert client.audio.transcriptions.create(file=tmp_path / "a.wav", model="asr").text == text
        server.terminate()
    assert list(empty.iterdir()) == []
