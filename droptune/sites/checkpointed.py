"""Activation checkpointing: what it computes again in the backward pass sees the same masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from droptune.sites.watch import under_functorch

_GENERATOR = "_checkpoint_without_reentrant_generator"
_REENTRANT = "CheckpointFunction"

Replay = Callable[[], AbstractContextManager[None]]


class _NotReentrant:
    """Stands in for torch's reentrant checkpoint, whose second run cannot be given a context."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch_checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve
        )


@contextlib.contextmanager
def replaying(remember: Callable[[], Replay]) -> Iterator[None]:
    """Inside, each checkpointed segment calls `remember` when it begins; what that returns is
    the context of the segment's second run, whenever and in whatever thread that happens."""
    generator = getattr(torch_checkpoint, _GENERATOR)
    reentrant = getattr(torch_checkpoint, _REENTRANT)

    def with_replay(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if under_functorch():  # whose tensors a second run, in the backward pass, would not have
            return iter([None])  # torch runs the segment between two steps of this: once, and keeps
        replay = remember()

        def again(*inner: Any, **named: Any) -> Any:
            with replay():
                return function(*inner, **named)

        return generator(again, *args, **kwargs)

    setattr(torch_checkpoint, _GENERATOR, with_replay)
    setattr(torch_checkpoint, _REENTRANT, _NotReentrant)
    try:
        yield
    finally:
        setattr(torch_checkpoint, _GENERATOR, generator)
        setattr(torch_checkpoint, _REENTRANT, reentrant)
