"""Saved views: how the study looks when its experiment is opened in MLflow's UI.

A saved view is an experiment tag `mlflow.sharedViewState.<id>`. Its format belongs to MLflow's
UI and is not documented; it was read back in a browser for the versions in TESTED. With other
versions links fall back to a sorted list of runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import Any
from urllib.parse import quote

from droptune.mirror import runs
from droptune.mirror.study import MirroredStudy
from droptune.spec.objective import Objective
from droptune.storage import Storage
from droptune.training import Record, State

TESTED = ("3.15", "3.16", "3.17")
LEADERBOARD = "leaderboard"
CHARTS = "charts"
_HEADLINE = 150  # characters, one line above the charts
_LONGEST_TAG = 20_000  # characters, MLflow's limit for experiment tags
_SHOWN_SITES = 5
_SHOWN_RUNS = 100  # in a chart of curves
_TRAINING = "workflowType=machine_learning"  # MLflow opens on its pages for GenAI without it


def view_id(study: MirroredStudy, view: str) -> str:
    """The id of one of the study's views, the same for ever."""
    return hashlib.sha256(f"{study.uuid}/{view}".encode()).hexdigest()[:32]


def experiment_tags(
    study: MirroredStudy, records: Sequence[Record], headline: str
) -> dict[str, str]:
    """The tags that make the study's saved views; `headline` stands above the charts."""
    sites = important_rates(records, study.objectives[0])[:_SHOWN_SITES]
    states = {
        LEADERBOARD: _leaderboard(study, sites),
        CHARTS: _charts(study, sites, records[:_SHOWN_RUNS], headline),
    }
    tags = {}
    for view, state in states.items():
        name = f"{study.name} {view}"
        value = json.dumps({"name": name, "createdAt": 0, "state": json.dumps(state)})
        if len(value) <= _LONGEST_TAG:
            tags[f"mlflow.sharedViewState.{view_id(study, view)}"] = value
    return tags


def link(study: MirroredStudy, view: str, *, base: str, experiment_id: str, version: str) -> str:
    """The address that opens the study on its runs, not on MLflow's GenAI page."""
    page = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{_TRAINING}"
    mode = "&compareRunsMode=CHART" if view == CHARTS else ""
    if version.startswith(tuple(f"{tested}." for tested in TESTED)):
        return f"{page}{mode}&viewStateShareKey={view_id(study, view)}"
    ascending = str(_ascending(study)).lower()
    key = quote("metrics.`objective`")
    return f"{page}{mode}&orderByKey={key}&orderByAsc={ascending}"


def links(storage: Storage, name: str, base: str) -> dict[str, str]:
    """The addresses of a study in the MLflow at `base`; {} before it is mirrored."""
    row = storage.study(name)
    state = storage.mirror_state(row.id)
    if "run_id" not in state:
        return {}
    study, experiment_id = MirroredStudy.of(row), state["experiment_id"]
    version = str(state.get("mlflow", ""))
    return {
        **{
            view: link(study, view, base=base, experiment_id=experiment_id, version=version)
            for view in (LEADERBOARD, CHARTS)
        },
        "answer": run_link(base=base, experiment_id=experiment_id, run_id=state["run_id"]),
        "models": f"{base.rstrip('/')}/#/models/{quote(study.model_name)}?{_TRAINING}",
    }


def run_link(*, base: str, experiment_id: str, run_id: str) -> str:
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{_TRAINING}"


def important_rates(records: Iterable[Record], objective: Objective) -> list[str]:
    """The rates' params, those that explain most of the objective first.

    A rate's weight is R² of a parabola through (rate, objective) over the complete trials: the
    best rate is usually inside its range, where a straight line would see nothing.
    """
    complete = [
        r for r in records if r.training.kind.is_trial and r.state is State.COMPLETE and r.values
    ]
    some = next((r.training.assignment for r in complete if r.training.assignment), None)
    if some is None:
        return []
    paths = list(some.rates)
    names = dict(zip(paths, runs.clean_keys(f"dropout/{path}" for path in paths), strict=True))
    weights = {path: _explained(path, complete) for path in paths}
    return [names[path] for path in sorted(paths, key=lambda path: -weights[path])]


def _explained(path: str, complete: Sequence[Record]) -> float:
    import numpy as np

    assignments = [record.training.assignment for record in complete]
    rates = np.array([a.rates.get(path, 0.0) if a else 0.0 for a in assignments])
    values = np.array([record.value for record in complete], dtype=float)
    kept = np.isfinite(values)
    rates, values = rates[kept], values[kept]
    if len(np.unique(rates)) < 4 or np.ptp(values) == 0:
        return 0.0
    ranks = np.argsort(np.argsort(values)).astype(float)  # one diverged trial must not rule
    fitted = np.polyval(np.polyfit(rates, ranks, 2), rates)
    return float(1 - np.var(ranks - fitted) / np.var(ranks))


def _ascending(study: MirroredStudy) -> bool:
    return study.objectives[0].direction == "minimize"


def _search(study: MirroredStudy) -> dict[str, Any]:
    return {
        "searchFilter": (
            f"tags.`droptune.role` = 'trial' and tags.`droptune.study_uuid` = '{study.uuid}'"
        ),
        "orderByKey": "metrics.`objective`",
        "orderByAsc": _ascending(study),
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
    }


def _leaderboard(study: MirroredStudy, sites: Sequence[str]) -> dict[str, Any]:
    """Few columns, each as wide as its title, so that all are seen and read at once."""
    columns = ["metrics.`objective`", "metrics.`gain`"]
    columns += [f"params.`{key}`" for key in ("lr", "dropout_mean", *sites[:3])]
    columns += ["tags.`droptune.state`"]
    return {
        **_search(study),
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {column: _width(column) for column in columns},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": False,
        "viewMaximized": False,
        "groupBy": None,
    }


def _width(column: str) -> int:
    """Pixels for a column's title, in bold, with room for the arrow of a sorted one."""
    title = column.partition("`")[2].rstrip("`")
    return min(260, max(90, 7 * len(title) + 40))


def _charts(
    study: MirroredStudy, sites: Sequence[str], records: Sequence[Record], headline: str
) -> dict[str, Any]:
    section = view_id(study, "section")
    curves = sorted({key for record in records for key in record.curves})
    shown = _shown_curves(study, curves)
    first, *others = [_lines(key, _scale(key, records)) for key in shown]
    cards = [
        _parallel(sites),
        _scatter("dropout_mean"),
        first,
        _scatter("lr"),
        *(_scatter(site) for site in sites[:2]),
        *others,
    ]
    hidden = [_hidden(key) for key in curves if key not in shown]
    summary = ("objective", "gain", "pruned_at", "best/interval", *_best_keys(curves))
    hidden += [_hidden(key) for key in summary]
    for number, card in enumerate(cards + hidden):
        card |= {
            "uuid": view_id(study, f"card {number}"),
            "metricSectionId": section,
            "isGenerated": False,
        }
    return {
        **_leaderboard(study, sites),
        "compareRunCharts": cards + hidden,
        "compareRunSections": [_section(section, headline)],
        "isAccordionReordered": True,  # keeps our section first
        "hideEmptyCharts": True,
        "autoRefreshEnabled": True,
    }


def _section(uuid: str, headline: str) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "name": shorten(headline, _HEADLINE, placeholder=" …"),
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }


def _shown_curves(study: MirroredStudy, curves: Sequence[str]) -> list[str]:
    objectives = [objective.key for objective in study.objectives]
    others = [key for key in ("val/accuracy", "train/loss") if key in curves]
    return list(dict.fromkeys([*objectives, *others]))


def _scale(key: str, records: Sequence[Record]) -> str:
    """The axis of a curve: logarithmic where a linear one would press most of it to the floor."""
    values = [v for record in records for v in record.curves.get(key, ()) if math.isfinite(v)]
    wide = bool(values) and min(values) > 0 and max(values) > 10 * min(values)
    return "log" if wide else "linear"


def _best_keys(curves: Sequence[str]) -> list[str]:
    return [runs.clean_key(f"best/{key[4:]}") for key in curves if key.startswith("val/")]


def _parallel(sites: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "PARALLEL",
        "displayName": "Learning rate, rates and objective",
        "selectedParams": ["lr", *sites[:3]],
        "selectedMetrics": ["objective"],
        "showAllRuns": True,
        "runsCountToCompare": 500,
        "deleted": False,
    }


def _scatter(param: str) -> dict[str, Any]:
    return {
        "type": "SCATTER",
        "displayName": f"{param} × objective",
        "xaxis": {"key": param, "type": "PARAM"},
        "yaxis": {"key": "objective", "type": "METRIC"},
        "runsCountToCompare": 500,
        "deleted": False,
    }


def _lines(key: str, scale: str) -> dict[str, Any]:
    metric = runs.clean_key(key)
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "xAxisScaleType": "linear",
        "scaleType": scale,
        "lineSmoothness": 0,
        "displayPoints": False,
        "yAxisKey": "metric",
        "ignoreOutliers": True,  # one diverged trial must not flatten all others
        "runsCountToCompare": _SHOWN_RUNS,
        "deleted": False,
    }


def _hidden(key: str) -> dict[str, Any]:
    """A chart that MLflow would add by itself: known and deleted, so it does not."""
    return {"type": "BAR", "metricKey": runs.clean_key(key), "deleted": True}
