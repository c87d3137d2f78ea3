"""The data of a program: what trainers draw batches from, checked and split."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import default_collate as torch_collate

from droptune.errors import ProgramError
from droptune.training import derive_seed

Batch = Any
"""A tensor, or a tuple, list or dict of batches: (inputs..., targets) in the short form."""

TARGET_KEYS = ("labels", "label", "targets", "target", "y")  # where a dict batch keeps its targets


class Data(Protocol):
    """`n` examples, numbered from 0."""

    @property
    def n(self) -> int: ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """Examples that fit in memory: a tree of tensors with equal first dimension n."""

    tree: Batch
    n: int

    def gather(self, indices: Tensor) -> Batch:
        """The examples at `indices` (int64, any shape [...]): leaves become [..., *example]."""
        return _map_examples(
            self.tree, lambda leaf: leaf[indices], lambda each: _picked(each, indices.tolist())
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> InMemory:
        """On that device; floating leaves in `dtype` where one is given."""
        return InMemory(place(self.tree, device, dtype), self.n)


@dataclass(frozen=True, eq=False)
class Streamed:
    """Examples read from a map-style dataset while training, by `workers` processes.

    Everything random in reading example i is seeded by (seed, epoch, i), in whatever process it
    is read, so a stream repeats exactly and does not depend on the number of workers.
    """

    dataset: Dataset[Any]
    batch_size: int
    collate: Callable[[list[Any]], Batch]
    workers: int
    n: int

    def batches(
        self, order: Tensor | Sequence[int], seed: int, epoch: int, device: torch.device | str
    ) -> Iterator[Batch]:
        """Batches of the examples in `order`, on `device`; the last one may be smaller."""
        device = torch.device(device)
        numbers = [int(i) for i in order]
        loader: DataLoader[Any] = DataLoader(
            _Repeatable(self.dataset, seed, epoch),
            batch_sampler=[
                numbers[start : start + self.batch_size]
                for start in range(0, len(numbers), self.batch_size)
            ],
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the model's generator
        )
        for batch in loader:
            yield place(batch, device)


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test data.

    `made` names those that were split off, `how` says how.
    """

    train: InMemory | Streamed
    validation: InMemory | Streamed
    test: InMemory | Streamed | None
    made: tuple[str, ...] = ()
    how: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Examples in each split; no entry for a test set that there is not."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: data.n for name, data in parts.items() if data is not None}


def epoch_order(n: int, data_seed: int, epoch: int) -> Tensor:
    """The order of n training examples in an epoch (from 0), int64 [n], on the CPU.

    A pure function: a training finds its order again in any process and after any restart.
    """
    generator = torch.Generator().manual_seed(derive_seed("order", data_seed, epoch))
    return torch.randperm(n, generator=generator)


def in_memory(dataset: Any, batch_size: int = 512) -> InMemory:
    """Reads a whole map-style dataset once. For datasets without random augmentation."""
    parts = [
        torch_collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        for start in range(0, len(dataset), batch_size)
    ]
    if not parts:
        raise ProgramError("the dataset is empty: nothing to read into memory")
    tree = join(parts)
    return InMemory(tuple(tree) if isinstance(tree, list) else tree, len(dataset))


class _Repeatable(Dataset[Any]):
    """A dataset whose random augmentation depends on (seed, epoch, example) alone."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        with seeded(derive_seed("example", self.seed, self.epoch, index)):
            return self.dataset[index]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the generators of torch (on the CPU), NumPy and Python start from a seed; afterwards
    they are where they were."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch CUDA too
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


# --- trees of tensors ---------------------------------------------------------------------


def map_leaves(tree: Batch, function: Callable[[Any], Any]) -> Batch:
    """The same tree with `function` of each leaf; named tuples and dict order are kept."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(value, function) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_leaves(value, function) for value in tree)
    return function(tree)


def _map_examples(
    tree: Batch, tensors: Callable[[Tensor], Tensor], lists: Callable[[list[Any]], list[Any]]
) -> Batch:
    """The same tree with functions of each tensor and of each list that has something else of
    every example; what is neither is of no example."""
    if _is_listed(tree):
        return lists(tree)
    if isinstance(tree, Mapping):
        return {key: _map_examples(value, tensors, lists) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [_map_examples(value, tensors, lists) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tensors(tree) if isinstance(tree, Tensor) else tree


def _is_listed(tree: Batch) -> bool:
    """Whether it is a list of what is no tensor: names, texts."""
    return isinstance(tree, list) and not any(isinstance(leaf, Tensor) for _, leaf in leaves(tree))


def _picked(each: list[Any], indices: Any) -> Any:
    if isinstance(indices, list):
        return [_picked(each, index) for index in indices]
    return each[indices]


def size_of(batch: Batch, axis: int = 0) -> int:
    """How many examples a batch holds along `axis`."""
    return int(next(leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)).shape[axis])


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    """The examples of a batch from `start` to `stop`."""
    return _map_examples(batch, lambda leaf: leaf[start:stop], lambda each: each[start:stop])


def leaves(tree: Batch, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf with where it is: `[0]`, `['labels']`, `[1]['mask']`."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(tree, tuple | list):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, tree


def join(trees: Sequence[Batch]) -> Batch:
    """Trees of equal form, concatenated along the first dimension."""
    first = trees[0]
    if _is_listed(first):
        return [each for tree in trees for each in tree]
    if isinstance(first, Mapping):
        return {key: join([tree[key] for tree in trees]) for key in first}
    if isinstance(first, tuple | list):
        parts = [join(list(parts)) for parts in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return torch.cat(list(trees)) if isinstance(first, Tensor) else first


def place(tree: Batch, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """The tree on a device; floating leaves in `dtype` where one is given."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        cast = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
        return leaf.to(device, cast, non_blocking=True)

    return map_leaves(tree, move)


def split_target(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """A batch as (positional inputs, keyword inputs, targets).

    Of a tuple the last is the target; of a dict the entry named labels, label, targets, target
    or y.
    """
    if isinstance(batch, Mapping):
        key = target_key(batch)
        return (), {name: value for name, value in batch.items() if name != key}, batch[key]
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise ProgramError(
        "a batch must be (inputs..., targets) or a dict with an entry 'labels'; "
        f"got {type(batch).__name__}: write the long form with its own loss(model, batch)"
    )


def target_key(batch: Mapping[str, Any]) -> str:
    """Which entry of a dict batch holds the targets."""
    for key in TARGET_KEYS:
        if key in batch:
            return key
    raise ProgramError(
        f"a dict batch needs its targets under one of {', '.join(TARGET_KEYS)}; "
        f"got {', '.join(map(str, batch))}"
    )
