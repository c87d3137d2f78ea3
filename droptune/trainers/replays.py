"""Calls that come again and again, done from a tape once two of them have proved to be alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from droptune.trainers.recording import Recording, record
from droptune.trainers.tape import Pool, Tape

KEPT = 32  # kinds of calls that are known at a time
LOOKS = (2, 3, *(10**power for power in range(1, 10)))  # the calls of a kind that are recorded
Function = Callable[..., Sequence[Tensor]]


@dataclass
class _Kind:
    """What is known of calls that differ in nothing but numbers."""

    calls: int = 0
    recording: Recording | None = None
    tape: Tape | None = None


class Replays:
    """Runs functions of tensors in host memory: as they are written, until two recordings of a
    kind of call are alike, and then from a tape.

    They are where a function does the same operations whatever the numbers are. It is looked at
    again from time to time: the tape ends when it is found to do something else.
    `forget` lets it compute anew what it remembers.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self._on = True
        self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self._known: dict[Hashable, _Kind] = {}
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
        known.calls += 1
        if known.calls not in LOOKS:
            return function(*inputs) if known.tape is None else known.tape.play(leaves)
        self._forget()
        given = [leaf.clone() for leaf in leaves]
        outputs, recording = record(lambda *new: function(*tree_unflatten(new, spec)), given)
        known.tape = self._tape(known, recording)
        known.recording = recording
        return outputs

    def _tape(self, known: _Kind, recording: Recording) -> Tape | None:
        """The tape of a call that was done as the one that was recorded before it."""
        if known.recording is None or not known.recording.repeats(recording):
            return None
        return known.tape or Tape(recording, self._pool)

    def _kind(self, key: Hashable) -> _Kind:
        if key not in self._known and len(self._known) == KEPT:
            self.clear()
        return self._known.setdefault(key, _Kind())


def _in_host_memory(leaf: object) -> bool:
    return type(leaf) is Tensor and leaf.device.type == "cpu"
