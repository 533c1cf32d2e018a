"""The command line: kdfuse train, eval, export, report, recipes, data, demo, doctor, bench.

Each verb imports what it needs when it runs, so that --help is quick.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import recipes as cli_recipes
from .recipes import number, wide

if TYPE_CHECKING:
    from ..recipe.load import AnyRecipe
    from ..run.set import Member

app = typer.Typer(
    help="Knowledge distillation: train a small network from a large one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Write or check images.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(cli_recipes.app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line; an error of the user's is one message on stderr and exit code 2."""
    try:
        app(prog_name="kdfuse")
    except Exception as error:
        from ..recipe.problems import for_users

        if os.environ.get("KDFUSE_TRACEBACK") == "1" or not for_users(error):
            raise
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


@app.command()
def train(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="names of recipes or FILE.yaml[:row], * for all rows; settings as in optim.lr=0.1",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="folder; default: runs/RECIPE-N, of a set runs/RECIPES-set-N, next N"),
    ] = None,
) -> None:
    """Train a recipe, or a set: several recipes, or several seeds with the word seeds=N.

    The word resume=true goes on with a run or a set that was stopped.
    """
    words = [word for word in given if "=" in word]
    resume = _take(words, "resume", "false", "true|false", "true or false") == "true"
    seeds = int(_take(words, "seeds", "1", "[1-9][0-9]*", "a whole number above 0"))
    from ..recipe.load import load
    from ..report.tables import published
    from ..run.folder import default_folder
    from ..run.set import default_base, expand, members, train_set
    from ..training.start import train as run

    names = expand(word for word in given if "=" not in word)
    one = load(names[0], words) if len(names) == 1 and seeds == 1 else None
    runs = [] if one else members(names, words, seeds)
    published(_written(runs))  # no cell has two recipes: said before anything is trained
    folder = out or _default_out(default_folder(one) if one else default_base(runs), resume)
    try:
        if one is None:
            failures = train_set(runs, folder, resume, run)
        else:
            run(one, folder, resume)
    except KeyboardInterrupt:
        print(f"stopped; resume=true goes on from the last checkpoint of {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    if one is None:
        _print_set(runs, folder, failures)
        return
    _print_published(folder)
    if os.environ.get("RANK", "0") == "0":
        page = folder / "report.html"
        print(f"{folder}: see {page if page.exists() else folder / 'log.jsonl'}")


def _print_set(runs: list[Member], folder: Path, failures: list[str]) -> None:
    """The tables of a set, then what does not count in them, then the runs that failed."""
    from ..report.tables import summary
    from ..run.past import below

    if os.environ.get("RANK", "0") != "0":
        return
    drawn, notes = summary(_written(runs), below(folder) if folder.exists() else [])
    for part in drawn:
        print()
        wide(part)
    for note in notes:
        print(note)
    print(f"{folder}: {len(runs) - len(failures)} of {len(runs)} runs are finished")
    if failures:
        for line in failures:
            print(f"failed: {line}", file=sys.stderr)
        raise typer.Exit(1)


def _written(runs: list[Member]) -> list[AnyRecipe]:
    """The recipes of a set, each once."""
    return list({member.written.name: member.written for member in runs}.values())


def _print_published(run: Path) -> None:
    """The published number, below the ones of the run, and what of the recipe was changed."""
    from ..recipe.load import load, recipes
    from ..run.folder import changes, plain

    recipe = load(run / "recipe.yaml")
    if recipe.expect is None or os.environ.get("RANK", "0") != "0":
        return
    print(f"published: {number(recipe.expect) or 'no number'} ({recipe.expect.source})")
    shipped = plain(load(recipe.name)) if recipe.name in recipes() else plain(recipe)
    drift = changes(shipped, plain(recipe))
    if drift:
        print(f"but this run is not that recipe: {'; '.join(drift)}")


def _take(words: list[str], key: str, default: str, form: str, wants: str) -> str:
    """Take the words KEY=... out of `words`: the value of the last one, which has to fit `form`."""
    values = [word.removeprefix(f"{key}=") for word in words if word.startswith(f"{key}=")]
    words[:] = [word for word in words if not word.startswith(f"{key}=")]
    for value in values:
        if not re.fullmatch(form, value):
            raise ValueError(f"{key}: got {value}, wants {wants}")
    return values[-1] if values else default


def _default_out(base: Path, resume: bool) -> Path:
    """BASE-N: the next number, or the newest folder to go on with.

    Processes of one torchrun agree: none creates its folder before all have come this far.
    """
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
    from ..recipe.load import DetectionRecipe, load
    from ..training.evaluate import evaluate as measure

    there = (run / "recipe.yaml").is_file()
    recipe = load(run / "recipe.yaml") if there else None
    # Both say what they find.
    if isinstance(recipe, DetectionRecipe):
        from ..detection.evaluate import evaluate as detect

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
    from ..report.page import report as write

    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    print(write(runs, out or default))


@data_app.command("digits")
def digits(root: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write")]) -> None:
    """Write scikit-learn's 1797 handwritten digits as an image folder."""
    from ..data.sources.digits import write_digits

    write_digits(root)
    print(root)


@data_app.command("glyphs")
def glyphs(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write into")],
    images: Annotated[
        int | None, typer.Option(min=1, help="training images; default: 50000")
    ] = None,
) -> None:
    """Draw characters of 100 classes, 32 x 32, from matplotlib's fonts: one file, in a minute."""
    from ..data.sources.glyphs import write_glyphs

    print(write_glyphs(root, images))


@data_app.command("check")
def check(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="folder of images or tars")],
) -> None:
    """Decode every image below a folder, in tars too, and name those that cannot be read."""
    from ..data.check import check_folder

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
    wide(table)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@bench_app.command(
    "losses",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def losses(context: typer.Context) -> None:
    """Time the loss kernels; --help lists the options."""
    from ...kernels.bench import main as measure

    measure(context.args)
