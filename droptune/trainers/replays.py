"""Calls that come again and again, replayed once two of them have proved to be alike."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from droptune.trainers.captured import Captured, GraphPool, needs_host
from droptune.trainers.memory import has_own_memory
from droptune.trainers.recording import Recording, record
from droptune.trainers.tape import Pool, Tape

KEPT = 32  # kinds of calls that are known at a time
FORGOTTEN = 1000  # calls of other kinds, after which another may take a kind's place
LIMIT = 64 * 2**20  # bytes of a call at once: with more, what is around operations is little
LOOKS = (2, 3, *(10**power for power in range(1, 10)))  # the calls of a kind that are recorded
TRIED = range(1, 4)  # the calls on an accelerator, from when a tape is made, that are timed
WRITTEN = range(4, 7)  # when replayed, and as they are written
log = logging.getLogger("droptune.trainer")

Function = Callable[..., Sequence[Tensor]]


class ReplayError(RuntimeError):
    """A replay failed, or could not be made; the function that it stands for may do."""


@dataclass
class _Kind:
    """What is known of calls that differ in nothing but numbers; `last` is when one was, and
    `made` the call at which the replay was made."""

    calls: int = 0
    last: int = 0
    made: int = 0
    recording: Recording | None = None
    replay: Tape | Captured | None = None
    never: bool = False
    seconds: dict[range, float] = field(default_factory=dict)


class Replays:
    """Runs functions of tensors: as they are written, until two recordings of a kind of call are
    alike, and then from a tape; on an accelerator in one launch, as a graph, where that can be.

    They are where a function does the same operations whatever the numbers are. It is looked at
    again at its tenth call, its hundredth and so on: the replay ends when it is found to do
    something else. `forget` lets it compute anew what it remembers. Calls that touch much host
    memory are left as they are, and those on an accelerator that are not faster from a tape.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self.clear()

    def clear(self) -> None:
        """Give all memory back, and begin anew."""
        self._on = True
        self._known: dict[Hashable, _Kind] = {}
        self._calls = 0
        self._pool, self._graph_pool = Pool(), GraphPool()

    @property
    def replayed(self) -> int:
        """How many kinds of calls are replayed."""
        return sum(kind.replay is not None for kind in self._known.values())

    def stop(self) -> None:
        """Run everything as it is written from now on."""
        self.clear()
        self._on = False

    def run(self, function: Function, inputs: Any, kind: Hashable) -> Sequence[Tensor]:
        """What `function(*inputs)` gives, which may change at the next call.

        Calls of one kind are of the same function on the same memory beside its inputs.
        """
        leaves, spec = tree_flatten(inputs)
        if not (self._on and _can_be_replayed(leaves)):
            return function(*inputs)
        known = self._kind((kind, spec, *((leaf.shape, leaf.dtype) for leaf in leaves)))
        if known is None or known.never:
            return function(*inputs)
        known.calls += 1
        if known.calls in LOOKS:
            return self._look(known, lambda *new: function(*tree_unflatten(new, spec)), leaves)
        if known.replay is None:
            return function(*inputs)
        if leaves[0].device.type != "cpu" and known.calls <= known.made + WRITTEN[-1]:
            return self._try(known, lambda: function(*inputs), leaves)
        return _played(known, leaves)

    def _try(
        self, known: _Kind, written: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """One of the calls that tell whether a replay is faster; it is given up after the last if
        not.

        The shortest of each way counts. So few waits for the device are not noticed.
        """
        number, device = known.calls - known.made, leaves[0].device
        if number == TRIED[1]:
            self._capture(known, device)
        torch.accelerator.synchronize(device)
        started = time.perf_counter()
        outputs = _played(known, leaves) if number in TRIED else written()
        torch.accelerator.synchronize(device)
        way, seconds = TRIED if number in TRIED else WRITTEN, time.perf_counter() - started
        known.seconds[way] = min(seconds, known.seconds.get(way, math.inf))
        if number == WRITTEN[-1] and not _is_faster(known.seconds):
            self._give_up(known)
            known.recording, known.never = None, True
        return outputs

    def _capture(self, known: _Kind, device: torch.device) -> None:
        """A graph in a tape's place, where that can be.

        The tape was played before: what its calls do once in a thread, as cuDNN looks for the
        fastest kernel, cannot be captured.
        """
        assert known.recording is not None
        assert isinstance(known.replay, Tape)
        if needs_host(known.recording):
            return
        try:
            known.replay = Captured(known.replay, device, self._graph_pool)
        except Exception as error:  # whatever a device or a driver says
            log.debug("replayed without a graph: %s", error)

    def _look(self, known: _Kind, function: Function, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        """The call as it is written, and what is known after it."""
        self._forget()
        outputs, recording = record(function, [leaf.clone() for leaf in leaves])
        known.never = leaves[0].device.type == "cpu" and recording.peak > LIMIT
        alike = known.recording is not None and known.recording.repeats(recording)
        if known.never or not alike:
            self._give_up(known)
        elif known.replay is None:
            with _blamed_on_replay():
                known.replay = Tape(recording, self._pool)
            known.made, known.seconds = known.calls, {}
        known.recording = None if known.never else recording
        return outputs

    def _give_up(self, known: _Kind) -> None:
        """End a kind's replay, and give back the memory that no other one is in."""
        if known.replay is not None:
            known.replay, self._pool = None, Pool()

    def _kind(self, key: Hashable) -> _Kind | None:
        """What is known of a kind; None where too many others are in use."""
        self._calls += 1
        known = self._known.get(key)
        if known is None:
            if len(self._known) == KEPT:
                oldest = min(self._known, key=lambda other: self._known[other].last)
                if self._calls - self._known[oldest].last < FORGOTTEN:
                    return None
                del self._known[oldest]
            known = self._known[key] = _Kind()
        known.last = self._calls
        return known


def _played(known: _Kind, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    assert known.replay is not None
    with _blamed_on_replay():
        return known.replay.play(inputs)


def _is_faster(seconds: Mapping[range, float]) -> bool:
    return seconds[TRIED] < seconds[WRITTEN]


@contextmanager
def _blamed_on_replay() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ReplayError(str(error)) from error


def _can_be_replayed(leaves: Sequence[object]) -> bool:
    """Whether all are tensors of one device, in host memory or on an accelerator."""
    devices = {leaf.device if type(leaf) is Tensor else None for leaf in leaves}
    device = devices.pop() if len(devices) == 1 else None
    return device is not None and (device.type == "cpu" or has_own_memory(device))
