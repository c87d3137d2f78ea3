"""Fashion-MNIST: the two-convolution network of Keras' and PyTorch's MNIST examples."""

from __future__ import annotations

from fashion_mnist import images
from torch import Tensor, nn

import droptune


class CNN(nn.Module):
    """Convolutions 32-64, dropout 0.25 after pooling, dense 128, dropout 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.dropout1 = nn.Dropout(0.25)
        self.dense = nn.Linear(64 * 12 * 12, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.output = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(self.features(x)).flatten(1)
        return self.output(self.dropout2(self.dense(x).relu()))


program = droptune.classification(
    model=CNN,
    train=lambda: images("train"),
    test=lambda: images("t10k"),
    batch_size=128,
    epochs=12,
    optimizer="adamw",
    lr=1e-3,
)
