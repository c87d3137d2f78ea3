"""What a pruner says of a group of trainings, and when a training has failed by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from droptune.training import Record, State


@dataclass(frozen=True)
class Decision:
    """What is expected of a running training, and whether it ends here.

    predicted, sd: its objectives' values at the end; best: those of the completed training that
    it is compared with. `audited`: it would be pruned, and is finished to check the prediction.
    """

    prune: bool
    interval: int
    predicted: tuple[float, ...]
    sd: tuple[float, ...]
    best: tuple[float, ...]
    audited: bool = False

    @property
    def reason(self) -> str:
        """What is stored with the training; `droptune.audit` reads it back."""
        verb = "audited: would be pruned" if self.audited else "pruned"
        pairs = zip(self.predicted, self.sd, strict=True)
        expected = ", ".join(f"{value:.6g} ± {sd:.2g}" for value, sd in pairs)
        best = ", ".join(f"{value:.6g}" for value in self.best)
        return f"{verb} at interval {self.interval}: predicted {expected}, best {best}"


@dataclass(frozen=True)
class Judgement:
    """What a pruner says of a group after one interval, by training id."""

    pruned: frozenset[int] = frozenset()
    failed: Mapping[int, str] = field(default_factory=dict)
    decisions: Mapping[int, Decision] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[int, str]:
        """What to store with trainings that were pruned, audited or failed, where known."""
        told = {key: d.reason for key, d in self.decisions.items() if d.prune or d.audited}
        return {**told, **self.failed}


class Pruner(Protocol):
    """Decides for a whole group at once."""

    @property
    def note(self) -> str:
        """One line for the user when a study is created, or empty."""
        ...

    def judge(self, records: Sequence[Record], ids: set[int]) -> Judgement:
        """`records` are all of the study's, `ids` the trainings that just ended an interval."""
        ...


@dataclass(frozen=True)
class NoPruning:
    """Prunes nothing; what diverges still fails. `keys` are the objectives'; see `divergence`."""

    keys: tuple[str, ...]
    chance: float | None = None
    note: str = ""

    def judge(self, records: Sequence[Record], ids: set[int]) -> Judgement:
        return Judgement(failed=failures(records, ids, self.keys, self.chance))


def completed_trials(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.state is State.COMPLETE and r.training.kind.is_trial]


def failures(
    records: Sequence[Record], ids: set[int], keys: Sequence[str], chance: float | None = None
) -> dict[int, str]:
    """Which of the trainings have failed by what they measured, and why (see `divergence`)."""
    judged = (record for record in records if record.training.id in ids)
    return {r.training.id: why for r in judged if (why := divergence(r, keys, chance)) is not None}


def divergence(record: Record, keys: Sequence[str], chance: float | None = None) -> str | None:
    """Why this training has failed, or None.

    It has where an objective (`keys`) or the training loss is not finite, or that loss is ten
    times as high as `chance`, an untrained model's (where unknown: as after its first interval).
    A high validation loss is no failure: that of an overfitting model may rise far above chance.
    Nor is another metric that is not finite: it may be undefined early.
    """
    for key in ("train/loss", *keys):
        curve = record.curves.get(key, ())
        if curve and not math.isfinite(curve[-1]):
            return f"{key} is {curve[-1]} at interval {len(curve)}"
    losses = record.curves.get("train/loss", ())
    level = chance if chance is not None else (losses[0] if losses else 0.0)
    if losses and level > 0 and losses[-1] > 10 * level:
        least = "untrained" if chance is not None else "at first"
        return (
            f"diverged: train/loss {losses[-1]:.4g} at interval {len(losses)}, {level:.4g} {least}"
        )
    return None
