"""A study in SQL: created once, opened by everybody, asked and told by workers.

Opening and reading need no torch; what a program is made of is prepared in `preparation`.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from droptune.errors import StorageError, StudyChangedError, UsageError
from droptune.progress import Progress, best, measure
from droptune.recorder import Decision, Items
from droptune.sites.site import Site
from droptune.space.space import Space
from droptune.spec.spec import Objective, StudySpec
from droptune.storage import Budget, Ending, Storage, StudyRow
from droptune.training import Record, Training, TrainingKind

if TYPE_CHECKING:
    from droptune.preparation import Prepared
    from droptune.search.pruning import Pruner
    from droptune.search.sampling import Proposer
    from droptune.trainers.slot import Scores
    from droptune.verdict.confirmation import Cost
    from droptune.verdict.evidence import Evidence
    from droptune.verdict.verdict import Verdict

log = logging.getLogger("droptune.study")


class Study:
    """One study: what it is, what is known of it, and what comes next."""

    def __init__(self, storage: Storage, row: StudyRow) -> None:
        self.storage = storage
        self.row = row
        self.spec = StudySpec.from_json(row.spec)
        self._finished: dict[int, Record] = {}
        self._cursor = 0
        self._reading = threading.Lock()  # a worker reads from its recorder's thread too

    # -- creating and opening -----------------------------------------------------------------

    @classmethod
    def create(cls, storage: Storage, prepared: Prepared) -> tuple[Study, StudySpec | None]:
        """Create the study in SQL, or continue the one of that name; also what that one was (None
        where it is new).

        Raises StudyChangedError where the stored study differs in more than its free keys.
        """
        spec, space = prepared.spec, prepared.space
        if any(summary.name == spec.name for summary in storage.studies()):
            before = cls.open(storage, spec.name)
            return before._continued(prepared), before.spec
        queue = prepared.baselines
        row = storage.create_study(
            spec.name,
            spec=spec.to_json(),
            sites=[site.to_json() for site in prepared.sites],
            directions=[str(objective.direction) for objective in spec.objectives],
            meta=prepared.meta,
            intervals=prepared.intervals,
            seed=spec.seed,
            queue=queue,
            params=[space.stored(new.assignment) for new in queue],
            budget=_budget(spec, prepared.intervals),
        )
        return cls(storage, row), None

    @classmethod
    def open(cls, storage: Storage, name: str) -> Study:
        """The study of that name; UnknownStudyError (with near names) where there is none."""
        return cls(storage, storage.study(name))

    def _continued(self, prepared: Prepared) -> Study:
        spec = prepared.spec
        changed = [key for key in self.spec.changes(spec) if not spec.is_free(key)]
        changed += [f"code of {file}" for file in self.drift(prepared.meta["fingerprint"])]
        if changed:
            raise StudyChangedError(
                f"study {spec.name!r} exists and differs in {', '.join(changed)}: restore that, "
                f"or make a new study with --name {spec.name}-2"
            )
        if spec != self.spec:
            self._queue_further(prepared)  # before workers draw on the new budget
            reopened = "searching" if spec.budget != self.spec.budget else None
            budget = _budget(spec, self.row.intervals)
            self.storage.update_study(
                self.row.id, spec=spec.to_json(), budget=budget, phase=reopened
            )
            if spec.confirm.enabled and not self.spec.confirm.enabled:
                self.storage.update_study(self.row.id, phase="confirming", if_phase="done")
        return Study.open(self.storage, spec.name)

    def _queue_further(self, prepared: Prepared) -> None:
        """Queue the baselines for which the budget had no trials when the study was created."""
        trials = [r for r in self.records() if r.training.kind.is_trial]
        if queue := prepared.baselines[len(trials) :]:
            params = [self.space.stored(new.assignment) for new in queue]
            self.storage.enqueue(self.row.id, queue, params=params)

    def drift(self, fingerprint: Mapping[str, str]) -> list[str]:
        """The files whose content is not what the study was created with."""
        known: Mapping[str, str] = self.row.meta["fingerprint"]
        return sorted(
            name for name in {*known, *fingerprint} if known.get(name) != fingerprint.get(name)
        )

    def reconfigure(self, **changes: Any) -> None:
        """Replace parts of the spec that may change on continuation, in SQL too."""
        self.spec = replace(self.spec, **changes)
        self.storage.update_study(self.row.id, spec=self.spec.to_json())

    # -- reading ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def file_name(self) -> str:
        """The study's name as a file name."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "study"

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.spec.objectives

    @property
    def intervals(self) -> int:
        """How many intervals a training of the search takes."""
        return self.row.intervals

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site.from_json(site) for site in self.row.sites)

    @cached_property
    def space(self) -> Space:
        """The search space, as it was when the study was created."""
        return Space.from_json(self.row.meta["space"])

    def records(self) -> tuple[Record, ...]:
        """Every training of the study as SQL knows it now; what has ended is read once."""
        with self._reading:
            changed, self._cursor = self.storage.changes(self.row.id, self._cursor)
            self._finished |= {r.training.id: r for r in changed if r.state.finished}
            open_ = {r.training.id: r for r in changed if not r.state.finished}
            both = self._finished | open_
        return tuple(both[id_] for id_ in sorted(both))

    def trial(self, number: int) -> Record:
        """The trial of that number, or a StorageError that says which numbers there are."""
        records = {r.training.number: r for r in self.records() if r.training.number is not None}
        if number not in records:
            last = max((n for n in records if n is not None), default=None)
            known = "it has no trials yet" if last is None else f"it has 0 to {last}"
            raise StorageError(f"study {self.name!r} has no trial {number}; {known}")
        return records[number]

    def phase(self) -> str:
        """`searching`, `confirming` or `done`, or `stopped` while it is; read from SQL."""
        self.refresh()
        return self.row.phase if self.row.status == "active" else "stopped"

    def refresh(self) -> None:
        """Read again what may change while a study runs: budget, confirmation, priority, phase."""
        self.row = self.storage.study(self.name)
        self.spec = StudySpec.from_json(self.row.spec)

    def progress(self) -> Progress:
        """How far the study is, and what is best so far."""
        direction = str(self.objectives[0].direction)
        total = self.spec.budget.trials
        return measure(self.records(), direction, total, datetime.now(UTC))

    # -- what a worker asks and tells ---------------------------------------------------------

    def claim(self, worker: int, limit: int) -> list[Training]:
        """Up to `limit` trainings for this worker, each with its assignment."""
        self._end_search_in_time()
        claimed = self.storage.claim(self.row.id, worker, limit)
        new = [training for training in claimed if training.assignment is None]
        if not new:
            return claimed
        numbers = [training.number for training in new if training.number is not None]
        assignments = self._proposer.propose(self.records(), numbers)
        stored = [self.space.stored(assignment) for assignment in assignments]
        assigned = {t.id: t for t in self.storage.assign(new, assignments, stored)}
        return [assigned.get(t.id, t) for t in claimed if t.assignment or t.id in assigned]

    def _end_search_in_time(self) -> None:
        """Begin no more trials where the rest of a limit of time is for confirming."""
        budget, confirm = self.row.budget, self.spec.confirm
        if (budget.device_seconds, budget.deadline) == (None, None) or not confirm.enabled:
            return
        reserved = confirm.share if confirm.share < 1 else 0.0
        if self.storage.progress(self.row.id).share >= 1 - reserved:
            self.storage.update_study(self.row.id, phase="confirming", if_phase="searching")

    @cached_property
    def _proposer(self) -> Proposer:
        from droptune.search.sampling import Proposer

        logging.getLogger("optuna").setLevel(logging.WARNING)  # it tells of studies in memory
        return Proposer.of(self.spec, self.space)

    @cached_property
    def pruner(self) -> Pruner:
        from droptune.search.pruning import make_pruner

        return make_pruner(self.spec, self.row.intervals, self.row.meta.get("chance"))

    def settle(self, items: Items) -> Decision:
        """Write the measurements of one boundary; decide once for the whole group."""
        lost = self.storage.record(items, [objective.key for objective in self.objectives])
        mine = {training.id for training, _ in items} - lost
        if not mine:
            return Decision(frozenset(lost))
        judged = self.pruner.judge(self.records(), mine)
        return Decision(frozenset(lost), judged.pruned, judged.failed, judged.reasons)

    def objective_values(
        self, curves: Mapping[str, Sequence[float]]
    ) -> tuple[tuple[float, ...], int]:
        """The values of all objectives, and the interval the first of them was taken at."""
        taken = [objective.value(curves[objective.key]) for objective in self.objectives]
        return tuple(value for value, _ in taken), taken[0][1]

    def is_best(self, value: float) -> bool:
        """Whether no completed trial is better in the first objective."""
        objective = self.objectives[0]
        trials = [r for r in self.records() if r.training.kind.is_trial]
        known = best(trials, str(objective.direction))
        if known is None or known.value is None:
            return True
        return value <= known.value if objective.direction == "minimize" else value >= known.value

    def put_scores(self, training: Training, scores: Scores) -> None:
        """Keep what a confirmation scored on the test set; what is there already stays."""
        from droptune.scores import put_scores

        put_scores(self.storage, training, scores)

    def describe(self, ending: Ending) -> str:
        """One line for the end of a training."""
        known = zip(self.objectives, ending.values or (), strict=False)
        value = "".join(f", {objective.key} {v:.5g}" for objective, v in known)
        reason = f" ({ending.reason})" if ending.reason else ""
        return f"{ending.training.name}: {ending.state.value.lower()}{reason}{value}"

    # -- phases -------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Move on where nothing is left to train: queue confirmations, or end with a verdict.

        Any worker may call it at any time; True when there is something new to train.
        """
        phase, left = self.phase(), self.storage.progress(self.row.id)
        if phase in ("done", "stopped") or not left.idle:
            return False
        if phase == "searching" and not self.storage.move_on(self.row.id, phase, to="confirming"):
            return False
        from droptune.verdict.confirmation import plan as make_plan
        from droptune.verdict.verdict import judge

        evidence = self.evidence()
        plan = make_plan(evidence)
        if not plan.decided and not left.spent:
            if self.storage.enqueue(self.row.id, plan.queue):
                return True
            if not self.storage.progress(self.row.id).idle:
                return False  # another worker was first: what it queued is there already
            if len(self.evidence().records) > len(evidence.records):
                return False  # and it is trained already
            log.warning("%s: no training is left for what is missing (%s)", self.name, plan.reason)
        self.storage.put_verdict(self.row.id, judge(evidence).to_json())
        self.storage.move_on(self.row.id, "confirming", to="done")
        return False

    def evidence(self) -> Evidence:
        """All that the verdict is made from."""
        from droptune.scores import read_metrics, read_scores
        from droptune.verdict.evidence import Evidence

        meta = self.row.meta
        return Evidence(
            spec=self.spec,
            sites=self.sites,
            records=self.records(),
            intervals=self.row.intervals,
            ranges=self.space.ranges(),
            groups=self.space.groups(),
            scores=read_scores(self.storage, self.row.id),
            tested=read_metrics(self.storage, self.row.id),
            sizes=meta["samples"],
            author_lr=meta["author_lr"],
            fused=meta["trainer"] == "fused",
        )

    def judge(self) -> Verdict:
        """The verdict on what SQL has now; provisional until everything is confirmed."""
        from droptune.verdict.verdict import judge

        return judge(self.evidence())

    def verdict(self) -> dict[str, Any] | None:
        """The stored verdict of a study that is done, as JSON; None before."""
        return self.storage.get_verdict(self.row.id)

    def confirm(self, *, top: int | None, max_seeds: int | None, ablate: bool) -> int | None:
        """Queue confirmations (more of them, or ablations); returns how many were queued.

        Ends a search that is still going on; while some of it is trained, workers queue when that
        has ended, and None is returned. StorageError where nothing may start any more,
        or where no group can be left out; UsageError for fewer seeds than the least.
        """
        from droptune.verdict.confirmation import ablated_members, plan

        left = self.storage.progress(self.row.id)
        if left.spent is not None:
            raise StorageError(
                f"study {self.name!r} has used up its {left.spent}: raise the budget in its file "
                "and run that again"
            )

        least = self.spec.confirm.min_seeds
        if max_seeds is not None and max_seeds < least:
            raise UsageError(
                f"{max_seeds} seeds at most are fewer than confirm.min_seeds of study "
                f"{self.name!r}: give {least} or more"
            )
        changes: dict[str, Any] = {"enabled": True}
        changes |= {} if top is None else {"top": top}
        changes |= {} if max_seeds is None else {"max_seeds": max_seeds}
        if top or max_seeds:
            changes["share"] = 1.0  # what is asked for counts before the budget's share
        changes |= {"ablate": True} if ablate else {}
        asked = replace(self.spec.confirm, **changes)
        if left.phase == "searching" and (left.running or left.queued):
            self.reconfigure(confirm=asked)
            self.storage.update_study(self.row.id, phase="confirming")
            return None
        evidence = replace(self.evidence(), spec=replace(self.spec, confirm=asked))
        planned = plan(evidence)
        if ablate and planned.winner and not ablated_members(evidence, planned.winner):
            raise StorageError(
                f"nothing to leave out: the winner of {self.name!r} has dropout in one group of "
                "sites; without it, it is no dropout at the winner's lr, which is compared anyway"
            )
        self.reconfigure(confirm=asked)
        queued = self.storage.enqueue(self.row.id, planned.queue)
        if not planned.decided:
            self.storage.update_study(self.row.id, phase="confirming")
        return len(queued)

    def cost(self) -> Cost:
        """What confirming will cost at least and at most, before the search has run."""
        from droptune.verdict.confirmation import predicted_cost

        trained = self.space.baselines(self.spec.baselines, self.spec.full_trials)
        baselines = len({new.label for new in trained})
        trials = self.spec.full_trials or 0
        return predicted_cost(
            self.spec.confirm, trials=trials, baselines=baselines, intervals=self.row.intervals
        )

    def project(self, here: Path) -> Path:
        """`here` where that has the study's program, else the folder that it was created from."""
        recorded = Path(self.row.meta.get("root", here))  # an earlier version kept none
        file = self.spec.program.partition(":")[0]
        return here if (here / file).exists() or not recorded.is_dir() else recorded

    def kept_weights(self) -> set[int]:
        """The trainings (ids) whose weights are still needed: the best trial's, confirmations'."""
        records = self.records()
        trials = [r for r in records if r.training.kind.is_trial]
        top = best(trials, str(self.objectives[0].direction))
        confirmed = {r.training.id for r in records if r.training.kind is TrainingKind.CONFIRMATION}
        return confirmed | ({top.training.id} if top else set())


def _budget(spec: StudySpec, intervals: int) -> Budget:
    """The study file's budget in SQL's terms; epochs of the budget are whole trainings' shares."""
    given = spec.budget
    per_epoch = intervals / spec.epochs if spec.epochs else 1.0
    return Budget(
        trials=given.trials,
        intervals=None if given.epochs is None else int(given.epochs * per_epoch),
        device_seconds=None if given.device_hours is None else given.device_hours * 3600.0,
        deadline=given.deadline,
    )
