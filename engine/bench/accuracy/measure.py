"""Trains the same student by the engine and by the plain loop, seed by seed."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....kernels.bench.report import Record
from ...data.batch import Batch
from ...data.loaders import make_loader
from ...data.sources import open_source
from ...methods import DKD, KD
from ...recipe.load import Recipe
from ...run.past import read_run
from ...training.process import settings
from ...training.ranks import choose_device
from ...training.rate import lr_at
from ...training.speed import settled
from ...training.start import train
from ..step.cases import Case
from ..step.peer import changed, networks_of, usual
from . import loop

FILE = "peer.json"


def why_not(recipe: Recipe) -> str | None:
    """Why the plain loop cannot train this; None where it can."""
    odd = [*recipe.data.softening]
    roles = {"student": recipe.student, "teacher": recipe.teacher}
    odd += [f"{role}.normalize" for role, network in roles.items() if network and network.normalize]
    method = recipe.method
    if isinstance(method, KD):
        odd += changed("method", method, ("standardise", "reduction"))
    elif isinstance(method, DKD):
        odd += changed("method", method, ("standardise",))
        odd += [f"method.warmup={method.warmup}"] if method.warmup else []
    else:
        odd.append(f"method {method.name}")
    if recipe.teacher is None or recipe.teacher.checkpoint is None:
        odd.append("teacher without teacher.checkpoint")
    odd += changed("optim", recipe.optim, ("name", "decay", "layer_decay", "ema", "clip"))
    odd += changed("run", recipe.run, ("accumulate",))
    odd += [section for section in ("also", "assistants") if getattr(recipe, section)]
    return f"the plain loop knows no {', no '.join(odd)}" if odd else None


def measured(recipe: Recipe, seeds: int, folder: Path) -> Iterator[Record]:
    """A record of the engine, one of the plain loop; runs lie below `folder`, used if there."""
    assert recipe.teacher is not None
    device = choose_device(recipe.run.device)
    shared: Record = {"kind": "accuracy", "recipe": recipe.name, "method": recipe.method.name}
    shared |= {"student": recipe.student.name, "teacher": recipe.teacher.name}
    shared |= {"device": device.type, "epochs": recipe.run.epochs, "batch": recipe.run.batch}
    sides: dict[str, list[tuple[float, float]]] = {"kdfuse": [], "plain": []}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):  # in turn, so that the machine is the same for both
        one = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})})
        for side, work in (("kdfuse", _engine), ("plain", _plain)):
            print(f"{side}: seed {seed}, {seed + 1} of {seeds}", file=sys.stderr)
            with open(folder / f"{side}.log", "a") as log, redirect_stdout(log):
                sides[side].append(work(one, folder / f"{side}-seed{seed}"))
    for side, found in sides.items():
        scores, seconds = [top1 for top1, _ in found], [time for _, time in found]
        record: Record = {"side": side, "top1": scores, "mean": statistics.fmean(scores)}
        record |= {"deviation": statistics.stdev(scores) if seeds > 1 else None}
        yield shared | record | {"train_s": seconds, "median_s": statistics.median(seconds)}


def _engine(recipe: Recipe, folder: Path) -> tuple[float, float]:
    """Top-1 of the last epoch in percent, and the seconds from the first record to the last."""
    past = read_run(train(recipe, folder, "auto"))
    assert past.last is not None
    return past.last["top1"], past.records[-1]["time"] - past.records[0]["time"]


def _plain(recipe: Recipe, folder: Path) -> tuple[float, float]:
    """The same of the plain loop, on the engine's own order of images."""
    kept = folder / FILE
    if kept.exists():
        top1, seconds = (float(word) for word in kept.read_text().split())
        return top1, seconds
    device = choose_device(recipe.run.device)
    exact = settled(recipe, device)
    run, data, optim = exact.run, exact.data, exact.optim
    train_set, val_set = open_source(data, "train"), open_source(data, "val")
    case = Case("plain", exact.model_copy(update={"data": _of(data, len(train_set.classes))}), "")
    with settings(run):
        student, teacher, _ = networks_of(case)
        assert teacher is not None
        sgd = torch.optim.SGD(
            student.to(device).parameters(),
            lr=optim.lr,
            **optim.model_dump(include={"momentum", "nesterov", "weight_decay"}),
        )
        first = make_loader(train_set, data, run.batch, seed=run.seed, train=True)
        second = make_loader(val_set, data, run.eval_batch, seed=run.seed, train=False)
        with closing(first) as images, closing(second) as val, usual():
            began = time.time()
            loop.train(
                student,
                teacher.to(device),
                _loss(exact),
                sgd,
                lambda epoch: _floats(images.epoch(epoch), data),
                run.epochs,
                lambda epoch, step: lr_at(optim, run, epoch + step / images.steps),
            )
            top1 = loop.top1(student, _floats(val.epoch(0), data))
            seconds = time.time() - began
    folder.mkdir(exist_ok=True)
    kept.write_text(f"{top1} {seconds}\n")
    return top1, seconds


def _of(data: Any, classes: int) -> Any:
    return data.model_copy(update={"classes": classes})


def _loss(recipe: Recipe) -> loop.Loss:
    method = recipe.method
    if isinstance(method, KD):
        return loop.KD(method.temperature, method.ce_weight, method.kd_weight)
    assert isinstance(method, DKD)
    return loop.DKD(method.temperature, method.ce_weight, method.alpha, method.beta)


def _floats(batches: Iterable[Batch], data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the transforms of such repositories make them."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.normalize.mean, data.normalize.std))
    for batch in batches:
        images = (batch.images[: batch.valid].float() / 255 - mean) / std
        yield images.contiguous(), batch.target[: batch.valid]
