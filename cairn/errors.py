"""The exceptions that are told as a line, not as a traceback, and the exit status that an exception leads to."""

import os


class UserError(Exception):
    """Bad input. The message is one line that names the key, file or rank and the remedy; the front door exits 2."""


class TryAgain(UserError):
    """Not the user's doing, and another try may end well: a rank was lost or hangs. The front door exits 75, at which
    a launcher may start the run again; at 2 it must not."""


class QuietError(UserError):
    """A UserError that rank 0 prints: raised on the other ranks, so that one mistake is told once."""


def exit_status(error: BaseException | None) -> int:
    """What a process that ends with this exception exits with: 2 a user's mistake, 75 try again, 130 Ctrl-C."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return os.EX_TEMPFAIL if isinstance(error, TryAgain) else 2 if isinstance(error, UserError) else 1
