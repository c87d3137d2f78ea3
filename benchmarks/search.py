"""How pruners and samplers do, replayed on recorded learning curves.

    python benchmarks/search.py pruners [--orders 200] [--sets NAME ...] [--width 1] [--baselines]
    python benchmarks/search.py samplers [--seeds 20] [--trials 48] [--width 8] [--error 0.2]

`pruners`: the recorded trainings of a set run in random orders, one after the other or `width`
at a time in lock-step; Optuna's pruners are its own code. Regret is the best completed value
less the best of the set; also as a share of the spread: best without dropout less best.
`samplers`: mean regret on functions made of the recorded sets and on synthetic ones, against
random search with the same budget. With `--error` a trial is predicted as badly as that, in
typical regrets, and pruned where even the prediction's optimistic end is worse than the best; the
sampler sees the prediction and its noise (`gp means`: the prediction alone). The results are in
docs/pruning.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import TrialState
from scipy.stats import qmc

from droptune.search.prediction import PILOTS, Expected, Process, Trace, Warp, points
from droptune.search.pruning import Rules, decide
from droptune.search.sampling import Proposer
from droptune.space.parameters import RateParameter, ValueParameter
from droptune.space.space import Space
from droptune.spec.objective import Objective
from droptune.spec.sections import Baselines, Sampler
from droptune.spec.spec import StudySpec
from droptune.training import Assignment, Record, Seeds, State, Training, TrainingKind

CURVES = Path(__file__).parent / "curves"
SETTLED_ON = ("grid_n2000", "noisy_digits", "digits_gru", "short_digits")
HELD_OUT = ("fashion_mlp", "fashion_cnn", "text_attention", "diabetes")


@dataclass(frozen=True)
class Recorded:
    """One set of curves in one objective; smaller is better.

    curves [n, intervals] (between recorded steps the last value stands), steps: the recorded ones
    """

    name: str
    metric: str
    take: str
    curves: np.ndarray
    points: np.ndarray
    assignments: tuple[Assignment, ...]
    steps: tuple[int, ...]

    @property
    def intervals(self) -> int:
        return self.curves.shape[1]

    @property
    def values(self) -> np.ndarray:
        return self.curves[:, -1] if self.take == "last" else self.curves.min(1)

    @property
    def best(self) -> int:
        return int(self.values.argmin())

    @property
    def without_dropout(self) -> float:
        """The best value with all rates 0."""
        none = [i for i, a in enumerate(self.assignments) if not any(a.rates.values())]
        return float(self.values[none].min())

    @property
    def baselines(self) -> set[int]:
        """The trainings without dropout, and those with all rates closest to a half."""
        rates = np.array([list(a.rates.values()) for a in self.assignments])
        from_half = np.abs(rates - 0.5).sum(1)
        half = from_half <= from_half.min() + 1e-9
        return set(np.flatnonzero(half | (rates.max(1) == 0)).tolist())


@cache
def load(name: str, metric: str, take: str) -> Recorded:
    data = json.loads((CURVES / f"{name}.json").read_text())
    metric = "rmse" if "rmse" in data["trainings"][0] else metric
    sign = -1.0 if metric == "accuracy" else 1.0
    assignments = tuple(Assignment(t["rates"], t["lr"]) for t in data["trainings"])
    recorded = sign * np.array([t[metric] for t in data["trainings"]])
    which = np.searchsorted(data["steps"], np.arange(1, data["intervals"] + 1), side="right") - 1
    curves = recorded[:, np.maximum(which, 0)]
    rows = points(assignments)
    return Recorded(name, metric, take, curves, rows, assignments, tuple(data["steps"]))


def objectives(name: str) -> Iterable[tuple[str, str]]:
    """(metric, take) of a set; the regression has one metric."""
    yield ("nll", "last")
    if name != "diabetes":
        yield ("accuracy", "last")
    yield ("nll", "best")


# Pruners: (running index -> intervals done, completed, never pruned) to those that are pruned.

Judge = Callable[[dict[int, int], list[int], set[int]], set[int]]


def ours(rules: Rules) -> Callable[[Recorded, int], Judge]:
    def start(recorded: Recorded, _: int) -> Judge:
        def trace(i: int, done: int | None) -> Trace:
            value = None if done else np.array([recorded.values[i]])
            return Trace(i, recorded.curves[None, i, :done], recorded.points[i], value)

        def judge(running: dict[int, int], completed: list[int], protected: set[int]) -> set[int]:
            due = rules.at(recorded.intervals)
            if len(completed) < rules.pilots or not any(done in due for done in running.values()):
                return set()
            decisions = decide(
                [trace(i, None) for i in completed],
                [trace(i, done) for i, done in running.items() if i not in protected],
                recorded.intervals,
                [recorded.take],
                rules,
                counted=[recorded.metric == "accuracy"],
            )
            return {i for i, decision in decisions.items() if decision.prune}

        return judge

    return start


def optunas(make: Callable[[Recorded], optuna.pruners.BasePruner]) -> Callable[..., Judge]:
    """One of Optuna's pruners, asked through an Optuna study in memory."""

    def start(recorded: Recorded, order: int) -> Judge:
        study = optuna.create_study(
            study_name=f"order-{order}",
            sampler=optuna.samplers.RandomSampler(),
            pruner=make(recorded),
        )
        trials: dict[int, optuna.Trial] = {}
        told: set[int] = set()

        def judge(running: dict[int, int], completed: list[int], protected: set[int]) -> set[int]:
            for i in set(completed) - told:
                trials[i].report(recorded.curves[i, -1], recorded.intervals)
                study.tell(trials[i], recorded.values[i])
                told.add(i)
            pruned = set()
            for i, done in running.items():
                if i not in trials:
                    trials[i] = study.ask()
                trials[i].report(recorded.curves[i, done - 1], done)
                if trials[i].should_prune() and i not in protected:
                    study.tell(trials[i], state=TrialState.PRUNED)
                    pruned.add(i)
            return pruned

        return judge

    return start


PRUNERS: dict[str, Callable[[Recorded, int], Judge]] = {
    "fair (ours)": ours(Rules(audit=0.0)),
    "median": optunas(lambda _: optuna.pruners.MedianPruner()),
    "median, a third": optunas(
        lambda r: optuna.pruners.MedianPruner(n_warmup_steps=r.intervals // 3)
    ),
    "sha": optunas(lambda _: optuna.pruners.SuccessiveHalvingPruner(min_resource=1)),
    "hyperband": optunas(lambda r: optuna.pruners.HyperbandPruner(1, r.intervals)),
    "none": lambda _recorded, _order: lambda *_: set(),
}


@dataclass(frozen=True)
class Outcome:
    """Means over orders."""

    regret: float
    best_pruned: float
    epochs: float


@dataclass(frozen=True)
class Manner:
    """How trainings come: `width` at a time in lock-step; baselines first and never pruned."""

    width: int = 1
    baselines: bool = False


def replay(
    recorded: Recorded, start: Callable[[Recorded, int], Judge], order: int, manner: Manner
) -> Outcome:
    """Run all trainings of a set in one random order."""
    queue = np.random.default_rng(order).permutation(len(recorded.curves)).tolist()
    protected = recorded.baselines if manner.baselines else set()
    queue.sort(key=lambda i: i not in protected)
    following = dict(itertools.pairwise((0, *recorded.steps)))
    judge, running, completed, spent, pruned = start(recorded, order), {}, [], 0, set()
    while queue or running:
        while queue and len(running) < manner.width:
            running[queue.pop(0)] = 0
        spent += sum(following[done] - done for done in running.values())
        running = {i: following[done] for i, done in running.items()}
        asked = {i: done for i, done in running.items() if done < recorded.intervals}
        ended = judge(asked, completed, protected) if asked else set()
        pruned |= ended
        completed += [i for i in running if i not in asked]
        running = {i: done for i, done in asked.items() if i not in ended}
    values = recorded.values
    return Outcome(
        float(values[completed].min() - values.min()),
        float(recorded.best in pruned),
        spent / recorded.curves.size,
    )


def measure(
    name: str, metric: str, take: str, pruner: str, orders: int, manner: Manner
) -> tuple[Outcome, float]:
    """Means over orders, and 1.96 standard errors of the mean regret."""
    recorded = load(name, metric, take)
    runs = [replay(recorded, PRUNERS[pruner], order, manner) for order in range(orders)]
    table = np.array([[run.regret, run.best_pruned, run.epochs] for run in runs])
    error = 1.96 * table[:, 0].std(ddof=1) / math.sqrt(orders)
    return Outcome(*table.mean(0).tolist()), float(error)


def pruners(
    names: Sequence[str], which: Sequence[str], orders: int, manner: Manner, jobs: int
) -> None:
    """Print one row per set, objective and pruner."""
    tasks = [
        (name, metric, take, pruner, orders, manner)
        for name in names
        for metric, take in objectives(name)
        for pruner in which
    ]
    print("| set | objective | pruner | regret | of the spread | best pruned | epochs |")
    print("|---|---|---|---|---|---|---|")
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(measure, *zip(*tasks, strict=True))
        for (name, metric, take, pruner, *_), (outcome, error) in zip(tasks, results, strict=True):
            recorded = load(name, metric, take)
            spread = recorded.without_dropout - recorded.values.min()
            share = f"{outcome.regret / spread:.1%}" if spread > 1e-9 else "–"
            print(
                f"| {name} | {take} {recorded.metric} | {pruner} "
                f"| {outcome.regret:.4f} ± {error:.4f} | {share} "
                f"| {outcome.best_pruned:.0%} | {outcome.epochs:.1%} |",
                flush=True,
            )


# Samplers: functions of rates and learning rate, and noise like that of seeds.


@dataclass(frozen=True)
class Problem:
    """truth(points [n, rates + 1]) is the value without noise; the last column is log lr."""

    name: str
    rates: tuple[float, ...]  # the highest rate of each site; all begin at 0
    log_lr: tuple[float, float]
    truth: Callable[[np.ndarray], np.ndarray]
    noise: float

    @property
    def space(self) -> Space:
        sites = [f"site{i}" for i in range(len(self.rates))]
        return Space(
            rates=tuple(
                RateParameter(f"dropout/{site}", (site,), (1.0,), 0.0, high)
                for site, high in zip(sites, self.rates, strict=True)
            ),
            lr=ValueParameter("lr", math.exp(self.log_lr[0]), math.exp(self.log_lr[1]), log=True),
            author=dict.fromkeys(sites, 0.0),
        )

    def at(self, assignment: Assignment) -> np.ndarray:
        return np.array([[*assignment.rates.values(), math.log(assignment.lr)]])

    @property
    def scale(self) -> tuple[float, float]:
        """(lowest, typical less lowest) of the truth on 4096 Sobol points."""
        unit = qmc.Sobol(len(self.rates) + 1, rng=0).random(4096)
        low = [-high / 9 for high in self.rates]  # the dead zone
        points = qmc.scale(unit, [*low, self.log_lr[0]], [*self.rates, self.log_lr[1]])
        values = self.truth(np.maximum(points, [0.0] * len(self.rates) + [-np.inf]))
        return float(values.min()), float(np.median(values) - values.min())


def recorded_problem(name: str) -> Problem:
    """A smooth function through a recorded set's final NLL (or RMSE); noise: half its error."""
    recorded = load(name, "nll", "last")
    x = np.array([[*a.rates.values(), math.log(a.lr)] for a in recorded.assignments])
    warp = Warp.of(recorded.values)
    process = Process(x, warp(recorded.values))
    highest = tuple(x[:, :-1].max(0).tolist())
    lrs = (float(x[:, -1].min()), float(x[:, -1].max()))
    return Problem(name, highest, lrs, lambda p: process.predict(p)[0], process.error / 2)


def synthetic_problem(rates: int, zeros: int) -> Problem:
    """A bowl whose best learning rate moves with the mean rate; `zeros` sites are best at 0."""
    best = np.where(np.arange(rates) < zeros, -0.2, np.linspace(0.2, 0.7, rates))
    weight = 0.5 ** (np.arange(rates) % 4)

    def truth(p: np.ndarray) -> np.ndarray:
        bowl = (weight * (p[:, :-1] - best) ** 2).sum(1)
        return bowl + 0.1 * (p[:, -1] + 7 - 2 * p[:, :-1].mean(1)) ** 2

    return Problem(f"bowl {rates}/{zeros}", (0.9,) * rates, (-9.5, -4.5), truth, 0.03)


def problems() -> list[Problem]:
    recorded = [recorded_problem(name) for name in (*SETTLED_ON, *HELD_OUT)]
    return [*recorded, *(synthetic_problem(*shape) for shape in ((2, 1), (4, 1), (8, 4), (12, 3)))]


class Told(Proposer):
    """Knows of pruned trials what the benchmark predicts of them."""

    predictions: dict[int, Expected]

    def _expected(self, finished: Sequence[Record]) -> dict[int, Expected]:
        return {r.training.id: self.predictions[r.training.id] for r in finished if not r.values}


def search(
    problem: Problem, sampler: str, seed: int, trials: int, width: int, error: float | None
) -> tuple[float, float, float]:
    """(regret of the best value seen, of the best posterior mean, both in typical regrets; share
    of the trials that was pruned)."""
    name, _, variant = sampler.partition(" ")
    options = {"multivariate": variant == "multivariate"} if name == "tpe" else {}
    spec = StudySpec(
        name="x",
        program="x.py",
        seed=seed,
        objectives=(Objective("nll"),),
        sampler=Sampler(name, options),
        baselines=Baselines(trials=1, none=False, half=False, author=False),
    )
    proposer = Told.of(spec, problem.space)
    proposer.predictions = {}
    best, typical = problem.scale
    random, records = np.random.default_rng(seed), []
    while len(records) < trials:
        numbers = range(len(records), len(records) + width)
        completed = [r.value for r in records if r.values]
        for number, assignment in zip(numbers, proposer.propose(records, numbers), strict=True):
            truth = float(problem.truth(problem.at(assignment))[0])
            value = truth + problem.noise * random.normal()
            record = _record(number, assignment, value)
            if error is not None:
                sd = max(error * typical * math.exp(0.5 * random.normal()), problem.noise)
                predicted = value + sd * random.normal()
                if len(completed) >= PILOTS and predicted - OPTIMISM * sd > min(completed):
                    noise = 0.0 if variant == "means" else sd
                    proposer.predictions[number] = Expected((predicted,), (noise,))
                    record = replace(record, state=State.PRUNED, values=None)
            records.append(record)
    seen = [r for r in records if r.values]
    chosen = min(seen, key=lambda r: r.value), _smoothed(seen)
    regrets = (problem.truth(problem.at(r.training.assignment))[0] - best for r in chosen)
    return *(float(regret) / typical for regret in regrets), 1 - len(seen) / trials


def _smoothed(records: Sequence[Record]) -> Record:
    """The trial with the best posterior mean: good because its neighbours are as well."""
    values = np.array([record.value for record in records])
    x = points([record.training.assignment for record in records])
    return records[int(np.argmin(Process(x, Warp.of(values)(values)).predict(x)[0]))]


def _record(number: int, assignment: Assignment, value: float) -> Record:
    training = Training(
        id=number,
        study_id=1,
        kind=TrainingKind.SEARCH,
        number=number,
        label="",
        assignment=assignment,
        seeds=Seeds(0, 0, 0),
        seed_index=None,
        intervals=1,
        attempt=0,
        lease_epoch=0,
    )
    return Record(training, State.COMPLETE, curves={"val/nll": (value,)}, values=(value,))


OPTIMISM = 2.4  # standard deviations, about those of the fair pruner
SAMPLERS = ("random", "qmc", "tpe multivariate", "tpe univariate", "gp", "cmaes")


def _searches(index: int, sampler: str, seeds: int, *how: float | None) -> np.ndarray:
    problem = problems()[index]
    return np.array([search(problem, sampler, seed, *how) for seed in range(seeds)])


def samplers(
    which: Sequence[str], seeds: int, trials: int, width: int, error: float | None, jobs: int
) -> None:
    """Print mean regrets over problems, and the paired difference to the first sampler."""
    indices = range(len(problems()))
    tasks = [(i, sampler, seeds, trials, width, error) for sampler in which for i in indices]
    with ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(_searches, *zip(*tasks, strict=True)))
    regrets = {
        sampler: np.stack([r for task, r in zip(tasks, results, strict=True) if task[1] == sampler])
        for sampler in which
    }  # [problems, seeds, (best seen, posterior, pruned)]
    columns = ("regret, best seen", f"less {which[0]} (95 %)", "regret, posterior mean", "pruned")
    print("| sampler | " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|")
    for sampler, regret in regrets.items():
        difference = (regret - regrets[which[0]])[..., 0].mean(1)
        margin = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
        print(
            f"| {sampler} | {regret[..., 0].mean():.3f} | {difference.mean():+.3f} ± {margin:.3f} "
            f"| {regret[..., 1].mean():.3f} | {regret[..., 2].mean():.0%} |"
        )
    print("\n| problem | " + " | ".join(which) + " |\n|" + "---|" * (len(which) + 1))
    for i, problem in enumerate(problems()):
        row = " | ".join(f"{regrets[sampler][i, :, 0].mean():.3f}" for sampler in which)
        print(f"| {problem.name} | {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    replays = commands.add_parser("pruners")
    replays.add_argument("--orders", type=int, default=200)
    replays.add_argument("--sets", nargs="+", default=[*SETTLED_ON, *HELD_OUT])
    replays.add_argument("--width", type=int, default=1)
    replays.add_argument("--baselines", action="store_true", help="first, and never pruned")
    replays.add_argument("--pruners", nargs="+", default=list(PRUNERS))
    replays.add_argument("--jobs", type=int, default=1)
    searches = commands.add_parser("samplers")
    searches.add_argument("--seeds", type=int, default=20)
    searches.add_argument("--trials", type=int, default=48)
    searches.add_argument("--width", type=int, default=8)
    searches.add_argument("--error", type=float, help="of predictions; no pruning without")
    searches.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    searches.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if given.command == "pruners":
        manner = Manner(given.width, given.baselines)
        pruners(given.sets, given.pruners, given.orders, manner, given.jobs)
    else:
        how = given.trials, given.width, given.error
        samplers(given.samplers, given.seeds, *how, given.jobs)


if __name__ == "__main__":
    main()
