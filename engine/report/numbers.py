"""Runs as JSON lines: a record each, for tables and plots of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..run.disk import write_whole
from ..run.past import PastRun, read_run

SUFFIX = ".jsonl"
FRAME = ("kind", "step", "time")
MACHINE = ("kdfuse", "commit", "python", "torch", "cuda", "platform", "cpus", "threads", "gpus")


def numbers(runs: list[Path], out: Path) -> Path:
    """Write a record of each of the given run directories to `out` and return its path.

    `last` and `best` are evaluations: scores in percent, the means of the training terms, the
    learning rate; null before the first one. `train_s` are the seconds from the first record of
    the log to the last, evaluations and checkpoints among them. Raises FileNotFoundError for a
    folder that is not a run.
    """
    records = [_record(read_run(path)) for path in runs]
    write_whole(out, "".join(json.dumps(record) + "\n" for record in records))
    return out


def _record(run: PastRun) -> dict[str, Any]:
    recipe = run.recipe
    record = {"kind": "run", "recipe": run.name, "run": run.folder, "seed": run.seed}
    record |= {
        role: (recipe.get(role) or {}).get("name") for role in ("method", "student", "teacher")
    }
    record |= {name: recipe.get("run", {}).get(name) for name in ("epochs", "batch", "amp")}
    times = [r["time"] for r in run.records if "time" in r]
    record |= {
        "state": run.state,
        "last": _scores(run.last),
        "best": _scores(run.best),
        "images_per_s": run.images_per_s,
        "train_s": round(times[-1] - times[0], 3) if times else None,
    }
    return record | {name: run.environment.get(name) for name in MACHINE}


def _scores(record: dict[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {name: value for name, value in record.items() if name not in FRAME}
