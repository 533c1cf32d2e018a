"""Reading run directories back: what a run was, how far it came, what it left behind."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ..recipe import problems, yamlfile
from ..recipe.load import AnyRecipe, Recipe
from . import checkpoint, log
from .environment import ENVIRONMENT
from .folder import RECIPE, kept_recipe


class Score(NamedTuple):
    """What the runs of a task are judged by, in percent."""

    key: str  # in the records of a log and in a recipe's `expect`
    name: str
    short: str

    @property
    def title(self) -> str:
        return self.name[0].upper() + self.name[1:]


TOP1 = Score("top1", "top-1 accuracy", "top-1")
AP = Score("ap", "box AP", "AP")


@dataclass(frozen=True)
class PastRun:
    """What a run directory holds; a run that was killed early has empty lists."""

    path: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", self.path.name))

    @property
    def folder(self) -> str:
        return self.path.resolve().name

    @property
    def seed(self) -> int:
        return self.recipe.get("run", {}).get("seed", 0)

    @property
    def score(self) -> Score:
        return AP if self.recipe.get("task") == "detection" else TOP1

    @property
    def published(self) -> float | None:
        """The score that was published for its recipe."""
        return (self.recipe.get("expect") or {}).get(self.score.key)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Epoch records with a score, in order."""
        return [r for r in self.of_kind("epoch") if r.get(self.score.key) is not None]

    @property
    def last(self) -> dict[str, Any] | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest score, the earliest of equal ones."""
        return max(self.evaluations, key=lambda record: record[self.score.key], default=None)

    @property
    def finished(self) -> bool:
        return bool(self.of_kind("end"))

    @property
    def state(self) -> str:
        """'finished', or how far an unfinished run came."""
        if self.finished:
            return "finished"
        if not self.records:
            return "not started"
        start = (self.of_kind("start") or [{}])[0]
        done = f"step {self.records[-1]['step']}"
        return f"unfinished, {done} of {start['steps']}" if "steps" in start else done

    @property
    def images_per_s(self) -> float | None:
        """Median over the step records, images a second of all processes."""
        speeds = [r["images_per_s"] for r in self.of_kind("step") if r.get("images_per_s")]
        return statistics.median(speeds) if speeds else None


@dataclass(frozen=True)
class Seeds:
    """The runs of one recipe over its seeds, whose results are averaged."""

    runs: list[PastRun]

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def score(self) -> Score:
        return self.runs[0].score

    def scores(self, which: str) -> list[float]:
        """The scores, `which` 'last' or 'best', of the finished runs or, with none, of all."""
        counted = [run for run in self.runs if run.finished] or self.runs
        found = [getattr(run, which) for run in counted]
        return [record[self.score.key] for record in found if record is not None]


def read_run(path: Path) -> PastRun:
    """Read a run directory. Raises FileNotFoundError for a folder that is none, by its name, and
    ValueError for a file in it that is damaged."""
    _check_is_run(path)
    written = path / log.NAME
    records = log.read(written) if written.is_file() else []
    return PastRun(path, _recipe(path / RECIPE), _environment(path / ENVIRONMENT), records)


def any_recipe_of(path: Path) -> AnyRecipe:
    """The recipe of a run's folder. Raises FileNotFoundError for a folder that is no run."""
    _check_is_run(path)
    return kept_recipe(path)


def recipe_of(path: Path) -> Recipe:
    """The recipe of a classifier's run for its checkpoints, without files of weights.

    Raises FileNotFoundError for a folder that is no run, ValueError for a detector's.
    """
    loaded = any_recipe_of(path)
    if not isinstance(loaded, Recipe):
        raise ValueError(f"{path} is a run of a detector; its weights are in checkpoints/")
    return loaded.without_files()


def checkpoints_of(path: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Weights and facts of the newest usable checkpoint and, once there is one, of the best."""
    last = checkpoint.latest(path / "checkpoints")
    if last is None:
        raise checkpoint.CheckpointError(f"{path}: no checkpoint yet")
    for reason in last.skipped:
        print(f"skipped a damaged checkpoint: {reason}", flush=True)
    found = {"last": (last.state, last.facts)}
    if "best" in last.facts["results"]:
        try:
            found["best"] = checkpoint.load(path / "checkpoints" / "best")
        except checkpoint.CheckpointError as error:
            print(f"without the best one: {error}", flush=True)
    return found


def across_seeds(runs: list[PastRun]) -> list[Seeds]:
    """The runs, those together that differ only in run.seed, in the order in which they come.

    Of two runs with the same seed, each is of another group: they are no sample of two.
    """
    groups: dict[tuple[str, int], list[PastRun]] = {}
    times: Counter[str] = Counter()
    for run in runs:
        seedless = {**run.recipe, "run": {**run.recipe.get("run", {}), "seed": None}}
        whole, same = (json.dumps(x, sort_keys=True) for x in (run.recipe, seedless))
        times[whole] += 1
        groups.setdefault((same, times[whole]), []).append(run)
    return [Seeds(members) for members in groups.values()]


def below(folder: Path) -> list[PastRun]:
    """The runs in and below a folder, by path. FileNotFoundError where it is not there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return [read_run(path.parent) for path in sorted(folder.rglob(RECIPE))]


def mean_and_spread(values: list[float]) -> str | None:
    """Mean and, of two or more, sample standard deviation; None without any value."""
    if not values:
        return None
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} \u00b1 {statistics.stdev(values):.2f}" if len(values) > 1 else mean


class _Method(BaseModel):
    name: str = ""


class _Run(BaseModel):
    seed: int = 0


class _Expect(BaseModel):
    top1: float | None = None
    ap: float | None = None
    source: str = ""


class _Held(BaseModel):
    """What is read of any recipe, of whatever version."""

    model_config = ConfigDict(strict=True)

    name: str = ""
    description: str = ""
    method: _Method = _Method()
    run: _Run = _Run()
    expect: _Expect | None = None


def _recipe(path: Path) -> dict[str, Any]:
    raw = yamlfile.read(path)
    try:
        _Held.model_validate(raw, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged ({problems.first(error)})") from error
    return raw


def _environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("wants keys and values")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from error
    return found


def _check_is_run(path: Path) -> None:
    if not (path / RECIPE).is_file():
        other = "is a file" if path.exists() else "does not exist"
        what = f"has no {RECIPE}" if path.is_dir() else other
        raise FileNotFoundError(f"{path} is not a run directory: it {what}")
