"""What a study has found, as its mirror says it: not confirmed until the verdict is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droptune import progress
from droptune.mirror import runs
from droptune.spec.objective import Objective
from droptune.training import Assignment, Record, TrainingKind

NOT_CONFIRMED = "NOT CONFIRMED"


@dataclass(frozen=True)
class Answer:
    """The verdict in SQL: confirmed, or from the search alone once it is done; else empty."""

    confirmed: bool = False
    sentence: str = ""
    details: tuple[str, ...] = ()
    recommended: Assignment | None = None
    reason: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, verdict: Mapping[str, Any] | None, *, done: bool) -> Answer:
        if not verdict or not (verdict["confirmed"] or done):
            return cls()
        chosen = verdict.get("recommended") or {}
        return cls(
            confirmed=bool(verdict["confirmed"]),
            sentence=str(verdict["sentence"]),
            details=tuple(verdict.get("details", ())),
            recommended=Assignment.from_json(chosen["assignment"]) if chosen else None,
            reason=str(chosen.get("reason", "")),
            warnings=(*verdict.get("warnings", ()), *verdict.get("hints", ())),
        )

    def line(self, name: str, records: Sequence[Record], objective: Objective) -> str:
        """The answer in one line; the best values so far where there is none yet."""
        if self.sentence:
            return f"{name}: {self.sentence}"
        best = runs.best_of(trials(records), objective)
        if best is None:
            return f"{name}: {NOT_CONFIRMED}, no completed trial yet"
        found = baselines(records, objective).items()
        against = ", ".join(f"{label} {record.value:.4g}" for label, record in found)
        return (
            f"{name}: {NOT_CONFIRMED} · best {objective.key} {best.value:.4g} "
            f"({best.training.name})" + (f" against {against}" if against else "")
        )

    def champion(self, records: Sequence[Record], objective: Objective) -> Record | None:
        """The confirmation of what is recommended that did best on validation."""
        if self.recommended is None or not self.confirmed:
            return None
        from droptune.verdict.evidence import key

        wanted = key(self.recommended)
        confirmations = [
            record
            for record in records
            if record.training.kind is TrainingKind.CONFIRMATION
            and record.training.assignment is not None
            and key(record.training.assignment) == wanted
        ]
        return runs.best_of(confirmations, objective)


def trials(records: Sequence[Record]) -> list[Record]:
    """The trainings that belong to the search, baselines among them."""
    return [record for record in records if record.training.kind.is_trial]


def baselines(records: Sequence[Record], objective: Objective) -> dict[str, Record]:
    """Each baseline's best complete trial, by label; one without is left out."""
    found = progress.baselines(records, str(objective.direction))
    return {label: record for label, record in found.items() if record is not None}
