"""How often pruning was right, from trials that were finished to find out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from droptune.search.prediction import Array, direction_signs
from droptune.training import Record, State

if TYPE_CHECKING:
    from droptune.spec.objective import Objective


@dataclass(frozen=True)
class Audit:
    """How often pruning was right: trials that would have been pruned and were finished.

    right: of the `finished` ones, how many were in no objective better than the trial that they
    were compared with
    covered: how many ended within two standard deviations of the prediction, in all objectives
    """

    pruned: int
    finished: int
    right: int
    covered: int

    @classmethod
    def of(cls, records: Sequence[Record], objectives: Sequence[Objective]) -> Audit:
        """Read the reasons that were stored with pruned and audited trials."""
        signs = direction_signs(objectives)
        ends = [
            (np.array(record.values), *_expected(told))
            for record in records
            if record.state is State.COMPLETE and (told := _AUDITED.match(record.reason or ""))
        ]
        return cls(
            pruned=sum(r.state is State.PRUNED for r in records),
            finished=len(ends),
            right=sum(bool((signs * (values - best) >= 0).all()) for values, _, _, best in ends),
            covered=sum(
                bool((np.abs(values - mean) <= 2 * sd).all()) for values, mean, sd, _ in ends
            ),
        )

    @property
    def sentence(self) -> str:
        if not self.finished:
            return f"{self.pruned} trials pruned, none of them audited"
        return (
            f"{self.pruned} trials pruned; {self.finished} more would have been and were finished: "
            f"pruning would have been right for {self.right}"
        )


_AUDITED = re.compile(
    r"audited: would be pruned at interval \d+: predicted (?P<predicted>.+), best (?P<best>.+)"
)


def _expected(told: re.Match[str]) -> tuple[Array, Array, Array]:
    """What was predicted, its sd, and what it was compared with: one value per objective."""
    mean, sd = zip(*(pair.split(" ± ") for pair in told["predicted"].split(", ")), strict=True)
    return np.array(mean, float), np.array(sd, float), np.array(told["best"].split(", "), float)
