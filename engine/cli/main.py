"""The command line: kdfuse train, watch, cache, eval, export, report, recipes, data, demo,
doctor, bench.

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
from typer.core import TyperGroup

from . import bench, cache, data, recipes
from .recipes import wide
from .train import print_published, train


class _ImportsFirst(TyperGroup):
    """Takes --import MODULE anywhere among the words, for every verb: `_top` imports them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        imports: list[str] = []
        others: list[str] = []
        words = iter(args[:end])
        for word in words:
            if word == "--import":
                module = next(words, None)
                if module is None:
                    raise ValueError("--import: wants a module, as in --import my_package.kd")
                imports += [word, module]
            else:
                (imports if word.startswith("--import=") else others).append(word)
        return super().parse_args(ctx, [*imports, *others, *args[end:]])


app = typer.Typer(
    cls=_ImportsFirst,
    help="Knowledge distillation: train a small network from a large one.\n\n"
    "First steps: kdfuse data digits data/digits, then kdfuse train digits/kd, then kdfuse report "
    "and the folder that it named.",
    epilog="The pages are in docs/ beside README.md: install, recipes, methods, python, "
    "extending, imagenet, cache, reliability, drop-in (the losses alone), limits. "
    "KDFUSE_TRACEBACK=1 shows where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
TRAIN, LOOK, FIND, MEASURE = "Train", "Look at runs, and take networks along", "Find", "Measure"
app.command(rich_help_panel=TRAIN)(train)
app.add_typer(cache.app, name="cache", rich_help_panel=TRAIN)
app.add_typer(recipes.app, name="recipes", rich_help_panel=FIND)
app.add_typer(data.app, name="data", rich_help_panel=FIND)
app.add_typer(bench.app, name="bench", rich_help_panel=MEASURE)


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
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="show the version")] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="a module that registers networks, methods or sources of your own; before the "
            "verb or behind it",
        ),
    ] = None,
) -> None:
    if modules:
        if context.invoked_subcommand is None:
            raise ValueError(f"--import {modules[0]}: goes with a verb, as in kdfuse train")
        from .imports import import_modules

        import_modules(modules)
    if version:
        from ... import __version__

        print(__version__)
        raise typer.Exit


@app.command("eval", rich_help_panel=LOOK)
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


@app.command(rich_help_panel=LOOK)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    out: Annotated[Path, typer.Argument(help="file to write: .pt2, .onnx, .pt or .safetensors")],
    which: Annotated[str, typer.Option(help="best or last")] = "best",
    network: Annotated[str, typer.Option(help="student, ema, slt0, ...")] = "student",
    check: Annotated[
        str | None,
        typer.Option(
            metavar="N|all|0",
            help="run the file on so many validation images beside the run's own network; all: its "
            "accuracy is the recorded one, too; 0: on none. Default: 256; a detector's is not run",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="timm|torchvision",
            help="of weights: under that library's names, for its load_state_dict. Default: under "
            "those of the run",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a trained network as one file: a program, an ONNX model, or its weights. Beside it goes
    a model card, FILE.md."""
    from .export import export as write

    print(write(run, out, which, network, check, layout))


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    out: Annotated[
        Path | None,
        typer.Option(help="file to write: a page, or FILE.jsonl with a record of numbers a run"),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="all|none|NAME,...",
            help="pictures of every run, drawn now from one pass of its networks over the "
            "validation set, and kept in RUN/pictures: tsne, correlation, confusion, calibration, "
            "classes, agreement. Default: those that were drawn before, without a pass. The page "
            "has those of the first runs, as far as it stays below 5 MB",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one HTML page about one or several runs, or their numbers as JSON lines."""
    from ..report import numbers
    from ..report.page import report as write
    from ..report.pictures import chosen
    from .pictures import draw

    if out is not None and out.suffix == numbers.SUFFIX:
        if pictures is not None:
            raise ValueError(
                f"--pictures {pictures}: a page has them, and --out {out} is of numbers"
            )
        print(numbers.numbers(runs, out))
        return
    shows = None if pictures is None else chosen(pictures)
    if shows:
        draw(runs, shows)
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    print(write(runs, out or default, shows))


@app.command(rich_help_panel=LOOK)
def watch(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, or a set")],
) -> None:
    """Show runs as they train, from another terminal, until they end, or none of a set has been at
    work for a minute; Ctrl-C ends it."""
    from .watch import watch as show

    try:
        finished = show(runs)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not finished:
        raise typer.Exit(1)


@app.command(rich_help_panel=TRAIN)
def demo(folder: Annotated[Path, typer.Argument(help="where the runs go")] = Path("demo")) -> None:
    """Distil a student from real images: data, teacher, student alone, with KD, with SLKD."""
    from .demo import demo as run

    run(folder)


@app.command(rich_help_panel=FIND)
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
