"""How often pruning was right, from trials that were finished to find out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from droptune.search.judgement import completed_trials
from droptune.training import Record, State

if TYPE_CHECKING:
    from droptune.spec.objective import Objective


@dataclass(frozen=True)
class Audit:
    """How often pruning was right: trials that would have been pruned and were finished.

    right: of the `finished` ones, how many were no better than what they were compared with
    covered: how many ended within two standard deviations of the prediction
    """

    pruned: int
    finished: int
    right: int
    covered: int

    @classmethod
    def of(cls, records: Sequence[Record], objective: Objective) -> Audit:
        """Read the reasons that were stored with pruned and audited trials."""
        sign = 1.0 if objective.direction == "minimize" else -1.0
        told = [(r, found) for r in records if (found := _AUDITED.match(r.reason or ""))]
        ends = [
            (r.value, *(float(found[name]) for name in ("mean", "sd", "best")))
            for r, found in told
            if r.state is State.COMPLETE and r.value is not None
        ]
        return cls(
            pruned=sum(r.state is State.PRUNED for r in records),
            finished=len(ends),
            right=sum(sign * (value - best) >= 0 for value, _, _, best in ends),
            covered=sum(abs(value - mean) <= 2 * sd for value, mean, sd, _ in ends),
        )

    @property
    def sentence(self) -> str:
        if not self.finished:
            return f"{self.pruned} trials pruned, none of them audited"
        return (
            f"{self.pruned} trials pruned; {self.finished} more would have been and were finished: "
            f"pruning would have been right for {self.right}"
        )


_NUMBER = r"-?[\d.]+(?:e[+-]?\d+)?"
_AUDITED = re.compile(
    rf"audited: would be pruned at interval \d+: predicted (?P<mean>{_NUMBER}) ± (?P<sd>{_NUMBER})"
    rf".*, best (?P<best>{_NUMBER})"
)


def rank_correlation(
    records: Sequence[Record], objective: Objective, interval: int
) -> float | None:
    """Spearman's correlation of completed trials' values at an interval with their final ones.

    Below about 0.5, who prunes by rank at that interval prunes at random or worse. None with
    fewer than five trials.
    """
    pairs = [
        (curve[interval - 1], record.value)
        for record in completed_trials(records)
        if len(curve := record.curves.get(objective.key, ())) >= interval
        and record.value is not None
    ]
    if len(pairs) < 5:
        return None
    return float(spearmanr(np.array(pairs)).statistic)
