"""What `kdfuse cache show` and `kdfuse cache check` say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .header import read
from .shards import CacheError, look, verify


def lines(folder: Path) -> list[str]:
    """What a cache holds and what training from it needs, a line each. CacheError for none."""
    header = read(folder)
    layout = header.layout()
    images, there, size, views = header.steps * header.batch, 0, 0, 0
    sums = {"right": 0.0, "entropy": 0.0}
    places = list(layout.shards())
    for view, steps in places:
        path = layout.path(folder, view, steps.start)
        try:
            found = look(path, layout, view, steps)["sums"]
        except FileNotFoundError:
            continue
        there += 1
        views += len(steps) * header.batch
        size += path.stat().st_size
        sums = {name: sums[name] + found.get(name, 0.0) for name in sums}
    form = header.form
    settings = {
        "full": f"{form.number}",
        "top_k": f"k {form.k}, the rest {form.rest}",
        "sampled": f"{form.draws} draws, {form.keep} of the largest exact",
    }[form.form]
    if form.label and form.form != "full":
        settings += ", the label's probability exact"
    whose = f"teacher         {' and '.join(header.teachers)} ({header.digest[:12]})"
    temperature = form.temperature
    if header.slts is not None:
        temperature = header.slts["method"]["temperature"]
        slts = f"{len(header.teachers)} x {header.teachers[0]}"
        whose = f"SL-Ts           {slts}, fused, of the teacher {header.digest[:12]}"
    found = [
        whose,
        f"form            {form.form}: {settings}",
        f"temperature     {'any' if temperature is None else f'{temperature:g}'}",
        f"views           {header.views} of {images} images, in batches of {header.batch}",
        f"files           {there} of {len(places)}",
        f"size            {size:,} bytes, {size / max(views, 1):.2f} a view",
    ]
    if form.taps:
        each = [f"{name} {' x '.join(map(str, shape))}" for name, shape in form.taps]
        found.append(f"features        {', '.join(each)}, {form.tap_number}")
    if views and header.slts is None:
        found += [
            f"top-1           {100 * sums['right'] / views:.2f} % of the views' labels",
            f"entropy         {sums['entropy'] / views:.4f} nats, at T = {form.temperature or 1:g}",
        ]
    found += [
        f"{name:<15} {value:.2f} % of the validation set" for name, value in header.facts.items()
    ]
    if header.slts is not None:
        found.append(
            f"to train        slt.record={folder}, with the sections data and method, run.batch "
            f"and the teacher as recorded, for {header.views} epochs at most"
        )
        return found
    found.append(
        f"to train        teacher.cache={folder} teacher.name={header.teachers[0]}, with the "
        "section data and run.batch as recorded"
        + ("" if form.temperature is None else f", method.temperature={form.temperature:g}")
    )
    return found


def damaged(folder: Path, told: Callable[[int, int], None]) -> list[str]:
    """A line for each file of a cache that is missing or whose bytes are not those written."""
    header = read(folder)
    layout = header.layout()
    cure = f"`kdfuse cache RECIPE --out {folder}` makes it"
    if header.slts is not None:
        cure = "the run that records it makes it, resumed if need be"
    places, found = list(layout.shards()), []
    for view, steps in places:
        path = layout.path(folder, view, steps.start)
        try:
            verify(path, layout, view, steps)
        except FileNotFoundError:
            found.append(f"{path}: not there; {cure}")
        except CacheError as error:
            found.append(str(error))
        told(1, len(places))
    return found
