"""Networks that came as objects: what tells one from another of the same name."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

from torch import nn

from ..models import HANDED, OWN
from ..recipe.load import Recipe
from ..recipe.schema import Network
from ..run.checkpoint import latest
from ..run.resume import FIRST, check_returned
from .frozen import digest
from .networks import Distiller
from .peers import together
from .ranks import Group
from .task import Task


def described(recipe: Recipe, networks: Distiller) -> dict[str, str]:
    """Of the student and the SL-Ts, where they are objects, names and shapes of their tensors, and
    the weights, which are those before the first step."""
    made: dict[str, tuple[Network | None, list[nn.Module]]] = {
        "student": (recipe.student, [networks.main.student]),
        "slt": (recipe.slt, list(networks.main.slts)),
    }
    found = {}
    for role, (spec, own) in made.items():
        if spec is None or spec.name not in HANDED:
            continue
        held = [item for network in own for item in network.state_dict().items()]
        shapes = repr([(name, tuple(value.shape)) for name, value in held])
        count = sum(value.numel() for _, value in held)
        known = hashlib.sha256(shapes.encode()).hexdigest()
        found[f"{role}'s tensors"] = f"{count} values, {known}"
        found[f"{role}'s {FIRST}"] = digest(own)
    return found


def compare(task: Task, recipe: Recipe, group: Group, folder: Path) -> None:
    """Raise ValueError unless a finished run was of the objects of this task, of which its recipe
    has only the names. Closes the task."""

    def look() -> None:
        if group.first and (found := latest(folder / "checkpoints")):
            check_returned(found, task.state.sources, recipe)

    with closing(task):
        together(group, "comparing with the finished run", look)


def origin(where: str, spec: Network) -> str:
    """What to look at where the teacher `where` knows nothing."""
    if spec.name.startswith(OWN):
        return (
            "that the object has its trained weights, the order of the classes, and that it takes "
            "images as data.normalize makes them (of float32 tensors: as they are)"
        )
    if spec.kept:
        return f"that {spec.kept} learned these classes"
    return f"{where}.checkpoint = {spec.checkpoint} and {where}.normalize"
