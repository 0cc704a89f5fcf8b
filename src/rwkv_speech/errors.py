"""The one exception that a user is meant to read, and the exit codes of commands."""

import errno
import signal
import sys
from collections.abc import Callable

# What disks and folders refuse, which the user can mend.
_STORAGE = frozenset(
    [errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
     errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.EIO]
)  # fmt: skip
_MOST_LINES = 3


class UserError(ValueError):
    """Input that the user can mend.

    The message names the flag or file, what was found, what was expected, the remedy.
    """


class AudioError(UserError):
    """One recording that cannot be used; the message names the file and the reason."""


def first_line(error: Exception) -> str:
    """What an error says first, else its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0 if it ended well; 2, after at most three lines, if the user can mend what stopped it; 130 if the
    user interrupted it.
    """
    try:
        command()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        message = (
            f"{error.filename or '--proj_dir'}: {error.strerror or error}, expected to be able to read and write "
            "there; free space, mend its permissions, or name another folder"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    else:
        return 0
    lines = f"error: {message}".splitlines()
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"  ... and {len(lines) - _MOST_LINES + 1} more lines like these"]
    print("\n".join(lines), file=sys.stderr)
    return 2
