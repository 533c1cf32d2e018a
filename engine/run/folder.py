"""The folder of a run: created once, and continued only by the recipe that started it."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ..recipe.load import AnyRecipe, load
from ..recipe.run import LEFT_OPEN
from ..recipe.schema import RecipeBase, RecipeError
from . import job, lease
from .disk import write_whole
from .environment import ENVIRONMENT, environment
from .imports import check_imports, imports_of

# Whether a run goes on; "auto": where its folder holds one, else it begins.
Resume = bool | Literal["auto"]

RECIPE = "recipe.yaml"
UNFINISHED = ".tmp"
# What there may be of a run that was killed before it began.
SCRAPS = {ENVIRONMENT, ENVIRONMENT + UNFINISHED, RECIPE + UNFINISHED, lease.NAME}

# Settings that change nothing of what is trained, so that a resumed run may have others: of the
# logged means of an epoch run.log_every changes the last digit, and run.eval_batch may that of an
# evaluation. Weights that were read from a file stand in the checkpoint, or are compared by digest:
# files may move.
FREE = {
    "name",
    "description",
    "data.root",
    "data.workers",
    "data.prefetch",
    "data.bad_images",
    "data.loader",  # of this and run.speed what they come to is compared
    "run.keep",
    "run.log_every",
    "run.trackers",
    "run.eval_batch",
    "run.checkpoint_every",
    "run.time_limit",
    "run.speed",
    "run.teacher_at_chance",
    "run.timeout",
    "optim.skip_limit",
    "student.backbone",
    "expect",
}
NO_PART = ("expect.", "cache.")  # sections of what others do with a recipe
FILES = (".checkpoint", ".cache", ".record")  # whose contents are compared, not where they lie

# How a run is carried out: a result counts with any of these, and a published number is to be
# reached. A resumed run keeps them, since its bytes may depend on them.
CARRIED_OUT = {
    "run.device",
    "run.capture",
    "run.threads",
}


def default_folder(recipe: RecipeBase) -> Path:
    """runs/NAME, the recipe's name in one word."""
    return Path("runs") / one_word(recipe.name)


def one_word(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name)


def begun(folder: Path) -> bool:
    """Whether a run is in the folder; somebody may have lost its recipe."""
    return (folder / RECIPE).exists() or (folder / "checkpoints").is_dir()


def begun_here(folder: Path) -> bool:
    """Whether this command began the run, or a run of the set, in a folder: in this job, where
    there is one."""
    facts = [folder / ENVIRONMENT, *folder.glob(f"*/{ENVIRONMENT}")]
    return any(_begun_by(path) == (job.name(), sys.argv) for path in facts if path.is_file())


def _begun_by(path: Path) -> tuple[Any, Any]:
    """Job and command in an environment.json; one that is damaged is nobody's."""
    try:
        facts = json.loads(path.read_bytes())
        return facts.get("job"), facts.get("command")
    except (ValueError, AttributeError):
        return None, None


def occupied(folder: Path) -> bool:
    """Whether something is in the folder. ValueError for a file of that name."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out = {folder}: a file of that name exists; choose another folder")
    return folder.exists() and any(path.name not in SCRAPS for path in folder.iterdir())


def check_folder(folder: Path, recipe: RecipeBase, resume: bool) -> None:
    """Raise ValueError unless the folder is new or empty, or with `resume` holds a run of the
    recipe."""
    if begun(folder):
        if not resume:
            raise ValueError(
                f"out = {folder}: not empty; choose another folder, or resume=true to go on with it"
            )
        if (folder / RECIPE).exists():
            drift = changes(plain(kept_recipe(folder)), plain(recipe))
            refuse(drift, f"cannot resume {folder}: the recipe is not the one it was started with")
    elif occupied(folder):
        raise ValueError(f"out = {folder}: not empty, and no run is in it; choose another folder")
    elif resume:
        raise nothing_there(folder)


def nothing_there(folder: Path) -> ValueError:
    """The error where a run or a set is to go on and was never begun."""
    return ValueError(
        f"resume=true: there is nothing in {folder} to go on with; leave the word out to begin "
        "there, or set resume=auto, which does either"
    )


def kept_recipe(folder: Path) -> AnyRecipe:
    """The recipe in a run's folder; RecipeError names the file for one that cannot be used, or the
    modules that it needs and that are not imported."""
    check_imports(folder)
    path = folder / RECIPE
    try:
        return load(path)
    except RecipeError as error:
        problems = [line.removeprefix(f"{path}: ") for line in str(error).splitlines()]
        raise RecipeError("\n".join(f"{path}: {line}" for line in problems)) from error


def create_folder(folder: Path, recipe: RecipeBase, world: int) -> None:
    """Write recipe.yaml and environment.json where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECIPE).exists():
        facts = environment(world)
        if imports := imports_of(recipe):
            facts["imports"] = imports
        write_whole(folder / ENVIRONMENT, json.dumps(facts, indent=2) + "\n")
        write_whole(folder / RECIPE, recipe.explain())


def refuse(drift: list[str], problem: str) -> None:
    """Raise ValueError with the differences, if there are any."""
    if drift:
        lines = "\n  ".join(drift)
        cure = "undo that, choose another folder (out), or remove this one"
        raise ValueError(f"{problem}:\n  {lines}\n{cure}")


def plain(recipe: RecipeBase) -> dict[str, Any]:
    """The recipe as plain values: {"optim.lr": 0.1, ...}."""
    return flat(recipe.model_dump(mode="json"))


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values by their dotted keys."""
    return dict(_flat(values, ""))


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each value that differs and can change a number of the run; what one of both
    leaves open does not."""
    both = {**was, **now}
    either = [f"run.{name}" for name in LEFT_OPEN]
    settled = {n for n in either if None not in (was.get(n), now.get(n))}
    names = [name for name in both if not _free(name) and (name not in either or name in settled)]
    return [f"{n}: {was.get(n)} -> {now.get(n)}" for n in names if was.get(n) != now.get(n)]


def _free(name: str) -> bool:
    file = name.endswith(FILES) and ".method." not in f".{name}"  # an option may have such a name
    return name in FREE or name.startswith(NO_PART) or file


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            yield from _flat({str(i): entry for i, entry in enumerate(value)}, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
