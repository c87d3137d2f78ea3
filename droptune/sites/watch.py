"""Seeing, and replacing, every call that draws dropout while a model runs.

`Watch` is a torch function mode: torch shows it every function called on a tensor, whether from
somebody's `forward`, from inside `nn.MultiheadAttention`, or from outside any module. A call that
draws dropout goes to a `Listener`, with the place it comes from, and returns what that answers. A
place is read from the Python frames, and only for calls that draw, so models need no hooks and
any other call costs one look-up.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType, MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function

from droptune.sites import written_out
from droptune.sites.dropout import KINDS

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_MODULE_CALLS = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}
# Frames of these files stand between a call and us; whoever wraps `Watch` adds its own.
BETWEEN = {__file__, handle_torch_function.__code__.co_filename}
DRY_STEP = ("droptune.sites.discovery", "_run")  # the function that runs the user's model


@dataclass(frozen=True)
class Place:
    """Where a call comes from: the innermost module that runs (None: outside any), and which
    call in its code ("" where the module is nothing but this call). Line and column count from
    the start of the function, so a place survives edits elsewhere in the file."""

    module: nn.Module | None
    call: str


@dataclass(frozen=True)
class Call:
    """One call that draws dropout in training mode. `label` is how its site is called inside
    the module where it has no module of its own."""

    place: Place
    kind: str
    label: str
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)


class Listener(Protocol):
    """Who decides what a dropout call does."""

    training: bool

    def dropout(self, call: Call, x: Tensor) -> Tensor:
        """The result of the call on activation `x`."""


_calls: dict[tuple[CodeType, int], str] = {}


def call_of(frame: FrameType) -> str:
    key = (frame.f_code, frame.f_lasti)
    if key not in _calls:
        code = frame.f_code
        line, _, column, _ = list(code.co_positions())[frame.f_lasti // 2]
        offset = (line or code.co_firstlineno) - code.co_firstlineno
        _calls[key] = f"{code.co_qualname}:{offset}:{column or 0}"
    return _calls[key]


def caller(own: CodeType | None = None, files: frozenset[str] = frozenset()) -> FrameType:
    """The innermost frame that is neither ours nor of torch's dispatch, nor `own`, nor of
    `files`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not (frame.f_code is own or file in BETWEEN or file in files):
            break
        frame = frame.f_back
    assert frame is not None
    return frame


def running_module(frame: FrameType | None) -> nn.Module | None:
    """The innermost module whose call is on the stack."""
    while frame is not None:
        if frame.f_code in _MODULE_CALLS:
            module: nn.Module = frame.f_locals["self"]
            return module
        frame = frame.f_back
    return None


def line_of(frame: FrameType | None) -> FrameType | None:
    """The innermost line of a dry step that is neither torch's nor ours; None where all are."""
    while frame is not None:
        module, function = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if (module, function) == DRY_STEP:
            return None
        if module.partition(".")[0] not in ("torch", "droptune"):
            return frame
        frame = frame.f_back
    return None


def _place(func: Any) -> Place:
    """Where the function of torch was called whose handler calls this."""
    frame = caller(getattr(func, "__code__", None))
    return Place(running_module(frame), call_of(frame))


def _without_dispatch(function: Any) -> types.FunctionType:
    """A copy of a composite function of torch that does not show itself to modes.

    The original does so first thing, and would come back to us for ever.
    """
    names = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    space = {**function.__globals__, **dict.fromkeys(names, lambda *_: False)}
    copy = types.FunctionType(
        function.__code__, space, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head = _without_dispatch(functional.multi_head_attention_forward)
_embedding_signature = inspect.signature(functional.embedding)
_normalize_signature = inspect.signature(functional.normalize)
_multi_head_signature = inspect.signature(functional.multi_head_attention_forward)


def under_functorch() -> bool:
    """Whether a `torch.func` transform is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Watch(TorchFunctionMode):
    """Hands the dropout calls of torch's functions to `listener`, and writes attention and
    recurrent layers out where they have to batch."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener
        self._composite: Call | None = None  # what is inside is this one call

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or _NOTHING))
        return handler(self, func, args, kwargs or _NOTHING)

    def _call(self, func: Any, rate: float, kind: str) -> Call:
        if self._composite is not None:
            return self._composite
        label = "dropout" if kind == "element" else kind
        return Call(_place(func), kind, label, rate, KINDS[kind].functions[func.__name__])

    def element(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`F.dropout*` and the functions of torch behind it."""
        x, rate, on, inplace = _arguments(func.__name__, *args, **kwargs)
        if not (on and self.listener.training):
            return x
        y = self.listener.dropout(self._call(func, rate, _KIND_OF[func.__name__]), x)
        return _written_back(x, y) if inplace else y

    def attention(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`F.scaled_dot_product_attention`; its dropout is on where its module trains."""
        rate = float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
        if self.listener.training:
            call = self._call(func, rate, "attention")
            module = call.place.module
            if rate > 0 or module is None or module.training:
                drop = _bound(self.listener, call)
                return written_out.attention(*args, **kwargs, drop=drop)
        if under_functorch():
            return written_out.attention(*args, **kwargs)
        args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **({**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs))

    def multi_head(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`F.multi_head_attention_forward`, run so that its inner calls are shown to us."""
        given = _multi_head_signature.bind(*args, **kwargs).arguments
        outer, rate = self._composite, float(given["dropout_p"])
        if given.get("training", True):
            place = Place(running_module(sys._getframe()), func.__name__)
            self._composite = Call(place, "attention", "attention", rate)
            given["dropout_p"] = rate or 0.5  # at 0 it would skip the call that we wait for
        try:
            with self:
                return _multi_head(**given)
        finally:
            self._composite = outer

    def recurrent(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`nn.LSTM`, `nn.GRU`, `nn.RNN`: layer by layer where there is dropout between them."""
        run = _Recurrent.of(func, *args, **kwargs)
        drop = None
        if run.layers > 1 and run.training and self.listener.training:
            module = running_module(sys._getframe())
            call = Call(Place(module, "layers"), "recurrent", "recurrent", run.rate)
            drop = _bound(self.listener, call)
        elif run.packed or not under_functorch():
            return func(*args, **kwargs)
        return run(drop)

    def recurrent_cell(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`nn.LSTMCell` and the like, which have no batching rule."""
        if not under_functorch():
            return func(*args, **kwargs)
        return written_out.recurrent_cell(func.__name__.removesuffix("_cell"), *args, **kwargs)

    def embedding(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`F.embedding`: its batching rule forgets that padding gets no gradient, and sparse
        gradients have none."""
        given = _embedding_signature.bind(*args, **kwargs).arguments
        padding = given.get("padding_idx")
        if not under_functorch():
            return func(*args, **kwargs)
        x = func(**{**given, "padding_idx": None, "sparse": False})
        if padding is None:
            return x
        is_padding = given["input"] == padding % len(given["weight"])
        return torch.where(is_padding.unsqueeze(-1), x.detach(), x)

    def normalize(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`F.normalize`: where it writes into a tensor (spectral normalisation does so) it has no
        batching rule."""
        given = _normalize_signature.bind(*args, **kwargs).arguments
        out = given.pop("out", None)
        if out is None or not under_functorch():
            return func(*args, **kwargs)
        return out.copy_(func(**given))


def _bound(listener: Listener, call: Call) -> written_out.Drop:
    return lambda x: listener.dropout(call, x)


def _arguments(
    name: str,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> tuple[Tensor, float, bool, bool]:
    on = training if train is None else train
    return input, float(p), bool(on), inplace or name.endswith("_")


def _written_back(x: Tensor, y: Tensor) -> Tensor:
    """The result of an in-place call. An activation that all slots share cannot hold the
    results of each: there the caller gets a new tensor."""
    try:
        return x.copy_(y)
    except RuntimeError:
        return y


@dataclass(frozen=True)
class _Recurrent:
    """A call of `torch.lstm` and the like: padded [time, batch, features], or packed."""

    func: Any
    x: Tensor
    batch_sizes: Tensor | None
    states: tuple[Tensor, ...]
    weights: Sequence[Tensor]
    biased: bool
    layers: int
    rate: float
    training: bool
    bidirectional: bool
    batch_first: bool

    @property
    def packed(self) -> bool:
        return self.batch_sizes is not None

    @classmethod
    def of(cls, func: Any, x: Tensor, *rest: Any) -> _Recurrent:
        packed = isinstance(rest[2], list | tuple)
        sizes, (states, weights, biased, layers, rate, training, both, *first) = (
            (rest[0], rest[1:]) if packed else (None, rest)
        )
        states = (states,) if isinstance(states, Tensor) else tuple(states)
        batch_first = bool(first and first[0])
        return cls(
            func, x, sizes, states, weights, biased, layers, rate, training, both, batch_first
        )

    def __call__(self, drop: written_out.Drop | None) -> tuple[Tensor, ...]:
        x = self.x.transpose(0, 1) if self.batch_first else self.x
        ends = []
        for layer in range(self.layers):
            if layer and drop is not None:
                x = drop(x)
            x, end = self._layer(layer, x)
            ends.append(end)
        x = x.transpose(0, 1) if self.batch_first else x
        return (x, *(torch.cat(parts) for parts in zip(*ends, strict=True)))

    def _layer(self, layer: int, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        each, ways = len(self.weights) // self.layers, 2 if self.bidirectional else 1
        weights = self.weights[layer * each : (layer + 1) * each]
        states = tuple(state[layer * ways : (layer + 1) * ways] for state in self.states)
        if under_functorch() and not self.packed:
            name = self.func.__name__
            return written_out.recurrent_layer(
                name, x, states, weights, self.biased, self.bidirectional
            )
        begin = states if self.func.__name__ == "lstm" else states[0]
        head = (x, begin) if self.batch_sizes is None else (x, self.batch_sizes, begin)
        tail = () if self.packed else (False,)
        options = (self.biased, 1, 0.0, self.training, self.bidirectional, *tail)
        output, *end = self.func(*head, weights, *options)
        return output, tuple(end)


_KIND_OF = {name: kind.name for kind in KINDS.values() for name in kind.functions}
_HANDLED_BY_KIND = {"attention": Watch.attention, "recurrent": Watch.recurrent}


def _handlers() -> dict[Any, Callable[..., Any]]:
    handlers: dict[Any, Callable[..., Any]] = {
        functional.multi_head_attention_forward: Watch.multi_head,
        functional.embedding: Watch.embedding,
        functional.normalize: Watch.normalize,
    }
    for name, kind in _KIND_OF.items():
        for home in (functional, torch):
            if hasattr(home, name):
                handlers[getattr(home, name)] = _HANDLED_BY_KIND.get(kind, Watch.element)
    for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
        handlers[getattr(torch, name)] = Watch.recurrent_cell
    return handlers


HANDLERS = _handlers()
