"""A study that lasts for as long as a test wants, on any machine, and what has to be true of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from droptune.storage import Storage
from droptune.training import State

PROGRAM = """
import time
import torch
from torch import nn
import droptune

generator = torch.Generator().manual_seed(0)
x = torch.randn(192, 8, generator=generator)
y = (x[:, 0] * x[:, 1] > 0).long()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))

    def forward(self, x):
        torch.ones(()).item()  # what looks at numbers is called in every update, and not replayed
        time.sleep({pause})
        return self.layers(x)


program = droptune.classification(
    model=Net, train=(x[:128], y[:128]), validation=(x[128:160], y[128:160]),
    test=(x[160:], y[160:]), batch_size=32, epochs={epochs}, lr=1e-2,
)
"""
STUDY = """
program: program.py
budget: {{trials: {trials}}}
sampler: random
pruner: none
baselines: {{trials: 1}}
confirm: {{top: 1, min_seeds: 3, max_seeds: 3}}
training: {{width: 2}}
"""


def droptune(*arguments: str, folder: Path, **environment: str) -> str:
    """Output of a droptune command that has to succeed."""
    command = [sys.executable, "-m", "droptune", *arguments]
    everything = {**os.environ, **environment}
    result = subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


class LastingStudy:
    """The study `lasting`: `trials` of `epochs` intervals, two at a time, then 9 confirmations.

    An interval of two trainings takes at least 5 pauses (seconds, or an expression for them).
    """

    def __init__(
        self, folder: Path, url: str, *, pause: float | str, trials: int, epochs: int = 6
    ) -> None:
        (folder / "program.py").write_text(PROGRAM.format(pause=pause, epochs=epochs))
        (folder / "lasting.yaml").write_text(STUDY.format(trials=trials))
        (folder / "droptune.toml").touch()
        self.folder, self.trials = folder, trials
        droptune("study", "create", "lasting.yaml", folder=folder, DROPTUNE_STORAGE=url)
        self.storage = Storage.open(url)
        self.id = self.storage.study("lasting").id

    def records(self):
        return self.storage.records(self.id)

    def intervals(self) -> int:
        """How many intervals are in SQL."""
        return sum(record.intervals_done for record in self.records())

    def assert_nothing_lost(self, said: str = "") -> None:
        """Each training ended once, each interval was measured, none began again from nothing."""
        records = self.records()
        numbers = sorted(r.training.number for r in records if r.training.kind.is_trial)
        assert numbers == list(range(self.trials)), said
        assert {record.state for record in records} == {State.COMPLETE}, said
        for record in records:
            assert {len(curve) for curve in record.curves.values()} == {record.training.intervals}
            assert record.training.attempt == 1, said
        assert self.storage.study("lasting").phase == "done", said
