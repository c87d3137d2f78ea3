"""What is random in a model besides dropout: nothing random in a dry step goes unexplained."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from droptune.sites.site import Untunable
from droptune.sites.watch import line_of, running_module

PathOf = Callable[[nn.Module | None], str]

_TORCH_REASON = (
    "draws its own random numbers{where}; if it is dropout, write it as nn.Dropout or F.dropout to "
    "have it tuned"
)
_OTHER_REASON = "changes the generator of {library}, which droptune cannot replace by masks"


class RandomOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists every operation that draws from a generator of torch, by the module that runs it."""

    def __init__(self, path_of: PathOf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path_of = path_of
        self.found: dict[tuple[str, str], Untunable] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, two seconds, to keep us out of its reach."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs or {}):
            frame = sys._getframe()
            path, operation = self._path_of(running_module(frame)), func._schema.name.split(":")[-1]
            reason = _TORCH_REASON.format(where=_where(frame))
            self.found.setdefault((path, operation + reason), Untunable(path, operation, reason))
        return func(*args, **(kwargs or {}))


def _draws(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Fused kernels carry the tag even where their dropout is 0."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("train") is False:
        return False
    rate = given.get("dropout_p", given.get("dropout"))
    return bool(rate) if isinstance(rate, int | float) else "dropout_p" not in names


def _where(frame: FrameType) -> str:
    line = line_of(frame)
    if line is None:
        return ""
    code = line.f_code
    return f" in {code.co_name} ({code.co_filename.rpartition('/')[2]}:{line.f_lineno})"


def _numpy_random() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {"Python": random.getstate()}
    numpy_random = _numpy_random()
    if numpy_random is not None:
        name, keys, *rest = numpy_random.get_state()
        states["NumPy"] = (name, keys.tobytes(), *rest)
    return states


def seed_other_generators(seed: int) -> None:
    """Seeds the global generators of Python and NumPy."""
    random.seed(seed)
    numpy_random = _numpy_random()
    if numpy_random is not None:
        numpy_random.seed(seed)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Puts Python's and NumPy's global generators back at the end."""
    python, numpy_random = random.getstate(), _numpy_random()
    numpy = None if numpy_random is None else numpy_random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy_random is not None:
            numpy_random.set_state(numpy)


@contextlib.contextmanager
def other_generators(path_of: PathOf) -> Iterator[list[Untunable]]:
    """Lists the modules in whose forward Python's or NumPy's global generator moves."""
    found: list[Untunable] = []
    running: list[nn.Module | None] = [None]
    last = _states()

    def compare() -> None:
        nonlocal last
        now = _states()
        for library, state in now.items():
            item = Untunable(path_of(running[-1]), library, _OTHER_REASON.format(library=library))
            if state != last.get(library) and item not in found:
                found.append(item)
        last = now

    def enter(module: nn.Module, args: Any) -> None:
        compare()
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        compare()
        running.pop()

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave),
    ]
    try:
        yield found
        compare()
    finally:
        for handle in handles:
            handle.remove()
