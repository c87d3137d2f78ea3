"""Digits of 8×8 pixels (scikit-learn, 1,797 of them): a small MLP with its author's rates."""

from __future__ import annotations

from sklearn.datasets import load_digits
from torch import Tensor, nn

import droptune


class DigitsMLP(nn.Module):
    """64-64-64-10, little dropout on the input side, the usual half before the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def digits():
    x, y = load_digits(return_X_y=True)
    return x / 16, y


program = droptune.classification(
    model=DigitsMLP, train=digits, batch_size=64, epochs=20, optimizer="adamw", lr=1e-3
)
