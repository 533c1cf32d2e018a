"""Published tables beside one's own runs; a table is the recipes whose `expect` names its cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import rich.table
from rich.text import Text

from ..recipe import problems
from ..recipe.load import AnyRecipe, load, recipes
from ..recipe.schema import Cell, RecipeError
from ..run.folder import CARRIED_OUT, changes, kept_recipe, plain
from ..run.past import AP, PastRun, Seeds, across_seeds, below, mean_and_spread

NOT_COMPARED = CARRIED_OUT | {"run.seed"}


ALONE = ("Teacher", "Student")


@dataclass(frozen=True)
class Entry:
    """A cell of a table, the recipe that reproduces it and the runs that did."""

    cell: Cell
    recipe: AnyRecipe
    runs: Seeds = field(default_factory=lambda: Seeds([]))


@dataclass(frozen=True)
class Table:
    """A published table as far as recipes reproduce it."""

    name: str
    entries: dict[tuple[str, str], Entry]  # by row and column
    notes: list[str] = field(default_factory=list)  # runs that do not count, and why

    @property
    def rows(self) -> list[str]:
        """As the recipes come, but the networks alone first."""
        found = dict.fromkeys(row for row, _ in self.entries)
        return [*(row for row in ALONE if row in found), *(r for r in found if r not in ALONE)]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.entries))

    @property
    def count(self) -> int:
        """Runs that count, over all cells."""
        return sum(len(entry.runs.runs) for entry in self.entries.values())

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(entry.cell.source for entry in self.entries.values()))


@cache
def shipped() -> tuple[AnyRecipe, ...]:
    """All recipes that come with the package; read once, since checking them takes seconds."""
    return tuple(load(name) for name in recipes())


def tables() -> list[str]:
    """Names of the published tables that shipped recipes reproduce."""
    return list(published(shipped()))


def table(name: str, folder: str | Path | None = None) -> Table:
    """The table of that name, with the runs of its recipes found in a folder and below it.

    A cell counts the finished runs whose settings are the recipe's, one for each seed. Raises
    ValueError for a name that no shipped recipe knows, FileNotFoundError for a folder that is
    not there.
    """
    known = published(shipped())
    if name not in known:
        hint = problems.nearest(name, list(known))
        raise ValueError(f"no table {name}{hint} (tables: {', '.join(known)})")
    return known[name] if folder is None else with_runs(known[name], below(Path(folder)))


def published(written: Iterable[AnyRecipe]) -> dict[str, Table]:
    """The tables whose cells the recipes name, rows and columns in the order of the recipes.

    Raises ValueError when two recipes claim the same cell.
    """
    found: dict[str, Table] = {}
    for recipe in written:
        for cell in recipe.expect.cells if recipe.expect else ():
            entries = found.setdefault(cell.table, Table(cell.table, {})).entries
            other = entries.get((cell.row, cell.column))
            if other is not None:
                raise ValueError(
                    f"table {cell.table}, row {cell.row}, column {cell.column}: claimed by "
                    f"{other.recipe.name} and by {recipe.name}; one recipe is one cell"
                )
            entries[cell.row, cell.column] = Entry(cell, recipe)
    return found


def with_runs(table: Table, runs: list[PastRun]) -> Table:
    """The table with those of the runs that count, and a note for each other of its recipes."""
    entries, notes = {}, []
    for place, entry in table.entries.items():
        group, others = counted(entry.recipe, runs)
        entries[place] = Entry(entry.cell, entry.recipe, group)
        notes += others
    return Table(table.name, entries, list(dict.fromkeys(notes)))


def counted(recipe: AnyRecipe, runs: list[PastRun]) -> tuple[Seeds, list[str]]:
    """The finished runs of a recipe with its settings, one a seed; a note for each other run."""
    first: dict[int, PastRun] = {}
    notes = []
    for run in (run for run in runs if run.name == recipe.name):
        try:
            drift = changed(recipe, run)
        except RecipeError as error:
            drift = [f"its recipe cannot be read here: {error}"]
        if drift:
            notes.append(f"{run.path} does not count, it is not {recipe.name}: {'; '.join(drift)}")
        elif not run.finished:
            notes.append(f"{run.path} does not count: {run.state}")
        elif run.seed in first:
            notes.append(f"{run.path} does not count: seed {run.seed} is {first[run.seed].path}")
        else:
            first[run.seed] = run
    return Seeds(list(first.values())), notes


def changed(recipe: AnyRecipe, run: PastRun) -> list[str]:
    """What a run changed of its recipe that can move the result, the seed aside."""
    was, now = plain(recipe), plain(kept_recipe(run.path))
    found = changes(
        {name: value for name, value in was.items() if name not in NOT_COMPARED},
        {name: value for name, value in now.items() if name not in NOT_COMPARED},
    )
    # Free for a resumed run, whose checkpoint has what came of them, but not for a result.
    starts = [n for n in {**was, **now} if n.endswith(("student.checkpoint", "slt.checkpoint"))]
    for name in (*starts, "run.teacher_at_chance"):
        if was.get(name) != now.get(name):
            found.append(f"{name}: {was.get(name)} -> {now.get(name)}")
    return found


def render(table: Table) -> rich.table.Table:
    """The table for a terminal: in each cell the published number, below it the runs' own."""
    drawn = rich.table.Table(title=f"{table.name}: {'; '.join(table.sources)}", show_lines=True)
    drawn.title_justify = "left"
    drawn.add_column("")
    for column in table.columns:
        drawn.add_column(Text(column), overflow="fold")
    for row in table.rows:
        entries = [table.entries.get((row, column)) for column in table.columns]
        drawn.add_row(Text(row), *(Text() if e is None else _cell(e) for e in entries))
    return drawn


def render_groups(groups: list[Seeds]) -> rich.table.Table:
    """Runs outside all published tables: a line for each recipe, over its seeds."""
    drawn = rich.table.Table(box=None, pad_edge=False)
    for heading in ("recipe", "seeds", "last", "best", "published"):
        drawn.add_column(heading, overflow="fold")
    for group in groups:
        published = group.runs[0].published
        numbers = [
            mean_and_spread(group.scores("last")),
            mean_and_spread(group.scores("best")),
            None if published is None else f"{published:.2f}",
        ]
        mark = "AP " if group.score == AP else ""  # of top-1 it goes without saying
        cells = ["" if number is None else mark + number for number in numbers]
        drawn.add_row(Text(group.name), str(len(group.runs)), *cells)
    return drawn


def summary(
    written: Iterable[AnyRecipe], runs: list[PastRun]
) -> tuple[list[rich.table.Table], list[str]]:
    """What the finished runs of these recipes came to: drawn tables, and notes to print below.

    First the published tables in which a run counts, then a plain table of the other runs.
    """
    written = list(written)
    finished = [run for run in runs if run.finished]
    filled = [with_runs(found, finished) for found in published(written).values()]
    filled = [found for found in filled if found.count]
    shown = {run.path for found in filled for e in found.entries.values() for run in e.runs.runs}
    rest = across_seeds([run for run in finished if run.path not in shown])
    notes = [note for recipe in written if recipe.expect for note in counted(recipe, finished)[1]]
    return [render(found) for found in filled] + ([render_groups(rest)] if rest else []), notes


def _cell(entry: Entry) -> Text:
    cell, runs = entry.cell, entry.runs
    spread = "" if cell.spread is None else f" \u00b1 {cell.spread:.2f}"
    which = "" if cell.which == "unknown" else f" {cell.which}"
    text = Text(f"{cell.top1:.2f}{spread}{which}")
    if runs.runs:
        count = len(runs.runs)
        for name in ("last", "best"):
            text.append(f"\n{name} {mean_and_spread(runs.scores(name))}", style="bold")
        text.append(f"\n{count} seed{'s' if count > 1 else ''}", style="dim")
    return text
