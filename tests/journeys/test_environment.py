"""The environment that all scripts share: made once, mended, kept (demo/env.sh)."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELLS = [name for name in ("dash", "bash") if shutil.which(name)] or ["sh"]


class Repository:
    """A folder with nothing but what demo/env.sh reads, and a name that must be quoted."""

    def __init__(self, parent: Path) -> None:
        self.root = parent / "my clone 'ü' $HOME"
        (self.root / "demo").mkdir(parents=True)
        shutil.copy(ROOT / "demo/env.sh", self.root / "demo")
        self.require("")
        (self.root / "pyproject.toml").write_text("")
        self.script = parent / "script.sh"
        self.script.write_text('set -eu\n. "$root/demo/env.sh"\nsetup_environment\necho "python is $python"\n')
        self.kept = self.root / ".venv/kept"

    def require(self, text: str) -> None:
        (self.root / "requirements.txt").write_text(text)

    def setup(self, program: str = SHELLS[0], **variables: object) -> subprocess.CompletedProcess[str]:
        """A script's first lines; PYTHON, if not given, is not set, and python3 is the tests' own."""
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "venv", "PYTHONPATH")}
        bin_folder = self.root.parent / "bin"
        bin_folder.mkdir(exist_ok=True)
        if not (bin_folder / "python3").exists():
            (bin_folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            (bin_folder / "python3").chmod(0o755)
        clean |= {"PATH": f"{bin_folder}{os.pathsep}{clean['PATH']}", "root": str(self.root)}
        clean |= {name: str(value) for name, value in variables.items()}
        return subprocess.run([program, self.script], env=clean, capture_output=True, text=True, check=False)

    def add_torchaudio(self, loads: str) -> None:
        """A torchaudio to install; its import fails while `loads` is false."""
        code = f"import pathlib\nlibrary = pathlib.Path(__file__).parent / 'lib/_torchaudio.so'\nassert {loads}\n"
        name = "torchaudio-2.11.0-py3-none-any.whl"
        with zipfile.ZipFile(self.root / name, "w") as wheel:
            wheel.writestr("torchaudio/__init__.py", code)
            wheel.writestr("torchaudio/lib/_torchaudio.so", "")
            info = "torchaudio-2.11.0.dist-info"
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.11.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        self.require(f"./{name}\n")


def test_environment_is_made_kept_and_mended(tmp_path: Path):
    repository = Repository(tmp_path)
    repository.add_torchaudio("not library.exists()")
    done = repository.setup()
    python = repository.root / ".venv/bin/python"
    assert done.returncode == 0 and "making the environment" in done.stdout, done.stderr
    assert "torchaudio's compiled part cannot load" in done.stdout and f"python is {python}" in done.stdout
    repository.kept.touch()

    for program in SHELLS:
        assert repository.setup(program).stdout == f"python is {python}\n"
    other = tmp_path / "python3.99"
    other.write_text("#!/bin/sh\necho Python 3.99\n")
    other.chmod(0o755)
    done = repository.setup(PYTHON=other)
    assert done.returncode == 0 and f"venv=rebuild makes it again with {other}" in done.stderr

    repository.require("# changed\n")
    done = repository.setup()
    assert "installing requirements.txt" in done.stdout and "torchaudio" not in done.stdout, done.stderr
    repository.require("# changed again, and torchaudio cannot be repaired\n")
    (next(repository.root.glob(".venv/lib/*/site-packages")) / "torchaudio/__init__.py").write_text("assert False\n")
    done = repository.setup()
    assert done.returncode != 0 and "AssertionError" in done.stderr
    assert repository.kept.exists()

    repository.add_torchaudio("library.exists()")
    python.unlink()
    done = repository.setup()
    assert done.returncode == 0 and "making the environment" in done.stdout, done.stderr
    assert "torchaudio" not in done.stdout and not repository.kept.exists()


@pytest.mark.parametrize(
    ("found", "message"),
    [("Python 3.10", "found Python 3.10, expected Python 3.11 or newer"), ("", "no such interpreter")],
)
def test_wrong_interpreter_is_named(found: str, message: str, tmp_path: Path):
    repository, interpreter = Repository(tmp_path), tmp_path / "my python"
    if found:
        interpreter.write_text(f'#!/bin/sh\ncase $2 in *exit*) exit 1 ;; *) echo "{found}" ;; esac\n')
        interpreter.chmod(0o755)
    done = repository.setup(PYTHON=interpreter)
    assert done.returncode == 2 and f"PYTHON={interpreter}" in done.stderr and message in done.stderr
    assert not (repository.root / ".venv").exists()


def test_none_makes_nothing_and_says_what_the_interpreter_lacks(tmp_path: Path):
    repository = Repository(tmp_path)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = repository.setup(venv="none", PYTHON=bare)
    assert done.returncode == 2 and "lacks what requirements.txt names" in done.stderr
    done = repository.setup(venv="maybe")
    assert done.returncode == 2 and "venv=maybe, expected rebuild, none or nothing" in done.stderr
    assert not (repository.root / ".venv").exists()
