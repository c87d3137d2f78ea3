from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from droptune.export import write
from droptune.progress import best, front, measure
from droptune.spec.objective import Objective
from droptune.training import Assignment, Record, Seeds, State, Training, TrainingKind

NOW = datetime(2026, 1, 1, tzinfo=UTC)


RATES = {"none": 0.0, "half": 0.5}


def record(
    number, state, value=None, *, kind=TrainingKind.SEARCH, label="", rate=0.3, minutes_ago=1.0
):
    training = Training(
        id=number, study_id=1, kind=kind, number=number, label=label,
        assignment=Assignment({"a": RATES.get(label, rate)}, 0.1), seeds=Seeds(1, 2, 3),
        seed_index=None,
        intervals=4, attempt=1, lease_epoch=1,
    )  # fmt: skip
    ended = NOW - timedelta(minutes=minutes_ago) if state.finished else None
    return Record(
        training, state, curves={"val/nll": (1.0,) * 4, "time/seconds": (0.5,) * 4},
        values=None if value is None else (value,), ended=ended,
        started=NOW - timedelta(minutes=10),
    )  # fmt: skip


def test_counts_standings_and_time_left():
    records = [
        record(0, State.COMPLETE, 0.9, kind=TrainingKind.BASELINE, label="none"),
        record(1, State.COMPLETE, 0.8, kind=TrainingKind.BASELINE, label="none"),
        record(2, State.PRUNED, kind=TrainingKind.BASELINE, label="half"),
        record(3, State.COMPLETE, 0.5),
        record(4, State.RUNNING),
    ]
    progress = measure(records, "minimize", 10, NOW)
    assert progress.finished == 4
    assert progress.counts[State.RUNNING] == 1
    assert progress.best is records[3]
    assert progress.baselines == {"none": records[1], "half": None}
    assert progress.per_minute == 4 / 5
    assert progress.seconds_left == 60 * 6 / (4 / 5)
    assert (progress.intervals, progress.device_seconds) == (20, 10.0)


def test_a_search_trial_with_a_baselines_rates_counts_for_it():
    records = [
        record(0, State.COMPLETE, 0.9, kind=TrainingKind.BASELINE, label="none"),
        record(1, State.COMPLETE, 0.7, rate=0.0),
        record(2, State.COMPLETE, 0.5),
    ]
    assert measure(records, "minimize", 10, NOW).baselines == {"none": records[1]}


def test_best_follows_the_direction_and_the_earlier_wins_a_tie():
    records = [record(0, State.COMPLETE, 0.5), record(1, State.COMPLETE, 0.5)]
    assert best(records, "minimize") is records[0]
    assert best([*records, record(2, State.COMPLETE, 0.7)], "maximize").value == 0.7
    assert best([record(3, State.FAIL)], "minimize") is None


def test_an_empty_study_has_no_rate_and_no_time_left():
    progress = measure([], "minimize", 10, NOW)
    assert (progress.per_minute, progress.seconds_left, progress.best) == (0.0, None, None)


def test_an_export_is_json_where_values_are_not_finite(tmp_path):
    curves = {"val/nll": (1.0, float("nan")), "train/loss": (float("inf"), 2.0)}
    write([replace(record(0, State.FAIL), curves=curves)], tmp_path / "rows.json")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    rows = json.loads((tmp_path / "rows.json").read_text(), parse_constant=refuse)
    assert [row["val/nll"] for row in rows] == [1.0, None]
    assert [row["train/loss"] for row in rows] == [None, 2.0]


def test_the_front_holds_what_no_other_trial_betters():
    objectives = (Objective("nll"), Objective("accuracy"))
    ends = [(0.5, 0.8), (0.4, 0.7), (0.6, 0.9), (0.5, 0.75), (0.4, 0.7), (0.9, float("nan"))]
    records = [
        replace(record(i, State.COMPLETE, 1.0), values=values) for i, values in enumerate(ends)
    ]
    other = replace(records[0].training, kind=TrainingKind.CONFIRMATION)
    records += [
        record(6, State.PRUNED),
        replace(record(7, State.COMPLETE, 1.0), training=other, values=(0.1, 0.99)),
    ]
    assert front(records, objectives) == [records[1], records[0], records[2]]
