"""The study file that `droptune study init` writes: filled in, and explained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from droptune.space.grouping import grows, patterns, suggest_groups
from droptune.space.space import Space
from droptune.spec.objective import DIRECTIONS
from droptune.spec.ranges import MAX_RATE
from droptune.spec.spec import StudySpec

if TYPE_CHECKING:
    from droptune.sites.site import Site
    from droptune.space.parameters import RateParameter


class Introduced(Protocol):
    """What a study file says of its program."""

    @property
    def task(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def interval_updates(self) -> int | None: ...
    @property
    def searched(self) -> Mapping[str, Any]: ...
    @property
    def loss_values(self) -> Sequence[str]: ...
    @property
    def metric_names(self) -> Sequence[str]: ...


_TEXT = """\
# A study of {program}: {count}. Run it with: droptune study run {file}

program: {program}  # relative to this file
seed: 0

# What is optimised on the validation data: {metrics}.
# `last` means you train {epochs} epochs; `best` means you keep the best epoch (early stopping).
# The choice changes the answer: dropout learns slowly and pays late, so `last` often asks for
# more of it, and with `best` even no dropout may tie.
{several}objective: {{metric: {metric}, take: last}}

# As long as you will train in the end: the best rates belong to this length.
epochs: {epochs}

budget: {{trials: 60}}  # also: epochs, device_hours, deadline
sampler: auto  # tpe, gp, cmaes, random, qmc
pruner: fair  # median, percentile, sha, hyperband, patient, none

space:
  # A rate is the probability of ZEROING, as in nn.Dropout(p): "keep 0.8" is the rate 0.2.
  # The rate 0 is always tried, whatever the scale (linear, logit, log).
{rates}
  lr: {{low: {lr_low:.12g}, high: {lr_high:.12g}}}  # a tenth to ten times the program's {lr:g}
  # weight_decay: {{low: 1e-5, high: 0.1}}
  # l1: {{low: 1e-7, high: 1e-4}}
  {smoothing}
  # schedule: [constant, up, early, late]  # of the rates over the training
  # fixed: {{some.site: 0.1}}  # not searched

{insert}  # channel, block, path, variational

# Each baseline (no dropout, 0.5, the author's rates) is searched at so many learning rates:
baselines: {{trials: 5, none: true, half: true, author: true}}

# The best trials and the baselines are trained again on fresh seeds:
confirm: {{top: 3, min_seeds: 3, max_seeds: 10, share: 0.3333}}
"""

_NOTHING_INSERTED = """\
# Sites to try where the model has none, at rate 0 to begin with, after modules of a type or of a
# path (encoder.*.act):
# insert: [{after: ReLU, kind: element}]"""
_INSERT = """\
# The model has no dropout of its own: these sites are added at rate 0, after modules of a type or
# of a path.
{line}"""


def study_file(
    reference: str, path: Path, program: Introduced, sites: Sequence[Site], insert: str = ""
) -> str:
    """The text of a study file at `path` for a program, named as on the command line.

    It says what the defaults would do: every site's range and the author's rate, the suggested
    groups with the list of their sites, and the line `insert` that adds these sites to a model
    which has none of its own. Raises SiteError where there is no site.
    """
    written = _beside(reference, path)
    plain = {"name": "study", "program": written}
    spec = StudySpec.parse(plain).resolved(program)
    space = Space.of(sites, spec, program)
    smooth = "label_smoothing" in program.loss_values
    return _TEXT.format(
        program=_yaml(written),
        file=path.name,
        count=f"{len(sites)} dropout site{'s' if len(sites) > 1 else ''}",
        metrics=", ".join(program.metric_names),
        metric=spec.objectives[0].metric,
        several=_several(spec.objectives[0].metric, program.metric_names),
        epochs=program.epochs,
        rates="\n".join(f"  {line}" for line in _rate_lines(sites, space)),
        insert=_INSERT.format(line=insert) if insert else _NOTHING_INSERTED,
        lr=program.lr,
        lr_low=space.lr.low,
        lr_high=space.lr.high,
        smoothing="# label_smoothing: {high: 0.3}" if smooth else "# values: {…}  # declared ones",
    )


def _several(metric: str, names: Sequence[str]) -> str:
    """How to ask for a second objective, where the program measures one."""
    others = [n for n in ("accuracy", "mae", *names) if n in names and n != metric]
    known = [name for name in others if name in DIRECTIONS]
    return f"# Several are weighed together: objective: [{metric}, {known[0]}]\n" if known else ""


def _beside(reference: str, path: Path) -> str:
    """A program given relative to the working directory, relative to the study file."""
    target, colon, name = reference.partition(":")
    if not target.endswith(".py"):
        return reference
    relative = os.path.relpath(Path(target).resolve(), path.resolve().parent)
    return f"{Path(relative).as_posix()}{colon}{name}"


def _rate_lines(sites: Sequence[Site], space: Space) -> Iterator[str]:
    groups = suggest_groups(sites)
    by_path = {site.path: site for site in sites}
    linear = [n for n, paths in groups.items() if _is_linear([by_path[p] for p in paths])]
    if linear:
        yield "linear_in_depth: [kind:path]  # one rate, reached at the last of these sites:"
        for path in groups[linear[0]]:
            yield f"  # {_about(by_path[path])}"
    tied = {name: paths for name, paths in groups.items() if name not in linear}
    if groups:
        yield "# Sites of a group share one rate; * stands for anything, the first match counts."
        yield f"groups:{'' if tied else ' {}'}"
    for name, globs in patterns(tied, sites).items():
        yield f"  {_yaml(name)}: {_yaml(globs[0] if len(globs) == 1 else globs)}"
        for path in tied[name]:
            yield f"    # {_about(by_path[path])}"
    if not groups:
        yield "groups: none  # every site has its own rate"
    yield "rates:"
    for parameter in space.rates:
        yield from _range_line(parameter, by_path, linear)


def _range_line(
    parameter: RateParameter, by_path: Mapping[str, Site], linear: Sequence[str]
) -> Iterator[str]:
    name = parameter.name.removeprefix("dropout/")
    key = "path" if name in linear else name
    members = [by_path[path] for path in parameter.sites]
    rates = list(dict.fromkeys(f"{site.rate:g}" for site in members))
    kinds = ", ".join(dict.fromkeys(site.kind for site in members))
    author = rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"
    mark = "# " if parameter.high > MAX_RATE else ""
    yield (
        f"  {mark}{_yaml(key)}: {{low: {parameter.low:.12g}, high: {parameter.high:.12g}}}"
        f"  # {kinds}, author's {author}"
    )


def _is_linear(members: Sequence[Site]) -> bool:
    return all(site.kind == "path" for site in members) and grows([s.rate for s in members])


def _about(site: Site) -> str:
    return f"{site.path} ({site.kind}, author's {site.rate:g})"


def _yaml(value: Any) -> str:
    """A scalar or list on one line of YAML, quoted where needed."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()
