"""Whose turn it is when a worker serves several studies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from droptune.storage import StudySummary, WorkerRow

TURN_SECONDS = 30.0


class Turns:
    """Orders studies: by priority, then those with fewer other workers, then the longest unserved.

    A worker that trains fused cannot serve two at once. So it stays with a study for a turn, then
    claims no more of it where another one is next; what it holds it trains to the end.
    """

    def __init__(
        self, seconds: float = TURN_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._served: dict[int, float] = {}
        self._began = 0.0

    def order(
        self, studies: Sequence[StudySummary], others: Iterable[WorkerRow]
    ) -> list[StudySummary]:
        """The studies, the next one first; `others` are the other workers."""
        crews = _crews(others)
        return sorted(studies, key=lambda s: (*_rank(s, crews), self._served.get(s.id, 0.0)))

    def begin(self) -> None:
        self._began = self._clock()

    def end(self, study_id: int) -> None:
        self._served[study_id] = self._clock()

    def rivals(
        self, study_id: int, studies: Sequence[StudySummary], others: Iterable[WorkerRow]
    ) -> list[StudySummary]:
        """Studies that should be served before more of this one is begun."""
        crews = _crews(others)
        mine = next((s for s in studies if s.id == study_id), None)
        if mine is None:
            return []
        over = self._clock() - self._began >= self._seconds
        return [
            s
            for s in studies
            if s.id != study_id
            and (s.priority > mine.priority or (over and _rank(s, crews) <= _rank(mine, crews)))
        ]


def _crews(workers: Iterable[WorkerRow]) -> Counter[str]:
    """How many workers train something of each study."""
    return Counter(name for w in workers for name in {holding.study for holding in w.holds})


def _rank(study: StudySummary, crews: Counter[str]) -> tuple[int, int]:
    return (-study.priority, crews[study.name])
