"""Data in memory and streamed, their checks, and splitting off."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from droptune.errors import ProgramError
from droptune.program.data import (
    InMemory,
    Streamed,
    epoch_order,
    in_memory,
    map_leaves,
    split_target,
)
from droptune.program.intake import RawSplits, as_data, make_splits, read_splits, split_off


class Augmented(Dataset):
    """Examples with noise from all three generators."""

    def __init__(self, n=12):
        self.n = n
        self.targets = [i % 3 for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return torch.tensor([float(i), noise], dtype=torch.float64), self.targets[i]


class Endless(IterableDataset):
    def __iter__(self):
        yield 0


def x_y(n=10, classes=2):
    return torch.randn(n, 3), torch.arange(n) % classes


def test_order_is_a_permutation_and_a_pure_function():
    order = epoch_order(100, 7, 3)
    state = torch.get_rng_state()
    assert torch.equal(order, epoch_order(100, 7, 3))
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, epoch_order(100, 7, 4))
    assert not torch.equal(order, epoch_order(100, 8, 3))


def test_gather_takes_indices_of_any_shape():
    data = InMemory({"a": torch.arange(10), "b": (torch.arange(20).view(10, 2),)}, 10)
    batch = data.gather(torch.tensor([[1, 2], [3, 4]]))
    assert batch["a"].tolist() == [[1, 2], [3, 4]]
    assert batch["b"][0].shape == (2, 2, 2)


def test_moving_casts_floats_alone():
    moved = InMemory((torch.ones(2), torch.ones(2).long()), 2).to("cpu", torch.float64)
    assert [leaf.dtype for leaf in moved.tree] == [torch.float64, torch.int64]


@pytest.mark.parametrize(
    "raw",
    [
        (np.zeros((4, 2)), np.arange(4)),
        [np.zeros((4, 2)), [0, 1, 0, 1]],
        (torch.zeros(4, 2, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0, 0.0])),
        TensorDataset(torch.zeros(4, 2), torch.arange(4)),
        Subset(TensorDataset(torch.zeros(9, 2), torch.arange(9)), [0, 1, 2, 3]),
        DataLoader(TensorDataset(torch.zeros(4, 2), torch.arange(4)), shuffle=True),
        lambda: (np.zeros((4, 2), np.float32), np.arange(4, dtype=np.int32)),
    ],
)
def test_what_fits_is_kept_in_memory_in_training_dtypes(raw):
    data = as_data(raw, "train", "classification", 2)
    assert isinstance(data, InMemory)
    assert data.n == 4
    assert [leaf.dtype for leaf in data.tree] == [torch.float32, torch.int64]


def test_dicts_keep_their_names():
    raw = {
        "input_ids": np.zeros((4, 2), np.int32),
        "mask": np.ones((4, 2), bool),
        "labels": [0] * 4,
    }
    data = as_data(raw, "train", "classification", 2)
    assert {k: v.dtype for k, v in data.tree.items()} == {
        "input_ids": torch.int64,
        "mask": torch.bool,
        "labels": torch.int64,
    }


def test_truth_values_stay_masks_beside_other_inputs_and_are_features_alone():
    mask, numbers = np.ones((4, 2), bool), [0, 1, 0, 1]
    (_, kept, _) = as_data((np.ones((4, 2)), mask, numbers), "train", "classification", 2).tree
    (alone, _) = as_data((mask, numbers), "train", "classification", 2).tree
    assert (kept.dtype, alone.dtype) == (torch.bool, torch.float32)


def test_bytes_are_pixels():
    data = as_data((np.full((2, 1, 4, 4), 255, np.uint8), [0, 1]), "train", "classification", 2)
    assert data.tree[0].dtype == torch.float32
    assert float(data.tree[0].max()) == 1


def test_targets_of_a_regression_are_floats():
    data = as_data((torch.zeros(3, 2), np.array([1, 2, 3])), "train", "regression", 2)
    assert data.tree[1].dtype == torch.float32


def test_a_custom_program_keeps_its_integers():
    data = as_data(torch.zeros(3, 2, dtype=torch.uint8), "train", "custom", 2)
    assert data.tree.dtype == torch.uint8


def nan_inputs():
    x, y = x_y()
    x[4, 1] = float("nan")
    return x, y


@pytest.mark.parametrize(
    ("raw", "task", "said"),
    [
        (nan_inputs(), "classification", r"train\[0\] holds 1 NaN or infinite .*row 4"),
        (
            (torch.zeros(3, 2), torch.tensor([0.0, np.inf, 1])),
            "regression",
            r"train\[1\] holds 1 NaN",
        ),
        (
            (torch.zeros(3, 2), torch.zeros(4)),
            "regression",
            r"unequal .*train\[0\] 3, train\[1\] 4",
        ),
        ((torch.zeros(0, 2), torch.zeros(0)), "regression", "train is empty"),
        ([], "classification", "train is empty"),
        ((torch.zeros(3, 2), torch.tensor([0, -1, 1])), "classification", "class number -1"),
        (
            (torch.zeros(3, 2), torch.tensor([0.5, 1, 1])),
            "classification",
            r"train\[1\] holds labels of type float32: give class numbers",
        ),
        ((torch.zeros(3, 2), np.array([2.0, 0, 1])), "classification", "type float64.*y.long"),
        ((torch.zeros(2, 2), torch.eye(2)), "classification", "one-hot .*argmax"),
        ((torch.zeros(3, 2), torch.eye(3).long()), "classification", "one-hot .*argmax"),
        ({"x": torch.zeros(3), "y": np.eye(3) > 0}, "classification", r"\['y'\] holds one-hot"),
        ((torch.zeros(2, 2), torch.eye(4).expand(2, 4, 4)), "classification", "one-hot"),
        (
            (torch.zeros(3, 2), torch.full((3, 4), 0.25)),
            "classification",
            "probabilities .*long form",
        ),
        (
            [(torch.zeros(2), "cat")] * 4,
            "classification",
            r"train\[1\] .*type str: give class numb",
        ),
        ([(torch.zeros(2), 2.0)] * 4, "classification", r"train\[1\] .*type float32: give class n"),
        ([(torch.zeros(2), "cat")] * 4, "regression", r"train\[1\] holds no numbers"),
        ((torch.zeros(2, 2), np.array(["cat", "dog"])), "classification", r"train\[1\] holds <U3"),
        (torch.zeros(3, 2), "classification", "a batch must be"),
        ({"x": torch.zeros(3)}, "classification", "needs its targets under one of labels"),
        (Endless(), "classification", "Endless, which .*: give tensors"),
        (3, "classification", "train is a int"),
        (
            DataLoader(TensorDataset(*x_y()), sampler=WeightedRandomSampler([1.0] * 10, 10)),
            "classification",
            "its own WeightedRandomSampler",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(raw, task, said):
    with pytest.raises(ProgramError, match=said) as caught:
        as_data(raw, "train", task, 4)
    assert "\n" not in str(caught.value)


def test_what_a_dataset_raises_is_said_with_its_place():
    class Torn(Augmented):
        def __getitem__(self, i):
            return json.loads("torn")  # raised inside Python's own library

    with pytest.raises(ProgramError, match=r"the train data failed: .*test_data.py:\d+: JSOND"):
        as_data(Torn(), "train", "classification", 4)


def test_several_labels_an_example_are_no_one_hot_rows():
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    data = as_data((torch.zeros(3, 2), labels), "train", "classification", 2)
    assert torch.equal(data.tree[1], labels)


def test_class_names_beside_a_stream_do_not_matter():
    class Named(Augmented):
        def __getitem__(self, i):
            return torch.zeros(2), i % 3

    named = Named()
    named.targets = ["cat", "dog"] * 6
    read = read_splits(RawSplits(named), "classification", 4)
    assert make_splits(read, 0, "classification").sizes["test"] == 2


def test_what_reading_raises_is_said_with_its_place():
    def load():
        raise FileNotFoundError("no images here")

    with pytest.raises(ProgramError, match=r"reading the test data failed: .*test_data.py:\d+: Fi"):
        as_data(load, "test", "classification", 4)


def test_ignored_targets_are_allowed():
    data = as_data((torch.zeros(2, 3), torch.tensor([0, -100])), "train", "classification", 2)
    assert data.tree[1].tolist() == [0, -100]


# --- streams ------------------------------------------------------------------------------


def streamed(workers=0, n=12):
    loader = DataLoader(Augmented(n), batch_size=5, num_workers=workers)
    return as_data(loader, "train", "classification", 5)


def collected(data, order, seed=1, epoch=2):
    return [(x.tolist(), y.tolist()) for x, y in data.batches(order, seed, epoch, "cpu")]


def test_a_stream_repeats_exactly_in_any_number_of_workers():
    order = epoch_order(12, 1, 2)
    alone = collected(streamed(), order)
    assert [len(y) for _, y in alone] == [5, 5, 2]
    assert alone == collected(streamed(), order)
    assert alone == collected(streamed(workers=2), order)


def test_augmentation_depends_on_seed_epoch_and_example_alone():
    data = streamed()
    one = dict(zip([3, 4, 5], collected(data, [3, 4, 5])[0][0], strict=True))
    other = dict(zip([5, 3], collected(data, [5, 3])[0][0], strict=True))
    assert one[3] == other[3]
    assert one[5] == other[5]
    assert collected(data, [3], epoch=3)[0][0][0] != one[3]
    assert collected(data, [3], seed=2)[0][0][0] != one[3]


def test_reading_leaves_the_generators_alone():
    data = streamed()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = float(torch.rand(())), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    collected(data, range(12))
    assert before == (float(torch.rand(())), np.random.rand(), random.random())


def test_streams_are_converted_too():
    x, y = next(streamed().batches([0, 1], 0, 0, "cpu"))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_a_dataset_without_augmentation_can_be_read_into_memory():
    data = in_memory(Augmented(7), batch_size=3)
    assert data.n == 7
    assert data.tree[0][:, 0].tolist() == list(map(float, range(7)))


# --- splits -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 300), st.integers(2, 5), st.integers(0, 1000))
def test_splitting_off_parts_the_examples_by_class(n, classes, seed):
    targets = torch.arange(n) % classes
    data = InMemory((torch.arange(n).view(n, 1).float(), targets), n)
    rest, taken, _ = split_off(data, seed, "classification")
    ids = [part.tree[0].flatten().tolist() for part in (rest, taken)]
    assert sorted(ids[0] + ids[1]) == list(range(n))
    assert len(ids[1]) == n // 5
    for label in range(classes):
        have = int((taken.tree[1] == label).sum())
        assert abs(have - 0.2 * int((targets == label).sum())) < 2


@pytest.mark.parametrize("n", [40, 43])
def test_five_seeds_in_a_row_are_folds(n):
    data = InMemory((torch.arange(n).view(n, 1).float(), torch.arange(n) % 2), n)
    parts = [split_off(data, 35 + fold, "classification")[1] for fold in range(5)]
    held = [set(part.tree[0].flatten().tolist()) for part in parts]
    assert all(len(one) == n // 5 for one in held)
    assert len(set.union(*held)) == 5 * (n // 5)
    other = split_off(data, 40, "classification")[1]
    assert set(other.tree[0].flatten().tolist()) not in held


def test_the_test_set_is_the_same_for_all_seeds():
    read = read_splits(RawSplits(x_y(100)), "classification", 10)
    one, two = (make_splits(read, seed, "classification") for seed in (1, 2))
    assert one.made == ("test", "validation")
    assert one.sizes == {"train": 64, "validation": 16, "test": 20}
    assert torch.equal(one.test.tree[0], two.test.tree[0])
    assert not torch.equal(one.validation.tree[0], two.validation.tree[0])
    again = make_splits(read, 1, "classification")
    assert torch.equal(one.validation.tree[0], again.validation.tree[0])


def test_what_is_given_is_not_split():
    raw = RawSplits(x_y(100), validation=x_y(10), test=x_y(20))
    splits = make_splits(read_splits(raw, "classification", 10), 0, "classification")
    assert splits.made == ()
    assert splits.sizes == {"train": 100, "validation": 10, "test": 20}


def test_no_test_set_where_none_is_wanted():
    splits = make_splits(
        read_splits(RawSplits(x_y(100), test=False), "classification", 10), 0, "classification"
    )
    assert splits.test is None
    assert splits.sizes == {"train": 80, "validation": 20}


def test_streams_are_split_by_their_targets():
    rest, taken, how = split_off(streamed(n=30), 0, "classification")
    assert isinstance(taken, Streamed)
    assert (rest.n, taken.n) == (24, 6)
    assert "by class" in how
    classes = torch.cat([y for _, y in taken.batches(range(6), 0, 0, "cpu")])
    assert sorted(classes.tolist()) == [0, 0, 1, 1, 2, 2]


def test_too_few_examples_to_split():
    with pytest.raises(ProgramError, match="2 examples are too few"):
        split_off(InMemory((torch.zeros(2, 1), torch.zeros(2).long()), 2), 0, "classification")


def test_batches_part_into_inputs_and_targets():
    assert split_target((1, 2, 3)) == ((1, 2), {}, 3)
    assert split_target({"a": 1, "label": 2}) == ((), {"a": 1}, 2)


def test_trees_keep_their_form():
    tree = {"a": (1, [2, 3])}
    assert map_leaves(tree, lambda leaf: leaf + 1) == {"a": (2, [3, 4])}
