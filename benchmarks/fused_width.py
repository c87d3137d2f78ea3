"""Trial-epochs per second: plain PyTorch, several processes, and droptune at every width.

    python benchmarks/fused_width.py                       all cases on the best device
    python benchmarks/fused_width.py --case digits-mlp --widths 1,16,64 --seconds 3 --repeats 1

A trial-epoch is one pass over the training data and one evaluation on validation data: the same
model, data, batch size and optimizer for everybody. Each row is measured in processes of its
own, all rows in turn, the best of `--repeats`. Data are random: only shapes matter here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from droptune.program.short_form import classification
from droptune.sites.installed import find_program_sites
from droptune.spec.objective import Objective
from droptune.trainers.fused import trainer_of
from droptune.trainers.fusibility import fusible
from droptune.trainers.memory import keep_freed_memory
from droptune.trainers.recipe import Recipe
from droptune.trainers.width import choose_width
from droptune.training import Assignment, Seeds, Training

AUTO = 0  # as a width: measured
LONG = 20.0  # seconds for one pass of a group: none wider is measured
Plan = tuple[str, int, int]  # how, width, processes


# -- cases ----------------------------------------------------------------------------------------


def mlp(*sizes: int, rate: float = 0.3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(rate)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(*sizes[-2:]))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25), nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(self.embed(ids))
        logits: Tensor = self.head(hidden.mean(1))
        return logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.lstm = nn.LSTM(32, 64, 2, dropout=0.3, batch_first=True)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        logits: Tensor = self.head(self.drop(hidden[:, -1]))
        return logits


@dataclass(frozen=True)
class Case:
    """A model with the sizes of its data; `shape` of one example, `tokens` where it is ids."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    train: int
    validation: int
    tokens: bool = False

    def data(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (n,), generator=generator)
        if self.tokens:
            return torch.randint(256, (n, *self.shape), generator=generator), labels
        return torch.randn(n, *self.shape, generator=generator), labels


CASES = {
    "digits-mlp": Case(lambda: mlp(64, 64, 64, 10), (64,), 64, 1150, 287),
    "digits-mlp-32": Case(lambda: mlp(64, 32, 32, 10), (64,), 32, 1150, 287),
    "mlp-784-512-512": Case(lambda: mlp(784, 512, 512, 10), (784,), 128, 4096, 1024),
    "fashion-cnn": Case(cnn, (1, 28, 28), 128, 2048, 512),
    "transformer": Case(Transformer, (32,), 64, 1024, 256, tokens=True),
    "lstm": Case(Recurrent, (32,), 64, 1024, 256, tokens=True),
}


# -- who trains -----------------------------------------------------------------------------------

Epoch = Callable[[], None]  # one trial-epoch of every training that is trained together


def plain(case: Case, device: torch.device, *, loader: bool) -> Epoch:
    """One training as a PyTorch user writes it, from a DataLoader or from tensors in place."""
    model = case.model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = (t if loader else t.to(device) for t in case.data(case.train, 0))
    vx, vy = (t.to(device) for t in case.data(case.validation, 1))
    batches = DataLoader(TensorDataset(x, y), case.batch, shuffle=True)

    def in_place() -> Any:
        order = torch.randperm(case.train, device=device)
        return ((x[i], y[i]) for i in order.split(case.batch))

    def epoch() -> None:
        model.train()
        for inputs, labels in batches if loader else in_place():
            loss = functional.cross_entropy(model(inputs.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(part) for part in vx.split(4 * case.batch)])
            functional.cross_entropy(logits, vy).item()
            (logits.argmax(-1) == vy).float().mean().item()

    return epoch


def recipe_of(case: Case, device: torch.device) -> Recipe:
    program = classification(
        model=case.model,
        train=case.data(case.train, 0),
        validation=case.data(case.validation, 1),
        test=False,
        batch_size=case.batch,
        epochs=1000,
        lr=1e-3,
    )
    return Recipe(program, find_program_sites(program).sites, Objective("nll"), device=device)


def droptune(case: Case, device: torch.device, width: int) -> tuple[Epoch, int]:
    """`width` trainings in droptune's trainer (AUTO: as many as it measures to be best), in a
    process that is set up as a worker is."""
    keep_freed_memory()
    recipe = recipe_of(case, device)
    width = width or choose_width(recipe, trainer_of).width
    trainer = trainer_of(recipe, width)
    for index in range(width):
        rates = {site.path: 0.6 * index / width for site in recipe.sites}
        seeds = Seeds(weights=index, data=0, split=0)
        trainer.fill(index, Training.apart(index, Assignment(rates, 1e-3), seeds, 1000))
    return lambda: trainer.train_interval() and None, width


# -- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one way of training gave: trial-epochs per second of all processes, memory of all."""

    case: str
    how: str
    width: int
    processes: int
    rate: float
    memory_mib: float
    auto: bool


def child(
    task: tuple[str, str, int], device_name: str, seconds: float, threads: int, barrier: Any,
    results: Any,
) -> None:  # fmt: skip
    """In a process of its own: trial-epochs per second, width, MiB."""
    name, how, width = task
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if how == "droptune":
        epoch, width = droptune(CASES[name], device, width)
    else:
        epoch, width = plain(CASES[name], device, loader=how == "DataLoader"), 1
    epoch()
    barrier.wait()
    started, epochs = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        epoch()
        epochs += 1
    elapsed = time.perf_counter() - started
    results.put((epochs * width / elapsed, width, peak_memory(device) / 2**20))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most; `ru_maxrss` would be its parent's, if that is more."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def measure(case: str, plan: Plan, options: argparse.Namespace) -> Row:
    context = multiprocessing.get_context("spawn")
    how, width, processes = plan
    barrier, results = context.Barrier(processes), context.Queue()
    task = (case, how, width)
    arguments = (task, options.device, options.seconds, options.threads, barrier, results)
    started = [context.Process(target=child, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    found = [results.get(timeout=600) for _ in started]
    for process in started:
        process.join()
    rate, memory = sum(f[0] for f in found), sum(f[2] for f in found)
    return Row(case, how, found[0][1], processes, rate, memory, auto=width == AUTO)


def flops_per_epoch(case: Case) -> float:
    """Floating point operations of one trial-epoch (matrix products and convolutions)."""
    model, (x, y) = case.model(), case.data(case.batch, 0)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    training = counter.get_total_flops() * case.train / case.batch
    return training + counter.get_total_flops() / 3 * case.validation / case.batch


def peak_flops(device: torch.device) -> float:
    """What large float32 matrix products reach here: the measure for the share of the peak."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    for _ in range(3):
        a @ a
    _wait(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    _wait(device)
    return 10 * 2 * size**3 / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- the table ------------------------------------------------------------------------------------


def rows_of(case: str, options: argparse.Namespace) -> list[Row]:
    """The best of `--repeats` for each way; all ways in turn, so that a drift meets them all."""
    plans: list[Plan] = [("DataLoader", 1, 1), ("tensors", 1, 1)]
    plans += [("tensors", 1, processes) for processes in options.processes]
    plans += [("droptune", width, 1) for width in (*options.widths, AUTO)]
    plans += [("droptune", AUTO, processes) for processes in options.processes]
    best: dict[Plan, Row] = {}
    for plan in [plan for _ in range(options.repeats) for plan in plans]:
        if not _too_long(plan, best):
            row = measure(case, plan, options)
            best[plan] = max(row, best.get(plan, row), key=lambda each: each.rate)
    return list(best.values())


def _too_long(plan: Plan, known: dict[Plan, Row]) -> bool:
    """Whether one pass of so wide a group would take too long to be measured."""
    _, width, _ = plan
    rates = [row.rate for row in known.values() if row.how == "droptune"]
    return bool(rates) and width > 1 and width / min(rates) > LONG


def show(rows: Sequence[Row], options: argparse.Namespace) -> None:
    one = next(row.rate for row in rows if row.how == "tensors")
    for row in rows:
        share = row.rate * flops_per_epoch(CASES[row.case]) / options.peak
        of_peak = f"{100 * share:.1f} %" if share > 5e-4 else "–"  # torch does not count an LSTM's
        print(
            f"| {row.case} | {row.how}{', auto' if row.auto else ''} | {row.width} "
            f"| {row.processes} | {row.rate:.1f} | {row.rate / one:.2f} | {row.memory_mib:.0f} "
            f"| {of_peak} |",
            flush=True,
        )
    for processes in sorted({row.processes for row in rows if row.auto}):
        same = [row for row in rows if row.processes == processes]
        auto = next(row for row in same if row.auto)
        other = max((row for row in same if not row.auto), key=lambda each: each.rate)
        ratio, width = auto.rate / other.rate, f"{other.how} at width {other.width}"
        print(f"<!-- {processes} process(es): auto is {ratio:.2f} of the best other, {width} -->")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="(may be repeated)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--widths", default="1,4,16,64,256" if cuda else "1,2,4,8,16,32,64")
    parser.add_argument("--processes", default="2,4,8" if cuda else str(os.cpu_count()))
    parser.add_argument("--threads", type=int, default=1, help="of each process on the CPU")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all rows there, too")
    options = parser.parse_args()
    options.widths = [int(width) for width in options.widths.split(",")]
    options.processes = [int(count) for count in options.processes.split(",") if int(count) > 1]
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    options.peak = peak_flops(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    facts = f"{name or device}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {facts}, {options.peak / 1e9:.0f} GFLOP/s at best\n")
    print(
        "| case | how | width | processes | trial-epochs/s | × one after another | MiB | of peak |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    rows = []
    for case in options.case or CASES:
        print(f"<!-- {case}: {fusible(recipe_of(CASES[case], torch.device('cpu'))).reason} -->")
        found = rows_of(case, options)
        show(found, options)
        rows += found
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
