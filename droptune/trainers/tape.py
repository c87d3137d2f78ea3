"""A recording as a list of calls, in memory that stays in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves, tree_map_only

from droptune.trainers.recording import Operation, Recording, View

Call = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


class Pool:
    """Memory for what does not outlive a run; shared by tapes that never run at once."""

    def __init__(self) -> None:
        self._free: list[UntypedStorage] = []

    def take(self, size: int, device: torch.device) -> UntypedStorage:
        """`size` bytes, of what was given back last: that is still in the cache."""
        for place in reversed(range(len(self._free))):
            free = self._free[place]
            if free.device == device and size <= free.nbytes() <= 2 * size:
                return self._free.pop(place)
        return UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]

    def give_back(self, storage: UntypedStorage) -> None:
        self._free.append(storage)


class Tape:
    """Does what a recording did, with other numbers, bit for bit.

    An update of a small group is bound by what is around its operations. Here nothing is: views
    are made once, and results go where they stay, in the place of an operand that is not read again
    where that can be.
    """

    def __init__(self, recording: Recording, pool: Pool) -> None:
        self._pool = pool
        self._outside = recording.outside
        self._storages = {m: t.untyped_storage() for m, t in recording.outside.items()}
        self._inputs = [recording.outside[memory] for memory in range(recording.inputs)]
        last = recording.last
        self._calls = [
            self._call(operation, {memory for memory in operation.touched if last[memory] == n})
            for n, operation in enumerate(recording.operations)
        ]
        self.outputs = [self._tensor(view) for view in recording.outputs]
        for memory in {view.memory for view in recording.outputs} - self._outside.keys():
            pool.give_back(self._storages[memory])  # they last until another tape is played

    def play(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, until a tape of this pool is played again."""
        self.take(inputs)
        self.run()
        return self.outputs

    @torch.no_grad()
    def take(self, inputs: Sequence[Tensor]) -> None:
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)

    @torch.no_grad()
    def run(self) -> None:
        """All calls, on the inputs that it took."""
        for function, args, kwargs in self._calls:
            function(*args, **kwargs)

    def _call(self, operation: Operation, last: set[int]) -> Call:
        """How to do an operation; what it touches for the `last` time is free after it."""
        free = last - self._outside.keys()
        operand = _replaceable(operation, free)
        if operand is None:
            devices = {view.memory: view.device for view in operation.results}
            self._storages |= {
                memory: self._pool.take(size, devices[memory])
                for memory, size in operation.fresh.items()
            }
        else:
            (result,) = operation.results
            self._storages[result.memory] = self._storages[operand.memory]
            free.discard(operand.memory)
        args, kwargs = tree_map_only(View, self._tensor, (operation.args, dict(operation.kwargs)))
        results = [self._tensor(view) for view in operation.results]
        for memory in free:
            self._pool.give_back(self._storages.pop(memory))
        if not operation.fresh:
            return operation.function._op, args, kwargs
        if operand is not None and operand == operation.args[0]:
            function = _in_place_form(operation.function)
            if function is not None:
                return function._op, args, kwargs
        return _into(operation.function, args, kwargs, results)

    def _tensor(self, view: View) -> Tensor:
        storage = self._storages[view.memory]
        empty = torch.empty(0, dtype=view.dtype, device=storage.device)
        return empty.set_(storage, view.offset, view.size, view.stride)


def _replaceable(operation: Operation, free: set[int]) -> View | None:
    """An operand whose place the result may take, element by element."""
    if torch.Tag.pointwise not in operation.function.tags or len(operation.fresh) != 1:
        return None
    (result,) = operation.results
    for operand in operation.given:
        same = [view for view in operation.given if view.memory == operand.memory]
        alike = replace(result, memory=operand.memory)
        if operand.memory in free and all(view == alike for view in same):
            return operand
    return None


def _into(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: Sequence[Tensor]
) -> Call:
    """How to do an operation that returns new tensors so that its results are in these."""
    if function in COPIES:
        return results[0].copy_, args[:1], {}
    found = _out_form(function)
    if found is not None:
        writing, name = found
        return writing._op, args, {**kwargs, name: results[0]}

    def copy() -> None:
        made = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if leaf is not None]
        for result, tensor in zip(results, made, strict=True):
            result.copy_(tensor)

    return copy, (), {}


def _in_place_form(function: Any) -> Any:
    """The operation that changes its first operand where `function` returns a new tensor."""
    siblings = getattr(torch.ops, function.namespace)
    packet = getattr(siblings, f"{function.overloadpacket.__name__}_", None)
    return getattr(packet, function._overloadname, None)


def _out_form(function: Any) -> tuple[Any, str] | None:
    """The operation that takes a tensor for its only result, and that argument's name; none that
    only copies it there."""
    packet = function.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        arguments = overload._schema.arguments
        outs = [argument.name for argument in arguments if argument.is_out]
        same = _inputs(overload) == _inputs(function)
        if same and len(outs) == 1 and torch.Tag.generated not in overload.tags:
            return overload, outs[0]
    return None


def _inputs(overload: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]
