"""The verbs kdfuse recipes, recipes show and recipes table."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..recipe.load import AnyRecipe
    from ..recipe.schema import Expect

app = typer.Typer(help="Recipes that come with the package.", invoke_without_command=True)


@app.callback()
def recipes(
    context: typer.Context,
    method: Annotated[str | None, typer.Option(help="recipes of this method alone")] = None,
    data: Annotated[str | None, typer.Option(help="recipes for this data set alone")] = None,
    table: Annotated[str | None, typer.Option(help="recipes of this published table alone")] = None,
    every: Annotated[bool, typer.Option("--all", help="list every recipe")] = False,
) -> None:
    """Count the recipes by method and data set, or list some of them, or all.

    `recipes show NAME` prints one, `recipes table NAME` a published table.
    """
    filters = {"method": method, "data": data, "table": table}
    wanted = {what: name for what, name in filters.items() if name is not None}
    if context.invoked_subcommand is not None:
        if wanted or every:
            option, verb = next(iter(wanted), "all"), context.invoked_subcommand
            raise ValueError(f"--{option}: filters the list; leave it out before {verb}")
        return
    from ..report.tables import shipped

    if not wanted and not every:
        wide(_counted(shipped()))
        print(
            "\nkdfuse recipes --method kd --data digits lists them, --all all; show NAME prints one"
        )
        return
    drawn = Table(box=None, pad_edge=False)
    drawn.add_column("recipe", no_wrap=True)
    for heading in ("student", "teacher", "published", "source"):
        drawn.add_column(heading, overflow="fold")
    for recipe in _filtered(shipped(), wanted):
        teacher = recipe.teacher.name if recipe.teacher else ""
        top1, source = "", ""
        if recipe.expect is not None:
            top1 = number(recipe.expect)
            source = recipe.expect.source
        drawn.add_row(recipe.name, recipe.student.name, teacher, top1, Text(source))
    wide(drawn, paged=every)


def _counted(recipes: Sequence[AnyRecipe]) -> Table:
    """How many rows there are of each method for each data set."""
    counts = Counter((r.method.name, r.name.split("/")[0]) for r in recipes)
    methods, sets = ({key[i]: None for key in counts} for i in (0, 1))
    drawn = Table("method", box=None, pad_edge=False)
    for name in sets:
        drawn.add_column(name, justify="right")
    for method in methods:
        drawn.add_row(method, *(str(counts[method, name] or "") for name in sets))
    drawn.add_row("", *(str(sum(counts[m, name] for m in methods)) for name in sets))
    return drawn


def number(expect: Expect) -> str:
    """The published number; empty where there is none."""
    if expect.ap is not None:
        return f"AP {expect.ap:.2f}"
    return "" if expect.top1 is None else f"{expect.top1:.2f}"


@app.command("show")
def show(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="name of a recipe, or FILE.yaml[:row]")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as in optim.lr=0.1")
    ] = None,
) -> None:
    """Print a recipe with all its settings on this machine, after the overriding words."""
    import torch

    from ..recipe.load import Recipe, load
    from ..training.known import check_names
    from ..training.ranks import choose_device
    from ..training.speed import settled

    found = load(recipe, words or [])
    if isinstance(found, Recipe):
        check_names(found)
    on_gpu = found.run.device == "cuda"  # of another machine, maybe
    device = torch.device("cuda") if on_gpu else choose_device(found.run.device)
    print(settled(found, device).explain(), end="")


@app.command("table")
def table(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="name of a table; none: list them")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="folder to look for runs in; default: runs, where it is")
    ] = None,
) -> None:
    """Print a published table with the results of one's own runs below its numbers."""
    from ..report import tables

    if name is None:
        if runs is not None:
            raise ValueError(f"--runs {runs}: say which table they are to be printed in")
        drawn = Table("table", "cells", "source", box=None, pad_edge=False)
        for one in tables.published(tables.shipped()).values():
            drawn.add_row(one.name, str(len(one.entries)), Text("; ".join(one.sources)))
        wide(drawn)
        return
    default = Path("runs")
    found = tables.table(name, runs or (default if default.is_dir() else None))
    wide(tables.render(found))
    for note in found.notes:
        print(note)


def wide(table: Table, paged: bool = False) -> None:
    """Print a table, on a terminal page by page if `paged`; where the output is a file or a pipe,
    without folding its lines."""
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if terminal else 400)
    with console.pager(styles=True) if paged and terminal else nullcontext():
        console.print(table)


def _filtered(recipes: Sequence[AnyRecipe], wanted: dict[str, str]) -> list[AnyRecipe]:
    """The recipes that meet every wish. ValueError for a name that none of them has."""
    for what, name in wanted.items():
        known = sorted({one for recipe in recipes for one in _names(recipe)[what]})
        if name not in known:
            from ..recipe.problems import nearest

            hint = nearest(name, known)
            there = ", ".join(known) or "none"
            raise ValueError(f"--{what}: no recipe has {name}{hint} (there are {there})")
    return [r for r in recipes if all(n in _names(r)[what] for what, n in wanted.items())]


def _names(recipe: AnyRecipe) -> dict[str, set[str]]:
    """What the filters of the list compare."""
    cells = recipe.expect.cells if recipe.expect else ()
    return {
        "method": {recipe.method.name},
        "data": {recipe.name.split("/")[0]},
        "table": {cell.table for cell in cells},
    }
