"""What to try next: samplers by name, which learn in memory from what SQL knows.

No sampler touches the database. The first wave after the baselines is a scrambled Sobol sequence
indexed by the trial's number, so several workers never propose the same; after it the named
sampler is seeded by (study's seed, number), so that one worker proposes the same in every run
and two never do. Which sampler is the default was measured: `docs/pruning.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from cmaes import CMA
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from droptune.errors import SpecError
from droptune.search.prediction import (
    UNCERTAINTY,
    Array,
    Expected,
    direction_signs,
    expected_values,
)
from droptune.space.space import Space
from droptune.spec.objective import Objective
from droptune.spec.spec import StudySpec
from droptune.training import Assignment, Record, State, derive_seed

SEEN = 1000  # finished trials that a sampler learns from, about
SEEN_BY_GP = 200  # its cost is cubic in them
PER_PARAMETER = 2  # trials of the first wave for each parameter
FIRST_WAVE = (6, 16)  # at least and at most so many
GP_ASKED = 8  # `auto` is gp up to so many new trials, and SEEN_BY_GP finished ones, then tpe


def _gp(**options: Any) -> optuna.samplers.BaseSampler:
    """Optuna's, told the noise of predicted values where its private parts are known."""
    if not optuna.__version__.startswith("5.0."):
        return optuna.samplers.GPSampler(**options)
    from droptune.search.noisy_gp import NoisyGPSampler  # it needs torch

    return NoisyGPSampler(**options)


OPTUNA: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": _gp,
    "random": optuna.samplers.RandomSampler,
}
PRESETS: dict[str, dict[str, Any]] = {"tpe": {"multivariate": True}}
CMAES_OPTIONS = ("sigma0", "popsize")

Kinds = Mapping[str, BaseDistribution]


class Proposer:
    """Proposes assignments for new trials of one study; it may be asked by one thread."""

    def __init__(self, spec: StudySpec, space: Space) -> None:
        self._spec = spec
        self._space = space
        self._kinds = space.sampler_distributions()
        self._name = spec.sampler.name
        self._designed = range(0 if self._name == "random" else self._first_wave())
        self._options = dict(spec.sampler.options)
        self._memories: dict[str, _Memory] = {}

    @classmethod
    def of(cls, spec: StudySpec, space: Space) -> Proposer:
        """The proposer that a study file names; SpecError for options it does not know."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        proposer = cls(spec, space)
        proposer._check()
        return proposer

    def propose(self, records: Sequence[Record], numbers: Sequence[int]) -> list[Assignment]:
        """One assignment for each new trial number, in order.

        `records` may be all of the study's; only trials with an assignment count.
        """
        asked = [n for n in numbers if n not in self._designed and self._name != "qmc"]
        learned = self._learned(records, asked) if asked else {}
        drawn = (learned[n] if n in learned else self._sobol(n) for n in numbers)
        return [self._space.sampled(params) for params in drawn]

    def _first_wave(self) -> int:
        """How many numbers come before the sampler: baselines, then the Sobol sequence."""
        low, high = FIRST_WAVE
        designed = min(max(low, PER_PARAMETER * len(self._kinds)), high)
        return len(self._space.baselines(self._spec.baselines)) + designed

    def _check(self) -> None:
        if self._name in OPTUNA:
            self._try()
        known = CMAES_OPTIONS if self._name == "cmaes" else ()
        unknown = sorted(set(self._options) - set(known)) if self._name not in OPTUNA else []
        if unknown:
            possible = f"possible: {', '.join(known)}" if known else "it has none"
            raise SpecError(f"sampler {self._name} has no option {unknown[0]!r} ({possible})")
        if self._name != "cmaes":
            return
        if len(self._spec.objectives) > 1:
            raise SpecError("sampler cmaes knows one objective only; use tpe, gp, random or qmc")
        try:
            self._strategy([])
        except (AssertionError, TypeError, ValueError) as error:
            raise self._refused(error) from error

    def _try(self) -> None:
        """Ask it once with one trial to learn from: some look at their options only then."""
        memory = _Memory(self._spec.objectives)
        middle = from_unit(self._kinds, np.full(len(self._kinds), 0.5))
        values, kinds = [0.0] * len(self._spec.objectives), dict(self._kinds)
        memory.learn(
            {0: optuna.trial.create_trial(params=middle, distributions=kinds, values=values)}
        )
        with memory.running([]) as study:
            study.sampler = self._sampler(self._name, 0)
            try:
                study.ask(kinds)
            except (TypeError, ValueError) as error:
                raise self._refused(error) from error

    def _refused(self, error: Exception) -> SpecError:
        given = "".join(f", {key} {value!r}" for key, value in self._options.items())
        return SpecError(f"sampler {self._name}{given}: {error}")

    def _seed(self, *parts: str | int) -> int:
        return derive_seed(self._spec.seed, *parts) % 2**32

    def _sobol(self, number: int) -> dict[str, Any]:
        """The point of that index in the study's scrambled Sobol sequence."""
        sequence = qmc.Sobol(len(self._kinds), scramble=True, rng=self._seed("design"))
        if number:
            sequence.fast_forward(number)
        return from_unit(self._kinds, sequence.random(1)[0])

    def _learned(self, records: Sequence[Record], numbers: Sequence[int]) -> dict[int, Any]:
        trials = [
            r
            for r in records
            if r.training.kind.is_trial
            and r.training.assignment is not None
            and r.training.number not in numbers
        ]
        finished = [r for r in trials if r.state in (State.COMPLETE, State.PRUNED)]
        if self._name == "cmaes":
            return self._evolved(self._chosen(finished, SEEN), numbers)
        running = [r for r in trials if r.state is State.RUNNING]
        return self._asked(finished, running, numbers)

    def _chosen(self, finished: Sequence[Record], most: int) -> list[Record]:
        """At most so many, by number: half of them the latest, the others the best before those."""
        ordered = sorted(finished, key=lambda r: r.training.number or 0)
        before, latest = ordered[: -most // 2], ordered[-most // 2 :]
        if len(ordered) > most:
            sign = float(direction_signs(self._spec.objectives)[0])
            before.sort(key=lambda r: np.inf if r.value is None else sign * r.value)
            before = before[: most - len(latest)]
        return sorted([*before, *latest], key=lambda r: r.training.number or 0)

    # -- Optuna's samplers --------------------------------------------------------------------

    def _asked(
        self, finished: Sequence[Record], running: Sequence[Record], numbers: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        name = self._learner(len(finished), len(numbers))
        memory = self._taught(finished) if name == "gp" else self._remembered(name, finished)
        with memory.running([self._frozen(r, {}) for r in running]) as study:
            proposed = {}
            for number in numbers:
                study.sampler = self._sampler(name, self._seed("sampler", number))
                proposed[number] = study.ask(dict(self._kinds)).params
            return proposed

    def _taught(self, finished: Sequence[Record]) -> _Memory:
        """All anew for the GP: what is predicted of pruned trials changes with each that ends."""
        memory, finished = _Memory(self._spec.objectives), self._chosen(finished, SEEN_BY_GP)
        expected = self._expected(finished)
        memory.learn({r.training.id: self._frozen(r, expected) for r in finished})
        return memory

    def _remembered(self, name: str, finished: Sequence[Record]) -> _Memory:
        """What the sampler has been told before, and what is new; anew when that is too much."""
        memory = self._memories.get(name)
        if memory is None or memory.size > 2 * SEEN:
            memory = self._memories[name] = _Memory(self._spec.objectives)
        new = [r for r in self._chosen(finished, SEEN) if r.training.id not in memory.known]
        memory.learn({r.training.id: self._frozen(r, {}) for r in new})
        return memory

    def _learner(self, finished: int, asked: int) -> str:
        if self._name != "auto":
            return self._name
        return "gp" if finished <= SEEN_BY_GP and asked <= GP_ASKED else "tpe"

    def _sampler(self, name: str, seed: int) -> optuna.samplers.BaseSampler:
        options = {**PRESETS.get(name, {}), **self._options}
        try:
            return OPTUNA[name](seed=seed, **options)
        except (TypeError, ValueError) as error:
            raise self._refused(error) from error

    def _expected(self, finished: Sequence[Record]) -> dict[int, Expected]:
        longest = max((r.intervals_done for r in finished), default=0)
        return expected_values(finished, self._spec.objectives, longest)

    def _frozen(self, record: Record, expected: Mapping[int, Expected]) -> FrozenTrial:
        """A trial as the sampler sees it; a pruned one may stand with its expected values."""
        assert record.training.assignment is not None
        predicted = expected.get(record.training.id)
        values = predicted.values if predicted else record.values
        complete = values is not None and record.state in (State.COMPLETE, State.PRUNED)
        pruned = TrialState.PRUNED if record.state is State.PRUNED else TrialState.RUNNING
        curve = record.curves.get(self._spec.objectives[0].key, ())
        reported = len(self._spec.objectives) == 1 and record.state is State.PRUNED
        return optuna.trial.create_trial(
            state=TrialState.COMPLETE if complete else pruned,
            params=self._space.sampler_params(record.training.assignment),
            distributions=dict(self._kinds),
            values=list(values) if complete and values is not None else None,
            intermediate_values={len(curve): curve[-1]} if curve and reported else {},
            user_attrs={UNCERTAINTY: list(predicted.sds)} if predicted else {},
        )

    # -- CMA-ES -------------------------------------------------------------------------------

    def _evolved(
        self, finished: Sequence[Record], numbers: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """CMA-ES (Hansen 2016) in the unit cube, told all finished trials by generations.

        The search distribution follows from the records alone, so workers share it.
        """
        sign = float(direction_signs(self._spec.objectives)[0])
        expected = {key: told.values for key, told in self._expected(finished).items()}
        told = [
            (self._unit(r), sign * values[0])
            for r in finished
            if (values := expected.get(r.training.id, r.values)) is not None
        ]
        strategy = self._strategy(told)
        for start in range(0, len(told) - strategy.population_size + 1, strategy.population_size):
            strategy.tell(told[start : start + strategy.population_size])
        proposed = {}
        for number in numbers:
            strategy.reseed_rng(self._seed("sampler", number))
            proposed[number] = from_unit(self._kinds, strategy.ask())
        return proposed

    def _strategy(self, told: Sequence[tuple[Array, float]]) -> CMA:
        dimensions = len(self._kinds)
        start = min(told, key=lambda pair: pair[1])[0] if told else np.full(dimensions, 0.5)
        return CMA(
            mean=start,
            sigma=float(self._options.get("sigma0", 0.25)),
            bounds=np.tile([0.0, 1.0], (dimensions, 1)),
            population_size=self._options.get("popsize"),
            seed=self._seed("cmaes"),
        )

    def _unit(self, record: Record) -> Array:
        assert record.training.assignment is not None
        return to_unit(self._kinds, self._space.sampler_params(record.training.assignment))


class _Memory:
    """An Optuna study in memory: finished trials enter once, running ones for one question."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        directions = [objective.direction or "minimize" for objective in objectives]
        self._study = optuna.create_study(directions=directions)
        self.known: set[int] = set()

    @property
    def size(self) -> int:
        return len(self._study.get_trials(deepcopy=False))

    def learn(self, trials: Mapping[int, FrozenTrial]) -> None:
        self._study.add_trials(trials.values())
        self.known |= trials.keys()

    def running(self, trials: Sequence[FrozenTrial]) -> _Running:
        return _Running(self._study, trials)


class _Running:
    """Shows running trials to the sampler, and takes them and what was asked away again."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._trials = study, trials

    def __enter__(self) -> optuna.Study:
        self._study.add_trials(self._trials)
        return self._study

    def __exit__(self, *_: object) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)


def from_unit(kinds: Kinds, point: Array) -> dict[str, Any]:
    """Parameters at a point of the unit cube [parameters]."""
    return {name: _at(kind, float(u)) for (name, kind), u in zip(kinds.items(), point, strict=True)}


def to_unit(kinds: Kinds, params: Mapping[str, Any]) -> Array:
    """The point of the unit cube where parameters lie; choices are intervals' centres."""
    return np.array([_share(kind, params[name]) for name, kind in kinds.items()])


def _at(kind: BaseDistribution, share: float) -> Any:
    if isinstance(kind, CategoricalDistribution):
        return kind.choices[min(int(share * len(kind.choices)), len(kind.choices) - 1)]
    assert isinstance(kind, FloatDistribution)
    if kind.log:
        return float(kind.low * (kind.high / kind.low) ** share)
    return kind.low + share * (kind.high - kind.low)


def _share(kind: BaseDistribution, value: Any) -> float:
    if isinstance(kind, CategoricalDistribution):
        return (kind.choices.index(value) + 0.5) / len(kind.choices)
    assert isinstance(kind, FloatDistribution)
    if kind.high == kind.low:
        return 0.5
    if kind.log:
        return float(np.log(value / kind.low) / np.log(kind.high / kind.low))
    return float((value - kind.low) / (kind.high - kind.low))
