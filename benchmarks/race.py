"""How long until the recommended configuration is as good as an exhaustive grid's best?

    python benchmarks/race.py [--seeds 0,1,2,3,4] [--trials 40] [--threads 1] [--out race.json]

Fashion-MNIST with 2,000 training images (studies/fashion_mnist_mlp_2000), 60 epochs, objective
final validation NLL. Two ways of searching two rates and the learning rate, in the same ranges,
both started at the same moment on the same machine, each in one process with `--threads` threads:

- optuna: its defaults (TPE, median pruner), plain PyTorch, one training after the other, until it
  has trained as many epochs as `--trials` whole trainings have;
- droptune: `droptune study run` of so many trials with its defaults, baselines included.

After each training that ends, a way recommends the configuration with the best value so far.
What it is worth is measured apart, outside of all clocks: its mean final NLL over fresh seeds.
A way arrives when that is within `--margin` of the same mean of the best of an exhaustive grid
(nine rates, equal at both sites, by three learning rates: recorded in curves/grid_n2000.json).
Time counts from the start of the process, imports and preparation included; epochs count all
that were trained until then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from torch.nn import functional

from droptune.program.loading import load_program
from droptune.sites.installed import find_program_sites
from droptune.spec.objective import Objective
from droptune.trainers.fused import trainer_of
from droptune.trainers.recipe import Recipe
from droptune.training import Assignment, Seeds, Training

STUDIES = Path(__file__).parent.parent / "studies"
STUDY = "fashion_mnist_mlp_2000"
SITES = ("dropout1", "dropout2")
EPOCHS, BATCH = 60, 128
RATES, LRS = (0.0, 0.8), (1e-4, 1e-2)  # what both ways search
GRID = Path(__file__).parent / "curves" / "grid_n2000.json"
FRESH = 1000  # seeds from here on belong to the confirmations
Point = tuple[float, ...]  # a rate for each site, and the learning rate


# -- what a configuration is worth ----------------------------------------------------------------


def final_nll(points: Sequence[Point], seeds: Sequence[int], width: int = 8) -> dict[Point, float]:
    """The mean final validation NLL of each configuration over these seeds."""
    program = load_program(f"{STUDY}.py", STUDIES)
    recipe = Recipe(program, find_program_sites(program).sites, Objective("nll"))
    tasks = list(itertools.product(dict.fromkeys(points), seeds))
    found: dict[Point, list[float]] = {}
    for start in range(0, len(tasks), width):
        part = tasks[start : start + width]
        trainer = trainer_of(recipe, len(part))
        for slot, (point, seed) in enumerate(part):
            trainer.fill(slot, training(slot, point, seed))
        for _ in range(EPOCHS):
            outcomes = trainer.train_interval()
        for slot, (point, _) in enumerate(part):
            value = outcomes[slot].measurement.values["val/nll"]
            found.setdefault(point, []).append(value if math.isfinite(value) else math.inf)
    return {point: statistics.fmean(values) for point, values in found.items()}


def training(number: int, point: Point, seed: int) -> Training:
    assignment = Assignment(dict(zip(SITES, point[:-1], strict=True)), point[-1])
    return Training.apart(number, assignment, Seeds(weights=seed, data=seed, split=0), EPOCHS)


def grid_best(seeds: Sequence[int]) -> tuple[Point, float]:
    """The best configuration of the recorded grid: of the best three of it, by fresh seeds."""
    recorded = json.loads(GRID.read_text())["trainings"]
    best = sorted(recorded, key=lambda each: each["nll"][-1])[:3]
    points = [(*[each["rates"]["hidden"]] * len(SITES), each["lr"]) for each in best]
    means = final_nll(points, seeds)
    point = min(means, key=means.__getitem__)
    return point, means[point]


# -- two ways of searching ------------------------------------------------------------------------


def search_optuna(seed: int, trials: int, threads: int, started: float) -> list[dict[str, Any]]:
    """Optuna's defaults and a training loop as everybody writes it."""
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    program = load_program(f"{STUDY}.py", STUDIES)
    splits = program.splits(0)
    (x, y), (vx, vy) = splits.train.tree, splits.validation.tree
    ended: list[dict[str, Any]] = []

    def objective(trial: optuna.Trial) -> float:
        rates = [trial.suggest_float(site, *RATES) for site in SITES]
        lr = trial.suggest_float("lr", *LRS, log=True)
        torch.manual_seed(1000 * seed + trial.number)
        model = program.model()
        for site, rate in zip(SITES, rates, strict=True):
            model.get_submodule(site).p = rate
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for epoch in range(EPOCHS):
            model.train()
            for index in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                loss = float(functional.cross_entropy(model(vx), vy))
            trial.report(loss, epoch)
            if trial.should_prune():
                ended.append({"time": time.time() - started, "epochs": epoch + 1, "value": None})
                raise optuna.TrialPruned
        row = {"time": time.time() - started, "epochs": EPOCHS, "value": loss}
        ended.append({**row, "point": [*rates, lr]})
        return loss

    def enough(study: optuna.Study, _: optuna.trial.FrozenTrial) -> None:
        if sum(row["epochs"] for row in ended) >= trials * EPOCHS:
            study.stop()

    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    study.optimize(objective, callbacks=[enough])
    return ended


def search_droptune(seed: int, trials: int, threads: int, started: float) -> list[dict[str, Any]]:
    """`droptune study run` in a folder of its own; what it did, from its own export."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (f"{STUDY}.py", "fashion_mnist.py"):
            shutil.copy(STUDIES / file, folder)
        spec = {
            "program": f"{STUDY}.py",
            "seed": seed,
            "objective": {"metric": "nll", "take": "last"},
            "epochs": EPOCHS,
            "budget": {"trials": trials},
            "space": {
                "rates": {site: dict(zip(("low", "high"), RATES, strict=True)) for site in SITES},
                "lr": dict(zip(("low", "high"), LRS, strict=True)),
                "groups": "none",
            },
            "confirm": {"enabled": False},
            "mlflow": {"mirror": "none"},
            "training": {"threads": threads},
        }
        (Path(folder) / "race.yaml").write_text(yaml.safe_dump(spec))
        droptune = [sys.executable, "-m", "droptune", "study"]
        quiet: dict[str, Any] = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([*droptune, "run", "race.yaml", "--workers", "1"], **quiet)
        subprocess.run([*droptune, "export", "race", "-o", "race.json"], **quiet)
        rows = json.loads((Path(folder) / "race.json").read_text())
    last = {row["training"]: row for row in rows}  # rows of a training are in order of intervals
    return sorted((_ended(row, started) for row in last.values()), key=lambda each: each["time"])


def _ended(row: dict[str, Any], started: float) -> dict[str, Any]:
    time_of_end = datetime.fromisoformat(row["ended"]).timestamp() - started
    ended = {"time": time_of_end, "epochs": row.get("interval", 0), "value": None}
    if row["state"] == "COMPLETE":
        point = [*(row[f"dropout/{site}"] for site in SITES), row["lr"]]
        ended |= {"value": row["objective"], "point": point}
    return ended


WAYS = {"optuna": search_optuna, "droptune": search_droptune}


def side_by_side(seed: int, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Both ways from the same moment on, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(WAYS), mp_context=spawn) as pool:
        started = time.time()
        searches = {
            way: pool.submit(search, seed, options.trials, options.threads, started)
            for way, search in WAYS.items()
        }
        return {way: search.result() for way, search in searches.items()}


# -- who arrives when -----------------------------------------------------------------------------


def incumbents(ended: Sequence[dict[str, Any]]) -> list[tuple[float, int, Point]]:
    """(seconds, epochs, configuration) whenever the best value so far changes."""
    best, epochs, path = math.inf, 0, []
    for row in ended:
        epochs += row["epochs"]
        if row["value"] is not None and row["value"] < best:
            best = row["value"]
            path.append((row["time"], epochs, tuple(row["point"])))
    return path


def arrival(
    path: Sequence[tuple[float, int, Point]], fresh: Sequence[int], target: float
) -> tuple[float, float]:
    """When the recommendation is good enough for the first time (inf: never)."""
    for seconds, epochs, point in path:
        if final_nll([point], fresh)[point] <= target:
            return seconds, epochs
    return math.inf, math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of the searches")
    parser.add_argument("--trials", type=int, default=40, help="of droptune's search")
    parser.add_argument("--threads", type=int, default=1, help="of each way")
    parser.add_argument("--confirm", type=int, default=3, help="fresh seeds of each configuration")
    parser.add_argument("--margin", type=float, default=0.02, help="nats")
    parser.add_argument("--out", type=Path, help="write all rows there, too")
    options = parser.parse_args()
    fresh = range(FRESH, FRESH + options.confirm)
    torch.set_num_threads(options.threads)
    point, reached = grid_best(fresh)
    facts = f"{os.cpu_count()} cores, torch {torch.__version__}, optuna {optuna.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {facts}\n")
    print(f"the grid's best is {point}: {reached:.4f} nats over {len(fresh)} fresh seeds\n")
    print("| seed | way | trials | s in all | epochs in all | s until there | epochs until there |")
    print("|---:|---|---:|---:|---:|---:|---:|", flush=True)
    ratios: dict[str, list[float]] = {"time": [], "epochs": []}
    kept = {}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in seeds:
        both = side_by_side(seed, options)
        kept[seed] = both
        paths = {way: incumbents(ended) for way, ended in both.items()}
        there = {}
        for way in WAYS:
            ended = both[way]
            there[way] = arrival(paths[way], fresh, reached + options.margin)
            total = sum(row["epochs"] for row in ended)
            print(
                f"| {seed} | {way} | {len(ended)} | {ended[-1]['time']:.0f} | {total} "
                f"| {there[way][0]:.0f} | {there[way][1]:.0f} |",
                flush=True,
            )
        for i, what in enumerate(ratios):
            theirs, ours = there["optuna"][i], there["droptune"][i]
            if math.isfinite(min(theirs, ours)):  # where neither arrives there is no ratio
                ratios[what].append(theirs / ours)
    if options.out:
        options.out.write_text(json.dumps(kept, indent=1))
    print(
        "\nMedian ratios until there, Optuna's by ours (inf: only ours arrived, 0: only Optuna's):"
    )
    for what, found in ratios.items():
        middle = f"{statistics.median(found):.1f}" if found else "none"
        print(f"{what}: {middle} over {len(found)} of {len(seeds)} seeds")


if __name__ == "__main__":
    main()
