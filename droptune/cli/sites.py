"""`droptune sites`: where dropout acts in a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droptune.cli.options import JsonOption, print_json

if TYPE_CHECKING:
    from droptune.sites.installed import Discovery


def sites(
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM", help="file.py[:name] or package.module[:name]")
    ],
    input: Annotated[
        str | None,
        typer.Option("--input", metavar="SHAPE", help="For a bare module: 1,1,28,28"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show every dropout site of PROGRAM, what cannot be tuned, and the suggested grouping."""
    from droptune.preparation import examine
    from droptune.space.grouping import suggest_groups

    discovery = examine(program, Path.cwd(), _shape(input))
    groups = suggest_groups(discovery.sites)
    if json:
        print_json(discovery.to_json() | {"groups": groups})
    else:
        show(discovery, groups)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no shape; write it like 1,1,28,28") from None


def show(discovery: Discovery, groups: dict[str, list[str]]) -> None:
    """Print the table of sites, then what cannot be tuned and what to beware of."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("site", "kind", "author's rate", "shape", "calls", "feeds", box=None)
    for site in discovery.sites:
        shape = "×".join(str(n) for n in site.shape)
        feeds = site.feeds or ""
        table.add_row(site.path, site.kind, f"{site.rate:g}", shape, str(site.calls), feeds)
    console.print(table)
    for item in discovery.untunable:
        console.print(f"not tunable: {item.module}: {item.operation} ({item.reason})")
    for warning in discovery.warnings:
        console.print(f"warning: {warning}")
    if groups:
        console.print(f"suggested: {len(groups)} rates for {len(discovery.sites)} sites")
        for name, paths in groups.items():
            console.print(f"  {name}: {', '.join(paths[:4])}{' …' if len(paths) > 4 else ''}")
