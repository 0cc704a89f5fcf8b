"""The one exception that a user is meant to read, and the exit codes of commands."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that the user can mend.

    The message names the flag or file, what was found, what was expected, the remedy.
    """


class AudioError(UserError):
    """One recording that cannot be used; the message names the file and the reason."""


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0 if it ended well, 2 and the message if the user can mend what stopped it."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
