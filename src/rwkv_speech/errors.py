"""The one exception that a user is meant to read, and the exit codes of commands."""

import errno
import os
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


def printable(path: object) -> str:
    """A path as one line of text: what is no letter, and a line break, as Python's escape."""
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in str(path))


def first_line(error: Exception) -> str:
    """What an error says first, else its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command: 0, or the code that it gives, if it ended well; 2, after at most three lines, if the user can mend
    what stopped it; 130 if the user interrupted it, 141 if nobody reads what it prints.
    """
    try:
        return command() or 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        # What reads the output, as `head`, has had enough; at its end Python would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
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
    lines = f"error: {message}".splitlines()
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"  ... and {len(lines) - _MOST_LINES + 1} more lines like these"]
    print("\n".join(lines), file=sys.stderr)
    return 2
