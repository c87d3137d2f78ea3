"""What the mirror shows of a study besides its trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from droptune.spec.objective import Objective
from droptune.spec.spec import StudySpec
from droptune.storage import StudyRow


@dataclass(frozen=True)
class MirroredStudy:
    """A study as its mirror sees it.

    `experiment` and `registered_model` are the names in MLflow; studies of one model may share
    them. `meta` is what was recorded at its creation (versions, commit, samples, …).
    """

    id: int
    name: str
    uuid: str
    objectives: tuple[Objective, ...]
    spec: Mapping[str, Any] = field(default_factory=dict)
    sites: Sequence[Mapping[str, Any]] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    phase: str = "searching"
    status: str = "active"
    experiment_name: str = ""
    model_name: str = ""

    def __post_init__(self) -> None:
        if not self.experiment_name:
            object.__setattr__(self, "experiment_name", f"droptune/{self.name}")
        if not self.model_name:
            object.__setattr__(self, "model_name", f"droptune-{self.name}")

    @classmethod
    def of(cls, row: StudyRow) -> MirroredStudy:
        """What is to be shown of a study in SQL."""
        spec = StudySpec.from_json(row.spec)
        return cls(
            id=row.id,
            name=row.name,
            uuid=row.uuid,
            objectives=spec.objectives,
            spec=row.spec,
            sites=row.sites,
            meta={k: value for k, value in row.meta.items() if k != "root"},  # of one machine
            phase=row.phase,
            status=row.status,
            experiment_name=spec.experiment,
            model_name=spec.registered_model,
        )

    @property
    def over(self) -> bool:
        """Whether nothing more is going to be trained."""
        return self.phase == "done" or self.status == "stopped"
