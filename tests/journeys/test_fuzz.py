"""No file and no line of a manifest crashes a reader, keeps it busy, or gives a wrong length."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZING = Path(__file__).parents[1] / "fuzzing.py"


def assert_nothing_is_found(kind: str, seed: int, first: int, last: int) -> None:
    command = [sys.executable, str(FUZZING), kind, str(seed), str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    # The last line names the file at which a process ended that did not reach the end.
    assert lines[-1] == f"DONE {last - first} {kind}", f"{lines[-1]}\n{done.stderr[-3000:]}"
    assert [line for line in lines if line.startswith("FOUND")] == []


@pytest.mark.parametrize(("kind", "count"), [("files", 300), ("lines", 150)])
def test_fuzz(kind: str, count: int):
    assert_nothing_is_found(kind, 0, 0, count)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 20_000, 2_000))
def test_fuzz_20000_files(first: int):
    assert_nothing_is_found("files", 1, first, first + 2_000)


@pytest.mark.soak
def test_fuzz_5000_lines_of_manifests():
    assert_nothing_is_found("lines", 1, 0, 5_000)
