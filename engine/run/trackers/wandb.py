"""Weights & Biases: a run of its own for each run, in the project WANDB_PROJECT, or kdfuse."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .remote import Remote, TrackerError, in_words


def wandb(folder: Path, config: Mapping[str, Any], known: str | None) -> tuple[Remote, str]:
    """The run in `folder` there, and its id: the one of the id `known`, or a new one.

    Where it goes and as whom is W&B's own to be told, by WANDB_MODE, WANDB_ENTITY and so on.
    Raises TrackerError.
    """
    try:
        import wandb as library

        run = library.init(
            project=os.environ.get("WANDB_PROJECT", "kdfuse"),
            name=folder.resolve().name,
            dir=os.environ.get("WANDB_DIR", str(folder)),
            config=dict(config),
            id=known,
            resume="allow",
            settings=library.Settings(console="off"),  # the terminal is the run's own
        )
    except Exception as error:
        raise TrackerError(in_words("wandb", error)) from error
    # Its own count of steps only grows, and a run that goes back to a checkpoint does not.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    remote = Remote(
        "wandb",
        lambda step, values: run.log({"step": step, **values}),
        lambda finished: run.finish(exit_code=0 if finished else 1),
    )
    return remote, run.id
