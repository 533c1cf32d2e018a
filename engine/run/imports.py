"""What a run needs beside kdfuse: the modules that bring the networks, method and source it names.

environment.json has them under `imports`: {module: ["network my_net", ...]}.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..recipe import registered
from ..recipe.load import Recipe
from ..recipe.registered import Kind
from ..recipe.schema import RecipeBase, RecipeError
from .environment import ENVIRONMENT

NAMELESS = "__main__"  # a module that cannot be imported by a name: a session


def imports_of(recipe: RecipeBase) -> dict[str, list[str]]:
    """The registered names that a recipe uses, by the module that registers them."""
    if not isinstance(recipe, Recipe):
        return {}
    networks = [recipe.teacher, *recipe.assistants]
    used: set[tuple[Kind, str]] = {("source", recipe.data.source)}
    for learner in recipe.learners("").values():
        networks += [learner.student, learner.slt]
        used.add(("method", learner.method.name))
    used |= {("network", network.name) for network in networks if network is not None}
    found: dict[str, list[str]] = {}
    for place in sorted(used & registered.MODULES.keys()):
        found.setdefault(registered.MODULES[place], []).append(" ".join(place))
    return found


def check_imports(folder: Path) -> None:
    """Raise RecipeError where the run in a folder names what is not registered now."""
    there = {" ".join(place) for place in registered.MODULES}
    missing = {m: lost for m, names in _written(folder).items() if (lost := {*names} - there)}
    options = " ".join(f"--import {module}" for module in missing if module != NAMELESS)
    if options:
        raise RecipeError(f"{folder} was trained with {options}; add it")
    if missing:
        raise RecipeError(
            f"{folder} was trained with {', '.join(sorted(missing[NAMELESS]))}, registered in a "
            "session; register it in a module, and add --import MODULE"
        )


def _written(folder: Path) -> dict[str, list[str]]:
    """What environment.json says; nothing where it is damaged, which matters to no other reader."""
    try:
        found = json.loads((folder / ENVIRONMENT).read_bytes())["imports"]
        return {str(module): list(map(str, names)) for module, names in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
