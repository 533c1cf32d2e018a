"""What a run keeps, as one file that needs nothing of kdfuse to classify images or find objects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.durable import whole_file
from ..export.card import card, card_of
from ..export.check import DEFAULT, Count, compare, count_of, validation
from ..export.chosen import Chosen, choose
from ..export.formats import (
    PROGRAMS,
    SUFFIXES,
    Runner,
    check_packages,
    program,
    read,
    runner,
    weights,
)
from ..export.layouts import LAYOUTS, Twin, laid_out
from ..recipe.load import DetectionRecipe
from ..run.disk import FULL, shortage
from ..run.past import any_recipe_of, checkpoints_of, read_run


def export(
    run: str | Path,
    out: str | Path,
    which: str = "best",
    network: str = "student",
    check: int | str | None = None,
    layout: str | None = None,
) -> Path:
    """Write a network of a run to `out`, with a model card beside it, and return the file's path. A
    file that is there already stays until the new one is on the disk and was found right.

    By the suffix: .pt2 is a program of torch.export, with facts beside it as the extra file
    "kdfuse.json"; .onnx is an ONNX model, with the same as metadata "kdfuse"; both take uint8
    images of any number and normalise them themselves. .pt holds the weights under "model", as
    published teachers do, .safetensors holds them alone; with `layout` "timm" or "torchvision" both
    hold them alone, under the names of that library's network. SimKD's student comes with projector
    and reused classifier; Dirac layers are plain convolutions in the first two. `which` is "best"
    or "last"; `network` "student", "ema", "slt0", ... or one of those with the name of a learner
    before it ("small_student").

    The file is run on `check` images of the run's validation set (None: 256; "all"; 0: on none),
    and has to give the logits of the run's own network in float32, up to a thousandth of the
    largest one; with "all" the accuracy that the run recorded, too. What was found is printed and
    stands in the card, FILE.md.

    A detector is written as .onnx, for one uint8 image (3, H, W) of any size, or as .pt, not run
    and without a card. Raises ValueError, OSError for a file that cannot be written, or
    CheckpointError (a RuntimeError) when there is no checkpoint to use.
    """
    run, out = Path(run), Path(out)
    if out.is_dir():
        raise IsADirectoryError(f"out = {out}: a folder; name a file, as {out / 'student.pt2'}")
    if out.suffix not in SUFFIXES:
        raise ValueError(f"out = {out}: write one of {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out = {out}: there is no folder {out.parent}; make it first")
    if which not in ("best", "last"):
        raise ValueError(f"which = {which!r}: best or last")
    _check_layout(layout, out)
    count = count_of(DEFAULT if check is None else check)
    recipe = any_recipe_of(run)
    held = checkpoints_of(run)
    if which not in held:
        raise ValueError(f"which = {which!r}: {run} was not evaluated yet; take last")
    if isinstance(recipe, DetectionRecipe):
        from ..detection.export import exported  # no other run needs what it imports

        if layout or check not in (None, 0, "0"):
            given = f"layout = {layout!r}" if layout else f"check = {check!r}"
            raise ValueError(f"{given}: {run} is a run of a detector; leave it out")
        with _written(out, exported(recipe, *held[which], network, out)):
            return out
    check_packages(out, runs=count != 0)
    chosen = choose(read_run(run), recipe.without_files(), which, *held[which], network)
    _classifier(chosen, out, count, layout)
    return out


def _check_layout(layout: str | None, out: Path) -> None:
    if layout is None:
        return
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: {' or '.join(LAYOUTS)}")
    if out.suffix in PROGRAMS:
        raise ValueError(
            f"layout = {layout!r}: names weights, and {out} is a program; write a .pt or "
            ".safetensors file"
        )


def _classifier(chosen: Chosen, out: Path, count: Count, layout: str | None) -> None:
    images = validation(chosen, count) if count else None
    twin: Twin | None = None
    if out.suffix in PROGRAMS:
        names = None if images is None else images.classes
        data = program(chosen, chosen.about(names), out.suffix)
    else:
        held = _weights(chosen, out)
        if layout is not None:
            twin, held = laid_out(chosen.spec.name, held, chosen.classes, layout)
        data = weights(held, out.suffix, layout)
    checked = None
    with _written(out, data) as found:
        if images is not None:
            run = _loaded(found, out, chosen, twin)
            checked = compare(run, out, chosen, images, count)
        page = card_of(out)
        with whole_file(page, page.with_name(f".{os.getpid()}-{page.name}")) as file:
            file.write(card(chosen, out, twin, images, checked).encode())
    if checked is not None:
        print(f"{out}: {checked}", flush=True)


def _loaded(found: Any, out: Path, chosen: Chosen, twin: Twin | None) -> Runner:
    try:
        return runner(out.suffix, found, chosen, twin)
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"out = {out}: the file cannot be loaded: {error}") from error


def _weights(chosen: Chosen, out: Path) -> dict[str, Tensor]:
    if not chosen.alone:
        raise ValueError(
            f"out = {out}: {chosen.name} is more than the network of one name (projector, reused "
            "classifier); write a .pt2 file, or name it as run:FOLDER in a recipe"
        )
    return chosen.network.state_dict()


@contextmanager
def _written(out: Path, data: bytes) -> Iterator[Any]:
    """What is read again of the file, which becomes `out` when the block ends; it vanishes, and
    what was there stays, where that raises."""
    # torch.export wants the suffix .pt2 of the unfinished file, too.
    unfinished = out.with_name(f".{os.getpid()}-{out.name}")
    try:
        with whole_file(out, unfinished) as file:
            file.write(data)
            file.flush()
            yield _read_again(unfinished, out)
    except OSError as error:
        why = error.strerror
        if error.errno in FULL:
            why = f"{why}; it takes {shortage(out.parent, len(data))}"
        raise OSError(error.errno, why, str(out)) from error


def _read_again(unfinished: Path, out: Path) -> Any:
    try:
        return read(unfinished)
    except Exception as error:
        raise ValueError(f"out = {out}: the file cannot be read again: {error}") from error
