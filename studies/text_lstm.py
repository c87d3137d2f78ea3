"""The next character of English prose: an LSTM on the texts of Python's own `help()`.

The long form of a program: it says itself what its model, data and loss are.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

CHARACTERS = 100_000
LENGTH = 64  # characters in an example


def text() -> Tensor:
    """Characters as numbers; rare ones are one."""
    joined = "\n\n".join(topics[name] for name in sorted(topics))[:CHARACTERS]
    codes = torch.tensor(list(joined.encode("ascii", "replace")))
    return codes.clamp(0, 127)


class TextLSTM(nn.Module):
    """Two layers of 96; dropout on the embedding, between the layers, before the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 48)
        self.drop_embedding = nn.Dropout(0.1)
        self.lstm = nn.LSTM(48, 96, num_layers=2, dropout=0.3, batch_first=True)
        self.drop_output = nn.Dropout(0.4)
        self.output = nn.Linear(96, 128)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.drop_embedding(self.embedding(x)))
        return self.output(self.drop_output(states))


class Program:
    task = "classification"  # measured as one, character by character
    batch_size = 32
    epochs = 10
    lr = 3e-3
    clip = 1.0
    optimizer = "adam"

    def model(self) -> nn.Module:
        return TextLSTM()

    def data(self):
        """Windows (characters, the characters that follow each); test and validation at the end,
        so that no text is both trained on and judged by."""
        codes = text()
        count = (len(codes) - 1) // LENGTH
        x = codes[: count * LENGTH].view(count, LENGTH)
        y = codes[1 : count * LENGTH + 1].view(count, LENGTH)
        cuts = [0, int(0.8 * count), int(0.9 * count), count]
        names = ("train", "validation", "test")
        return {n: (x[a:b], y[a:b]) for n, a, b in zip(names, cuts, cuts[1:], strict=False)}

    def loss(self, model, batch) -> Tensor:
        x, y = batch
        return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


program = Program()
