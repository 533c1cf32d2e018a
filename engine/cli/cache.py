"""The verb kdfuse cache: record what a teacher says, show a cache, check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _RecipeFirst(TyperGroup):
    """What is no verb of its own is a recipe to record: `kdfuse cache RECIPE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["record", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_RecipeFirst,
    help="Record a teacher's answers, so that students learn without it: kdfuse cache RECIPE.",
    no_args_is_help=True,
)
Cached = Annotated[Path, typer.Argument(metavar="CACHE", help="folder of a cache")]


@app.command()
def record(
    recipe: Annotated[str, typer.Argument(help="shipped recipe or path.yaml[:row]")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over it")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder to write, or to go on with")] = Path("cache"),
) -> None:
    """Record the answers of a recipe's teacher to every view; begun before, it goes on."""
    from ..recipe.load import Recipe
    from ..training.recording import record as write
    from .bar import bar

    loaded = Recipe.load(recipe, words or [])
    if not isinstance(loaded, Recipe):
        raise ValueError(f"{recipe} is for detectors, whose teachers are not recorded")
    with bar() as told:
        header = write(loaded, out, told)
    print(f"{out}: {header.summary()}")


@app.command()
def show(cache: Cached) -> None:
    """Print what a cache holds, and what training from it needs."""
    from ..cache.show import lines

    for line in lines(cache):
        print(line)


@app.command()
def check(cache: Cached) -> None:
    """Read a whole cache and name every damaged file."""
    from ..cache.show import damaged
    from .bar import bar

    with bar() as told:
        found = damaged(cache, told)
    if found:
        raise ValueError("\n".join(found))
    print(f"{cache}: every file is as it was written")
