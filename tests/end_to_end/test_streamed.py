"""Data read while training: datasets and loaders, from the command line to the result."""

from __future__ import annotations

import json

import pytest
from command import run

PROGRAM = """
import droptune
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Points(Dataset):
    def __init__(self, n):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        {example}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


if __name__ != "__main__":
    program = droptune.classification(model=Net, {data}, epochs=6, lr=5e-2)
"""
STUDY = """
program: program.py
budget: {trials: 4}
baselines: {trials: 1}
training: {width: auto}
mlflow: {mirror: none}
"""
PAIR = "return self.x[i], int(self.x[i, 0] > 0)"
NAMED = "return {'x': self.x[i], 'label': int(self.x[i, 0] > 0)}"
DATASET = "train=Points(80), batch_size={}"
LOADER = "train=DataLoader(Points(80), 8, shuffle=True, num_workers=1), test=DataLoader(Points(20))"


@pytest.mark.parametrize(
    ("example", "data"),
    [(PAIR, DATASET.format(8)), (NAMED, DATASET.format(2)), (PAIR, LOADER)],
    ids=["dataset", "dicts in batches of two", "loader"],
)
def test_streamed_data_train_fused_and_learn(tmp_path, example, data):
    (tmp_path / "program.py").write_text(PROGRAM.format(example=example, data=data))
    (tmp_path / "study.yaml").write_text(STUDY)
    command = ("study", "run", "study.yaml", "--workers", "1", "--no-confirm", "--width", "auto")
    assert "trains fused" in run(tmp_path, *command)
    best = json.loads(run(tmp_path, "study", "best", "study", "--json"))["best"]
    assert best["value"] < 0.5, best  # guessing: 0.69
