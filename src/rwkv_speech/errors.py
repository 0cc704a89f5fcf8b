"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Input that the user can mend.

    The message names the flag or file, what was found, what was expected, the remedy.
    """
