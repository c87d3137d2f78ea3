"""Which examples each update sees: the training data of one split, cut into updates.

A training's own count of updates gives its pass, its place in the pass and its order (a pure
function of data seed and pass), so it can start, stop and go on anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from droptune.program.data import (
    Batch,
    InMemory,
    Streamed,
    epoch_order,
    join,
    part_of,
    place,
    size_of,
)

Bounds = tuple[int, int]  # the first example of a part, and the one after its last


@functools.lru_cache
def cut(n: int, size: int, *, merge_lone: bool = False) -> tuple[Bounds, ...]:
    """0..n in parts of `size`; the last may be smaller.

    With `merge_lone` a last part of one example joins the part before it: batch normalisation
    cannot train on a single example, and no example is dropped.
    """
    starts = list(range(0, n, size))
    if merge_lone and size > 1 and len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return tuple(zip(starts, [*starts[1:], n], strict=True))


@dataclass(frozen=True)
class Update:
    """The data of one update: its micro-batches and each one's share of the examples."""

    batches: tuple[Batch, ...]
    shares: tuple[float, ...]
    size: int


class Feed:
    """Training data in updates of `batch_size` examples, each in `accumulate` micro-batches."""

    def __init__(
        self,
        data: InMemory | Streamed,
        batch_size: int,
        accumulate: int,
        merge_lone: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.data = data
        self._merge_lone = merge_lone
        self._micro = -(-batch_size // accumulate)
        self._bounds = cut(data.n, batch_size, merge_lone=merge_lone)
        self._device = device
        self._dtype = dtype

    @property
    def updates(self) -> int:
        """How many updates a pass has."""
        return len(self._bounds)

    @property
    def streamed(self) -> bool:
        return isinstance(self.data, Streamed)

    def phase(self, done: int) -> int:
        """What must agree between trainings that go through an interval side by side.

        0 where it does not matter: an interval begins with a pass, or all batches are alike.
        """
        alike = len({stop - start for start, stop in self._bounds}) == 1
        return 0 if alike else done % self.updates

    def interval(self, seeds: Sequence[int], done: Sequence[int], count: int) -> Iterator[Update]:
        """`count` updates for trainings with these data seeds and updates behind them.

        Batches are shared, [B, ...], where all trainings see the same examples (always where
        the data are streamed), and one per training, [k, B, ...], otherwise (`is_shared`).
        """
        if isinstance(self.data, InMemory) and len({d % self.updates for d in done}) > 1:
            yield from self._apart(self.data, seeds, done, count)
            return
        for offset, bounds in self._by_pass(done[0], count):
            passes = [d // self.updates + offset for d in done]
            if isinstance(self.data, Streamed):
                yield from self._stream(self.data, seeds[0], passes[0], bounds)
            else:
                order = self._order(seeds, passes, self.is_shared(seeds, done))
                for start, stop in bounds:
                    yield self._gather(self.data, order[..., start:stop])

    def _apart(
        self, data: InMemory, seeds: Sequence[int], done: Sequence[int], count: int
    ) -> Iterator[Update]:
        """Updates of trainings at different places in their passes, where all batches are alike."""
        size, order_of = self._bounds[0][1], functools.cache(functools.partial(epoch_order, data.n))
        rows = []
        for seed, start in zip(seeds, done, strict=True):
            passes = range(start // self.updates, (start + count - 1) // self.updates + 1)
            order = torch.cat([order_of(seed, number) for number in passes])
            place = start % self.updates
            rows.append(order[place * size : (place + count) * size])
        for part in torch.split(torch.stack(rows).to(self._device), size, dim=1):
            yield self._gather(data, part)

    def is_shared(self, seeds: Sequence[int], done: Sequence[int]) -> bool:
        """Whether all these trainings see the same examples."""
        return self.streamed or len(set(zip(seeds, done, strict=True))) == 1

    def _by_pass(self, done: int, count: int) -> Iterator[tuple[int, Sequence[Bounds]]]:
        """The batches of each pass that an interval touches, passes counted from its first."""
        place = done % self.updates
        for offset in range((place + count - 1) // self.updates + 1):
            start = max(place - offset * self.updates, 0)
            yield offset, self._bounds[start : place + count - offset * self.updates]

    def _order(self, seeds: Sequence[int], passes: Sequence[int], shared: bool) -> Tensor:
        """The order of the examples: [n], or one for each training [k, n]."""
        if shared:
            return epoch_order(self.data.n, seeds[0], passes[0]).to(self._device)
        order_of = functools.cache(functools.partial(epoch_order, self.data.n))
        orders = [order_of(seed, number) for seed, number in zip(seeds, passes, strict=True)]
        return torch.stack(orders).to(self._device)

    def _gather(self, data: InMemory, order: Tensor) -> Update:
        return self._update(
            order.shape[-1], lambda start, stop: data.gather(order[..., start:stop])
        )

    def _stream(
        self, data: Streamed, seed: int, number: int, bounds: Sequence[Bounds]
    ) -> Iterator[Update]:
        order = epoch_order(data.n, seed, number)[bounds[0][0] : bounds[-1][1]]
        read = data.batches(order, seed, number, self._device)
        for start, stop in bounds:
            batch = next(read)
            if size_of(batch) < stop - start:
                batch = join([batch, next(read)])
            batch = place(batch, self._device, self._dtype)
            yield self._update(stop - start, functools.partial(part_of, batch))

    def _update(self, size: int, part: Callable[[int, int], Batch]) -> Update:
        cuts = cut(size, self._micro, merge_lone=self._merge_lone)
        return Update(
            tuple(part(start, stop) for start, stop in cuts),
            tuple((stop - start) / size for start, stop in cuts),
            size,
        )
