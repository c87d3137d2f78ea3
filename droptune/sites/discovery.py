"""Finding dropout sites: one dry step of the model, watched.

A site is found where a call passes, so whether it comes from a module, from a functional call or
from inside torch does not matter, and what does not run is no site.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from droptune.errors import DroptuneError, SiteError
from droptune.program.soundness import calls_eagerly
from droptune.program.source import told
from droptune.sites import watch
from droptune.sites.attributes import with_attributes
from droptune.sites.configuration import config_fields
from droptune.sites.dropout import KINDS
from droptune.sites.flow import Flow
from droptune.sites.insertion import insertions, suggested_insertions, written
from droptune.sites.masks import Noise
from droptune.sites.modules import module_paths, recognised_modules
from droptune.sites.randomness import (
    RandomOperations,
    generators_kept,
    other_generators,
    seed_other_generators,
)
from droptune.sites.routes import Routes, dropout_functions, replaced
from droptune.sites.site import Discovery, Site, Untunable
from droptune.sites.watch import Call, Watch, line_of, running_module

if TYPE_CHECKING:
    from droptune.program.program import Program

watch.BETWEEN.add(__file__)

Key = tuple[str, str]
Run = Callable[[], object]


class _Finder:
    """The listener of a dry step: every call is a site, and drops at the author's rate."""

    training = True

    def __init__(self, model: nn.Module, paths: Mapping[nn.Module, str], batch: Any) -> None:
        self.flow = Flow(batch)
        self.found: dict[Key, Site] = {}
        self.drawn: set[Key] = set()
        self.other_rates: dict[Key, float] = {}
        self._calls: dict[Key, int] = {}
        self._model = model
        self.paths = paths
        self._taken = set(paths.values())

    def begin(self) -> None:
        """Another dry step: calls are counted anew."""
        self._calls.clear()

    def path_of(self, module: nn.Module | None) -> str:
        return self.paths.get(self._model if module is None else module, "")

    def dropout(self, call: Call, x: Tensor) -> Tensor:
        owner = self.path_of(call.place.module)
        key = (owner, call.place.call)
        site = self.found.get(key) or self._new(call, owner, x)
        if call.rate != site.rate:
            self.other_rates[key] = call.rate
        count = self._calls[key] = self._calls.get(key, 0) + 1
        self.found[key] = replace(site, calls=max(site.calls, count))
        key_words = torch.tensor([count, len(self.found)], dtype=torch.int32, device=x.device)
        noise = Noise.of(torch.tensor(min(call.rate, 0.999), device=x.device), key_words)
        y = KINDS[site.kind].apply(x, noise, call.options)
        self.drawn.add(key)
        self.flow.leaves(key, y)
        return y

    def _new(self, call: Call, owner: str, x: Tensor) -> Site:
        kind, label = call.kind, call.label
        if kind == "element" and self.flow.is_attention(x):
            kind = "attention"
            label = "attention" if label == "dropout" else label
        is_module = not call.place.call
        module = self._model if call.place.module is None else call.place.module
        return Site(
            path=owner if is_module else self._free(owner, label),
            kind=kind,
            rate=call.rate,
            shape=tuple(x.shape),
            calls=0,
            module=type(module).__name__,
            inserted=call.place.call.startswith("inserted-"),
            call=call.place.call,
            role=self.flow.role(x),
            line=_line(),
        )

    def _free(self, owner: str, label: str) -> str:
        """A path inside `owner` that neither a module nor another site has."""
        stem = path = f"{owner}.{label}" if owner else label
        count = 0
        while path in self._taken:
            count += 1
            path = f"{stem}_{count}"
        self._taken.add(path)
        return path

    def sites(self) -> tuple[Site, ...]:
        feeds = self.flow.feeds
        return tuple(replace(site, feeds=feeds.get(key)) for key, site in self.found.items())

    def rate_warnings(self) -> Iterator[str]:
        for key, rate in self.other_rates.items():
            site = self.found[key]
            yield (
                f"{site.path} is called with the rates {site.rate:g} and {rate:g}; it is one place"
                " in the code, so it is one site and gets one rate."
            )

    def norm_warnings(self) -> Iterator[str]:
        for key, norm in self.flow.norms.items():
            yield (
                f"{self.found[key].path} feeds the BatchNorm {self.path_of(norm)}: dropout in front"
                " of BatchNorm shifts its statistics between training and evaluation"
                " (Li et al., CVPR 2019), so large rates may hurt."
            )


def _line() -> str:
    frame = line_of(sys._getframe())
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _DryWatch(Watch):
    """A watch that also follows what becomes of the sites' outputs."""

    listener: _Finder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        finder, outer = self.listener, self.listener.drawn
        finder.drawn = set()
        result = super().__torch_function__(func, types, args, kwargs)
        module = running_module(sys._getframe())
        name = getattr(func, "__name__", "")
        finder.flow.passed(name, (args, kwargs), result, set(finder.drawn), module)
        finder.drawn |= outer
        return result


def run_model(model: Callable[..., Any], batch: Any) -> Any:
    """Calls `model` on a batch: a mapping by keywords, a tuple or list by position."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


@contextlib.contextmanager
def _untouched(model: nn.Module, training: bool, seed: int = 0) -> Iterator[None]:
    """Runs the model in this mode, with gradients as in training (a loss may take some itself),
    then puts modes, buffers and torch's generators back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        torch.manual_seed(seed)
        model.train(training)
        try:
            with torch.enable_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, before in buffers:
                _put_back(buffer, before)
                module._buffers[name] = buffer


def _put_back(buffer: Tensor, before: Tensor) -> None:
    if buffer.is_inference():  # nobody writes to those
        return
    if buffer.grad_fn is not None:  # the model wrote into it what it has computed
        buffer.detach_()
    with torch.no_grad():
        buffer.copy_(before)


@contextlib.contextmanager
def _routed(
    paths: Mapping[nn.Module, str], finder: _Finder, insert: Sequence[Any]
) -> Iterator[None]:
    routes = Routes(lambda: finder)
    try:
        for module, what in recognised_modules(paths):
            routes.dropout(module, what)
        for module, kind in insertions(paths, insert):
            routes.inserted(module, kind)
        with replaced(dropout_functions(paths), finder):
            yield
    finally:
        routes.undo()


def _dry_step(
    model: nn.Module, finder: _Finder, insert: Sequence[Any], run: Run, seed: int = 0
) -> None:
    paths = finder.paths
    finder.begin()
    with (
        calls_eagerly(paths)(),
        _untouched(model, training=True, seed=seed),
        _routed(paths, finder, insert),
        _DryWatch(finder),
    ):
        _run(run)


def _run(run: Run) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they will come when it is trained
            run()
    except DroptuneError:
        raise
    except Exception as error:
        raise SiteError(
            f"the model does not run on this batch ({told(error)}); "
            "give the inputs that it is trained on"
        ) from error


# A model that draws numbers may take another way with each (layer drop): so many are looked at.
_RANDOM_PATHS = 4

_ALWAYS_ON = (
    "{} drops in evaluation mode too (its code passes training=True, not self.training); "
    "droptune evaluates without it, the plain model does not."
)

_HIDDEN = (
    "{} does not run at rate 0, so it is no site: set {} to a rate above 0 (say 0.01) in your "
    "model to have it tuned."
)


def find_sites(
    model: nn.Module,
    batch: Any,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    insert: Sequence[Any] = (),
) -> Discovery:
    """The dropout sites that a training-mode forward of `model` on `batch` passes.

    `forward(model, batch)` runs the model where calling it on the batch (a mapping by keywords, a
    tuple or list by position) is not right. `insert` holds rules for new sites (see
    `droptune.insertion`). The model and all generators are left as they were. Raises
    SiteError where the model does not run.
    """
    with generators_kept():
        return _find(model, batch, forward or run_model, insert)


def _find(
    model: nn.Module, batch: Any, call: Callable[[Any, Any], Any], insert: Sequence[Any]
) -> Discovery:
    finder = _Finder(model, module_paths(model), batch)
    operations = RandomOperations(finder.path_of)
    others: dict[Untunable, None] = {}
    for seed in range(_RANDOM_PATHS):
        seed_other_generators(seed)
        with other_generators(finder.path_of) as moved, operations:
            _dry_step(model, finder, insert, lambda: call(model, batch), seed)
        others |= dict.fromkeys(moved)
        if not (operations.found or others):
            break
    untunable = (*operations.found.values(), *others)
    on = _always_on(model, batch, call)
    notes = [*finder.norm_warnings(), *finder.rate_warnings()]
    notes += [_ALWAYS_ON.format(site.path) for key, site in finder.found.items() if key in on]

    def again() -> dict[Key, Site]:
        other = _Finder(model, finder.paths, batch)
        _dry_step(model, other, insert, lambda: call(model, batch))
        return other.found

    sites, hidden = with_attributes(model, finder.sites(), again)
    fields = config_fields(model)
    sites = tuple(replace(site, field=fields.get(site.attribute, "")) for site in sites)
    notes += [_HIDDEN.format(site.path, site.attribute) for site in hidden]
    return Discovery(sites, untunable, tuple(notes))


def _always_on(model: nn.Module, batch: Any, call: Callable[[Any, Any], Any]) -> set[Key]:
    """The dropout that evaluation mode does not turn off."""
    paths = module_paths(model)
    finder = _Finder(model, paths, batch)
    with (
        contextlib.suppress(SiteError),
        calls_eagerly(paths)(),
        _untouched(model, training=False),
        _routed(paths, finder, ()),
        _DryWatch(finder),
    ):
        _run(lambda: call(model, batch))
    return {key for key, site in finder.found.items() if site.rate > 0}


def find_program_sites(program: Program, insert: Sequence[Any] = ()) -> Discovery:
    """The sites that one training step of a program passes, found on two examples."""
    from droptune.program.declared import default_values

    values = default_values(program.searched)
    return find_sites(
        _first_model(program),
        program.example_batch(),
        forward=lambda model, batch: program.loss(model, batch, values),
        insert=insert,
    )


def find_or_insert_sites(program: Program) -> tuple[tuple[Site, ...], str]:
    """The program's sites; where it has none, those that a line of the study file inserts, and
    that line ("" where it has some, or where no place for them is known)."""
    found = find_program_sites(program).sites
    rules = [] if found else suggested_insertions(module_paths(_first_model(program)))
    return (find_program_sites(program, rules).sites, written(rules)) if rules else (found, "")


def _first_model(program: Program) -> nn.Module:
    """A model with the same weights whenever it is asked."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return program.model()
