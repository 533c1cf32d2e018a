"""A recipe that trains in seconds, for the tests of the engine."""

from pathlib import Path
from typing import Any

from kdfuse.engine.methods import METHODS
from kdfuse.engine.recipe.load import Recipe

SECTIONS: dict[str, dict[str, Any]] = {
    "data": {
        "source": "digits",
        "size": 16,
        "augment": "random_resized_crop",
        "scale": (0.5, 1.0),
        "flip": False,
        "eval_resize": None,
        "subset": 32,
        "loader": "torchvision",
        "workers": 1,
    },
    "student": {"name": "resnet8"},
    "optim": {"lr": 0.05, "schedule": "constant"},
    "run": {
        "epochs": 2,
        "batch": 64,
        "eval_batch": 100,
        "device": "cpu",
        "threads": 1,
        "log_every": 2,
        "teacher_at_chance": "allow",
    },
}


def tiny(root: Path | None, method: str | dict[str, Any] = "ce", **changes: Any) -> Recipe:
    """320 digits of 16 x 16, resnet8, two epochs of five steps.

    `changes` are merged into the sections of their name; a method with a teacher gets a random
    resnet8 unless `teacher` is among them.
    """
    chosen = {"name": method} if isinstance(method, str) else method
    sections = {name: {**values, **changes.pop(name, {})} for name, values in SECTIONS.items()}
    if root is not None:
        sections["data"]["root"] = root
    if METHODS[chosen["name"]].uses_teacher:
        changes.setdefault("teacher", {"name": "resnet8"})
    return Recipe.model_validate({"name": "tiny", "method": chosen, **sections, **changes})
