"""The demonstration: what distillation gains on real images with few labels, in a few minutes.

scikit-learn's handwritten digits are written out as JPEG files. A teacher learns from all labels;
the same small student then learns from five images a class: alone, with KD, and with SLKD.
"""

import shutil
import statistics
from pathlib import Path

from ..recipe.load import Recipe
from ..report.page import report
from ..report.pictures import PICTURES
from ..run.folder import RECIPE
from ..run.past import read_run
from ..training.start import train
from .pictures import draw

SEEDS = 3
FEW = ["data.subset=5", "run.batch=25", "run.epochs=100", "run.eval_every=25", "run.log_every=20"]
STUDENTS = {
    "alone": "digits/ce:resnet8",
    "KD": "digits/kd:resnet20-resnet8",
    "SLKD, two SL-Ts": "digits/slkd:resnet20-resnet8",
}


def demo(folder: Path) -> Path:
    """Run the demonstration in `folder`, print its table and return the path of its report.

    A second call trains what an interrupted one left. Raises ValueError for a folder that holds
    anything else.
    """
    known = {"digits", "teacher", "report.html"}
    strange = [p.name for p in folder.glob("*") if p.name not in known and p.name[:2] != "s-"]
    if strange:
        raise ValueError(
            f"{folder} holds {strange[0]!r}, which is not the demo's; name another folder"
        )
    words = [f"data.root={folder / 'digits'}"]
    teacher = _run("digits/ce:resnet20", folder / "teacher", [*words, "run.epochs=10"])
    words += FEW
    runs: dict[str, list[Path]] = {}
    for name, recipe in STUDENTS.items():
        given = [f"teacher.checkpoint={teacher}"] if name != "alone" else []
        for seed in range(SEEDS):
            out = folder / f"s-{recipe.split('/')[1].split(':')[0]}-{seed}"
            runs.setdefault(name, []).append(
                _run(recipe, out, [*words, *given, f"run.seed={seed}"])
            )
    print("\npictures of the teacher and of the first seed:", flush=True)
    draw([teacher, *(several[0] for several in runs.values())], tuple(PICTURES))
    out = report(
        [teacher, *(run for several in runs.values() for run in several)], folder / "report.html"
    )
    print(f"\nteacher (all {_labels(teacher)} labels): {_last(teacher):.2f}% top-1")
    print(f"student from 5 images a class, {SEEDS} seeds, last epoch:\n")
    print(f"{'':18}{'mean':>8}{'spread':>8}   each")
    for name, several in runs.items():
        found = [_last(run) for run in several]
        each = "  ".join(f"{value:.2f}" for value in found)
        print(f"{name:18}{statistics.mean(found):8.2f}{statistics.stdev(found):8.2f}   {each}")
    print(f"\n{out}")
    return out


def _run(recipe: str, out: Path, words: list[str]) -> Path:
    loaded = Recipe.load(recipe, words)
    print(f"\n{out.name}: {recipe} {' '.join(words)}", flush=True)
    if (out / RECIPE).exists():
        return train(loaded, out=out, resume=True)
    shutil.rmtree(out, ignore_errors=True)
    return train(loaded, out=out)


def _last(run: Path) -> float:
    last = read_run(run).last
    assert last is not None  # a finished run was evaluated
    return last["top1"]


def _labels(run: Path) -> int:
    return sum(1 for _ in (run.parent / "digits" / "train").glob("*/*.jpg"))
