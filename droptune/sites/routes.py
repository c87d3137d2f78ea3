"""Replacing code that is nothing but dropout: whole modules, and plain functions.

Such a module gets a `forward` of its own on the instance; its class, hooks and `state_dict` stay.
A plain function (`drop_path(x, self.drop_prob, self.training)`) is replaced by name, in the files
of the model's classes, and only while the model runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from droptune.errors import SiteError
from droptune.sites.dropout import KINDS, OPTIONS, Kind, Recognised
from droptune.sites.watch import (
    BETWEEN,
    HANDLERS,
    Call,
    Listener,
    Place,
    call_of,
    caller,
    running_module,
)

BETWEEN.add(__file__)
_MODULE_FILE = frozenset({nn.Module._call_impl.__code__.co_filename})


class Routes:
    """Forwards of single modules, replaced on the instance until `undo`."""

    def __init__(self, listener: Callable[[], Listener | None]) -> None:
        self._listener = listener
        self._before: list[tuple[nn.Module, Any]] = []

    def dropout(self, module: nn.Module, what: Recognised) -> None:
        """Route a module that is nothing but dropout to the listener."""
        original, current = module.forward, self._listener
        first = list(inspect.signature(type(module).forward).parameters)[1]
        fixed = None if what.by_argument else _module_call(module, what, what.rate(module), "")

        def forward(*args: Any, **kwargs: Any) -> Any:
            listener, x = current(), args[0] if args else kwargs[first]
            if listener is not None and not listener.training:
                return x
            if listener is None or not module.training:
                return original(*args, **kwargs)
            if fixed is not None:
                return listener.dropout(fixed, x)
            rate, where = what.rate(module, *args, **kwargs), call_of(caller(files=_MODULE_FILE))
            return listener.dropout(_module_call(module, what, rate, where), x)

        self._replace(module, forward)

    def inserted(self, module: nn.Module, kind: str) -> None:
        """Put dropout of this kind behind `module`: on its output, or on the first of several.

        Kind `path` takes the module for a residual block: where it drops, the input passes.
        """
        original, current = module.forward, self._listener
        time = 1 if getattr(module, "batch_first", True) else 0
        call = Call(Place(module, f"inserted-{kind}"), kind, f"inserted-{kind}", 0.0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            output, listener = original(*args, **kwargs), current()
            if listener is None or not (module.training and listener.training):
                return output
            options: dict[str, Any] = {"time": time}
            if kind == "path":
                options["around"] = _block_input(module, args, output)
            return _on_first(output, lambda y: listener.dropout(replace(call, options=options), y))

        self._replace(module, forward)

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._before.append((module, vars(module).get("forward")))
        vars(module)["forward"] = forward

    def undo(self) -> None:
        """Put every forward back."""
        for module, before in reversed(self._before):
            if before is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before
        self._before.clear()


def _block_input(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    first = output[0] if type(output) in (tuple, list) else output
    before = args[0] if args else None
    if not (isinstance(before, Tensor) and before.shape == getattr(first, "shape", None)):
        raise SiteError(
            f"No stochastic depth after {type(module).__name__}: a residual block has one input, "
            "and gives back its shape; insert it after such blocks only."
        )
    return before


def _module_call(module: nn.Module, what: Recognised, rate: float, where: str) -> Call:
    return Call(Place(module, where), what.kind.name, what.kind.name, rate, what.options)


def _on_first(output: Any, act: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return act(output)
    if type(output) in (tuple, list):
        return type(output)([_on_first(output[0], act), *output[1:]])
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = act(output.last_hidden_state)
    return output


@dataclass(frozen=True)
class DropoutFunction:
    """A plain function that draws dropout, and where its callers find it."""

    namespace: dict[str, Any]
    name: str
    kind: Kind
    rate: str  # its argument that is the rate

    def replacement(self, listener: Listener) -> Callable[..., Any]:
        original = self.namespace[self.name]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def function(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(x, *args, **kwargs)
            given.apply_defaults()
            values = given.arguments
            if not (listener.training and values.get("training", True)):
                return x
            frame = caller()
            options = {name: values[name] for name in OPTIONS if name in values}
            place = Place(running_module(frame), call_of(frame))
            rate = float(values[self.rate] or 0.0)
            return listener.dropout(Call(place, self.kind.name, self.kind.name, rate, options), x)

        return function


def dropout_functions(modules: Iterable[nn.Module]) -> list[DropoutFunction]:
    """The plain dropout functions in the files that define the model's classes, or in modules
    that these import."""
    classes = {cls for module in modules for cls in type(module).__mro__}
    files = {cls.__module__ for cls in classes if cls.__module__.partition(".")[0] != "torch"}
    spaces = [vars(sys.modules[file]) for file in sorted(files) if file in sys.modules]
    imported = [
        vars(value)
        for space in spaces
        for value in list(space.values())
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] != "torch"
    ]
    unique = {id(space): space for space in (*spaces, *imported)}
    return [found for space in unique.values() for found in _functions_in(space)]


def _functions_in(space: dict[str, Any]) -> Iterator[DropoutFunction]:
    for kind in KINDS.values():
        for name in kind.functions:
            function = space.get(name)
            if isinstance(function, types.FunctionType) and function not in HANDLERS:
                after_first = list(inspect.signature(function).parameters)[1:]
                rates = [argument for argument in kind.attributes if argument in after_first]
                if rates:
                    yield DropoutFunction(space, name, kind, rates[0])


@contextlib.contextmanager
def replaced(functions: Iterable[DropoutFunction], listener: Listener) -> Iterator[None]:
    """Inside, these functions ask the listener."""
    before = [(item, item.namespace[item.name]) for item in functions]
    try:
        for item, _ in before:
            item.namespace[item.name] = item.replacement(listener)
        yield
    finally:
        for item, function in before:
            item.namespace[item.name] = function
