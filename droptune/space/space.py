"""The search space of a study: made from its sites, its spec and its program's learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from droptune.errors import SiteError, SpecError, nearest
from droptune.space.grouping import suggest_groups
from droptune.space.parameters import RateParameter, Value, ValueParameter
from droptune.space.tying import Tying, matching
from droptune.spec.ranges import ValueRange
from droptune.training import Assignment, NewTraining, TrainingKind

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from droptune.sites.site import Site
    from droptune.spec.sections import Baselines, SpaceSpec
    from droptune.spec.spec import StudySpec

__all__ = ["Parameter", "Space", "suggest_groups"]

HALF = 0.5
HALVED = ("element", "channel")  # the kinds that the baseline `half` sets; others: the author's
LR_SPREAD = 10.0  # the learning rate is searched from a tenth of the program's to ten times it
CUTOFF = ValueParameter("cutoff", 0.1, 0.9)  # where early ends and late begins, in progress
NEEDS_CUTOFF = ("early", "late")
Parameter = RateParameter | ValueParameter


class Tuned(Protocol):
    """What a space reads of a program."""

    @property
    def lr(self) -> float: ...
    @property
    def searched(self) -> Mapping[str, Any]: ...
    @property
    def loss_values(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Space:
    """What is searched, and how parameters become an assignment and back.

    Parameters are named `dropout/<site or group>`, `lr`, and as the other values. `fixed` holds
    the rates of sites that are not searched (never of all), in baselines too. `halved` are the
    sites that the baseline `half` sets to 0.5.
    """

    rates: tuple[RateParameter, ...]
    lr: ValueParameter
    values: tuple[ValueParameter, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    author: Mapping[str, float] = field(default_factory=dict)
    halved: frozenset[str] = frozenset()
    author_lr: float = 1e-3

    @classmethod
    def of(cls, sites: Sequence[Site], spec: StudySpec, program: Tuned) -> Space:
        """The space of a study. Raises SpecError or SiteError in one line.

        Ranges that the user did not write are widened until every baseline is inside.
        """
        _check_sites(sites)
        fixed = _fixed(sites, spec.space.fixed)
        free = [site for site in sites if site.path not in fixed]
        if not free:
            raise SpecError(
                f"space.fixed: {' and '.join(map(repr, spec.space.fixed))}: no site is left whose "
                f"rate is searched; leave out at least one of {len(sites)}"
            )
        halved = frozenset(site.path for site in free if site.kind in HALVED)
        author = {site.path: site.rate for site in sites}
        bare = cls((), _lr(spec.space, program.lr), (), fixed, author, halved, program.lr)
        baselines = bare._baseline_rates(spec.baselines)
        tying = Tying(free, spec.space, baselines)
        return cls(
            rates=tuple(tying.parameters()),
            lr=bare.lr,
            values=tuple(_values(spec.space, program)),
            fixed=fixed,
            author=author,
            halved=halved,
            author_lr=program.lr,
        )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*self.rates, self.lr, *self.values)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """The sites that share each searched rate, by the parameter's name without `dropout/`."""
        return {p.name.removeprefix("dropout/"): p.sites for p in self.rates}

    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of the search: of `lr`, and of each searched site's rate by its path."""
        of_sites = {
            site: (p.low * weight, p.high * weight)
            for p in self.rates
            for site, weight in zip(p.sites, p.weights, strict=True)
        }
        return {"lr": (self.lr.low, self.lr.high), **of_sites}

    # -- stored: rates as they are ------------------------------------------------------------

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each stored parameter, by name."""
        return {p.name: p.distribution() for p in self.parameters}

    def assignment(self, params: Mapping[str, Any]) -> Assignment:
        """The assignment of stored parameters; a rate is max(0, raw)."""
        rates = {p.name: p.clamped(params[p.name]) for p in self.rates}
        return self._assignment(rates, params)

    def params(self, assignment: Assignment) -> dict[str, Value]:
        """What is stored for an assignment: rates as they are, 0.0 for the dead zone.

        Where tied sites have different rates (an author's), the closest single rate.
        """
        given: dict[str, Value] = {**assignment.values, "lr": assignment.lr}
        given.setdefault(CUTOFF.name, 0.5)  # of schedules that have none
        return {
            **{p.name: p.value_of(assignment.rates) for p in self.rates},
            **{p.name: p.clamped(given[p.name]) for p in (self.lr, *self.values)},
        }

    def stored(self, assignment: Assignment) -> dict[str, tuple[float, str]]:
        """(internal value, distribution as JSON) of each parameter, as in Optuna's tables."""
        from optuna.distributions import distribution_to_json

        kinds = self.distributions()
        return {
            name: (kinds[name].to_internal_repr(value), distribution_to_json(kinds[name]))
            for name, value in self.params(assignment).items()
        }

    # -- as samplers see it: rates on their scale ---------------------------------------------

    def sampler_distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions on the scales of the rates; what to ask a sampler for."""
        scaled = {p.name: p.sampler_distribution() for p in self.rates}
        return {**self.distributions(), **scaled}

    def sampled(self, raw: Mapping[str, Any]) -> Assignment:
        """The assignment of what a sampler drew from `sampler_distributions`."""
        return self._assignment({p.name: p.from_sampler(raw[p.name]) for p in self.rates}, raw)

    def sampler_params(self, assignment: Assignment) -> dict[str, Value]:
        """A finished trial's parameters, for a sampler to learn from."""
        params = self.params(assignment)
        scaled = {p.name: p.to_sampler(float(params[p.name])) for p in self.rates}
        return {**params, **scaled}

    def _assignment(self, rates: Mapping[str, float], params: Mapping[str, Any]) -> Assignment:
        by_site = dict(self.fixed)
        for parameter in self.rates:
            by_site.update(parameter.rates(rates[parameter.name]))
        values = {p.name: p.clamped(params[p.name]) for p in self.values}
        if CUTOFF.name in values and values["schedule"] not in NEEDS_CUTOFF:
            del values[CUTOFF.name]
        ordered = {path: by_site[path] for path in self.author}
        return Assignment(ordered, float(self.lr.clamped(params["lr"])), values)

    # -- baselines ----------------------------------------------------------------------------

    def _wanted_rates(self, wanted: Baselines) -> dict[str, dict[str, float]]:
        """The rates of each wanted baseline; sites that are fixed stay so."""
        half = {p: HALF if p in self.halved else rate for p, rate in self.author.items()}
        rates = {"none": dict.fromkeys(self.author, 0.0), "author": dict(self.author), "half": half}
        return {n: {**of, **self.fixed} for n, of in rates.items() if getattr(wanted, n)}

    def merged(self, wanted: Baselines) -> dict[str, str]:
        """Baselines that are equal to an earlier one of none, author, half: under which name
        they are trained."""
        rates = self._wanted_rates(wanted)
        first = {n: next(k for k, other in rates.items() if other == of) for n, of in rates.items()}
        return {name: other for name, other in first.items() if other != name}

    def _baseline_rates(self, wanted: Baselines) -> dict[str, dict[str, float]]:
        merged = self.merged(wanted)
        return {n: of for n, of in self._wanted_rates(wanted).items() if n not in merged}

    def baselines(self, wanted: Baselines, most: int | None = None) -> list[NewTraining]:
        """The first `most` trainings of the baselines, each with `wanted.trials` learning rates.

        The rates lie evenly on the log scale over the searched range, the nearest of them
        replaced by the author's, which comes first (the middle one where the author's lies
        outside): every baseline has its first before any has a second. Other values start in the
        middle of their ranges and then fill them evenly (Halton). The schedule is constant.
        """
        lrs = self._lr_grid(wanted.trials)
        return [
            NewTraining(
                TrainingKind.BASELINE, Assignment(dict(rates), lr, self._others(index)), label=name
            )
            for index, lr in enumerate(lrs)
            for name, rates in self._baseline_rates(wanted).items()
        ][:most]

    def _lr_grid(self, count: int) -> list[float]:
        inside = self.lr.low <= self.author_lr <= self.lr.high
        steps = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
        grid = [float(self.lr.clamped(self.lr.at(step))) for step in steps]
        first = grid[count // 2]
        if inside:
            first = min(grid, key=lambda lr: max(lr / self.author_lr, self.author_lr / lr))
        return [self.author_lr if inside else first, *(lr for lr in grid if lr != first)]

    def _others(self, index: int) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for parameter, base in zip(self.values, _primes(), strict=False):
            if parameter.name == "schedule":
                values["schedule"] = "constant"
            elif parameter.name != CUTOFF.name:
                values[parameter.name] = parameter.at(_radical_inverse(index + 1, base))
        return values

    # -- writing ------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything, so that workers rebuild it without the program."""
        return {
            "rates": [p.to_json() for p in self.rates],
            "lr": self.lr.to_json(),
            "values": [p.to_json() for p in self.values],
            "fixed": dict(self.fixed),
            "author": dict(self.author),
            "halved": sorted(self.halved),
            "author_lr": self.author_lr,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Space:
        return cls(
            rates=tuple(RateParameter.from_json(p) for p in data["rates"]),
            lr=ValueParameter.from_json(data["lr"]),
            values=tuple(ValueParameter.from_json(p) for p in data["values"]),
            fixed=data["fixed"],
            author=data["author"],
            halved=frozenset(data["halved"]),
            author_lr=data["author_lr"],
        )

    def describe(self) -> tuple[str, ...]:
        """A line for each parameter, then the fixed sites."""
        fixed = (f"{path}: fixed at {rate:g}" for path, rate in self.fixed.items())
        return (*(p.describe() for p in self.parameters), *fixed)


# --- from the spec ------------------------------------------------------------------------


def _check_sites(sites: Sequence[Site]) -> None:
    if not sites:
        raise SiteError(
            "the model has no dropout site: add some with `insert:` in the study file, or put "
            "nn.Dropout(0.0) into the model"
        )
    for site in sites:
        if not 0 <= site.rate < 1:
            raise SiteError(f"site {site.path} has the rate {site.rate:g}: rates are in [0, 1)")


def _fixed(sites: Sequence[Site], given: Mapping[str, float]) -> dict[str, float]:
    return {
        site.path: rate
        for pattern, rate in given.items()
        for site in matching(pattern, sites, "space.fixed")
    }


def _lr(spec: SpaceSpec, author: float) -> ValueParameter:
    if spec.lr is not None:
        return ValueParameter("lr", spec.lr.low, spec.lr.high, log=True)
    return ValueParameter("lr", author / LR_SPREAD, author * LR_SPREAD, log=True)


def _values(spec: SpaceSpec, program: Tuned) -> Iterator[ValueParameter]:
    declared = program.searched
    if spec.label_smoothing and "label_smoothing" not in (*program.loss_values, *declared):
        raise SpecError(
            "space.label_smoothing: the program's loss knows none; declare it with searched={…} "
            "and use it in loss(model, batch, values)"
        )
    for name in spec.values:
        if name not in declared:
            raise SpecError(
                f"space.values: the program declares no {name!r}{nearest(name, declared)}; "
                "searched values are declared with searched={…}"
            )
    written = {n: v if isinstance(v, ValueRange) else list(v) for n, v in spec.values.items()}
    given: dict[str, Any] = {**declared, **written}
    for name in ("weight_decay", "l1", "label_smoothing"):
        chosen = getattr(spec, name)
        if chosen is not None:
            given[name] = ValueRange(chosen.low, chosen.high, log=name != "label_smoothing")
    for name, values in given.items():
        yield _value(name, values)
    if len(spec.schedule) > 1:
        yield ValueParameter("schedule", choices=spec.schedule)
        if set(spec.schedule) & set(NEEDS_CUTOFF):
            yield CUTOFF


def _value(name: str, values: Any) -> ValueParameter:
    if isinstance(values, ValueRange):
        return ValueParameter(name, values.low, values.high, values.log)
    if isinstance(values, Mapping):
        return ValueParameter(name, values["low"], values["high"], values.get("log", False))
    if isinstance(values, tuple):
        return ValueParameter(name, *values)
    return ValueParameter(name, choices=tuple(values))


def _primes() -> Iterator[int]:
    found: list[int] = []
    candidate = 2
    while True:
        if all(candidate % prime for prime in found):
            found.append(candidate)
            yield candidate
        candidate += 1


def _radical_inverse(index: int, base: int) -> float:
    """The index's digits mirrored at the point: 1/2, 1/4, 3/4, 1/8, … for base 2."""
    value, scale = 0.0, 1 / base
    while index:
        index, digit = divmod(index, base)
        value += digit * scale
        scale /= base
    return value
