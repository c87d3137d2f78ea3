"""A page to explore a study with the pointer: one HTML file, with nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from droptune.mirror import runs
from droptune.mirror.answer import Answer, trials
from droptune.mirror.study import MirroredStudy
from droptune.training import Record, State


def page(study: MirroredStudy, records: Sequence[Record], answer: Answer) -> str:
    """Every trial as a point (a rate or the learning rate × a metric) and as a curve."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    objective = study.objectives[0]
    environment = Environment(
        loader=PackageLoader("droptune"), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {}  # in the order given, not sorted
    return environment.get_template("explorer.html.j2").render(
        title=answer.line(study.name, records, objective),
        objective=objective.key,
        trials=[_shown(record, objective.key) for record in trials(records) if _trained(record)],
    )


def _trained(record: Record) -> bool:
    return record.training.assignment is not None and record.intervals_done > 0


def _shown(record: Record, objective: str) -> Mapping[str, Any]:
    assignment = record.training.assignment
    assert assignment is not None
    last = {key: curve[-1] for key, curve in record.curves.items() if curve}
    if record.state is State.COMPLETE and record.value is not None:
        last = {"objective": record.value, **last}
    numbers = {key: value for key, value in assignment.values.items() if not isinstance(value, str)}
    return {
        "name": record.training.name,
        "state": record.state.value,
        "colour": runs.colour(record.training.kind, record.state),
        "x": {
            "lr": assignment.lr,
            "mean rate": assignment.mean_rate,
            **assignment.rates,
            **{key: float(value) for key, value in numbers.items()},
        },
        "y": {key: _rounded(value) for key, value in last.items()},
        "curve": [_rounded(value) for value in record.curves.get(objective, ())],
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
