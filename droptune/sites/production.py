"""Tuned rates on a plain model, for production: no part of droptune stays in it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from droptune.errors import SiteError, nearest
from droptune.sites.attributes import Attribute, rate_attributes
from droptune.sites.dropout import KINDS
from droptune.sites.modules import module_paths, recognised_modules
from droptune.sites.site import Site

# How sites are called that are no module of their own: `dropout`, `attention_2`, `inserted-path`.
_LABEL = re.compile(rf"(dropout|(inserted-)?({'|'.join(KINDS)}))(_\d+)?")


@dataclass(frozen=True)
class Applied:
    """What `apply_rates` did: site path -> the attribute it set, and site path -> why a rate
    could not be set in place."""

    set: Mapping[str, str] = field(default_factory=dict)
    not_set: Mapping[str, str] = field(default_factory=dict)


def apply_rates(
    model: nn.Module, rates: Mapping[str, float], *, sites: Iterable[Site] = ()
) -> Applied:
    """Sets `rates` (site path -> probability of zeroing) on the attributes that hold them.

    `sites`, from `find_sites`, say which these are; without them they are looked for by name. An
    attribute's own path (`encoder.0.drop.p`) names it for certain.
    What cannot be set in place (a literal in the code, an attribute that sites of different
    rates share, an inserted site) is left as it is, returned in `not_set`, and warned of. Raises
    SiteError, with nothing set, on an impossible rate and on a path that can be no site.
    """
    paths = module_paths(model)
    known = {site.path: site for site in sites}
    attributes = {item.path: item for item in rate_attributes(paths)}
    names = _Names(paths, attributes, known)
    for path, rate in rates.items():
        names.check(path, rate)
    chosen: dict[str, Attribute] = {}
    not_set: dict[str, str] = {}
    for path in rates:
        found = _attribute(path, known.get(path), attributes)
        if isinstance(found, str):
            not_set[path] = found
        else:
            chosen[path] = found
    for path, attribute in chosen.items():
        sharing = {rates[other] for other, item in chosen.items() if item is attribute}
        if len(sharing) == 1:
            attribute.set(rates[path])
        else:
            not_set[path] = f"{attribute.path} holds the rate of several sites, which differ"
    done = {path: item.path for path, item in chosen.items() if path not in not_set}
    for path, reason in not_set.items():
        warnings.warn(f"the rate {rates[path]:g} of {path!r} is not set: {reason}", stacklevel=2)
    return Applied(done, not_set)


class _Names:
    """What can be meant by the path of a site."""

    def __init__(
        self,
        paths: Mapping[nn.Module, str],
        attributes: Mapping[str, Attribute],
        known: Mapping[str, Site],
    ) -> None:
        recognised = recognised_modules(paths)
        self._modules = set(paths.values())
        self._whole = {paths[module] for module, what in recognised if not what.by_argument}
        self._holders = {name.rpartition(".")[0] for name in attributes}
        self._attributes = attributes
        self._known = known

    def check(self, path: str, rate: float) -> None:
        """Raises SiteError."""
        if not 0 <= rate < 1:
            raise SiteError(
                f"Rate {rate!r} of {path!r} is no probability of zeroing: give one in [0, 1)."
            )
        if not (path in self._attributes or path in self._known or self._may_be_site(path)):
            raise SiteError(f"No site {path!r} in this model{nearest(path, self._choices())}.")

    def _may_be_site(self, path: str) -> bool:
        """Whether, of a model whose sites are not known, this may be one: a module of dropout, or
        a call in the code of another module."""
        owner, _, label = path.rpartition(".")
        calls = owner in self._modules - self._whole and _LABEL.fullmatch(label) is not None
        return not self._known and (path in self._whole or path in self._holders - {""} or calls)

    def _choices(self) -> Iterable[str]:
        inside = {a for a in self._attributes if a.rpartition(".")[0] not in self._whole}
        return self._known or self._whole | inside


def _attribute(
    path: str, site: Site | None, attributes: Mapping[str, Attribute]
) -> Attribute | str:
    """What holds a site's rate, or why nothing does."""
    if site is None and path in attributes:
        return attributes[path]
    if site is not None and site.inserted:
        return f"inserted: add dropout of kind {site.kind} after {site.owner!r} in the code"
    if site is not None and site.attribute in attributes:
        return attributes[site.attribute]
    owner = path if site is None or not site.call else site.owner
    for holder in (owner, owner.rpartition(".")[0]) if site is None else (owner,):
        named = [item for name, item in attributes.items() if name.rpartition(".")[0] == holder]
        if len(named) == 1:
            return named[0]
    return "no attribute of the model is known to hold this rate: change it in the code"
