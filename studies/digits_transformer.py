"""Digits as sequences: a small transformer encoder reads the eight rows of an image."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import droptune


class RowTransformer(nn.Module):
    """Two encoder layers of width 32; dropout 0.1 where `nn.TransformerEncoderLayer` puts it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.zeros(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.dropout = nn.Dropout(0.1)
        self.output = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.encoder(self.embed(x) + self.position)
        return self.output(self.dropout(rows.mean(1)))


def digits():
    x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 8, 8) / 16, y


program = droptune.classification(
    model=RowTransformer,
    train=digits,
    batch_size=64,
    epochs=30,
    optimizer="adamw",
    lr=2e-3,
    schedule="cosine",
)
