"""Tuned rates on a plain model, for production: no part of droptune stays in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from droptune.errors import SiteError, nearest
from droptune.sites.attributes import Attribute, rate_attributes
from droptune.sites.modules import module_paths
from droptune.sites.site import Site


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
    rates share, an inserted site) is left as it is, and told. Raises SiteError on an impossible
    rate and on a path that fits no module.
    """
    paths = module_paths(model)
    known = {site.path: site for site in sites}
    attributes = {item.path: item for item in rate_attributes(paths)}
    chosen: dict[str, Attribute] = {}
    not_set: dict[str, str] = {}
    for path, rate in rates.items():
        _check(path, rate, {*paths.values(), *attributes}, known)
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
    return Applied(done, not_set)


def _check(path: str, rate: float, modules: set[str], known: Mapping[str, Site]) -> None:
    if not 0 <= rate < 1:
        raise SiteError(
            f"Rate {rate!r} of {path!r} is no probability of zeroing: give one in [0, 1)."
        )
    if path not in known and path not in modules and path.rpartition(".")[0] not in modules:
        raise SiteError(f"No site {path!r} in this model{nearest(path, known or modules)}.")


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
