"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input. The message is one line that names the key, file or rank and the remedy; the front door exits 2."""


class QuietError(UserError):
    """A UserError that rank 0 prints: raised on the other ranks, so that one mistake is told once."""
