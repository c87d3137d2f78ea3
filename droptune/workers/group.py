"""One study served by one worker: slots are filled, trained, settled and refilled.

This is the only training loop in droptune. It does not care which kind a training is (trial,
baseline, confirmation, ablation), nor whether the trainer is solo or fused.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from droptune.errors import ConfigurationError, DroptuneError, WorkRemainsError
from droptune.program.source import blamed
from droptune.recorder import Decision, Recorder
from droptune.storage import Ending
from droptune.study import Study
from droptune.trainers.checkpoint import CheckpointStore
from droptune.trainers.memory import is_out_of_memory
from droptune.trainers.slot import Interrupted, Outcome, Scores, Snapshot, Trainer
from droptune.training import Measurement, State, Training, TrainingKind

log = logging.getLogger("droptune.worker")

CHECKPOINT_SECONDS = 30.0
CHECKPOINT_SHARE = 0.05  # of the time, at most, goes into writing checkpoints


@dataclass
class Held:
    """A training in a slot, and what it measured so far."""

    training: Training
    measurements: list[Measurement] = field(default_factory=list)
    reason: str | None = None  # what the pruner says of it

    @property
    def curves(self) -> dict[str, tuple[float, ...]]:
        """By key; NaN where a program's metrics left one out."""
        keys = dict.fromkeys(key for m in self.measurements for key in m.values)
        return {key: tuple(m.values.get(key, math.nan) for m in self.measurements) for key in keys}

    @property
    def at_end(self) -> bool:
        done = self.measurements[-1].interval if self.measurements else 0
        return done >= self.training.intervals


@dataclass(frozen=True)
class Ended:
    """A training that has left its slot: its end, and what of it may be kept."""

    ending: Ending
    weights: Mapping[str, Tensor] | None = None
    scores: Scores | None = None

    @property
    def training(self) -> Training:
        return self.ending.training


class Group:
    """The slots of one trainer, kept filled from one study until nothing is claimable."""

    def __init__(
        self,
        study: Study,
        worker: int,
        trainer: Trainer,
        store: CheckpointStore,
        *,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.study = study
        self.trainer = trainer
        self.held: dict[int, Held] = {}
        self.device_seconds = 0.0  # spent on this study
        self.stopping = False
        self._worker = worker
        self._store = store
        self._recorder = Recorder(study.storage.away)
        self._leaving: dict[int, Training] = {}  # ended here, and SQL does not know it yet
        self._trained = False  # whether any interval ever was
        self._away = False
        self._every = checkpoint_seconds
        self._save_at = time.monotonic() + checkpoint_seconds

    def step(self, *, refill: bool = True) -> bool:
        """Train one interval of every filled slot; False when there was nothing to train.

        Raises Interrupted, with every slot at its last boundary, after `stop`, and
        WorkRemainsError where the device fails: no training shall end or start again for it.
        """
        try:
            return self._step(refill)
        except Exception as error:
            if device_failed(error):
                raise self._blame(error) from error
            raise

    def _step(self, refill: bool) -> bool:
        if self.stopping:
            raise Interrupted
        if refill:
            self._refill()
        if not self.held:
            return False
        before = time.monotonic()
        outcomes, failed = self._train()
        self.device_seconds += time.monotonic() - before
        self._settle(outcomes)
        self._end(failed)
        self._notice_absence()
        if time.monotonic() > self._save_at:
            self.save()
        return True

    def stop(self) -> None:
        """From any thread: fill nothing any more, break the interval that runs."""
        self.stopping = True
        self.trainer.interrupt()

    def holding(self) -> list[Training]:
        """The trainings whose leases are this group's (read by the beating thread too)."""
        return [held.training for held in list(self.held.values())] + list(self._leaving.values())

    def _notice_absence(self) -> None:
        away = self.study.storage.away.is_set()
        if away and not self._away:
            log.warning("the database is away: training goes on, measurements wait")
        elif self._away and not away:
            log.info("the database is back")
        self._away = away

    # -- one interval -------------------------------------------------------------------------

    def _train(self) -> tuple[dict[int, Outcome], dict[int, Ending]]:
        """The outcomes of an interval, and the ends of trainings that the program failed on."""
        try:
            outcomes = self.trainer.train_interval()
        except Interrupted:
            raise
        except Exception as error:
            if device_failed(error):
                raise
            return self._one_by_one(error)
        self._trained = True
        return outcomes, {}

    def _one_by_one(self, error: Exception) -> tuple[dict[int, Outcome], dict[int, Ending]]:
        """Train the interval again slot by slot, so that only what fails by itself ends.

        Where all fail and nothing was ever trained here, the fault is the program's or this
        machine's, and ConfigurationError is raised: no trial shall fail for it.
        """
        starts = {index: self.trainer.snapshot(index) for index in self.held}
        outcomes: dict[int, Outcome] = {}
        failed: dict[int, Exception] = {}
        ends: dict[int, Snapshot] = {}
        try:
            for index in starts:
                self._fill_slots({index: starts[index]})
                try:
                    outcomes |= self.trainer.train_interval()
                    ends[index] = self.trainer.snapshot(index)
                except Interrupted:
                    ends = {}
                    raise
                except Exception as again:
                    if device_failed(again):
                        raise
                    failed[index] = again
        finally:
            self._fill_slots(starts | ends)
        self._trained = self._trained or bool(outcomes)
        if not self._trained:
            raise self._blame(error) from error
        return outcomes, {
            index: Ending(self.held[index].training, State.FAIL, reason=reason_of(again))
            for index, again in failed.items()
        }

    def _blame(self, error: Exception) -> DroptuneError:
        return blame(error, self.study.name, self.trainer.recipe.device)

    def _fill_slots(self, snapshots: Mapping[int, Snapshot]) -> None:
        """Leave exactly these in the trainer."""
        for index in self.trainer.occupied():
            self.trainer.empty(index)
        for index, snapshot in snapshots.items():
            self.trainer.fill(index, self.held[index].training, snapshot)

    def _settle(self, outcomes: Mapping[int, Outcome]) -> None:
        """Hand over what was measured; end what is at its end, pruned or lost."""
        items: list[tuple[Training, Measurement]] = []
        for index, outcome in outcomes.items():
            self.held[index].measurements.append(outcome.measurement)
            items.append((self.held[index].training, outcome.measurement))
        decision = self._recorder.decisions()
        self._record(items)
        endings: dict[int, Ending] = {}
        for index, outcome in outcomes.items():
            held = self.held[index]
            if held.training.id in decision.lost:
                log.warning("%s: lost, another worker has it", held.training.name)
                self._drop(index)
            elif ending := self._ending(held, outcome.failure, decision):
                endings[index] = ending
        self._end(endings)

    def _record(self, items: Sequence[tuple[Training, Measurement]]) -> None:
        self._recorder.add(lambda: self.study.settle(items))

    # -- ends ---------------------------------------------------------------------------------

    def _ending(
        self, held: Held, failure: str | None = None, decision: Decision = Decision()
    ) -> Ending | None:
        """How a training ends now, or None where it goes on."""
        training = held.training
        held.reason = decision.reasons.get(training.id, held.reason)
        failure = failure or decision.failed.get(training.id)
        if failure:
            return Ending(training, State.FAIL, reason=failure)
        if held.at_end:
            values, best = self.study.objective_values(held.curves)
            if any(math.isnan(value) for value in values):
                return Ending(training, State.FAIL, reason=f"the objective was {values}")
            return Ending(training, State.COMPLETE, values, held.reason, best)
        if training.id in decision.pruned:
            return Ending(training, State.PRUNED, reason=held.reason)
        return None

    def _end(self, endings: Mapping[int, Ending]) -> None:
        """Free the slots of these; the recorder keeps what is worth it and tells SQL."""
        if not endings:
            return
        if not self._recorder.flush():  # should this worker die first, they end again from here
            self.save()
        ended = [self._ended(index, ending) for index, ending in endings.items()]
        self._leaving |= {each.training.id: each.training for each in ended}
        for index in endings:
            self._drop(index)
        self._recorder.add(lambda: self._finish(ended))

    def _ended(self, index: int, ending: Ending) -> Ended:
        """Take what may be exported: a confirmation's weights and scores, a trial's weights.

        A confirmation that cannot be scored has failed.
        """
        kind = ending.training.kind
        if ending.state is not State.COMPLETE:
            return Ended(ending)
        if kind is not TrainingKind.CONFIRMATION:
            return Ended(ending, self.trainer.weights(index) if kind.is_trial else None)
        try:
            return Ended(ending, self.trainer.weights(index), self.trainer.score(index))
        except Exception as error:  # of the program's metrics, say, on the test set
            if device_failed(error) or isinstance(error, Interrupted):
                raise
            return Ended(Ending(ending.training, State.FAIL, reason=reason_of(error)))

    def _finish(self, ended: Sequence[Ended]) -> Decision:
        """In the recorder's thread: keep weights and scores, then write the ends."""
        kept = [self._keep(each) for each in ended]
        lost = self.study.storage.finish_all([each.ending for each in ended])
        for each in ended:
            self._leaving.pop(each.training.id, None)
            if each.training.id not in lost:
                log.info("%s", self.study.describe(each.ending))
                self._store.delete(each.training.id, weights=False)
        if any(kept):
            self.sweep()
        return Decision()

    def _keep(self, ended: Ended) -> bool:
        """Keep a confirmation's scores and weights, and the weights of a trial that is the best."""
        training, values = ended.training, ended.ending.values
        if ended.weights is None or values is None:
            return False
        if ended.scores is not None:
            self.study.put_scores(training, ended.scores)
        elif not self.study.is_best(values[0]):
            return False
        meta = {"training": training.id, "interval": ended.ending.best_interval}
        return self._store.save_weights(training.id, ended.weights, meta)

    def _drop(self, index: int) -> None:
        self.held.pop(index)
        self.trainer.empty(index)

    # -- filling ------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Claim for the free slots; while the database is away, what trains goes on alone."""
        free = [i for i in range(self.trainer.width) if i not in self.held]
        if not free or not self._recorder.flush():
            return
        claimed = self.study.claim(self._worker, len(free))
        for index, training in zip(free, claimed, strict=False):
            self._fill(index, training)
        if claimed:
            splits = {held.training.seeds.split for held in self.held.values()}
            self.trainer.recipe.keep_only(splits)
        ended = {i: end for i, held in self.held.items() if (end := self._ending(held))}
        if ended:  # its last worker could not tell SQL any more
            self._end(ended)
            self._refill()

    def _fill(self, index: int, training: Training) -> None:
        """Put a training into a slot: from its snapshot, else from nothing."""
        snapshot = self._store.load(training.id, training.attempt)
        if snapshot is not None and self._resume(index, training, snapshot):
            held = Held(training, _history(snapshot))
            self.held[index] = held
            if held.measurements:  # what was measured and may never have reached SQL
                self._record([(training, measurement) for measurement in held.measurements])
            return
        if training.lease_epoch > 1:
            training = self.study.storage.restart(training)
        self.trainer.fill(index, training)
        self.held[index] = Held(training)

    def _resume(self, index: int, training: Training, snapshot: Snapshot) -> bool:
        try:
            if len(_history(snapshot)) != snapshot.interval:
                raise ValueError("it is not whole")
            self.trainer.fill(index, training, snapshot)
        except Exception as error:  # of another version of the program, or of the data
            if device_failed(error):
                raise
            what = f"{training.name}: its checkpoint cannot be used ({_one_line(error)})"
            log.warning("%s; it starts again", what)
            return False
        return True

    # -- checkpoints --------------------------------------------------------------------------

    def save(self) -> None:
        """Write the last boundary of every training, with all that it measured."""
        if self._store.in_database and self.study.storage.away.is_set():
            return
        started = time.monotonic()
        for index, held in self.held.items():
            curve = [[m.interval, dict(m.values)] for m in held.measurements]
            snapshot = self.trainer.snapshot(index).with_meta(curve=curve)
            self._store.save(held.training.id, held.training.attempt, snapshot)
        now = time.monotonic()
        self._save_at = now + max(self._every, (now - started) / CHECKPOINT_SHARE)

    def sweep(self) -> None:
        """Delete what nobody needs any more: what lesser bests and late workers left behind."""
        finished = {r.training.id for r in self.study.records() if r.state.finished}
        self._store.sweep(finished, keep_weights=self.study.kept_weights())

    def hand_back(self) -> None:
        """Give every training back to the queue, to be resumed from its last boundary.

        WorkRemainsError where SQL cannot be told: the leases run out by themselves.
        """
        self.save()
        self._recorder.flush()
        if self.held:
            self.study.storage.release([held.training for held in self.held.values()])
        for index in list(self.held):
            self._drop(index)

    def close(self) -> None:
        """End the recorder; what it had not begun is in the checkpoints."""
        self._recorder.close()


def blame(error: Exception, study: str, device: torch.device) -> DroptuneError:
    """What a worker ends with that can train nothing: its device's fault, or the program's."""
    if device_failed(error):
        return WorkRemainsError(
            f"{device} failed ({_one_line(error)}); "
            "what it trained goes on elsewhere, or when this worker is started again"
        )
    return ConfigurationError(f"study {study!r}: {reason_of(error)}")


def device_failed(error: Exception) -> bool:
    """Whether the device, and not the program, is to blame."""
    kind: type[Exception] | None = getattr(torch, "AcceleratorError", None)
    if is_out_of_memory(error) or (kind is not None and isinstance(error, kind)):
        return True
    words = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def reason_of(error: Exception) -> str:
    """What the user's code raised, in one line with its place."""
    try:
        with blamed("training"):
            raise error
    except Exception as blame:
        return str(blame)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _history(snapshot: Snapshot) -> list[Measurement]:
    return [Measurement(interval, values) for interval, values in snapshot.meta.get("curve", [])]
