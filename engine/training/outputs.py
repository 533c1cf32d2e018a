"""What the kept networks of a run say of its validation set, in one pass: for its pictures."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.images import UnreadableError
from ..data.loaders import make_loader
from ..data.loaders.feed import on_device
from ..data.loaders.ondevice import Normalise
from ..data.manifest import Manifest
from ..data.sources import open_source
from ..models import Taps, points
from ..models.taps import INPUT
from ..recipe.load import Recipe
from ..report.answers import STUDENT, TEACHER, Answers, Network
from ..report.tsne import sample
from ..run.checkpoint import CheckpointError
from ..run.past import any_recipe_of, checkpoints_of, recipe_of
from .build import build, loaded
from .frozen import digest
from .meters import Diverged
from .process import settings
from .ranks import choose_device
from .speed import settled


@dataclass
class _Heard:
    """A network that is run, and what it said so far."""

    network: nn.Module
    inputs: nn.Module
    said: Network
    taps: Taps | None


def outputs(run: Path, names: Collection[str]) -> Answers:
    """What the pictures of these names are made of: student, SL-Ts and teacher of the run's best
    checkpoint, or of its last where none was evaluated. Of `also` nothing is looked at.

    It is computed on the GPU where there is one and the recipe does not want the CPU. A teacher
    that cannot be had, or has other weights than the one that the run learned from, is left out.
    Raises FileNotFoundError for a folder that is no run or for data that are gone, ValueError for a
    detector's run, Diverged for outputs that are not finite, CheckpointError (a RuntimeError) when
    there is no checkpoint to use.
    """
    recipe = recipe_of(run)
    device = choose_device("cpu" if recipe.run.device == "cpu" else "auto")
    recipe = settled(recipe, device)
    held = checkpoints_of(run)
    which = "best" if "best" in held else "last"
    weights, facts = held[which]
    with settings(recipe.run), torch.no_grad():
        images = open_source(recipe.data, "val")
        distiller = build(recipe, len(images.classes), device)
        distiller.load(weights)
        networks: dict[str, tuple[nn.Module, nn.Module]] = {}
        for name, (network, role) in distiller.evaluated().items():
            if shown := _name(name):
                networks[shown] = network, distiller.inputs[role]
        no_teacher = ""
        try:
            networks[TEACHER] = _teacher(run, recipe, len(images.classes), device, facts)
        except (ValueError, OSError, CheckpointError) as error:
            no_teacher = str(error)
        heard = {
            name: _heard(name, *both, len(images.classes), names) for name, both in networks.items()
        }
        seen = _pass(heard, images, recipe, device)
    about = {"checkpoint": which, "step": facts["step"], "device": device.type}
    said = {name: one.said for name, one in heard.items()}
    return Answers(images.classes, *seen, said, lambda row: _image(images, row), no_teacher, about)


def _name(network: str) -> str:
    """The name in pictures of a network in logs; "" for one that is not looked at."""
    number = network.removeprefix("slt")
    if number != network and number.isdecimal():
        return f"SL-T {number}"
    return STUDENT if network == "student" else ""


def _teacher(
    run: Path, recipe: Recipe, classes: int, device: torch.device, facts: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """The teacher and what normalises its images. An error's text says why there is none."""
    written = any_recipe_of(run)
    assert isinstance(written, Recipe)
    if written.teacher is None:
        raise ValueError(f"method {written.method.name} has no teacher")
    if written.teacher.cache is not None:
        raise ValueError(
            f"its answers were recorded (teacher.cache = {written.teacher.cache}), and those are "
            "to training images"
        )
    built = [
        loaded(spec, classes, recipe.data.size) for spec in (written.teacher, *written.assistants)
    ]
    if digest([network for network, _ in built]) != facts["sources"].get("teacher's weights"):
        source = written.teacher.checkpoint or written.teacher.kept
        where = f"{source} has other weights" if source else "its random weights were not kept"
        raise ValueError(f"not the one that the run learned from: {where}")
    teacher, spec = built[0]
    layout = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    inputs = Normalise(spec.normalize or recipe.data.normalize, recipe.run.channels_last)
    return teacher.to(device).to(memory_format=layout), inputs.to(device)


def _heard(
    name: str, network: nn.Module, inputs: nn.Module, classes: int, names: Collection[str]
) -> _Heard:
    said = Network(moments="correlation" in names and name in (STUDENT, TEACHER))
    taps = None
    if "tsne" in names:
        if point := classifier_input(network, classes):
            taps = Taps(network, [point])
        else:
            said.no_features = "it has no linear layer that ends in the classes"
    return _Heard(network.eval(), inputs, said, taps)


def classifier_input(network: nn.Module, classes: int) -> str:
    """The point that has what the classifier reads: of the layer that the network names, else of
    its last linear layer with an output for each class; "" without one."""
    named = points(network).get("classifier")
    linear = [
        path
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    path = named or (linear[-1] if linear else "")
    return path and path + INPUT


def _pass(
    heard: dict[str, _Heard], images: Manifest, recipe: Recipe, device: torch.device
) -> tuple[Any, Any, Any]:
    """Let every network say what it has to of all images: their classes (n,), their rows (n,), and
    whether they are of the sample (n,)."""
    chosen = np.zeros(len(images.target), bool)
    chosen[sample(images.target, len(images.classes))] = True
    loader = make_loader(
        images,
        recipe.data,
        recipe.run.eval_batch,
        seed=recipe.run.seed,
        train=False,
        device=device,
    )
    targets, rows = [], []
    with closing(loader):
        for batch in on_device(loader.epoch(0), device):
            index = batch.index[: batch.valid].cpu().numpy()
            targets.append(batch.target[: batch.valid].cpu().numpy())
            rows.append(index)
            kept = torch.from_numpy(np.flatnonzero(chosen[index])).to(device)
            for name, one in heard.items():
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.run.amp == "bf16"):
                    logits = one.network(one.inputs(batch.images))[: batch.valid].float()
                if not logits.isfinite().all():
                    raise Diverged(f"{name}: its outputs for validation images are not finite")
                features = None
                if one.taps is not None:
                    (found,) = one.taps.take().values()
                    features = found[kept].flatten(1).float().cpu().numpy()
                one.said.add(logits.cpu().numpy(), features)
    found_rows = np.concatenate(rows)
    return np.concatenate(targets), found_rows, chosen[found_rows]


def _image(images: Manifest, row: int) -> Image.Image | None:
    try:
        return images.read(row)
    except UnreadableError:
        return None
