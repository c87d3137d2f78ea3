"""Fashion-MNIST with 2,000 training images: little data, where dropout has something to do."""

from __future__ import annotations

from fashion_mnist import images
from torch import Tensor, nn

import droptune


class MLP(nn.Module):
    """784-512-512-10 with dropout 0.2 after both hidden layers (Keras' mnist_mlp example)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 512)
        self.dropout1 = nn.Dropout(0.2)
        self.hidden2 = nn.Linear(512, 512)
        self.dropout2 = nn.Dropout(0.2)
        self.output = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(self.hidden1(x.flatten(1)).relu())
        return self.output(self.dropout2(self.hidden2(x).relu()))


def part(start: int, end: int):
    x, y = images("train")
    return x[start:end], y[start:end]


program = droptune.classification(
    model=MLP,
    train=lambda: part(0, 2000),
    validation=lambda: part(2000, 7000),
    test=lambda: images("t10k"),
    batch_size=128,
    epochs=60,
    optimizer="adam",
    lr=1e-3,
)
