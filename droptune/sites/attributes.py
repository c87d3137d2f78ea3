"""Which attribute of a model holds the rate of which site: found by changing it and looking."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from droptune.errors import SiteError
from droptune.sites.modules import module_paths
from droptune.sites.site import Site

Key = tuple[str, str]


@dataclass(frozen=True)
class Attribute:
    """A number in the `__dict__` of a module, or of its configuration, that may be a rate."""

    holder: Any
    name: str
    path: str  # from the model down

    def set(self, rate: float) -> None:
        vars(self.holder)[self.name] = rate


def rate_attributes(paths: Mapping[nn.Module, str]) -> list[Attribute]:
    """All numbers in [0, 1) that are called like a rate, those of shared objects once."""
    found: dict[tuple[int, str], Attribute] = {}
    for module, path in paths.items():
        for holder, place in ((module, path), (vars(module).get("config"), join(path, "config"))):
            for name, value in (vars(holder) if hasattr(holder, "__dict__") else {}).items():
                if may_be_rate(name, value):
                    attribute = Attribute(holder, name, join(place, name))
                    found.setdefault((id(holder), name), attribute)
    return list(found.values())


def may_be_rate(name: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and ("drop" in name or name == "p") and 0 <= value < 1  # type: ignore[operator]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextlib.contextmanager
def _marked(attributes: Sequence[Attribute]) -> Iterator[dict[float, str]]:
    """Gives each attribute a rate of its own, small enough to change nothing else."""
    before = [vars(attribute.holder)[attribute.name] for attribute in attributes]
    marks = {1e-3 + 1e-7 * (index + 1): item for index, item in enumerate(attributes)}
    try:
        for mark, attribute in marks.items():
            attribute.set(mark)
        yield {mark: attribute.path for mark, attribute in marks.items()}
    finally:
        for attribute, value in zip(attributes, before, strict=True):
            vars(attribute.holder)[attribute.name] = value


def with_attributes(
    model: nn.Module, sites: Sequence[Site], again: Callable[[], Mapping[Key, Site]]
) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """`sites` with the attribute that holds each one's rate, and sites that only a rate above 0
    brings up. `again()` runs the model and says what it passes; where it does not run with other
    rates, nothing more is known."""
    with _marked(rate_attributes(module_paths(model))) as paths:
        try:
            seen = again()
        except SiteError:
            return tuple(sites), ()
    holding = {key: paths.get(site.rate, "") for key, site in seen.items()}
    known = {(site.owner, site.call) for site in sites}
    hidden = [replace(site, attribute=holding[key]) for key, site in seen.items()]
    return (
        tuple(replace(s, attribute=holding.get((s.owner, s.call), "")) for s in sites),
        tuple(s for s in hidden if (s.owner, s.call) not in known and s.attribute),
    )
