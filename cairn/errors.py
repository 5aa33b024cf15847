"""The exceptions that are told as a line, not as a traceback."""


class UserError(Exception):
    """Bad input. The message is one line that names the key, file or rank and the remedy; the front door exits 2."""


class TryAgain(UserError):
    """Not the user's doing, and another try may end well: a rank was lost or hangs. The front door exits 75, at which
    a launcher may start the run again; at 2 it must not."""


class QuietError(UserError):
    """A UserError that rank 0 prints: raised on the other ranks, so that one mistake is told once."""
