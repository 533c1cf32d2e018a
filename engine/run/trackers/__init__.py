"""Where the numbers of a run go beside its log: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from ...recipe.run import Tracker as Name
from ..disk import write_whole
from .mlflow import mlflow
from .remote import TrackerError
from .tensorboard import Board
from .wandb import wandb

# Any of these distributions is the tracker's. A folder named wandb, which it makes where it runs,
# would do for an import.
PACKAGES: dict[Name, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
REMOTE = {"wandb": wandb, "mlflow": mlflow}
IDS = "trackers.json"  # in a run's folder: what it is called elsewhere
WITHOUT = "the run goes on without it"


class Tracker(Protocol):
    """One of them, for one run."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take values of a step by name, at once. Raises OSError for a file that cannot be written
        yet, and TrackerError, once, for what went wrong elsewhere."""

    def close(self, finished: bool) -> str:
        """What is missing elsewhere, "" for nothing; `finished`: the run will not go on."""


def installed(name: Name) -> bool:
    """Whether a tracker's package is there."""
    for package in PACKAGES[name]:
        try:
            return bool(version(package))
        except PackageNotFoundError:
            continue
    return False


def check(names: Sequence[Name] | None) -> None:
    """Raise ValueError unless all that are asked for are installed; None asks for none."""
    for name in names or ():
        if not installed(name):
            raise ValueError(
                f"run.trackers: {name} is not installed: pip install {PACKAGES[name][0]}, or leave "
                "it out"
            )


def opened(
    names: Sequence[Name] | None,
    folder: Path,
    purge_step: int | None,
    config: Mapping[str, Any],
) -> tuple[list[Tracker], list[str]]:
    """The trackers of the run in `folder`, and why others, which it had before, are not there.

    `names` None: TensorBoard where it is installed. From `purge_step` on its earlier numbers do not
    count. `config`: the recipe's settings. A run that was in a tracker before goes on in the same
    one. Raises ValueError where one that is asked for begins no run.
    """
    auto: tuple[Name, ...] = ("tensorboard",) if installed("tensorboard") else ()
    found: list[Tracker] = []
    missing: list[str] = []
    ids = _ids(folder / IDS)
    for name in dict.fromkeys(auto if names is None else names):
        try:
            if name == "tensorboard":
                found.append(Board(folder / "tensorboard", purge_step))
                continue
            tracker, own = REMOTE[name](folder, config, ids.get(name))
        except ImportError as error:
            missing.append(f"{name}: {error}; {WITHOUT}")
        except OSError as error:
            missing.append(f"cannot write {error.filename}: {error.strerror}; {WITHOUT}")
        except TrackerError as error:
            if name not in ids:
                raise ValueError(f"run.trackers: {error}; cure that or leave it out") from error
            missing.append(f"{error}; {WITHOUT}")
        else:
            found.append(tracker)
            if ids.get(name) != own:
                ids[name] = own
                write_whole(folder / IDS, json.dumps(ids) + "\n")
    return found, missing


def _ids(path: Path) -> dict[str, str]:
    """By tracker, what the run is called there."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise ValueError("wants names and ids")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from error
    return found
