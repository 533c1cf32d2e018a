"""The command line: kdfuse train, cache, eval, export, report, recipes, data, demo, doctor, bench.

Each verb imports what it needs when it runs, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import cache, data, recipes
from .recipes import wide
from .train import print_published, train

app = typer.Typer(
    help="Knowledge distillation: train a small network from a large one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Of a command whose own parser reads all of its words.
PASSED_ON: Any = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
bench_app = typer.Typer(
    help="Measure speed, and what recorded teachers are worth.", no_args_is_help=True
)
app.command()(train)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line; an error of the user's is one message on stderr and exit code 2."""
    try:
        app(prog_name="kdfuse")
    except Exception as error:
        from ..recipe.problems import for_users

        if os.environ.get("KDFUSE_TRACEBACK") == "1" or not for_users(error):
            raise
        if getattr(error, "alike", False) and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)  # all processes of this machine say the same
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="show the version")] = False):
    if version:
        from ... import __version__

        print(__version__)
        raise typer.Exit


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
) -> None:
    """Evaluate the networks of a run on its validation set."""
    from ..recipe.load import DetectionRecipe
    from ..run.past import any_recipe_of

    recipe = any_recipe_of(run)
    # Both say what they find.
    if isinstance(recipe, DetectionRecipe):
        from ..detection.evaluate import evaluate as detect

        detect(run, recipe)
    else:
        from ..training.evaluate import evaluate as measure

        measure(run)
    print_published(run)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    out: Annotated[Path, typer.Argument(help="file to write: .pt2, .onnx or .pt")],
    which: Annotated[str, typer.Option(help="best or last")] = "best",
    network: Annotated[str, typer.Option(help="student, ema, slt0, ...")] = "student",
) -> None:
    """Write a trained network as one file: a program, an ONNX model, or its weights."""
    from .export import export as write

    print(write(run, out, which, network))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    out: Annotated[Path | None, typer.Option(help="file to write")] = None,
) -> None:
    """Write one HTML page about one or several runs."""
    from ..report.page import report as write

    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    print(write(runs, out or default))


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="where the runs go")] = Path("demo")) -> None:
    """Distil a student from real images: data, teacher, student alone, with KD, with SLKD."""
    from .demo import demo as run

    run(folder)


@app.command()
def doctor() -> None:
    """Say what this machine has for training, what is missing, and the cure."""
    from .doctor import doctor as look

    marks = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "wrong": "[red]wrong[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    findings = look()
    for what, state, detail in findings:
        table.add_row(what, marks[state], detail)
    wide(table)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@bench_app.command("losses", **PASSED_ON)
def losses(context: typer.Context) -> None:
    """Time the loss kernels; --help lists the options."""
    from ...kernels.bench.run import main as measure

    measure(context.args)


@bench_app.command("step", **PASSED_ON)
def step(context: typer.Context) -> None:
    """Time training steps on synthetic batches; --help lists the options."""
    from ..bench.step.run import main as measure

    _show(measure(context.args))


@bench_app.command("e2e", **PASSED_ON)
def end_to_end(context: typer.Context) -> None:
    """Time training from image files; --help lists the options."""
    from ..bench.e2e.run import main as measure

    _show(measure(context.args))


@bench_app.command("data", **PASSED_ON)
def data_speed(context: typer.Context) -> None:
    """Time the loaders on images of a recipe; --help lists the options."""
    from ..bench.data.run import main as measure

    _show(measure(context.args))


@bench_app.command("cache", **PASSED_ON)
def recorded(context: typer.Context) -> None:
    """Train students from recorded teachers: accuracy over bytes; --help lists the options."""
    from ..bench.cache.run import main as measure

    _show(measure(context.args))


def _show(parts: list[str | Table]) -> None:
    for part in parts:
        print(part) if isinstance(part, str) else wide(part)
