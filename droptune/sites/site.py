"""What a dropout site is, as plain values (no torch): found, stored in SQL, shown to people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """A place in a model where dropout acts.

    `path` names it: the module's path, and where the module is more than this dropout, which
    call inside it (`encoder.0.attention`, `head.dropout_1`). `rate` is the author's, `shape`
    the activation's in the dry step, `calls` how often one forward passes it. `feeds` is the
    layer that its output reaches first, `module` the type of the module it belongs to, `role`
    "input" or "embedding" where it acts on those. `call` tells which call in the module's code
    it is ("" where the module is the site). `attribute` is what holds the author's rate, from
    the model down (`encoder.0.drop.p`), "" where it is a literal or not known; `field` the field
    of the model's configuration that sets it (`config.hidden_dropout_prob`), if one does. `line`
    is the line of code outside of torch that it was reached from (`/home/me/net.py:31`): edits
    elsewhere in the file move it, so sites that differ in it alone are equal.
    """

    path: str
    kind: str
    rate: float
    shape: tuple[int, ...]
    calls: int = 1
    feeds: str | None = None
    module: str = ""
    inserted: bool = False
    call: str = ""
    role: str = ""
    attribute: str = ""
    field: str = ""
    line: str = dataclasses.field(default="", compare=False)

    @property
    def owner(self) -> str:
        """The path of the module that the site belongs to."""
        return self.path.rpartition(".")[0] if self.call else self.path

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class Untunable:
    """Something random in a model that is not a site, and why: module path, operation, reason."""

    module: str
    operation: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Untunable:
        return cls(**data)


@dataclass(frozen=True)
class Discovery:
    """What one dry step showed: the sites in the order the model passes them, and the rest."""

    sites: tuple[Site, ...]
    untunable: tuple[Untunable, ...] = ()
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_json(self) -> dict[str, Any]:
        return {
            "sites": [site.to_json() for site in self.sites],
            "untunable": [item.to_json() for item in self.untunable],
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Discovery:
        return cls(
            tuple(Site.from_json(site) for site in data["sites"]),
            tuple(Untunable.from_json(item) for item in data["untunable"]),
            tuple(data["warnings"]),
        )
