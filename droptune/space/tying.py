"""Which sites share a rate in a study, and where each rate is searched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from droptune.errors import SpecError, nearest
from droptune.space.grouping import depth_profile, grows, matches, suggest_groups
from droptune.space.parameters import RateParameter
from droptune.spec.ranges import MAX_RATE, RateRange

if TYPE_CHECKING:
    from droptune.sites.site import Site
    from droptune.spec.sections import SpaceSpec

ROLE_HIGH = {"input": 0.3, "embedding": 0.5}  # Srivastava 2014: keep 0.8 of real-valued inputs


def matching(pattern: str, sites: Sequence[Site], key: str) -> list[Site]:
    """The sites that a pattern names; SpecError where there are none."""
    found = [site for site in sites if matches(pattern, site)]
    if not found:
        known = {s.path for s in sites} | {f"kind:{s.kind}" for s in sites}
        raise SpecError(f"{key}: {pattern!r} names no site{nearest(pattern, known)}")
    return found


def default_range(site: Site) -> tuple[float, float]:
    """(low, high) of a site's rate by its kind, and by its role on inputs and embeddings."""
    from droptune.sites.dropout import KINDS  # imports torch: only where a space is made

    kind = KINDS[site.kind]
    return kind.low, min(kind.high, ROLE_HIGH.get(site.role, MAX_RATE))


@dataclass(frozen=True)
class Tying:
    """Makes the rate parameters: which sites are tied, and where each is searched."""

    sites: Sequence[Site]
    spec: SpaceSpec
    baselines: Mapping[str, Mapping[str, float]]

    def parameters(self) -> Iterator[RateParameter]:
        groups = self._groups()
        self._check_patterns(groups)
        for name, members in groups.items():
            rates = [site.rate for site in members]
            linear = self._is_linear(name, members)
            weights = depth_profile(rates) if linear else (1.0,) * len(members)
            yield self._ranged(name, members, weights)

    def _groups(self) -> dict[str, list[Site]]:
        """Every site once, in groups by name, in the order of the sites."""
        left = list(self.sites)
        groups: dict[str, list[Site]] = {}

        def take(name: str, globs: Sequence[str], key: str) -> None:
            for glob in globs:
                matching(glob, self.sites, key)
            members = [s for s in left if any(matches(glob, s) for glob in globs)]
            if not members:
                raise SpecError(f"{key}: the sites of {name!r} are in groups before it")
            if _name(name) in groups:
                raise SpecError(f"{key}: two groups are named {_name(name)!r}: rename one")
            groups[_name(name)] = members
            left[:] = [s for s in left if s not in members]

        for glob in self.spec.linear_in_depth:
            take(glob, [glob], "space.linear_in_depth")
        if isinstance(self.spec.groups, Mapping):
            for name, globs in self.spec.groups.items():
                take(name, globs, f"space.groups.{name}")
        elif self.spec.groups == "auto":
            for name, paths in suggest_groups(left).items():
                take(name, paths, "space.groups")
        for site in left:
            if site.path in groups:
                raise SpecError(f"space.groups: {site.path!r} is a site too: rename the group")
            groups[site.path] = [site]
        order = {site.path: index for index, site in enumerate(self.sites)}
        return dict(sorted(groups.items(), key=lambda item: order[item[1][0].path]))

    def _is_linear(self, name: str, members: Sequence[Site]) -> bool:
        if any(_name(glob) == name for glob in self.spec.linear_in_depth):
            return True
        of_paths = all(site.kind == "path" for site in members)
        return self.spec.groups == "auto" and of_paths and grows([s.rate for s in members])

    def _check_patterns(self, groups: Mapping[str, Sequence[Site]]) -> None:
        for pattern in self.spec.rates:
            if pattern in groups or any(matches(pattern, site) for site in self.sites):
                continue
            of_sites = (name for s in self.sites for name in (s.path, f"kind:{s.kind}"))
            known = {*groups, *of_sites}
            raise SpecError(
                f"space.rates: {pattern!r} names no site or group{nearest(pattern, known)}"
            )

    def _ranged(
        self, name: str, members: Sequence[Site], weights: tuple[float, ...]
    ) -> RateParameter:
        given = self._given(name, members)
        paths = tuple(site.path for site in members)
        bare = RateParameter(f"dropout/{name}", paths, weights, 0.0, 1.0)
        inside = {label: bare.value_of(rates) for label, rates in self.baselines.items()}
        defaults = [default_range(site) for site in members]
        low = min([low for low, _ in defaults] + list(inside.values()))
        high = max([high for _, high in defaults] + list(inside.values()))
        low = low if given.low is None else given.low
        high = high if given.high is None else given.high
        if low >= high:
            raise SpecError(f"space.rates: {name!r} is left with [{low:g}, {high:g}]: widen it")
        for label, value in inside.items():
            if not low <= value <= high:
                raise SpecError(
                    f"space.rates: {name!r} is searched in [{low:g}, {high:g}], which leaves out "
                    f"the baseline {label!r} at {value:g}: widen it, or set baselines.{label}: "
                    "false"
                )
        return RateParameter(f"dropout/{name}", paths, weights, low, high, given.scale)

    def _given(self, name: str, members: Sequence[Site]) -> RateRange:
        """What the user wrote for a group: by its name, else what is written for its sites."""
        if name in self.spec.rates:
            return self.spec.rates[name]
        ranges = [self._given_for(site) for site in members]
        if any(each != ranges[0] for each in ranges):
            raise SpecError(
                f"space.rates gives the sites of the group {name!r} different ranges: "
                f"write one for the group, as {name!r}: {{low: …, high: …}}"
            )
        return ranges[0]

    def _given_for(self, site: Site) -> RateRange:
        """A site's own path counts before a glob, a glob before its kind; of several the last."""
        found = [p for p in self.spec.rates if matches(p, site)]
        found.sort(key=lambda p: (p == site.path, not p.startswith("kind:")))
        return self.spec.rates[found[-1]] if found else RateRange()


def _name(text: str) -> str:
    """A group's name without what parameter names cannot hold (MLflow refuses a `*`)."""
    plain = re.sub(r"[^\w.\-/ ]", "", text.removeprefix("kind:"))
    return re.sub(r"\.{2,}", ".", plain).strip(". ") or "all"
