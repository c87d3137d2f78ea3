"""Every update sees the examples that its training's own count says."""

from __future__ import annotations

import pytest
import torch

from droptune.program.data import InMemory, Streamed, epoch_order
from droptune.trainers.feed import Feed, cut

CPU = torch.device("cpu")


def feed(n: int, batch: int, accumulate: int = 1, merge_lone: bool = False) -> Feed:
    data = InMemory((torch.arange(n), torch.arange(n) * 2), n)
    return Feed(data, batch, accumulate, merge_lone, CPU, torch.float32)


def seen(updates) -> list[list[int]]:
    return [[int(i) for batch in update.batches for i in batch[0]] for update in updates]


@pytest.mark.parametrize(
    ("n", "size", "merge", "sizes"),
    [
        (9, 4, False, [4, 4, 1]),
        (9, 4, True, [4, 5]),
        (8, 4, True, [4, 4]),
        (1, 4, True, [1]),
        (3, 1, True, [1, 1, 1]),
    ],
)
def test_parts(n, size, merge, sizes):
    assert [stop - start for start, stop in cut(n, size, merge_lone=merge)] == sizes


def test_a_pass_sees_every_example_once_in_its_own_order():
    made = feed(11, 4)
    for number in range(3):
        order = [i for part in seen(made.interval([7], [3 * number], 3)) for i in part]
        assert order == epoch_order(11, 7, number).tolist()


@pytest.mark.parametrize("done", range(7))
def test_an_interval_may_begin_and_end_anywhere(done):
    made = feed(11, 4)
    whole = seen(made.interval([7], [0], 12))
    assert seen(made.interval([7], [done], 5)) == whole[done : done + 5]


def test_trainings_at_other_places_have_batches_of_their_own():
    made = feed(8, 4)
    (first, *_) = made.interval([7, 8, 7], [0, 0, 2], 2)
    assert first.batches[0][0].shape == (3, 4)
    for k, (seed, done) in enumerate([(7, 0), (8, 0), (7, 2)]):
        alone = next(iter(made.interval([seed], [done], 2)))
        assert torch.equal(first.batches[0][1][k], alone.batches[0][1])
    assert not made.is_shared([7, 8], [0, 0])
    assert made.is_shared([7, 7], [2, 2])


def test_trainings_inside_different_passes_see_what_each_would_alone():
    made = feed(20, 2)
    seeds, done = [7, 8, 7], [4, 0, 27]
    together = list(made.interval(seeds, done, 13))
    for k in range(3):
        alone = seen(made.interval([seeds[k]], [done[k]], 13))
        assert [update.batches[0][0][k].tolist() for update in together] == alone


def test_micro_batches_are_shares_of_a_batch():
    updates = list(feed(11, 4, accumulate=2).interval([7], [0], 3))
    assert [[len(b[0]) for b in u.batches] for u in updates] == [[2, 2], [2, 2], [2, 1]]
    assert [u.shares for u in updates] == [(0.5, 0.5), (0.5, 0.5), (2 / 3, 1 / 3)]
    assert [u.size for u in updates] == [4, 4, 3]


def test_the_phase_matters_only_where_batches_differ():
    assert [feed(12, 4).phase(done) for done in range(4)] == [0, 0, 0, 0]
    assert [feed(11, 4).phase(done) for done in range(4)] == [0, 1, 2, 0]


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, index):
        return index, float(index)


@pytest.mark.parametrize("done", range(4))
def test_a_stream_sees_what_memory_would(done):
    data = Streamed(Numbers(), 4, torch.utils.data.default_collate, 0, 9)
    stream = Feed(data, 4, 1, True, CPU, torch.float64)
    assert stream.streamed
    updates = list(stream.interval([7], [done], 3))
    assert seen(updates) == seen(feed(9, 4, merge_lone=True).interval([7], [done], 3))
    assert updates[0].batches[0][1].dtype == torch.float64
