"""The verbs of kdfuse bench."""

from __future__ import annotations

from typing import Any

import typer
from rich.table import Table

from .recipes import wide

app = typer.Typer(help="Measure speed, and what recorded teachers are worth.", no_args_is_help=True)
# Each verb's own parser reads all of its words.
PASSED_ON: Any = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@app.command("losses", **PASSED_ON)
def losses(context: typer.Context) -> None:
    """Time the loss kernels; --help lists the options."""
    from ...kernels.bench.run import main as measure

    measure(context.args)


@app.command("step", **PASSED_ON)
def step(context: typer.Context) -> None:
    """Time training steps on synthetic batches; --help lists the options."""
    from ..bench.step.run import main as measure

    _show(measure(context.args))


@app.command("e2e", **PASSED_ON)
def end_to_end(context: typer.Context) -> None:
    """Time training from image files; --help lists the options."""
    from ..bench.e2e.run import main as measure

    _show(measure(context.args))


@app.command("data", **PASSED_ON)
def data_speed(context: typer.Context) -> None:
    """Time the loaders on images of a recipe; --help lists the options."""
    from ..bench.data.run import main as measure

    _show(measure(context.args))


@app.command("cache", **PASSED_ON)
def recorded(context: typer.Context) -> None:
    """Train students from recorded teachers: accuracy over bytes; --help lists the options."""
    from ..bench.cache.run import main as measure

    _show(measure(context.args))


@app.command("accuracy", **PASSED_ON)
def accuracy(context: typer.Context) -> None:
    """Train students beside a plain loop: accuracy and time; --help lists the options."""
    from ..bench.accuracy.run import main as measure

    _show(measure(context.args))


def _show(parts: list[str | Table]) -> None:
    for part in parts:
        print(part) if isinstance(part, str) else wide(part)
