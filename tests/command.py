"""droptune's command line as a user's process runs it."""

from __future__ import annotations

import os
import subprocess
import sys


def run(folder, *words):
    """What a command that ends well prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DROPTUNE", "MLFLOW"))}
    done = subprocess.run(
        [sys.executable, "-m", "droptune", *words],
        capture_output=True, text=True, cwd=folder, timeout=280, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout
