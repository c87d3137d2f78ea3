"""Dropout sites made tunable: a model runs with rates and masks that are given to it.

`find_sites` says which sites a model has, `install` prepares it, `Installed.active` runs it with
rates and keys as tensors (also inside `torch.func.vmap`), `restore` undoes everything.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from droptune.errors import SiteError, nearest
from droptune.program.soundness import calls_eagerly
from droptune.sites.checkpointed import Replay, replaying
from droptune.sites.discovery import find_or_insert_sites, find_program_sites, find_sites
from droptune.sites.dropout import KINDS
from droptune.sites.insertion import insertions
from droptune.sites.masks import (
    Levels,
    Noise,
    behind_vmap,
    derive_keys,
    keep_mask,
    noises_at,
    split_seed,
)
from droptune.sites.modules import module_paths, recognised_modules
from droptune.sites.production import Applied, apply_rates
from droptune.sites.routes import Routes, dropout_functions, replaced
from droptune.sites.site import Discovery, Site, Untunable
from droptune.sites.watch import Call, Watch, running_module

__all__ = [
    "KINDS",
    "Applied",
    "Discovery",
    "Installed",
    "Site",
    "Untunable",
    "apply_rates",
    "derive_keys",
    "find_or_insert_sites",
    "find_program_sites",
    "find_sites",
    "install",
    "keep_mask",
    "restore",
    "split_seed",
]


_INSTALLED = "_droptune_installed"  # in the model's __dict__, so that both are freed together


class _Active:
    """One micro-batch: draws the masks, and counts the calls of each site."""

    def __init__(self, installed: Installed, noises: list[Noise], training: bool) -> None:
        self.training = training
        self._installed = installed
        self._noises = noises
        self._counts = [0] * len(noises)
        self._around: nn.Module | None = None

    def dropout(self, call: Call, x: Tensor) -> Tensor:
        index = self._installed.index_of(call, self._around)
        count = self._counts[index]
        self._counts[index] = count + 1
        kind = self._installed.kinds[index]
        return kind.apply(x, self._noises[index].at(count), call.options)

    def remember(self) -> Replay:
        """What makes a checkpointed segment, which begins now, draw the same masks again."""
        again = _Active(self._installed, self._noises, self.training)
        again._around = running_module(sys._getframe())
        counts = list(self._counts)

        @contextlib.contextmanager
        def replay() -> Iterator[None]:
            again._counts = list(counts)
            with self._installed._running(again):
                yield

        return replay


class Installed:
    """The sites of one model, made tunable.

    Modules that are a site get a `forward` of their own on the instance (classes, hooks and
    `state_dict` stay as they are); other sites are seen by a `Watch` while active. Outside of
    `active` the model computes what it always did.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)
        self.kinds = [KINDS[site.kind] for site in self.sites]
        self._model = model
        self._paths = module_paths(model)
        self._index = {(site.owner, site.call): index for index, site in enumerate(self.sites)}
        self._current: _Active | None = None
        self._levels: tuple[Tensor, Levels] | None = None
        self._routes = Routes(lambda: self._current)
        for module, what in recognised_modules(self._paths):
            self._routes.dropout(module, what)
        self._insert()
        self._watched = any(_needs_watch(module) for module in self._paths) or any(
            site.call and not site.inserted for site in self.sites
        )
        self._eagerly = calls_eagerly(self._paths)
        self._functions = dropout_functions(self._paths)

    def _insert(self) -> None:
        modules = {path: module for module, path in self._paths.items()}
        for site in self.sites:
            if site.owner not in modules:
                hint = nearest(site.owner, modules)
                raise SiteError(f"Site {site.path!r} is of a module this model lacks{hint}.")
            if site.inserted:
                self._routes.inserted(modules[site.owner], site.kind)

    def index_of(self, call: Call, around: nn.Module | None = None) -> int:
        """Which site a call is; `SiteError` where the dry step did not pass it."""
        inner = call.place.module if call.place.module is not None else around
        owner = self._paths.get(self._model if inner is None else inner, "")
        index = self._index.get((owner, call.place.call))
        if index is None:
            raise SiteError(
                f"Dropout in {owner or type(self._model).__name__!r} ({call.place.call or 'module'}"
                ") was not passed when the sites were found: find them with a batch that does."
            )
        return index

    @contextlib.contextmanager
    def active(
        self, rates: Tensor | None = None, keys: Tensor | None = None, *, training: bool = True
    ) -> Iterator[None]:
        """Inside, each site drops at its rate: `rates` [sites], `keys` int32 [sites, 2].

        One context is one micro-batch (calls of a site are counted from its start). Inside
        `torch.func.vmap` both are the slot's own. With `training=False` dropout is off
        everywhere, attention and recurrent layers batch, and neither tensor is needed.
        """
        noises: list[Noise] = []
        if training and self.sites:
            if rates is None or keys is None or len(rates) != len(self.sites):
                given = "none" if rates is None or keys is None else len(rates)
                raise SiteError(f"{len(self.sites)} sites are installed; rates given: {given}.")
            plain_rates, plain_keys, level = behind_vmap(rates, keys)
            noises = noises_at(self._levels_of(plain_rates), plain_keys, level)
        state = _Active(self, noises, training)
        with self._running(state), replaying(state.remember):
            yield

    def forget(self) -> None:
        """Compute anew what is remembered of the last rates."""
        self._levels = None

    def _levels_of(self, rates: Tensor) -> Levels:
        """Rates seldom change from update to update: what follows from them is remembered, for the
        same tensor, or where looking is free (not on a device that would have to be waited for)."""
        if is_functorch_wrapped_tensor(rates):
            return Levels.of(rates)
        if self._levels is None or not _equal(self._levels[0], rates):
            own = rates.clone() if rates.device.type == "cpu" else rates
            self._levels = (own, Levels.of(own))
        return self._levels[1]

    @contextlib.contextmanager
    def _running(self, state: _Active) -> Iterator[None]:
        outer, self._current = self._current, state
        try:
            if self._watched:
                functions = replaced(self._functions, state)
                with self._eagerly(), _plain_attention(), functions, Watch(state):
                    yield
            else:
                with self._eagerly():
                    yield
        finally:
            self._current = outer

    def restore(self) -> None:
        """Undo: the model is as it was before `install`."""
        self._routes.undo()
        vars(self._model).pop(_INSTALLED, None)

    def __deepcopy__(self, memo: Any) -> Installed:
        raise SiteError("The sites of this model are installed: restore(model) before copying it.")


def _equal(known: Tensor, rates: Tensor) -> bool:
    if rates.device.type != "cpu" or known.dtype != rates.dtype:
        return known is rates
    return torch.equal(known, rates)


def _needs_watch(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return module.padding_idx is not None or module.sparse
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks):
        return True
    return isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Without nn.TransformerEncoder's fused evaluation kernel, which has no batching rule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def install(model: nn.Module, sites: Sequence[Site], insert: Sequence[Any] = ()) -> Installed:
    """Make `sites`, found in this model or in one of the same architecture, tunable.

    Inserted sites among them are inserted; `insert` only checks that its rules still match.
    """
    if _INSTALLED in vars(model):
        raise SiteError("The sites of this model are installed already: restore(model) first.")
    insertions(module_paths(model), insert)
    installed = vars(model)[_INSTALLED] = Installed(model, sites)
    return installed


def restore(model: nn.Module) -> None:
    """Undo `install`; nothing happens where nothing is installed."""
    installed = vars(model).get(_INSTALLED)
    if installed is not None:
        installed.restore()
