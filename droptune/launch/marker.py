"""The marker by which a worker tells its launcher that it gets on.

A launcher restarts a worker for as long as it finishes intervals, and gives up after some
restarts without one. The worker touches the file after each interval that is in SQL; the
launcher removes it when it counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

MARKER = "DROPTUNE_PROGRESS_FILE"


def mark_interval(environ: Mapping[str, str] = os.environ) -> None:
    """Say that an interval is finished. Does nothing where no launcher listens, never fails."""
    if path := environ.get(MARKER):
        with suppress(OSError):
            Path(path).touch()


def take_marker(path: Path) -> bool:
    """Whether an interval was finished since the last call."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
