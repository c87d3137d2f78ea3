"""`droptune sites`: where dropout acts in a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droptune.cli.options import JsonOption, display, print_json
from droptune.script import line_of

if TYPE_CHECKING:
    from rich.table import Table

    from droptune.sites.site import Discovery


UNLIMITED = 100_000  # columns: a row that is piped stays one line


def sites(
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM", help="file.py[:name] or package.module[:name]")
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SHAPE[:LOW..HIGH]",
            help="An input of a bare model, again for each: 1,1,28,28 are random floats, "
            "input_ids=2,16:0..999 whole numbers such as tokens, mask=2,16:bool all True.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show every dropout site of PROGRAM, what cannot be tuned, and the suggested grouping.

    A bare model (a class, a built model, a function that builds one) needs --input.
    """
    from droptune.sites.examination import ExampleInput, examine
    from droptune.space.grouping import suggest_groups

    inputs = [ExampleInput.parse(text) for text in input or ()]
    discovery = examine(program, Path.cwd(), inputs)
    groups = suggest_groups(discovery.sites)
    if json:
        print_json(discovery.to_json() | {"groups": groups})
    else:
        show(discovery, groups)


def show(discovery: Discovery, groups: dict[str, list[str]]) -> None:
    """Print the table of sites, then what cannot be tuned and what to beware of."""
    if discovery.sites:
        display(_table(discovery), piped_width=UNLIMITED)
    else:
        print(
            "no dropout acts in this model: add sites in the study file, for example\n"
            "  insert: [{after: ReLU, kind: element}]\n"
            "where `after` is the type of a module or a glob on its path (`encoder.*.act`); for a\n"
            "program, `droptune study init` writes a file with such a line"
        )
    for item in discovery.untunable:
        print(f"not tunable: {item.module or 'model'}: {item.operation} ({item.reason})")
    for warning in discovery.warnings:
        print(f"warning: {warning}")
    for line in _suggestion(discovery, groups):
        print(line)


def _table(discovery: Discovery) -> Table:
    from rich.table import Table
    from rich.text import Text

    names = ("site", "kind", "author's rate", "shape", "calls", "feeds", "line")
    table = Table(box=None)
    for name in names:
        table.add_column(name, overflow="fold")
    for site in discovery.sites:
        shape = "×".join(str(n) for n in site.shape)
        row = (site.path, site.kind, f"{site.rate:g}", shape, str(site.calls), site.feeds or "")
        table.add_row(*map(Text, (*row, line_of(site))))
    return table


def _suggestion(discovery: Discovery, groups: dict[str, list[str]]) -> Iterator[str]:
    count = len(discovery.sites)
    if groups:
        yield f"suggested: {len(groups)} rates for {count} sites"
        for name, paths in groups.items():
            yield f"  {name}: {', '.join(paths)}"
    elif count == 1:
        yield "suggested: a rate for this site"
    elif count:
        yield f"suggested: a rate for each of the {count} sites"
