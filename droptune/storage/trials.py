"""Optuna's tables, written in droptune's own transactions.

Optuna makes the schema (see `creation`); here are the columns that droptune writes. States and
types are Optuna's enum names, which PostgreSQL holds as native enums under several names: they
are bound without a type, so that each database reads them as what the column is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from droptune.training import State

REVISION = "v3.2.0.a"  # of Optuna's own migrations: its schema since 3.2, 5.0 included

metadata = sa.MetaData()
_Enum = sa.types.NullType

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True),
    sa.Column("study_name", sa.String(512)),
)
study_directions = sa.Table(
    "study_directions",
    metadata,
    sa.Column("study_direction_id", sa.Integer, primary_key=True),
    sa.Column("direction", _Enum),
    sa.Column("study_id", sa.Integer),
    sa.Column("objective", sa.Integer),
)
trials = sa.Table(
    "trials",
    metadata,
    sa.Column("trial_id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer),
    sa.Column("study_id", sa.Integer),
    sa.Column("state", _Enum),
    sa.Column("datetime_start", sa.DateTime),
    sa.Column("datetime_complete", sa.DateTime),
)
trial_params = sa.Table(
    "trial_params",
    metadata,
    sa.Column("param_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer),
    sa.Column("param_name", sa.String(512)),
    sa.Column("param_value", sa.Double),
    sa.Column("distribution_json", sa.Text),
)
trial_values = sa.Table(
    "trial_values",
    metadata,
    sa.Column("trial_value_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer),
    sa.Column("objective", sa.Integer),
    sa.Column("value", sa.Double),
    sa.Column("value_type", _Enum),
)
intermediate_values = sa.Table(
    "trial_intermediate_values",
    metadata,
    sa.Column("trial_intermediate_value_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer),
    sa.Column("step", sa.Integer),
    sa.Column("intermediate_value", sa.Double),
    sa.Column("intermediate_value_type", _Enum),
)


def _attributes(name: str, owner: str) -> sa.Table:
    return sa.Table(
        name,
        metadata,
        sa.Column(name.removesuffix("s") + "_id", sa.Integer, primary_key=True),
        sa.Column(owner, sa.Integer),
        sa.Column("key", sa.String(512), quote=True),
        sa.Column("value_json", sa.Text),
    )


study_user_attributes = _attributes("study_user_attributes", "study_id")
study_system_attributes = _attributes("study_system_attributes", "study_id")
trial_user_attributes = _attributes("trial_user_attributes", "trial_id")
trial_system_attributes = _attributes("trial_system_attributes", "trial_id")
trial_heartbeats = sa.Table("trial_heartbeats", metadata, sa.Column("trial_id", sa.Integer))

OF_TRIALS = (
    trial_params, trial_values, intermediate_values,
    trial_user_attributes, trial_system_attributes, trial_heartbeats,
)  # fmt: skip
OF_STUDIES = (study_directions, study_user_attributes, study_system_attributes)
STATES = {state: "WAITING" if state is State.QUEUED else state.value for state in State}


def optuna_time(seconds: float) -> datetime:
    """The database's seconds as Optuna stores times: naive UTC."""
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


def add_study(connection: sa.Connection, name: str, directions: Sequence[str]) -> int:
    """Insert a study; returns its Optuna id."""
    added = connection.execute(studies.insert(), {"study_name": name})
    key = added.inserted_primary_key
    assert key is not None
    study_id = int(key[0])
    rows = [
        {"study_id": study_id, "objective": i, "direction": direction.upper()}
        for i, direction in enumerate(directions)
    ]
    connection.execute(study_directions.insert(), rows)
    return study_id


def set_study_attributes(
    connection: sa.Connection, study_id: int, attributes: Mapping[str, Any]
) -> None:
    """Add user attributes (small: Optuna reads them all, often) to a new study."""
    rows = [
        {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attributes.items()
    ]
    connection.execute(study_user_attributes.insert(), rows)


def add_trials(
    connection: sa.Connection, study_id: int, numbers: Sequence[int], state: State, at: float
) -> list[int]:
    """Insert trials with these numbers (ascending); returns their Optuna ids."""
    if not numbers:
        return []
    start = optuna_time(at) if state is State.RUNNING else None
    rows = [
        {"study_id": study_id, "number": n, "state": STATES[state], "datetime_start": start}
        for n in numbers
    ]
    if len(rows) == 1:
        key = connection.execute(trials.insert(), rows[0]).inserted_primary_key
        return [] if key is None else [int(key[0])]
    connection.execute(trials.insert(), rows)
    # The newest of the study: no index is on the number, and the study's row is locked.
    query = (
        sa.select(trials.c.number, trials.c.trial_id)
        .where(trials.c.study_id == study_id)
        .order_by(trials.c.trial_id.desc())
        .limit(len(numbers))
    )
    ids = {row.number: row.trial_id for row in connection.execute(query)}
    assert set(ids) == set(numbers), "another program adds trials to this study"
    return [ids[number] for number in numbers]


def label_trials(connection: sa.Connection, labels: Mapping[int, Mapping[str, Any]]) -> None:
    """Add a small user attribute `droptune` to trials (by their Optuna id)."""
    rows = [
        {"trial_id": trial_id, "key": "droptune", "value_json": json.dumps(label)}
        for trial_id, label in labels.items()
    ]
    if rows:
        connection.execute(trial_user_attributes.insert(), rows)


def start_trials(connection: sa.Connection, trial_ids: Sequence[int], at: float) -> None:
    _set_state(connection, trial_ids, State.RUNNING, datetime_start=optuna_time(at))


def queue_trials(connection: sa.Connection, trial_ids: Sequence[int]) -> None:
    _set_state(connection, trial_ids, State.QUEUED, datetime_start=None)


def _set_state(
    connection: sa.Connection, trial_ids: Sequence[int], state: State, **values: Any
) -> None:
    if trial_ids:
        chosen = trials.c.trial_id.in_(trial_ids)
        connection.execute(trials.update().where(chosen).values(state=STATES[state], **values))


def set_params(
    connection: sa.Connection, params: Mapping[int, Mapping[str, tuple[float, str]]]
) -> None:
    """Replace the params of trials: `{trial id: {name: (internal value, distribution JSON)}}`."""
    if not params:
        return
    connection.execute(trial_params.delete().where(trial_params.c.trial_id.in_(list(params))))
    rows = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": float(value),
            "distribution_json": distribution,
        }
        for trial_id, named in params.items()
        for name, (value, distribution) in named.items()
    ]
    if rows:
        connection.execute(trial_params.insert(), rows)


def intermediate_row(trial_id: int, step: int, value: float) -> dict[str, Any]:
    stored, kind = _stored(value)
    return {
        "trial_id": trial_id,
        "step": step,
        "intermediate_value": stored,
        "intermediate_value_type": kind,
    }


def end_trials(
    connection: sa.Connection, ends: Mapping[int, tuple[State, Sequence[float]]], at: float
) -> None:
    """Write the final states of trials (by Optuna id) and their values, one per objective."""
    if not ends:
        return
    ending = trials.update().where(trials.c.trial_id == sa.bindparam("of"))
    when = optuna_time(at)
    states = [
        {"of": trial_id, "state": STATES[state], "datetime_complete": when}
        for trial_id, (state, _) in ends.items()
    ]
    connection.execute(ending, states)
    rows = []
    for trial_id, (_, values) in ends.items():
        for i, value in enumerate(values):
            stored, kind = _stored(value)
            row = {"trial_id": trial_id, "objective": i, "value": stored, "value_type": kind}
            rows.append(row)
    if rows:
        connection.execute(trial_values.insert(), rows)


def last_intermediates(connection: sa.Connection, trial_ids: Sequence[int]) -> dict[int, float]:
    """The newest intermediate values, where they are finite: Optuna's values of pruned trials."""
    if not trial_ids:
        return {}
    i = intermediate_values.c
    query = sa.select(i.trial_id, i.intermediate_value).where(i.trial_id.in_(list(trial_ids)))
    last = {
        row.trial_id: row.intermediate_value for row in connection.execute(query.order_by(i.step))
    }
    return {trial_id: float(value) for trial_id, value in last.items() if value is not None}


def forget_intermediates(connection: sa.Connection, trial_id: int) -> None:
    chosen = intermediate_values.c.trial_id == trial_id
    connection.execute(intermediate_values.delete().where(chosen))


def delete_trials(connection: sa.Connection, trial_ids: Sequence[int]) -> None:
    """Remove trials (by their Optuna id) and all that Optuna has of them."""
    for table in (*OF_TRIALS, trials):
        connection.execute(table.delete().where(table.c.trial_id.in_(trial_ids)))


def delete_study(connection: sa.Connection, study_id: int) -> None:
    """Remove a study and all that Optuna has of it."""
    of_study = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id)
    for table in OF_TRIALS:
        connection.execute(table.delete().where(table.c.trial_id.in_(of_study)))
    for table in (trials, *OF_STUDIES, studies):
        connection.execute(table.delete().where(table.c.study_id == study_id))


def _stored(value: float) -> tuple[float | None, str]:
    """Optuna's pair for a float: no database holds NaN and infinity in the same way."""
    if math.isnan(value):
        return None, "NAN"
    if math.isinf(value):
        return None, "INF_POS" if value > 0 else "INF_NEG"
    return float(value), "FINITE"
