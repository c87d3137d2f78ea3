"""Figures of a study as matplotlib figures, SVG or PNG; the same in the report and in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from droptune.figures.canvas import inline, png, svg
from droptune.figures.confirmed import differences, learning_curves, reliability
from droptune.figures.course import pruning, timeline
from droptune.figures.searched import (
    gap,
    history,
    importance,
    interaction,
    lengths,
    parallel,
    pareto,
    slices,
)
from droptune.verdict.evidence import Evidence
from droptune.verdict.surface import Surface
from droptune.verdict.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "inline", "png", "svg"]


def draw(evidence: Evidence, verdict: Verdict) -> dict[str, Figure]:
    """Every figure that the evidence allows, by name; slices are `slice/INPUT`."""
    if not evidence.trials:
        return {}
    drawn: dict[str, Figure | None] = {
        "learning_curves": learning_curves(evidence, verdict),
        "differences": differences(evidence, verdict) if verdict.comparisons else None,
        "gap": gap(evidence),
        "history": history(evidence),
        "lengths": lengths(evidence),
        "pareto": pareto(evidence),
        "pruning": pruning(evidence),
        "reliability": reliability(evidence, verdict),
        "timeline": timeline(evidence),
    }
    surface = Surface.of(evidence)
    if surface is not None:
        drawn["parallel"] = parallel(evidence, surface)
        drawn["interaction"] = interaction(evidence, verdict, surface)
        drawn["importance"] = importance(evidence, verdict) if verdict.importance else None
        found = slices(evidence, verdict, surface)
        drawn |= {f"slice/{name}": figure for name, figure in found.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
