"""Which sites share one rate: named by globs, or suggested from the structure of the paths."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from droptune.sites.site import Site

FEW = 8  # sites that are searched one by one
MOST = 6  # groups that a suggestion makes
_THIRDS = ("first", "middle", "last")


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern names a site: its path, `kind:attention`, or a glob on the path.

    `*` stands for anything, dots included; `?` for one character.
    """
    if pattern.startswith("kind:"):
        return site.kind == pattern.removeprefix("kind:")
    return pattern == site.path or fnmatch.fnmatchcase(site.path, pattern)


def suggest_groups(sites: Sequence[Site]) -> dict[str, list[str]]:
    """A name and the paths of each group, in the order of the sites; empty for few sites.

    Sites are tied that do the same work in repeated blocks: those whose paths differ only in
    their numbers, the innermost numbers first, as far as it takes to have at most six groups;
    then by kind and last word, then by kind alone. Kinds are never mixed, and the author's
    different rates are kept apart where six groups suffice. Residual paths whose rates grow with
    depth are one group (`depth_profile`). One group of many sites is cut into thirds by depth.
    """
    if len(sites) <= FEW:
        return {}
    growing = _growing_paths(sites)
    rest = [site for site in sites if site not in growing]
    groups = dict(_tied(rest, MOST - bool(growing))) if rest else {}
    if growing:
        groups[_unused("stochastic depth", groups)] = [site.path for site in growing]
    if len(groups) == 1 and not growing:
        groups = _thirds(sites)
    order = {site.path: index for index, site in enumerate(sites)}
    return dict(sorted(groups.items(), key=lambda item: order[item[1][0]]))


def depth_profile(rates: Sequence[float]) -> tuple[float, ...]:
    """Each site's share of the deepest site's rate, under one rate for all.

    The author's own profile where the rates grow with depth; else l/L for the site number l of L
    (Huang et al., Stochastic depth, ECCV 2016, eq. 4). The largest share is exactly 1.
    """
    if grows(rates):
        return tuple(rate / max(rates) for rate in rates)
    return tuple((index + 1) / len(rates) for index in range(len(rates)))


def grows(rates: Sequence[float]) -> bool:
    """Whether rates never fall with depth and rise somewhere."""
    return list(rates) == sorted(rates) and len(set(rates)) > 1


def _growing_paths(sites: Sequence[Site]) -> list[Site]:
    paths = [site for site in sites if site.kind == "path"]
    return paths if grows([site.rate for site in paths]) else []


Label = Callable[["Site"], str]


def _labels() -> Iterator[Label]:
    """Ways to name what a site does, from the finest to the coarsest."""
    for count in range(1, 5):
        yield lambda site, n=count: _without_indices(site.path, n)  # type: ignore[misc]
    for count in range(1, 4):
        yield lambda site, n=count: _without_digits(_without_indices(site.path, 99), n)  # type: ignore[misc]
    yield lambda site: f"{site.path.partition('.')[0]} {_last_word(site)}"
    yield _last_word
    yield lambda site: site.kind


def _last_word(site: Site) -> str:
    return re.sub(r"_?\d+", "", site.path.rpartition(".")[2])


def _tied(sites: Sequence[Site], most: int) -> Iterator[tuple[str, list[str]]]:
    for label in _labels():
        for with_rate in (True, False):
            keys = [(label(site), site.kind, site.rate if with_rate else None) for site in sites]
            if len(set(keys)) <= most:
                yield from _named(sites, keys)
                return
    yield from _named(sites, [(site.kind, site.kind, None) for site in sites])


def _named(
    sites: Sequence[Site], keys: Sequence[tuple[str, str, float | None]]
) -> Iterator[tuple[str, list[str]]]:
    labels: dict[str, int] = {}
    for label, _, _ in dict.fromkeys(keys):
        labels[label] = labels.get(label, 0) + 1
    taken: set[str] = set()
    for key in dict.fromkeys(keys):
        label, kind, rate = key
        name = label or kind
        if labels[label] > 1:
            name = f"{name} {kind}" if rate is None else f"{name} {kind} {rate:g}"
        name = _unused(name, taken)
        taken.add(name)
        yield name, [site.path for site, k in zip(sites, keys, strict=True) if k == key]


def _unused(name: str, taken: object) -> str:
    count, free = 1, name
    while free in taken:  # type: ignore[operator]
        count += 1
        free = f"{name} {count}"
    return free


def _without_indices(path: str, count: int) -> str:
    """The path without its last `count` indices (`layers.3.drop` → `layers.drop`)."""
    kept: list[str] = []
    for part in reversed(path.split(".")):
        if part.isdigit() and count > 0:
            count -= 1
        else:
            kept.append(part)
    return ".".join(reversed(kept))


def _without_digits(path: str, count: int) -> str:
    """The path without the digits in its last `count` words (`block2.drop` → `block.drop`)."""
    kept: list[str] = []
    for part in reversed(path.split(".")):
        plain = re.sub(r"_?\d+", "", part) if count > 0 else part
        count -= plain != part
        kept.append(plain)
    return ".".join(reversed(kept))


def _thirds(sites: Sequence[Site]) -> dict[str, list[str]]:
    paths = [site.path for site in sites]
    cuts = [round(len(paths) * i / 3) for i in range(4)]
    return {f"{word} third": paths[cuts[i] : cuts[i + 1]] for i, word in enumerate(_THIRDS)}


def patterns(groups: dict[str, list[str]], sites: Sequence[Site]) -> dict[str, list[str]]:
    """Short patterns for groups, such that the first group to match a site is its own.

    A group's paths with their numbers replaced by `*` where that names no site of a later group;
    the paths themselves elsewhere. The more specific groups come first.
    """
    by_path = {site.path: site for site in sites}
    globs = {name: _globs([by_path[path] for path in paths]) for name, paths in groups.items()}
    written: dict[str, list[str]] = {}
    waiting = dict(groups)
    while waiting:
        free = [name for name in waiting if not _takes(globs[name], name, waiting, by_path)]
        name = free[0] if free else next(iter(waiting))
        written[name] = globs[name] if free else list(waiting[name])
        del waiting[name]
    return written


def _takes(
    globs: list[str], name: str, groups: dict[str, list[str]], by_path: dict[str, Site]
) -> bool:
    """Whether globs name a site of another of the groups."""
    others = [by_path[path] for other in groups if other != name for path in groups[other]]
    return any(matches(glob, site) for glob in globs for site in others)


def _globs(sites: Sequence[Site]) -> list[str]:
    """The paths, with `*` for the numbers in which paths of the same form differ."""
    forms: dict[str, list[list[str]]] = {}
    for site in sites:
        forms.setdefault(re.sub(r"\d+", "*", site.path), []).append(site.path.split("."))
    return [
        ".".join(_common(parts) for parts in zip(*paths, strict=True)) for paths in forms.values()
    ]


def _common(parts: Sequence[str]) -> str:
    return parts[0] if len(set(parts)) == 1 else re.sub(r"\d+", "*", parts[0])
