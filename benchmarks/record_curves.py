"""Record learning curves over rates and learning rates, for `benchmarks/search.py` to replay.

    python benchmarks/record_curves.py            every set that is not there yet
    python benchmarks/record_curves.py NAME ...   these again

Plain PyTorch, one thread. All configurations of a set train at once: every tensor has a leading
dimension of configurations, each with its own initial weights, rates and learning rate, and all
see the same batches. A set takes one to seventeen minutes on one shared core. The sets
`grid_n2000` and `curves_n2000` (Fashion-MNIST, 2000 images, MLP 784-512-512-10, equal rates) were
recorded before.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor

CURVES = Path(__file__).parent / "curves"
FASHION = Path("/usr/share/datasets/fashion-mnist")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One set of curves: `sites` maps a site to the rates tried, `forward` maps [K, ...] weights,
    a batch of inputs and the rates [K, S] to outputs [K, B, ...]."""

    about: str
    data: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]  # train x, y, validation x, y
    weights: Callable[[int], Weights]
    forward: Callable[[Weights, Tensor, Tensor], Tensor]
    sites: dict[str, Sequence[float]]
    lrs: Sequence[float]
    intervals: int
    batch: int = 64
    regression: bool = False

    def configurations(self) -> list[tuple[float, ...]]:
        return list(itertools.product(*self.sites.values(), self.lrs))


# Layers over K configurations at once.


def matrix(k: int, rows: int, columns: int) -> Tensor:
    return torch.randn(k, rows, columns) * math.sqrt(2 / rows)


def dropout(x: Tensor, rate: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """x [K, ...] with rate [K]; `shape` is that of the mask where it is not x's own."""
    rate = rate.view(-1, *[1] * (x.dim() - 1))
    return x * (torch.rand(shape or x.shape) >= rate) / (1 - rate)


def mlp_weights(*widths: int) -> Callable[[int], Weights]:
    def weights(k: int) -> Weights:
        made: Weights = {}
        for i, (rows, columns) in enumerate(itertools.pairwise(widths)):
            made[f"w{i}"] = matrix(k, rows, columns)
            made[f"b{i}"] = torch.zeros(k, 1, columns)
        return made

    return weights


def mlp(w: Weights, x: Tensor, rates: Tensor) -> Tensor:
    last = len(w) // 2 - 1
    for i in range(last):
        x = dropout(torch.relu(x @ w[f"w{i}"] + w[f"b{i}"]), rates[:, i])
    return x @ w[f"w{last}"] + w[f"b{last}"]


def convolution(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """3×3 with padding: x [K or 1, B, C, H, W], w [K, 9 C, D] to [K, B, D, H, W]."""
    lead, (height, width) = x.shape[:2], x.shape[3:]
    patches = F.unfold(x.flatten(0, 1), 3, padding=1).transpose(1, 2)  # [lead, H W, 9 C]
    out = patches.reshape(lead[0], -1, patches.shape[2]) @ w + b
    return out.reshape(len(w), lead[1], height, width, -1).permute(0, 1, 4, 2, 3)


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x.flatten(0, 1), 2).view(*x.shape[:3], x.shape[3] // 2, x.shape[4] // 2)


def cnn_weights(k: int) -> Weights:
    return {
        "c1": matrix(k, 9, 12),
        "cb1": torch.zeros(k, 1, 12),
        "c2": matrix(k, 9 * 12, 24),
        "cb2": torch.zeros(k, 1, 24),
    } | mlp_weights(24 * 9, 64, 10)(k)


def cnn(w: Weights, x: Tensor, rates: Tensor) -> Tensor:
    """Channel dropout after the convolutions, element dropout after the dense layer."""
    x = pool(torch.relu(convolution(x[None], w["c1"], w["cb1"])))
    x = pool(torch.relu(convolution(x, w["c2"], w["cb2"])))
    x = dropout(x, rates[:, 0], (*x.shape[:3], 1, 1)).flatten(2)
    x = dropout(torch.relu(x @ w["w0"] + w["b0"]), rates[:, 1])
    return x @ w["w1"] + w["b1"]


def gru_weights(inputs: int, hidden: int, outputs: int) -> Callable[[int], Weights]:
    def weights(k: int) -> Weights:
        return {
            "x": matrix(k, inputs, 3 * hidden),
            "h": torch.randn(k, hidden, 3 * hidden) / math.sqrt(hidden),
            "b": torch.zeros(k, 1, 3 * hidden),
            "out": matrix(k, hidden, outputs),
            "ob": torch.zeros(k, 1, outputs),
        }

    return weights


def gru(w: Weights, x: Tensor, rates: Tensor) -> Tensor:
    """x [B, T, F]; one mask per sequence on the state (Gal & Ghahramani 2016), one at the end."""
    k, size = len(w["h"]), w["h"].shape[1]
    h = torch.zeros(k, len(x), size)
    mask = dropout(torch.ones_like(h), rates[:, 0])
    for t in range(x.shape[1]):
        z, r, n = (x[:, t] @ w["x"] + w["b"]).split(size, dim=2)
        hz, hr, hn = ((h * mask) @ w["h"]).split(size, dim=2)
        z = torch.sigmoid(z + hz)
        h = z * h + (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return dropout(h, rates[:, 1]) @ w["out"] + w["ob"]


CHARACTERS, CONTEXT, WIDTH, HEADS = 64, 32, 32, 2


def attention_weights(k: int) -> Weights:
    made = {"embed": torch.randn(k, CHARACTERS, WIDTH) * 0.3}
    made["place"] = torch.randn(k, 1, CONTEXT, WIDTH) * 0.3
    for layer in range(2):
        made[f"qkv{layer}"] = matrix(k, WIDTH, 3 * WIDTH)
        made[f"join{layer}"] = matrix(k, WIDTH, WIDTH) * 0.5
        made[f"up{layer}"] = matrix(k, WIDTH, 4 * WIDTH)
        made[f"down{layer}"] = matrix(k, 4 * WIDTH, WIDTH) * 0.5
    return made | {"out": matrix(k, WIDTH, CHARACTERS) * 0.5}


def attention(w: Weights, x: Tensor, rates: Tensor) -> Tensor:
    """A causal transformer of two layers over characters x [B, T] to [K, B, T, characters]."""
    k, (b, t) = len(w["out"]), x.shape
    h = dropout(w["embed"][:, x] + w["place"], rates[:, 0])
    future = torch.full((t, t), float("-inf")).triu(1)
    for layer in range(2):
        q, key, v = (
            part.view(k, b, t, HEADS, -1).transpose(2, 3)
            for part in (F.layer_norm(h, (WIDTH,)) @ w[f"qkv{layer}"][:, None]).split(WIDTH, dim=3)
        )
        scores = q @ key.transpose(3, 4) / math.sqrt(WIDTH / HEADS) + future
        mixed = dropout(scores.softmax(4), rates[:, 1]) @ v
        mixed = mixed.transpose(2, 3).reshape(k, b, t, WIDTH) @ w[f"join{layer}"][:, None]
        h = h + dropout(mixed, rates[:, 2])
        up = torch.relu(F.layer_norm(h, (WIDTH,)) @ w[f"up{layer}"][:, None])
        h = h + dropout(up @ w[f"down{layer}"][:, None], rates[:, 2])
    return F.layer_norm(h, (WIDTH,)) @ w["out"][:, None]


# Data: splits are drawn once with seed 0.


def digits(n: int, noise: float) -> Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """n training images (a share `noise` of their labels drawn anew), all others to validate."""

    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = load_digits(return_X_y=True)
        random = np.random.default_rng(0)
        order = random.permutation(len(x))
        x, y = torch.tensor(x[order], dtype=torch.float32) / 16, torch.tensor(y[order])
        labels, wrong = y[:n].clone(), torch.tensor(random.random(n) < noise)
        labels[wrong] = torch.tensor(random.integers(0, 10, int(wrong.sum())))
        return x[:n], labels, x[n:], y[n:]

    return data


def digit_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, vx, vy = digits(400, 0.1)()
    return x.view(-1, 8, 8), y, vx.view(-1, 8, 8), vy


def fashion(n: int, flat: bool) -> Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """n training and 2000 validation images at 14×14."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(FASHION / name) as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=header)

    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raw = read("train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        order = np.random.default_rng(0).permutation(len(raw))[: n + 2000]
        x = F.avg_pool2d(torch.tensor(raw[order], dtype=torch.float32) / 255, 2)
        y = torch.tensor(read("train-labels-idx1-ubyte.gz", 8)[order], dtype=torch.long)
        x = x.flatten(1) if flat else x
        return x[:n], y[:n], x[n:], y[n:]

    return data


def text() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Python's own help texts: the next character, from windows of CONTEXT characters."""
    from pydoc_data.topics import topics

    words = "\n".join(topics[name] for name in sorted(topics))
    codes = np.minimum(np.frombuffer(words.encode("ascii", "replace"), dtype=np.uint8), 122)
    codes = np.where(codes >= 97, codes - 60, np.maximum(codes, 32) - 32) % CHARACTERS
    windows = torch.tensor(codes[: 40_000 // CONTEXT * CONTEXT].astype(np.int64))
    windows = windows.view(-1, CONTEXT)
    windows = windows[torch.tensor(np.random.default_rng(0).permutation(len(windows)))]
    inputs, targets = windows.clone(), windows.roll(-1, 1)
    targets[:, -1] = -100  # the last character's successor is in another window
    return inputs[:320], targets[:320], inputs[320:720], targets[320:720]


def diabetes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (torch.tensor(a[order], dtype=torch.float32) for a in (x * 21, (y - y.mean()) / y.std()))
    return x[:221], y[:221], x[221:], y[221:]


TASKS = {
    "noisy_digits": Task(
        "scikit-learn digits, 1000 images, a fifth of the labels noise; MLP 64-256-256-10",
        digits(1000, 0.2),
        mlp_weights(64, 256, 256, 10),
        mlp,
        {"first": (0, 0.25, 0.5, 0.75), "second": (0, 0.25, 0.5, 0.75)},
        (3e-4, 1e-3, 3e-3),
        50,
    ),
    "digits_gru": Task(
        "rows of 400 digits (a tenth of the labels noise) through a GRU of 48",
        digit_rows,
        gru_weights(8, 48, 10),
        gru,
        {"state": (0, 0.2, 0.4, 0.6, 0.8), "output": (0, 0.3, 0.6)},
        (2e-3, 5e-3, 1.2e-2),
        60,
        batch=40,
    ),
    "short_digits": Task(
        "1000 digits, MLP 64-32-32-10, 20 passes: too short for dropout to help",
        digits(1000, 0.0),
        mlp_weights(64, 32, 32, 10),
        mlp,
        {"first": (0, 0.1, 0.3, 0.6), "second": (0, 0.2, 0.5)},
        (5e-4, 1.5e-3, 5e-3),
        20,
    ),
    "fashion_cnn": Task(
        "Fashion-MNIST at 14×14, 1000 images; convolutions 12-24, dense 64",
        fashion(1000, flat=False),
        cnn_weights,
        cnn,
        {"channels": (0, 0.15, 0.3, 0.5), "dense": (0, 0.3, 0.6, 0.8)},
        (5e-4, 1.5e-3, 5e-3),
        50,
        batch=50,
    ),
    "text_attention": Task(
        "next character of Python's help texts, 10,000 characters; transformer of 2 layers of 32",
        text,
        attention_weights,
        attention,
        {"embedding": (0, 0.2), "attention": (0, 0.15, 0.4), "residual": (0, 0.2, 0.4)},
        (2e-3, 6e-3),
        50,
        batch=32,
    ),
    "diabetes": Task(
        "scikit-learn diabetes, 221 rows (target standardised); MLP 10-128-128-1",
        diabetes,
        mlp_weights(10, 128, 128, 1),
        mlp,
        {"first": (0, 0.1, 0.3, 0.5), "second": (0, 0.2, 0.5, 0.8)},
        (3e-4, 1e-3, 3e-3),
        60,
        batch=32,
        regression=True,
    ),
    "fashion_mlp": Task(
        "Fashion-MNIST at 14×14, 1000 images; MLP 196-256-256-10, two rates",
        fashion(1000, flat=True),
        mlp_weights(196, 256, 256, 10),
        mlp,
        {"first": (0, 0.2, 0.4, 0.6), "second": (0, 0.25, 0.5, 0.75)},
        (4e-4, 1.2e-3, 4e-3),
        60,
    ),
}


class Adam:
    """Adam over stacked weights with a learning rate per configuration (Kingma & Ba 2015)."""

    def __init__(self, weights: Weights, lr: Tensor) -> None:
        self.weights, self.lr, self.step_count = weights, lr, 0
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def step(self) -> None:
        self.step_count += 1
        for name, w in self.weights.items():
            m, v = self.first[name], self.second[name]
            m.lerp_(w.grad, 0.1)
            v.lerp_(w.grad.square(), 0.001)
            scale = math.sqrt(1 - 0.999**self.step_count) / (1 - 0.9**self.step_count)
            w -= self.lr.view(-1, *[1] * (w.dim() - 1)) * scale * m / (v.sqrt() + 1e-8)
            w.grad = None


def losses(out: Tensor, y: Tensor, regression: bool) -> Tensor:
    """Mean loss of every configuration [K]."""
    if regression:
        return (out[..., 0] - y).square().mean(1)
    flat = out.flatten(0, -2)
    every = F.cross_entropy(
        flat, y.repeat(len(out), *[1] * (y.dim() - 1)).flatten(), reduction="none"
    )
    return every.view(len(out), -1).sum(1) / (y >= 0).sum()


@torch.no_grad()
def validate(task: Task, w: Weights, x: Tensor, y: Tensor, k: int) -> dict[str, Tensor]:
    """Metrics [K] over the whole validation set, dropout off."""
    off = torch.zeros(k, len(task.sites))
    out = torch.cat([task.forward(w, part, off) for part in x.split(250)], dim=1)
    loss = losses(out, y, task.regression)
    if task.regression:
        return {"rmse": loss.sqrt()}
    correct = (out.argmax(-1) == y) & (y >= 0)
    return {"nll": loss, "accuracy": correct.flatten(1).sum(1) / (y >= 0).sum()}


def train(task: Task) -> dict[str, list[Tensor]]:
    """Curves of all configurations: metric to one tensor [K] per interval."""
    torch.manual_seed(0)
    configurations = torch.tensor(task.configurations())
    rates, lr = configurations[:, :-1], configurations[:, -1]
    x, y, vx, vy = task.data()
    weights = {name: w.requires_grad_() for name, w in task.weights(len(rates)).items()}
    adam = Adam(weights, lr)
    curves: dict[str, list[Tensor]] = {"train_loss": []}
    for _ in range(task.intervals):
        total, updates = torch.zeros(len(rates)), 0
        for rows in torch.randperm(len(x)).split(task.batch):
            loss = losses(task.forward(weights, x[rows], rates), y[rows], task.regression)
            loss.sum().backward()
            adam.step()
            total, updates = total + loss.detach(), updates + 1
        curves["train_loss"].append(total / updates)
        for name, values in validate(task, weights, vx, vy, len(rates)).items():
            curves.setdefault(name, []).append(values)
    return curves


def save(name: str, task: Task, curves: dict[str, list[Tensor]]) -> None:
    """One training a line: its rates, lr, and a list per metric (`steps` are shared)."""
    lines = []
    for i, configuration in enumerate(task.configurations()):
        rates = dict(zip(task.sites, configuration, strict=False))
        values = {key: [round(float(v[i]), 4) for v in series] for key, series in curves.items()}
        lines.append(json.dumps({"rates": rates, "lr": configuration[-1], "seed": i, **values}))
    head = {"about": task.about, "intervals": task.intervals}
    head["steps"] = list(range(1, task.intervals + 1))
    text = json.dumps(head)[:-1] + ', "trainings": [\n' + ",\n".join(lines) + "\n]}\n"
    (CURVES / f"{name}.json").write_text(text)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or [n for n in TASKS if not (CURVES / f"{n}.json").exists()]:
        started = time.perf_counter()
        save(name, TASKS[name], train(TASKS[name]))
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
