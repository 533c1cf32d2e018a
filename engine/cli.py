"""The command line: kdfuse train, eval, export, report, recipes, data, demo, doctor, bench.

Each verb imports what it needs when it runs, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .schema import Expect, RecipeBase

app = typer.Typer(
    help="Knowledge distillation: train a small network from a large one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Recipes that come with the package.", invoke_without_command=True)
data_app = typer.Typer(help="Write or check image folders.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="name of a recipe, or FILE.yaml[:row]")
]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as in optim.lr=0.1")
]


def main() -> None:
    """Run the command line; an error of the user's is one message on stderr and exit code 2."""
    try:
        app(prog_name="kdfuse")
    except Exception as error:
        if os.environ.get("KDFUSE_TRACEBACK") == "1" or not _for_users(error):
            raise
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _for_users(error: Exception) -> bool:
    """Errors whose text is meant for the user: bad values, files, and kdfuse's own classes."""
    own = type(error).__module__.split(".")[0] == "kdfuse"
    return own or isinstance(error, ValueError | OSError)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="show the version")] = False):
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeName,
    words: Words = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the run; default: runs/RECIPE-N, the next N")
    ] = None,
) -> None:
    """Train a recipe. The word resume=true goes on with a run that was stopped."""
    from .recipe import DetectionRecipe, load

    words = list(words or [])
    resume = _take_resume(words)
    loaded = load(recipe, words)
    folder = out or _default_out(loaded, resume)
    try:
        # torchvision and DALI: not before the recipe is known good
        if isinstance(loaded, DetectionRecipe):
            from .detection.loop import train as detect

            detect(loaded, out=folder, resume=resume)
        else:
            from .loop import train as run

            run(loaded, out=folder, resume=resume)
    except KeyboardInterrupt:
        print(f"stopped; resume=true goes on from the last checkpoint of {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    _print_published(folder)
    if os.environ.get("RANK", "0") == "0":
        page = folder / "report.html"
        print(f"{folder}: see {page if page.exists() else folder / 'log.jsonl'}")


def _print_published(run: Path) -> None:
    """The published number, below the ones of the run, and what of the recipe was changed."""
    from .recipe import load, recipes
    from .rundir import changes, plain

    recipe = load(run / "recipe.yaml")
    if recipe.expect is None or os.environ.get("RANK", "0") != "0":
        return
    print(f"published: {_number(recipe.expect) or 'no number'} ({recipe.expect.source})")
    shipped = plain(load(recipe.name)) if recipe.name in recipes() else plain(recipe)
    drift = changes(shipped, plain(recipe))
    if drift:
        print(f"but this run is not that recipe: {'; '.join(drift)}")


def _number(expect: Expect | None) -> str:
    """The published number with its name; empty where there is none."""
    if expect is None or (expect.top1 is None and expect.ap is None):
        return ""
    return f"ap {expect.ap:.2f}" if expect.top1 is None else f"top1 {expect.top1:.2f}"


def _take_resume(words: list[str]) -> bool:
    """Take the words resume=... out of `words`; the last one counts."""
    values = [word.removeprefix("resume=") for word in words if word.startswith("resume=")]
    words[:] = [word for word in words if not word.startswith("resume=")]
    for value in values:
        if value not in ("true", "false"):
            raise ValueError(f"resume: got {value}, wants true or false")
    return bool(values) and values[-1] == "true"


def _default_out(recipe: RecipeBase, resume: bool) -> Path:
    """runs/RECIPE-N: the next number, or the newest run to go on with.

    Processes of one torchrun agree: none creates its folder before all have come this far.
    """
    from .rundir import default_folder

    base = default_folder(recipe)
    tails = [path.name.removeprefix(f"{base.name}-") for path in base.parent.glob(f"{base.name}-*")]
    newest = max((int(tail) for tail in tails if tail.isdigit()), default=0)
    if resume and newest == 0:
        raise ValueError(f"resume=true: there is no {base}-N to go on with; add --out DIR")
    return base.with_name(f"{base.name}-{newest if resume else newest + 1}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
) -> None:
    """Evaluate the networks of a run on its validation set."""
    from .evaluate import evaluate as measure
    from .recipe import DetectionRecipe, load

    there = (run / "recipe.yaml").is_file()
    recipe = load(run / "recipe.yaml") if there else None
    # Both say what they find.
    if isinstance(recipe, DetectionRecipe):
        from .detection.evaluate import evaluate as detect

        detect(run, recipe)
    else:
        measure(run)
    _print_published(run)


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
    from .report import report as write

    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    print(write(runs, out or default))


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes; `kdfuse recipes show NAME` prints one."""
    if context.invoked_subcommand is not None:
        return
    from .recipe import load
    from .recipe import recipes as names

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("student", "teacher", "published top-1"):
        table.add_column(heading, overflow="fold")
    for name in names():
        recipe = load(name)
        teacher = recipe.teacher.name if recipe.teacher else ""
        published = _number(recipe.expect).removeprefix("top1 ")
        table.add_row(name, recipe.student.name, teacher, published)
    _wide(table)


@recipes_app.command("show")
def show(recipe: RecipeName, words: Words = None) -> None:
    """Print a recipe with all its settings, after the overriding words."""
    from .recipe import load

    print(load(recipe, words or []).explain(), end="")


@data_app.command("digits")
def digits(root: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write")]) -> None:
    """Write scikit-learn's 1797 handwritten digits as an image folder."""
    from .data import write_digits

    write_digits(root)
    print(root)


@data_app.command("check")
def check(root: Annotated[Path, typer.Argument(metavar="DIR", help="folder of images")]) -> None:
    """Decode every image below a folder and name those that cannot be read."""
    from .data import check_folder

    faults = check_folder(root)
    for path, why in faults:
        print(f"{path}: {why}")
    if faults:
        raise ValueError(f"{len(faults)} unreadable images under {root}; replace or remove them")
    print(f"{root}: every image can be read")


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
    _wide(table)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@bench_app.command(
    "losses",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def losses(context: typer.Context) -> None:
    """Time the loss kernels; --help lists the options."""
    from ..kernels.bench import main as measure

    measure(context.args)


def _wide(table: Table) -> None:
    """Print a table; where the output is a file or a pipe, without folding its lines."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 400)
    console.print(table)
