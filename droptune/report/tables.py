"""Tables of a report: the same cells for HTML, Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

from droptune.program.declared import is_number
from droptune.progress import front
from droptune.training import Record
from droptune.verdict.comparison import Comparison
from droptune.verdict.evidence import Evidence, assigned
from droptune.verdict.findings import values_at_objective
from droptune.verdict.verdict import Verdict
from droptune.verdict.wording import (
    UNITS,
    amount,
    interval,
    learning_rate,
    level,
    metric_name,
    rate,
)

REDUNDANT = ("error", "precision", "recall")  # what accuracy and F1 say, not in the table
STOPPED = {
    "decided": "decided",
    "hopeless": "given up: not decidable",
    "seeds": "all seeds spent",
    "budget": "share of budget spent",
    "open": "not finished",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; `notes` stand below."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """As a GitHub table."""
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in escaped]
        lines.insert(1, "|" + "---|" * len(self.head))
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def text(self) -> str:
        """In columns, for a terminal."""
        cells = (self.head, *self.rows)
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, *self.notes])


def rates(evidence: Evidence, verdict: Verdict) -> Table | None:
    """What to use: a row for each site, then the learning rate and other searched values."""
    recommended = verdict.recommended
    if recommended is None or verdict.winner is None:
        return None
    other = recommended.assignment != verdict.winner.assignment
    use = "rate to use" if verdict.confirmed else "best so far"
    found = (evidence.name("winner"), "as good as that") if other else ("as good",)
    head = ("site", use, *found, "author's")
    rows = [
        (
            site.path,
            rate(site.rate),
            *((rate(site.winner),) if other else ()),
            "–" if site.near is None else _range(site.near),
            rate(site.author),
        )
        for site in verdict.sites
    ]
    author_lr = "–" if evidence.author_lr is None else learning_rate(evidence.author_lr)
    found_lr = (learning_rate(verdict.winner.assignment.lr),) if other else ()
    rows.append(
        ("learning rate", learning_rate(recommended.assignment.lr), *found_lr, "", author_lr)
    )
    for name, value in recommended.assignment.values.items():
        theirs = verdict.winner.assignment.values.get(name, "")
        rows.append((name, _value(value), *((_value(theirs),) if other else ()), "", ""))
    return Table(head, tuple(rows))


def _range(near: tuple[float, float]) -> str:
    return rate(near[0]) if rate(near[0]) == rate(near[1]) else f"{rate(near[0])}–{rate(near[1])}"


def _value(value: float | str) -> str:
    return f"{value:.3g}" if is_number(value) else str(value)


def comparisons(evidence: Evidence, found: Sequence[Comparison]) -> Table:
    """The winner against each other: means, change of the metric, seeds, and how it stopped."""
    metric = evidence.objective.metric
    unit = UNITS.get(metric, "").strip()
    head = (
        f"{evidence.name('winner')} against",
        metric_name(metric),
        "theirs",
        f"changes by{f' ({unit})' if unit else ''}",
        "interval",
        "seeds",
        "p",
        "detectable",
        "stopped",
    )
    return Table(head, tuple(_comparison(evidence, one) for one in found))


def _comparison(evidence: Evidence, one: Comparison) -> tuple[str, ...]:
    metric, found = evidence.objective.metric, one.difference
    low, high = sorted((evidence.sign * found.low, evidence.sign * found.high))
    return (
        evidence.name(one.against),
        level(metric, one.ours),
        level(metric, one.theirs),
        amount(metric, evidence.sign * found.mean, (high - low) / 2, sign=True),
        interval(metric, low, high, sign=True),
        str(found.seeds),
        "< 0.001" if one.adjusted_p < 0.001 else f"{one.adjusted_p:.3f}",
        amount(metric, found.detectable, found.detectable),
        STOPPED.get(one.stopped, one.stopped),
    )


def pareto(evidence: Evidence) -> Table | None:
    """The Pareto front of several objectives; None with one."""
    objectives = evidence.spec.objectives
    if len(objectives) < 2:
        return None
    head = ("trial", "lr", "mean rate", *(metric_name(each.metric) for each in objectives))
    rows = [
        (
            record.training.name,
            learning_rate(assigned(record).lr),
            rate(assigned(record).mean_rate),
            *(level(o.metric, v) for o, v in zip(objectives, record.values or (), strict=True)),
        )
        for record in front(evidence.records, objectives)
    ]
    return Table(head, tuple(rows)) if rows else None


def calibration(evidence: Evidence, verdict: Verdict) -> Table | None:
    """ECE and NLL before and after temperature scaling."""
    if not verdict.calibration:
        return None
    scaled = any(one.ece_after is not None for one in verdict.calibration)
    head = ("", "ECE", "NLL", *(("temperature", "ECE scaled", "NLL scaled") if scaled else ()))
    rows = [
        (
            evidence.name(one.label),
            f"{one.ece:.3f}",
            _number(one.nll),
            *(
                (_number(one.temperature), _number(one.ece_after), _number(one.nll_after))
                if scaled
                else ()
            ),
        )
        for one in verdict.calibration
    ]
    return Table(head, tuple(rows))


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def metrics(evidence: Evidence, trained: Mapping[str, Sequence[Record]]) -> Table | None:
    """The metrics of the compared members: mean and standard deviation over seeds.

    On the test set where all were scored there, else on validation data.
    """
    everyone = [record for records in trained.values() for record in records]
    tested = all(record.training.id in evidence.tested for record in everyone)
    split = "test" if tested else "validation"
    found = {
        label: [_measured(evidence, record, tested=tested) for record in records]
        for label, records in trained.items()
    }
    names = {name for each in found.values() for one in each for name in one}
    objective = evidence.objective.metric
    shown = sorted(names - {*REDUNDANT, objective})
    if not names or len(trained) < 2:
        return None
    order = ([objective] if objective in names else []) + shown
    rows = [
        (evidence.name(label), *(_spread(n, [m[n] for m in each if n in m]) for n in order))
        for label, each in found.items()
    ]
    return Table((split, *(metric_name(name) for name in order)), tuple(rows))


def _measured(evidence: Evidence, record: Record, *, tested: bool) -> Mapping[str, float]:
    if tested:
        return evidence.tested[record.training.id]
    names = [key.removeprefix("val/") for key in record.curves if key.startswith("val/")]
    found = {name: values_at_objective([record], f"val/{name}") for name in names if name != "gap"}
    return {name: values[0] for name, values in found.items() if values}


def _spread(metric: str, values: Sequence[float]) -> str:
    """`0.481 ± 0.004`, in the metric's own form."""
    if not values or not all(math.isfinite(value) for value in values):
        return "–"
    mean = sum(values) / len(values)
    if len(values) < 2:
        return level(metric, mean)
    return f"{level(metric, mean)} ± {amount(metric, stdev(values), stdev(values))}"


def importance(evidence: Evidence, verdict: Verdict) -> Table | None:
    """What it costs to set one input at random, the most important first."""
    if not verdict.importance:
        return None
    ranked = sorted(verdict.importance.items(), key=lambda item: -item[1])
    unit = metric_name(evidence.objective.metric)
    largest = ranked[0][1]
    metric = evidence.objective.metric
    rows = tuple((name, amount(metric, value, largest / 5)) for name, value in ranked)
    return Table(("input", f"mean loss of {unit} when set at random"), rows)
