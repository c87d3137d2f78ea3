"""Attention and recurrent layers in plain operations, for where torch's kernels cannot serve.

The kernels take one rate for all, draw their own masks, and have no batching rule under
`torch.func.vmap`. What is here computes the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Drop = Callable[[Tensor], Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    drop: Drop | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention`; `drop` acts on the weights [..., queries, keys].

    A row that may see no key gives 0, as in torch. `dropout_p` is ignored.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = _masked_softmax(scores, attn_mask)
    return (weights if drop is None else drop(weights)) @ value


def _masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    is_choice = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, float("-inf")) if is_choice else scores + mask
    blind = scores.amax(-1, keepdim=True) == float("-inf")
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


Step = Callable[[Tensor, tuple[Tensor, ...], Sequence[Tensor | None]], tuple[Tensor, ...]]


def _lstm_step(
    given: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`given` is the input's part of the gates; `weights` are (recurrent, bias, projection)."""
    hidden, cell = state
    gates = given + functional.linear(hidden, *_pair(weights))
    enter, forget, new, leave = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    hidden = leave.sigmoid() * cell.tanh()
    projection = weights[2]
    return (hidden if projection is None else functional.linear(hidden, projection)), cell


def _gru_step(
    given: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    (hidden,) = state
    reset, update, new = given.chunk(3, -1)
    own_reset, own_update, own_new = functional.linear(hidden, *_pair(weights)).chunk(3, -1)
    reset, update = (reset + own_reset).sigmoid(), (update + own_update).sigmoid()
    new = (new + reset * own_new).tanh()
    return (new + update * (hidden - new),)


def _plain_step(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(
        given: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        return (activation(given + functional.linear(state[0], *_pair(weights))),)

    return step


def _pair(weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    recurrent = weights[0]
    assert recurrent is not None
    return recurrent, weights[1]


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _plain_step(torch.tanh),
    "rnn_relu": _plain_step(torch.relu),
}


def recurrent_cell(
    name: str,
    x: Tensor,
    state: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """`torch.lstm_cell` (returns hidden, cell), `gru_cell`, `rnn_tanh_cell`, `rnn_relu_cell`."""
    states = (state,) if isinstance(state, Tensor) else tuple(state)
    after = _STEPS[name](functional.linear(x, w_ih, b_ih), states, (w_hh, b_hh, None))
    return after if name == "lstm" else after[0]


def _one_direction(
    name: str, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], biased: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: `x` [time, batch, features]."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = (rest[0], rest[1]) if biased else (None, None)
    projection = rest[-1] if len(rest) % 2 else None
    outputs = []
    for given in functional.linear(x, w_ih, b_ih).unbind(0):
        state = _STEPS[name](given, state, (w_hh, b_hh, projection))
        outputs.append(state[0])
    return torch.stack(outputs), state


def recurrent_layer(
    name: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biased: bool,
    bidirectional: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer of `nn.LSTM`, `nn.GRU` or `nn.RNN`, all its steps.

    `x` [time, batch, features]; `states` (hidden[, cell]), each [directions, batch, features].
    """
    each = len(weights) // (2 if bidirectional else 1)
    outputs, ends = [], []
    for direction in range(2 if bidirectional else 1):
        begin = tuple(state[direction] for state in states)
        own = weights[direction * each : (direction + 1) * each]
        seen = x.flip(0) if direction else x
        output, end = _one_direction(name, seen, begin, own, biased)
        outputs.append(output.flip(0) if direction else output)
        ends.append(end)
    return torch.cat(outputs, -1), tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
