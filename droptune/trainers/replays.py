"""Calls that come again and again, done from a tape once two of them have proved to be alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from droptune.trainers.recording import Recording, record
from droptune.trainers.tape import Pool, Tape

KEPT = 32  # kinds of calls that are known at a time
FORGOTTEN = 1000  # calls of other kinds, after which another may take a kind's place
LIMIT = 64 * 2**20  # bytes of a call at once: with more, what is around operations is little
LOOKS = (2, 3, *(10**power for power in range(1, 10)))  # the calls of a kind that are recorded
Function = Callable[..., Sequence[Tensor]]


class ReplayError(RuntimeError):
    """A tape failed, or could not be made; the function that it stands for may do."""


@dataclass
class _Kind:
    """What is known of calls that differ in nothing but numbers; `last` is when one was."""

    calls: int = 0
    last: int = 0
    recording: Recording | None = None
    tape: Tape | None = None
    too_large: bool = False


class Replays:
    """Runs functions of tensors in host memory: as they are written, until two recordings of a
    kind of call are alike, and then from a tape.

    They are where a function does the same operations whatever the numbers are, and not too much
    memory is touched. It is looked at again at its tenth call, its hundredth and so on: the tape
    ends when it is found to do something else. `forget` lets it compute anew what it remembers.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self._on = True
        self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self._known: dict[Hashable, _Kind] = {}
        self._calls = 0
        self._pool = Pool()

    @property
    def tapes(self) -> int:
        """How many kinds of calls are done from a tape."""
        return sum(kind.tape is not None for kind in self._known.values())

    def stop(self) -> None:
        """Run everything as it is written from now on."""
        self._on = False
        self.clear()

    def run(self, function: Function, inputs: Any, kind: Hashable) -> Sequence[Tensor]:
        """What `function(*inputs)` gives, which may change at the next call.

        Calls of one kind are of the same function on the same memory beside its inputs.
        """
        leaves, spec = tree_flatten(inputs)
        if not (self._on and all(map(_in_host_memory, leaves))):
            return function(*inputs)
        known = self._kind((kind, spec, *((leaf.shape, leaf.dtype) for leaf in leaves)))
        if known is None or known.too_large:
            return function(*inputs)
        known.calls += 1
        if known.calls in LOOKS:
            return self._look(known, lambda *new: function(*tree_unflatten(new, spec)), leaves)
        if known.tape is None:
            return function(*inputs)
        with _blamed_on_replay():
            return known.tape.play(leaves)

    def _look(self, known: _Kind, function: Function, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        """The call as it is written, and what is known after it."""
        self._forget()
        outputs, recording = record(function, [leaf.clone() for leaf in leaves])
        known.too_large = recording.peak > LIMIT
        alike = known.recording is not None and known.recording.repeats(recording)
        if known.too_large or not alike:
            known.tape = None
        elif known.tape is None:
            with _blamed_on_replay():
                known.tape = Tape(recording, self._pool)
        known.recording = None if known.too_large else recording
        return outputs

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


@contextmanager
def _blamed_on_replay() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ReplayError(str(error)) from error


def _in_host_memory(leaf: object) -> bool:
    return type(leaf) is Tensor and leaf.device.type == "cpu"
