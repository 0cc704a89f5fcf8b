"""The Dockerfiles: linted, and the steps of the one for CPUs taken without a container."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from journeys.test_wheel import ROOT, borrow, tracked
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.parts import Parts

FILES = ("demo/Dockerfile", "demo/Dockerfile.cuda")


@pytest.mark.parametrize("file", FILES)
def test_hadolint_finds_nothing(file: str):
    command = [Path(sys.executable).parent / "hadolint", "--no-color", ROOT / file]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def instructions(file: str) -> list[tuple[str, str]]:
    """Each instruction and what follows it: comments left out, lines joined."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


@pytest.mark.parametrize("file", FILES)
def test_images_are_pinned_end_as_another_user_and_know_their_health(file: str):
    found = instructions(file)
    bases = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert len(bases) == 2 and all(len(base.partition(":")[2].split(".")) >= 3 for base in bases)
    last = dict(found[[name for name, _ in found].index("FROM", 1) :])
    assert last["USER"] == "10001" and "/health/live" in last["HEALTHCHECK"] and "build" in last["COPY"]
    assert json.loads(last["CMD"])[0] == "serve"


@pytest.mark.parametrize("file", FILES)
def test_what_is_copied_is_not_ignored(file: str):
    """And nothing else goes to the builder: no run, no data, no git."""
    ignored = (ROOT / f"{file}.dockerignore").read_text().split()
    assert ignored[0] == "*"
    kept = {name[1:] for name in ignored if name.startswith("!")}
    assert kept == {"LICENSE", "README.md", "cuda", "demo/env.sh", "pyproject.toml", "requirements.txt", "src"}


@pytest.mark.soak
def test_the_steps_for_a_cpu_give_a_server(tmp_path: Path):
    """In a new environment, but for apt and users, with the packages of this one in place of those of the index."""
    home, port = tmp_path / "home", free_port()
    places = {"/opt/": f"{tmp_path}/opt/", "/model": f"{tmp_path}/model", '"8000"': f'"{port}"', ":8000": f":{port}"}

    def here(text: str) -> str:
        for there, mine in places.items():
            text = text.replace(there, mine)
        return text

    (tmp_path / "src").mkdir()
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home)}
    variables |= {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # pip reads 0 as: no isolation
    stages = " ".join(name for name, _ in instructions(FILES[0])).split("FROM")
    steps = instructions(FILES[0])[: len(stages[1].split()) + 1]
    for name, rest in steps:
        if name == "COPY":
            copy(rest.split()[0], tmp_path / "src")
        elif name == "RUN" and not rest.startswith("apt-get"):
            subprocess.run(["sh", "-ec", here(rest)], cwd=tmp_path / "src", env=variables, check=True)
            if "venv" in rest:
                borrow(tmp_path / "opt/rwkv_speech")
                for old in tmp_path.glob("opt/rwkv_speech/lib/python*/site-packages/setuptools*"):
                    shutil.rmtree(old)  # as in the image's Python, which brings none
    assert list(tmp_path.glob("opt/rwkv_speech/lib/python*/site-packages/rwkv_speech/ops/prebuilt/libwkv_cpu.so"))
    shutil.rmtree(home)
    shutil.rmtree(tmp_path / "src")
    torch.manual_seed(1)
    SpeechLM.build(Parts("tiny")).save(tmp_path / "model/best.safetensors")
    last = {name: here(rest) for name, rest in instructions(FILES[0])[len(steps) :]}
    home.mkdir()
    command = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    check = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    plain = {"PATH": "/usr/bin:/bin", "HOME": str(home)}
    with subprocess.Popen(command, cwd=home, env=plain, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        early = subprocess.run(check, env=plain, capture_output=True, check=False).returncode
        told = next(line for line in server.stderr if "running on" in line)
        assert early != 0 and f"0.0.0.0:{port}" in told
        assert subprocess.run(check, env=plain, check=False).returncode == 0
        server.terminate()
        begun = time.monotonic()
        server.wait()
        assert time.monotonic() - begun < 10
    assert not (home / ".cache/rwkv_speech").exists()


def copy(name: str, target: Path) -> None:
    """What `COPY name .` copies of a checkout, by the ignore file."""
    kept = [line[1:] for line in (ROOT / f"{FILES[0]}.dockerignore").read_text().split() if line.startswith("!")]
    for file in tracked():
        if any(file == x or file.startswith(f"{x}/") for x in kept) and name in (".", file):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target / file, follow_symlinks=False)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
