"""The trainers' contract on an accelerator: where there is none, on one that is simulated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import NOT_SIMULATED

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.timeout(900)
def test_the_contract_holds_on_an_accelerator(tmp_path):
    """In a process of its own, because a device is there for good."""
    files = [str(HERE / name) for name in ("test_trainer.py", "on_accelerator.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files]
    environment = {
        **{name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")},
        "DROPTUNE_TEST_DEVICE": "sim",
        "DROPTUNE_TEST_BUILD": str(tmp_path),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(NOT_SIMULATED in line for line in skipped), skipped
    assert len(skipped) == 2
