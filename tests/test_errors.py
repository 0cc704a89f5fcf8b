import errno
from pathlib import Path

import pytest

from rwkv_speech.errors import UserError, exit_code


def run_that_raises(error: BaseException) -> int:
    def command() -> None:
        raise error

    return exit_code(command)


def test_exit_code_of_what_ends_well_and_of_what_the_user_can_mend(capsys: pytest.CaptureFixture[str]):
    assert exit_code(lambda: None) == 0
    assert run_that_raises(UserError("--x: mend it")) == 2
    assert capsys.readouterr().err == "error: --x: mend it\n"


def test_exit_code_shows_three_lines_at_most(capsys: pytest.CaptureFixture[str]):
    assert run_that_raises(UserError("a\n  b\n  c")) == 2
    assert capsys.readouterr().err == "error: a\n  b\n  c\n"
    assert run_that_raises(UserError("a\n  b\n  c\n  d")) == 2
    assert capsys.readouterr().err == "error: a\n  b\n  ... and 2 more lines like these\n"


def test_exit_code_names_a_full_disk_and_an_interruption(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run_that_raises(OSError(errno.ENOSPC, "No space left on device", str(tmp_path))) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: No space left on device, expected")
    assert run_that_raises(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [OSError(errno.ECHILD, "no child"), RuntimeError("x")])
def test_exit_code_hides_no_fault_of_ours(error: Exception):
    with pytest.raises(type(error)):
        run_that_raises(error)
