"""Output that nobody can read any more: its reader ended, or its terminal was closed."""

from __future__ import annotations

import errno
import os
import sys

GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


def drop_unread() -> None:
    """Throw away what cannot be printed: the interpreter would make it exit code 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            if error.errno in GONE:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:  # closed already
            pass
