"""What a function does to tensors, written down: its operations, and the memory that each is on.

A tensor is described by where it lies. So views are no operations of their own, and recordings of
two calls can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_READS_ON_HOST = (  # and no operations
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
)
_UNSTEADY = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
)


@dataclass(frozen=True)
class View:
    """Where a tensor lies: in the recording's memory number `memory`, at `offset` (in elements)."""

    memory: int
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


NOWHERE = View(-1, torch.device("meta"), torch.uint8, (), (), 0)


@dataclass(frozen=True)
class Operation:
    """One operation, with a view in each tensor's place; `fresh` are the bytes of each memory that
    it allocated."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[View, ...]
    fresh: Mapping[int, int]

    @property
    def given(self) -> list[View]:
        return _views((self.args, self.kwargs))

    @property
    def touched(self) -> set[int]:
        """The memories that it reads, fills or changes."""
        return {view.memory for view in (*self.given, *self.results)}

    @property
    def written(self) -> set[int]:
        """The memories that it fills or changes, where its schema says so: `native_batch_norm`
        does not say that it changes statistics, but fills others as well."""
        arguments = self.function._schema.arguments
        named = dict(zip((argument.name for argument in arguments), self.args, strict=False))
        changed = [
            {**named, **self.kwargs}.get(argument.name)
            for argument in arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return {*self.fresh, *(view.memory for view in _views(changed))}


def _views(tree: Any) -> list[View]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, View)]


@dataclass
class Recording:
    """The operations of one call on its inputs, which are the first `inputs` memories.

    `outside` holds a tensor of each memory that was there before, those of the inputs among them;
    `steady` says whether every operation was one whatever the numbers in the tensors are.
    """

    inputs: int
    operations: list[Operation] = field(default_factory=list)
    outputs: tuple[View, ...] = ()
    outside: dict[int, Tensor] = field(default_factory=dict)
    steady: bool = True

    @property
    def last(self) -> dict[int, int]:
        """The number of the operation that touches a memory last; none for the outputs'."""
        last = {memory: n for n, op in enumerate(self.operations) for memory in op.touched}
        return last | {view.memory: len(self.operations) for view in self.outputs}

    @property
    def peak(self) -> int:
        """Bytes of what it allocated that were needed at once."""
        last = self.last
        sizes = {memory: size for op in self.operations for memory, size in op.fresh.items()}
        needed = peak = 0
        for n, operation in enumerate(self.operations):
            needed += sum(operation.fresh.values())
            peak = max(peak, needed)
            over = {memory for memory in operation.touched if last[memory] == n}
            needed -= sum(sizes[memory] for memory in over & sizes.keys())
        return peak

    def repeats(self, other: Recording) -> bool:
        """Whether both calls did the same, on the same memory beside their inputs."""
        return (
            (self.steady and other.steady)
            and self.operations == other.operations
            and self.outputs == other.outputs
            and self.outside.keys() == other.outside.keys()
            and all(self._same_outside(other, m) for m in self.outside if m >= self.inputs)
        )

    def _same_outside(self, other: Recording, memory: int) -> bool:
        mine, its = self.outside[memory], other.outside[memory]
        if mine.untyped_storage()._cdata == its.untyped_storage()._cdata:
            return True
        changed = any(memory in operation.written for operation in self.operations)
        return not changed and torch.equal(_bytes(mine), _bytes(its))  # a constant, made anew


def record(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Recording]:
    """`function(*inputs)`, which is done as always, and its recording."""
    recorder = _Recorder(inputs)
    with _Readings(recorder.recording), recorder:
        outputs = function(*inputs)
    recorder.recording.outputs = tuple(map(recorder.view, outputs))
    return outputs, recorder.recording


def _bytes(tensor: Tensor) -> Tensor:
    """All memory that a tensor is a view of."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a view tells all of it."""
    strided = type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided
    return strided and not tensor.is_conj() and not tensor.is_neg()


class _Readings(TorchFunctionMode):
    """Notices what is read on the host without an operation."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_ON_HOST:
            self._recording.steady = False
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills a recording with all operations below autograd and vmap."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording(len(inputs))
        self._numbers: dict[int, int] = {}  # of a memory, by the address of its storage
        self._held: list[StorageWeakRef] = []  # so that no address comes twice
        for tensor in inputs:
            self.view(tensor)

    def view(self, tensor: Tensor) -> View:
        """Where a tensor lies; what no operation allocated was there before."""
        if not _is_plain(tensor):
            self.recording.steady = False
            return NOWHERE
        if self._is_new(tensor):
            # another tensor: the program can put this one on other memory later
            self.recording.outside[self._add(tensor)] = tensor.detach()
        return View(
            self._numbers[tensor.untyped_storage()._cdata],
            tensor.device,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
        )

    def _is_new(self, tensor: Tensor) -> bool:
        return _is_plain(tensor) and tensor.untyped_storage()._cdata not in self._numbers

    def _add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        number = self._numbers[storage._cdata] = len(self._held)
        self._held.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, named = tree_map_only(Tensor, self.view, (args, kwargs or {}))
        returned = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(returned) if leaf is not None]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        new = [tensor for tensor in tensors if self._is_new(tensor)]
        fresh = {self._add(tensor): tensor.untyped_storage().nbytes() for tensor in new}
        results = tuple(map(self.view, tensors))
        operation = Operation(func, given, named, results, fresh)
        writes = bool(operation.written)
        looks = len(tensors) < len(leaves) or not (tensors or writes)  # at numbers
        if looks or any(tag in func.tags for tag in _UNSTEADY):
            self.recording.steady = False
        if writes:
            self.recording.operations.append(operation)
        return returned
