"""What is left of a study's budget, told from its row (of `studies.counters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from droptune.storage import schema


def tickets_left(study: sa.Row[Any], enough: int | None) -> Any:
    """How many new trials the budget still allows (`enough` where there is no limit)."""
    limits = []
    if study.budget_trials is not None:
        limits.append(study.budget_trials - study.next_number)
    if study.budget_intervals is not None:
        limits.append((study.budget_intervals - study.intervals_taken) // study.intervals)
    return max(min(limits), 0) if limits else enough


def limit_reached(connection: sa.Connection, study: sa.Row[Any]) -> str | None:
    """Which limit of time is reached (at the row's `at`), after which nothing starts."""
    return first_reached(time_used(connection, study))


def first_reached(used: Mapping[str, float]) -> str | None:
    return next((limit for limit, share in used.items() if share >= 1), None)


def time_used(connection: sa.Connection, study: sa.Row[Any]) -> dict[str, float]:
    """The share of each limit of time that is used (at the row's `at`)."""
    used = {}
    if study.budget_deadline is not None:
        whole = study.budget_deadline - study.created_at
        passed = max(study.at - study.created_at, 0.0)
        used["deadline"] = passed / whole if whole > 0 else 1.0
    if study.budget_device_seconds is not None:
        u = schema.usage.c
        query = sa.select(sa.func.sum(u.device_seconds)).where(u.study_id == study.id)
        spent = float(connection.execute(query).scalar() or 0.0)
        used["device hours"] = spent / max(study.budget_device_seconds, 1e-6)
    return used
