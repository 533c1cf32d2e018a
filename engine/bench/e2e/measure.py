"""Measures training from files end to end, beside what it is made of and a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial

import numpy as np
import torch

from ....kernels.bench.report import Record
from ...data.contents import Encoded, Files
from ...data.loaders import kind_of
from ...data.sources import open_source
from ...recipe.data import Data
from ...training.process import settings
from ..data.measure import Turns, about_images, play, readable_rows, speed, steps_of
from ..data.sides import Ours, Turn, chosen_rows, peer_loader, repeated
from ..step import peer, plain
from ..step.cases import Case
from ..step.measure import configured
from ..step.ours import Images, Step
from ..step.player import now
from .sides import Alone, Both, Plain


def measure(
    cases: Sequence[tuple[Case, Data]],
    device: torch.device,
    seconds: float,
    kind: str | None,
    keep: Callable[[Record], None],
) -> None:
    """Hands a record of each case to `keep`; each of its sides is timed for about so many seconds.

    A case comes with the section of the images that it reads; `kind` of its peer is fp32, bf16 or
    None for no peer. Raises ValueError and FileNotFoundError for images that cannot be read.
    """
    for case, data in cases:
        with ExitStack() as opened:
            keep(_measured(case, data, device, seconds, kind, opened))


def _measured(
    case: Case,
    data: Data,
    device: torch.device,
    seconds: float,
    kind: str | None,
    opened: ExitStack,
) -> Record:
    recipe, run, batch = case.recipe, case.recipe.run, case.recipe.run.batch
    manifest = open_source(data, "train")
    if len(manifest.classes) > case.classes:
        raise ValueError(
            f"data.classes={case.classes} of {case.name}: its images are of "
            f"{len(manifest.classes)} classes; name a recipe of as many"
        )
    rows = readable_rows(manifest)
    images = manifest
    data = data.model_copy(update={"loader": kind_of(manifest, data, train=True)})
    if isinstance(manifest.content, Encoded):
        once = data.loader == "resident"  # it holds every image, a repeated one would be held again
        images = chosen_rows(manifest, rows) if once else repeated(manifest, rows, batch)
    loader = Ours(images, data, batch, "train", device)
    opened.enter_context(closing(loader))
    with settings(run):
        step = Step(case, Images(device))
    both = Both(step, loader, device)
    sides: dict[str, Turn] = {"step": Alone(step), "input": loader, "both": both}

    absent = None if kind is None else peer.why_not(case)
    if kind is not None and not isinstance(manifest.content, Files):
        absent = f"ImageFolder reads a folder of images, data.source={data.source} is none"
    if kind is not None and data.after_crop:
        absent = f"the plain loader knows no {', no '.join(data.after_crop)}"
    if kind is not None and absent is None:
        files = peer_loader(manifest, rows, data, batch, "train", pin=device.type == "cuda")
        loop = peer.loop_of(case, plain.Batches(files), device, kind == "bf16")
        sides["peer"] = Plain(loop, batch)

    clock = partial(now, device) if device.type == "cuda" else time.perf_counter
    turns = {name: Turns(side, steps_of(side, seconds, clock)) for name, side in sides.items()}
    for side in (both, sides.get("peer")):
        if isinstance(side, Both | Plain):
            side.waits.clear()
    play(list(turns.values()), clock)

    speeds = {name: speed(turn) for name, turn in turns.items()}
    rates = {name: found["images_per_s"] for name, found in speeds.items()}
    found: Record = {"kind": "e2e", "case": case.name, "recipe": case.written}
    found |= {"student": recipe.student.name}
    found |= {"teacher": recipe.teacher.name} if recipe.teacher else {}
    found |= {"device": device.type, "batch": batch, "size": data.size, "classes": case.classes}
    found |= configured(run) | about_images(manifest, rows)
    found |= {"loader": loader.name, "decode": loader.decode}
    found |= {"workers": data.workers, "prefetch": data.prefetch}
    found |= speeds["both"] | {"waiting": float(np.median(both.waits))}
    found |= {"step_images_per_s": rates["step"], "input_images_per_s": rates["input"]}
    found["of_slower"] = rates["both"] / min(rates["step"], rates["input"])
    found["of_sum"] = rates["both"] * (1 / rates["step"] + 1 / rates["input"])
    plain_loop = sides.get("peer")
    if isinstance(plain_loop, Plain):
        found |= {"peer": kind, "peer_images_per_s": rates["peer"]}
        found |= {"peer_waiting": float(np.median(plain_loop.waits))}
        found |= {"times_peer": rates["both"] / rates["peer"]}
    return found if absent is None else found | {"peer_absent": absent}
