"""From what users give as data to checked splits.

What is given (tensors, arrays, tuples, datasets, loaders, functions that return them) becomes
`InMemory` or `Streamed` data in the dtypes that training needs; what cannot be trained on is
refused in one line that names the array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data import default_collate as torch_collate

from droptune.errors import ProgramError
from droptune.program.data import (
    Batch,
    InMemory,
    Splits,
    Streamed,
    epoch_order,
    leaves,
    map_leaves,
    split_target,
    target_key,
)
from droptune.program.labels import check_labels, class_numbers
from droptune.program.source import blamed
from droptune.training import FOLDS, derive_seed

LOOKED_AT = 16  # examples of a stream that are read to check it


@dataclass(frozen=True, eq=False)
class RawSplits:
    """Data as users give them. `test` False: no test set is wanted."""

    train: Any
    validation: Any = None
    test: Any = None


def read_splits(raw: RawSplits, task: str, batch_size: int) -> RawSplits:
    """All that is given, read once and checked; each part is `Data`, or as it was where missing."""
    parts = {
        name: part if part is None or part is False else as_data(part, name, task, batch_size)
        for name, part in (
            ("train", raw.train),
            ("validation", raw.validation),
            ("test", raw.test),
        )
    }
    if parts["train"] is None or parts["train"] is False:
        raise ProgramError("the program has no training data: give train=")
    return RawSplits(**parts)


def make_splits(read: RawSplits, seed: int, task: str) -> Splits:
    """All three splits. A missing test set is 20 % of the training data, the same for every seed
    (no seed may search on what another is judged by); a missing validation set is 20 % of the
    rest, drawn by `seed`. What was given is never split again."""
    train, validation, test = read.train, read.validation, read.test
    made = {}
    if test is None:
        train, test, how = split_off(train, 0, task)
        made["test"] = f"test: {how} of the training data"
    if validation is None or validation is False:
        train, validation, how = split_off(train, seed, task)
        made["validation"] = f"validation: {how} of the training data, by seed {seed}"
    return Splits(train, validation, test or None, tuple(made), tuple(made.values()))


def as_data(raw: Any, name: str, task: str, batch_size: int) -> InMemory | Streamed:
    """Checked data from tensors, arrays, a Dataset, a DataLoader, or a callable returning one.

    Tensors, arrays and `TensorDataset`s are kept in memory, other datasets are streamed. Floats
    become float32, images of bytes float32 in [0, 1], other integers int64; truth values stay
    (masks), but are float32 where they are all that goes in; targets int64 (classification) or
    float32 (regression). `task` custom: only float64 is changed.
    """
    if callable(raw) and not isinstance(raw, Dataset | DataLoader):
        with blamed(f"reading the {name} data"):
            raw = raw()
    if isinstance(raw, InMemory):
        raw = raw.tree
    if isinstance(raw, Streamed):
        return raw
    workers, collate = 0, torch_collate
    if isinstance(raw, DataLoader):
        _check_loader(raw, name)
        workers, collate, raw = raw.num_workers, raw.collate_fn or torch_collate, raw.dataset
    tree = _tree(raw) if collate is torch_collate else None
    if tree is not None:
        return _checked(tree, name, task)
    return _streamed(raw, name, task, batch_size, collate, workers)


def _check_loader(loader: DataLoader[Any], name: str) -> None:
    if isinstance(loader.dataset, IterableDataset):
        return  # refused with the other datasets
    if not isinstance(loader.sampler, RandomSampler | SequentialSampler):
        raise ProgramError(
            f"{name}: the DataLoader has its own {type(loader.sampler).__name__}, but droptune "
            "orders the data by its recorded seed: give the dataset itself"
        )


def _tree(raw: Any) -> Batch | None:
    """The tree of tensors that `raw` is, or None where it must be streamed."""
    if isinstance(raw, TensorDataset):
        return tuple(raw.tensors)
    if isinstance(raw, Subset):
        inner = _tree(raw.dataset)
        chosen = torch.as_tensor(raw.indices)
        return None if inner is None else map_leaves(inner, lambda leaf: leaf[chosen])
    if isinstance(raw, Mapping | Tensor | np.ndarray | tuple):
        return raw
    if isinstance(raw, list) and raw and not isinstance(raw[0], tuple | Mapping):
        return tuple(raw)
    if hasattr(raw, "__array__"):  # data frames
        return np.asarray(raw)
    return None


def _checked(tree: Batch, name: str, task: str) -> InMemory:
    tree = _plain(tree)
    named = {path: _tensor(leaf, f"{name}{path}") for path, leaf in leaves(tree)}
    _check_lengths(named, name)
    for path, leaf in named.items():
        _check_finite(leaf, f"{name}{path}")
    tensors = iter(named.values())
    tree = map_leaves(tree, lambda _: next(tensors))
    if task == "classification":
        _check_targets(tree, name)
    tree = convert(tree, name, task)
    return InMemory(tree, len(next(leaves(tree))[1]))


def _plain(tree: Batch) -> Batch:
    """The tree with lists of numbers as arrays."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_plain(value) for value in tree)
    if isinstance(tree, list) and not any(isinstance(v, Tensor | np.ndarray) for v in tree):
        return np.asarray(tree)
    return tree


def _tensor(leaf: Any, where: str) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    array = np.asarray(leaf)
    if array.dtype.kind not in "fiub":
        raise ProgramError(
            f"{where} holds {array.dtype} values: turn them into numbers first "
            "(text into token numbers, class names into class numbers)"
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array))  # a copy: read-only arrays are no ground for tensors


def _check_lengths(named: Mapping[str, Tensor], name: str) -> None:
    if not named:
        raise ProgramError(f"{name} is empty: it must hold at least one example")
    for path, leaf in named.items():
        if leaf.ndim == 0:
            raise ProgramError(f"{name}{path} is a single number: it must hold one row an example")
    lengths = {path: len(leaf) for path, leaf in named.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}{path} {length}" for path, length in lengths.items())
        raise ProgramError(f"{name} has unequal numbers of examples: {listed}")
    if next(iter(lengths.values())) == 0:
        raise ProgramError(f"{name} is empty: it must hold at least one example")


def _check_finite(leaf: Tensor, where: str) -> None:
    if not leaf.is_floating_point():
        return
    bad = ~torch.isfinite(leaf)
    if count := int(bad.sum()):
        row = int(bad.reshape(len(leaf), -1).any(-1).nonzero()[0])
        raise ProgramError(
            f"{where} holds {count} NaN or infinite value{'s' if count > 1 else ''} "
            f"(first in row {row}): remove or fill them before tuning"
        )


def convert(tree: Batch, name: str, task: str) -> Batch:
    """The dtypes that training needs; see `as_data`."""
    if task == "custom":
        return map_leaves(tree, _float32)
    if isinstance(tree, Mapping):
        key = target_key(tree)
        rest = _inputs({k: v for k, v in tree.items() if k != key})
        return {**rest, key: _target(tree[key], f"{name}[{key!r}]", task)}
    inputs, _, targets = split_target(tree)
    where = f"{name}[{len(inputs)}]"
    return (*_inputs(inputs), _target(targets, where, task))


def _float32(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _inputs(tree: Batch) -> Batch:
    masks = sum(1 for _ in leaves(tree)) > 1  # beside other inputs truth values say what to use
    return map_leaves(tree, lambda leaf: _input(leaf, masks))


def _input(leaf: Any, masks: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point():
        return leaf.float()
    if leaf.dtype == torch.uint8:  # pixels; token numbers come as wider integers
        return leaf.float() / 255
    if leaf.dtype == torch.bool:
        return leaf if masks else leaf.float()
    return leaf.long()


def _target(targets: Any, where: str, task: str) -> Tensor:
    if not isinstance(targets, Tensor):
        raise ProgramError(f"{where} holds no numbers: give targets as numbers")
    return targets.float() if task == "regression" else class_numbers(targets, where)


def _check_targets(tree: Batch, name: str) -> None:
    """Labels as they were given; see `check_labels`."""
    if isinstance(tree, Mapping):
        key = target_key(tree)
        check_labels(tree[key], f"{name}[{key!r}]")
    else:
        inputs, _, targets = split_target(tree)
        check_labels(targets, f"{name}[{len(inputs)}]")


def _streamed(
    raw: Any,
    name: str,
    task: str,
    batch_size: int,
    collate: Callable[[list[Any]], Batch],
    workers: int,
) -> Streamed:
    missing = [m for m in ("__len__", "__getitem__") if not hasattr(raw, m)]
    if isinstance(raw, IterableDataset) or missing:
        lacks = (
            "is read in an order of its own" if not missing else f"has no {' or '.join(missing)}"
        )
        raise ProgramError(
            f"{name} is a {type(raw).__name__}, which {lacks}: give tensors, arrays, a tuple of "
            "them, or a Dataset with a length whose examples can be read in any order"
        )
    if len(raw) == 0:
        raise ProgramError(f"{name} is empty: it must hold at least one example")
    looked_at = range(min(LOOKED_AT, len(raw)))
    plain = Streamed(raw, LOOKED_AT, _Collate(collate, name, "custom"), 0, len(raw))
    with blamed(f"reading the {name} data"):
        first = next(plain.batches(looked_at, 0, 0, "cpu"))
    for path, leaf in leaves(first):
        if isinstance(leaf, Tensor):
            _check_finite(leaf, f"{name}{path}")
    if task == "classification":
        _check_targets(first, name)
    convert(first, name, task)
    return Streamed(raw, batch_size, _Collate(collate, name, task), workers, len(raw))


@dataclass(frozen=True)
class _Collate:
    """The user's collate, then the dtypes that training needs. A class: workers pickle it."""

    collate: Callable[[list[Any]], Batch]
    name: str
    task: str

    def __call__(self, examples: list[Any]) -> Batch:
        batch = self.collate(examples)
        if isinstance(batch, list):
            batch = tuple(batch)
        return convert(batch, self.name, self.task)


def split_off(
    data: InMemory | Streamed, seed: int, task: str
) -> tuple[InMemory | Streamed, InMemory | Streamed, str]:
    """(the rest, a fifth of the examples, how it was drawn), drawn by the seed.

    Classes keep their shares (stratified) where the class numbers are at hand: systematic
    sampling of the shuffled examples in the order of their classes. Five seeds in a row from a
    multiple of five draw the same order and take a fifth each (folds), all of one size.
    """
    draw, fold = divmod(seed, FOLDS)
    order = epoch_order(data.n, derive_seed("split", draw), 0)
    classes = _classes(data) if task == "classification" else None
    if classes is not None:
        order = order[torch.argsort(classes[order], stable=True)]
    positions = torch.arange(data.n)
    taken = (positions % FOLDS == fold) & (positions < data.n // FOLDS * FOLDS)
    if not bool(taken.any()):
        raise ProgramError(
            f"{data.n} examples are too few to split a fifth off: give validation and test data"
        )
    by = "" if classes is None else ", by class,"
    how = f"{int(taken.sum())} of {data.n} examples{by}"
    return _take(data, order[~taken]), _take(data, order[taken]), how


def _take(data: InMemory | Streamed, indices: Tensor) -> InMemory | Streamed:
    indices = indices.sort().values
    if isinstance(data, InMemory):
        return InMemory(data.gather(indices), len(indices))
    part: Subset[Any] = Subset(data.dataset, indices.tolist())
    return Streamed(part, data.batch_size, data.collate, data.workers, len(indices))


def _classes(data: InMemory | Streamed) -> Tensor | None:
    """Class numbers [n], or None where they are unknown without reading a stream."""
    if isinstance(data, InMemory):
        targets: Tensor | None = split_target(data.tree)[2]
    else:
        targets = _numbers(getattr(data.dataset, "targets", getattr(data.dataset, "labels", None)))
    return targets if targets is not None and targets.shape == (data.n,) else None


def _numbers(found: Any) -> Tensor | None:
    try:
        return None if found is None else torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):  # names, or rows of different lengths
        return None
