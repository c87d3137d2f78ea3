"""Dropout masks as a pure function of where they are drawn.

A mask is a function of (seed, update, micro-batch, site, call, element index) and of nothing
else. It is computed with integer arithmetic from counters, never from a generator, so there is
no state to save, the bits are the same on every device, and a training sees the same masks alone
and in any slot of a fused group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from droptune.sites import kernel

Shape = tuple[int, ...]

# The two odd multipliers of lowbias32 (Wellons, "Prospecting for hash functions", 2018), and
# those of SplitMix64 (Steele et al., OOPSLA 2014), as signed numbers.
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_MICRO = 0x5851F42D4C957F2D  # Knuth's multiplier (MMIX)


def _signed(word: int, bits: int = 32) -> int:
    """The signed integer that has the low `bits` bits of `word`."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def split_seed(seed: int) -> tuple[int, int]:
    """A 63-bit seed as two int32 words, low word first."""
    return _signed(seed), _signed(seed >> 32)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on a fresh int64 tensor, in place."""
    z ^= (z >> 30).bitwise_and_((1 << 34) - 1)
    z *= _MIX_1
    z ^= (z >> 27).bitwise_and_((1 << 37) - 1)
    z *= _MIX_2
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def derive_keys(seed: Tensor, update: Tensor, micro: int | Tensor, sites: int) -> Tensor:
    """The keys of all sites for one micro-batch of one update.

    `seed` is int32 [..., 2] (see `split_seed`), `update` an int32 tensor [...] that counts the
    training's own updates, `micro` counts the micro-batches of an update. Returns int32
    [..., sites, 2]. Any leading shape goes: slots, or updates x slots to derive the keys of many
    updates at once (about 30 small tensor operations, whatever the shape).
    """
    words = update.to(torch.int64) * _GOLDEN
    if isinstance(micro, Tensor):
        counter = words + micro.to(torch.int64) * _MICRO
    else:
        counter = words + _signed(micro * _MICRO, 64)
    state = _mix(seed.contiguous().view(torch.int64).squeeze(-1) + counter)
    ordinals = torch.arange(1, sites + 1, dtype=torch.int64, device=seed.device)
    keys = _mix(state.unsqueeze(-1) + ordinals * _GOLDEN)
    return keys.view(torch.int32).view(*keys.shape, 2)


_hashed_indices: dict[tuple[torch.device, int], Tensor] = {}


def _indices(count: int, device: torch.device) -> Tensor:
    """Element indices 0..count-1, hashed by lowbias32 (int32). Cached, and never freed: a
    captured CUDA graph may still read it."""
    power = max(count - 1, 1).bit_length()
    hashed = _hashed_indices.get((device, power))
    if hashed is None:
        x = torch.arange(1 << power, dtype=torch.int32, device=device)
        for shift, multiplier in ((16, _FIRST), (15, _SECOND), (16, 1)):
            x ^= (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)
            x *= multiplier
        hashed = x
        if type(x) is Tensor and not functorch.is_functorch_wrapped_tensor(x):
            _hashed_indices[device, power] = x
    return hashed[:count]


class Noise(NamedTuple):
    """What one call of a site draws from.

    Its tensors are 0-dim. Under vmap, `level` is the transform's level and they are the plain
    [slots, 1] behind it: a mask of all slots then costs its arithmetic and not a batching rule
    for each operation (half the time of a mask, where masks are small).
    """

    rate: Tensor
    threshold: Tensor  # int32: rate * 2^32 - 2^31, towards 0
    scale: Tensor  # 1 / (1 - rate)
    first: Tensor  # int32, the key's words
    second: Tensor
    level: int | None = None

    @classmethod
    def of(cls, rate: Tensor, key: Tensor) -> Noise:
        """The noise of a site with this rate (0-dim) and key (int32 [2])."""
        return noises(rate.unsqueeze(0), key.unsqueeze(0))[0]

    def at(self, call: int) -> Noise:
        """The noise of the site's call number `call` in this micro-batch."""
        if call == 0:
            return self
        salt = split_seed(call * 0x9E3779B97F4A7C15)
        return self._replace(first=self.first ^ salt[0], second=self.second ^ salt[1])

    def at_rate(self, rate: Tensor) -> Noise:
        """The same key at another rate (a tensor like `rate`)."""
        return self._replace(rate=rate, threshold=_threshold(rate), scale=_scale(rate))

    def keep(self, shape: Shape, device: torch.device) -> Tensor:
        """Which elements stay: bool [*shape], each True with probability 1 - rate."""
        return self._shaped(self._drawn(shape, device).to(torch.bool), shape)

    def ones(self, shape: Shape, like: Tensor) -> Tensor:
        """1 where an element stays, else 0: [*shape] in the type of `like`."""
        return self._shaped(self._drawn(shape, like.device).to(like.dtype), shape)

    def multipliers(self, shape: Shape, like: Tensor) -> Tensor:
        """1 / (1 - rate) where an element stays, else 0: [*shape] in the type of `like`."""
        kept, scale = self._drawn(shape, like.device).to(like.dtype), self.scale.to(like.dtype)
        return self._shaped(kept * scale if _is_batched(kept, scale) else kept.mul_(scale), shape)

    def per_slot(self, value: Tensor) -> Tensor:
        """A tensor like `rate` as the 0-dim tensor that a slot sees."""
        return self._shaped(value, ())

    def _drawn(self, shape: Shape, device: torch.device) -> Tensor:
        """0 or 1, flat."""
        drawn_from = _indices(math.prod(shape), device), self.first, self.second, self.threshold
        if device.type not in kernel.DEVICES or _is_batched(*drawn_from):
            return _draw(*drawn_from)
        return _draw_at_once(*drawn_from)

    def _shaped(self, flat: Tensor, shape: Shape) -> Tensor:
        if self.level is None:
            return flat.view(shape)
        # A transform inside of vmap (torch.func.grad) wraps what is computed under it.
        return functorch._add_batch_dim(unwrapped(flat.view(-1, *shape)), 0, self.level)


def _draw(indices: Tensor, first: Tensor, second: Tensor, threshold: Tensor) -> Tensor:
    """Two keyed multiply-xorshift rounds over the hashed indices: 0 or 1.

    In place on the first fresh tensor, comparison included (a bool output is not vectorised):
    0.7 ns an element on one CPU core, where `F.dropout` takes 10.
    """
    x = indices ^ first
    x *= _FIRST
    x ^= x.bitwise_right_shift(16).bitwise_and_(0xFFFF)
    x ^= second
    x *= _SECOND
    return x >= threshold if _is_batched(x, threshold) else x.ge_(threshold)


_draw_at_once = kernel.operation_for(_draw)  # on a CUDA device


def _is_batched(*tensors: Tensor) -> bool:
    """Whether a transform batches rate or key all the same: no place for in-place steps."""
    return any(map(functorch.is_functorch_wrapped_tensor, tensors))


def _threshold(rate: Tensor) -> Tensor:
    words = (rate.to(torch.float64) * 2.0**32).sub_(2.0**31)
    return words.clamp(max=2.0**31 - 1).to(torch.int32)


def _scale(rate: Tensor) -> Tensor:
    return (1 - rate).reciprocal_()


def _columns(values: Tensor) -> Sequence[Tensor]:
    """Of [sites], 0-dim tensors; of [slots, sites], tensors [slots, 1]."""
    return values.unbind(0) if values.dim() == 1 else values.t().unsqueeze(-1).unbind(0)


class Levels(NamedTuple):
    """What follows from the rates of all sites alone, site by site."""

    rates: Sequence[Tensor]
    thresholds: Sequence[Tensor]
    scales: Sequence[Tensor]

    @classmethod
    def of(cls, rates: Tensor) -> Levels:
        """`rates` [sites] or, plain under vmap, [slots, sites]."""
        return cls(*map(_columns, (rates, _threshold(rates), _scale(rates))))


def behind_vmap(rates: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """What a running vmap batches: plain [slots, sites], [slots, sites, 2] and its level; the
    tensors themselves and None where there is no vmap, or it does not batch both."""
    transform = functorch.peek_interpreter_stack()
    level = None if transform is None else transform.level()
    for tensor in (rates, keys):
        if not functorch.is_batchedtensor(tensor) or functorch.maybe_get_level(tensor) != level:
            return rates, keys, None
    return slots_first(rates), slots_first(keys), level


def slots_first(batched: Tensor) -> Tensor:
    """A tensor that the innermost vmap batches, without it: [slots, ...]."""
    plain, dimension = functorch.get_unwrapped(batched), functorch.maybe_get_bdim(batched)
    return plain.movedim(dimension, 0) if dimension else plain


def unwrapped(tensor: Tensor) -> Tensor:
    """A tensor without the transforms around it."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def noises(rates: Tensor, keys: Tensor) -> list[Noise]:
    """The noise of every site: `rates` [sites], `keys` int32 [sites, 2], batched or not."""
    rates, keys, level = behind_vmap(rates, keys)
    return noises_at(Levels.of(rates), keys, level)


def noises_at(levels: Levels, keys: Tensor, level: int | None) -> list[Noise]:
    """`noises`, from rates whose levels are known; `keys` and `level` are `behind_vmap`'s."""
    first, second = map(_columns, keys.unbind(-1))
    return [Noise(*row, level) for row in zip(*levels, first, second, strict=True)]


def keep_mask(shape: Shape, rate: Tensor, key: Tensor, device: torch.device) -> Tensor:
    """Which elements stay: bool [*shape]; `rate` is 0-dim, `key` int32 [2]."""
    return Noise.of(rate, key).keep(shape, device)
