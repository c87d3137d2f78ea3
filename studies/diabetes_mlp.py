"""Regression on 442 patients (scikit-learn's diabetes): does dropout help on tiny data?"""

from __future__ import annotations

from sklearn.datasets import load_diabetes
from torch import nn

import droptune


def mlp() -> nn.Module:
    """10-50-50-1 with the small rates that the regression literature finds."""
    return nn.Sequential(
        nn.Linear(10, 50), nn.ReLU(), nn.Dropout(0.05),
        nn.Linear(50, 50), nn.ReLU(), nn.Dropout(0.05),
        nn.Linear(50, 1),
    )  # fmt: skip


def patients():
    x, y = load_diabetes(return_X_y=True)  # x is centred and scaled to 1/√442
    return x * len(x) ** 0.5, (y - 152.1) / 77.1  # mean and standard deviation of y


program = droptune.regression(
    model=mlp, train=patients, batch_size=32, epochs=60, optimizer="adam", lr=1e-3
)
