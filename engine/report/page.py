"""One HTML page about one or several runs: results beside the published ones, curves, settings.

The page is one file that needs nothing else: styles and curves are inside.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jinja2

from ..recipe import problems
from ..run.disk import write_whole
from ..run.past import PastRun, Seeds, across_seeds, mean_and_spread, read_run
from . import curves, pictures
from .drawing import COLOURS

LIMIT = 5_000_000  # bytes of a page, as far as pictures decide
TEMPLATE = Path(__file__).resolve().parent / "templates" / "report.html"


def report(runs: list[Path], out: Path, shows: Collection[str] | None = None) -> Path:
    """Write the page about the given run directories to `out` and return its path.

    `shows` are the names of the pictures that it has of those that were made (pictures.make); None:
    all of them. Those of the first runs are on it, as far as it stays below LIMIT bytes. Runs that
    differ only in seed are one row, with mean and sample standard deviation; classifiers and
    detectors have a table each, since top-1 and AP do not compare. Raises FileNotFoundError for a
    folder that is not a run, ValueError without any run.
    """
    if not runs:
        raise ValueError("report needs at least one run directory")
    read = [read_run(Path(path)) for path in runs]
    groups = across_seeds(read)
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    given = {
        "title": read[0].name if len(groups) == 1 else f"{len(groups)} recipes, {len(read)} runs",
        "description": read[0].recipe.get("description", "") if len(groups) == 1 else "",
        "colours": COLOURS,
        "tasks": [
            _task([group for group in groups if group.score == score])
            for score in dict.fromkeys(group.score for group in groups)
        ],
        "runs": [_section(run) for run in read],
    }
    bare = page.render(given, pictures=[pictures.Album()] * len(read))
    room = LIMIT - len(bare.encode(errors="backslashreplace"))
    text = page.render(given, pictures=pictures.albums(read, shows, room))
    write_whole(out, text.encode(errors="backslashreplace").decode())  # of names of files
    return out


def _task(groups: list[Seeds]) -> dict[str, Any]:
    """What the page shows of all runs that are judged by the same score."""
    several = sum(len(group.runs) for group in groups) > 1
    return {
        "score": groups[0].score,
        "results": [_result(group) for group in groups],
        "comparison": curves.comparison(groups) if several else None,
        "differences": _differences(groups),
    }


def _result(group: Seeds) -> dict[str, Any]:
    """A row of the table of results; scores are text, percent."""
    run = group.runs[0]
    best, published = group.scores("best"), run.published
    gain = None
    if best and published is not None:
        gain = f"{statistics.mean(best) - published:+.2f}"
    speeds = [r.images_per_s for r in group.runs if r.images_per_s is not None]
    tops = [r.best for r in group.runs if r.best is not None]
    return {
        "name": group.name,
        "method": run.recipe.get("method", {}).get("name", ""),
        "runs": group.runs,
        "last": mean_and_spread(group.scores("last")),
        "best": mean_and_spread(best),
        "best_epoch": f"epoch {tops[0]['epoch']:g}" if len(tops) == 1 else "",
        "published": None if published is None else f"{published:.2f}",
        "source": (run.recipe.get("expect") or {}).get("source", ""),
        "gain": gain,
        "speed": f"{statistics.median(speeds):,.0f}" if speeds else None,
    }


def _differences(groups: list[Seeds]) -> dict[str, list[str]]:
    """Settings that are not the same in all groups: dotted key and one value a group."""
    flat = [dict(problems.leaves(group.runs[0].recipe)) for group in groups]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    dull = ("name", "description", "expect", "run.seed")
    rows = {key: [_text(recipe.get(key, "")) for recipe in flat] for key in keys}
    telling = [key for key in keys if not key.startswith("expect.") and key not in dull]
    return {key: rows[key] for key in telling if len(set(rows[key])) > 1}


def _section(run: PastRun) -> dict[str, Any]:
    """What the page shows of one run."""
    return {
        "name": run.name,
        "folder": run.folder,
        "seed": run.seed,
        "state": run.state,
        "charts": curves.charts(run),
        "notes": [record["text"] for record in run.of_kind("note")],
        "evaluations": [_evaluation(record) for record in run.evaluations],
        "recipe": _table(run.recipe),
        "environment": _table(run.environment),
    }


def _evaluation(record: dict[str, Any]) -> dict[str, str]:
    hidden = ("kind", "step", "time")
    return {k: f"{v:.5g}" if v is not None else "-" for k, v in record.items() if k not in hidden}


def _table(values: dict[str, Any]) -> dict[str, str]:
    rows = {key: _text(value) for key, value in problems.leaves(values)}
    return {key: value for key, value in rows.items() if key not in ("name", "description")}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
