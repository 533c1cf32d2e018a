"""What is measured: a recipe as it stands, or its pair of networks under a method of the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...recipe.data import CLASSES
from ...recipe.load import Recipe, load
from ...recipe.run import Run
from ...training.ranks import choose_device
from ...training.speed import settled

PAIR = ("student", "teacher", "kd", "slkd1", "slkd2")
# The pair of networks, unless a recipe is named.
DEFAULT = {"cuda": "imagenet/kd:resnet34-resnet18", "cpu": "cifar100/kd:resnet56-resnet20"}
SHARED = ("temperature", "ce_weight", "kd_weight")  # options that KD and SLKD have in common


@dataclass(frozen=True)
class Case:
    """A training step; or the forward pass of its teacher, as that step has it."""

    name: str
    recipe: Recipe
    written: str  # name of the recipe that it is derived from
    forward: bool = False
    words: tuple[str, ...] = ()  # of --beside, which the recipe has on top
    without: Case | None = None  # the same without them

    @property
    def label(self) -> str:
        return labelled(self.name, self.words)

    @property
    def classes(self) -> int:
        data = self.recipe.data
        found = data.classes or CLASSES.get(data.source)
        if found is None:
            raise ValueError(
                f"data.classes: source {data.source} has as many as its files say, and none are "
                "read here; add data.classes=N"
            )
        return found

    @property
    def key(self) -> tuple[bool, str]:
        """Equal for what is the same work."""
        said = {"name", "description", "expect"}
        return self.forward, self.recipe.model_dump_json(exclude=said)


def labelled(name: str, words: Sequence[str]) -> str:
    """How a case is shown, with the words that it has on top."""
    return f"{name} with {' '.join(words)}" if words else name


def chosen(
    recipe: str | None, words: Sequence[str], names: Sequence[str] | None, device: str | None
) -> list[Case]:
    """The cases of these names, without repetition; see `step.py` for what a name may be.

    Raises ValueError for a name or a recipe that cannot be measured.
    """
    base = classifier(recipe or DEFAULT[choose_device(device or "auto").type], words)
    found = []
    for name in dict.fromkeys(names or ([recipe] if recipe else PAIR)):
        if name in PAIR:
            found.append(of_pair(name, base))
        elif name == recipe:
            found.append(Case(name, base, base.name))
        elif "/" in name or name.endswith((".yaml", ".yml")) or ".yaml:" in name:
            own = classifier(name, words)
            found.append(Case(name, own, own.name))
        elif "=" in name:
            raise ValueError(f"--cases: got {name}; settings go before the options")
        else:
            raise ValueError(
                f"--cases: got {name}, wants {', '.join(PAIR)} or a recipe's name, as in "
                "cifar100/dkd:resnet56-resnet20"
            )
        _ = found[-1].classes  # known, or said before anything is made
    return found


def classifier(name: str, words: Sequence[str]) -> Recipe:
    recipe = load(name, words)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name}: a recipe of detection; the step of a classifier is measured")
    return settled(recipe, choose_device(recipe.run.device))


def of_pair(name: str, base: Recipe) -> Case:
    """A case of the list, on the networks and settings of a recipe."""
    if name == "student":
        return Case(name, alone(base, "student"), base.name)
    if base.teacher is None:
        raise ValueError(
            f"--cases {name}: {base.name} has no teacher; name a recipe that has one, as "
            f"{DEFAULT['cpu']}"
        )
    if name == "teacher":
        if base.teacher.cache is not None:
            raise ValueError(f"--cases teacher: {base.name} has a cache of it; leave one out")
        # Under KD every recipe's teacher is the same work, unless it is in training mode.
        run = kept(base.run, "teacher")
        plain = changed(base, method={"name": "kd"}, slt=None, assistants=(), also={}, run=run)
        own = base if base.method.teacher_mode == "train" else plain
        return Case(name, own, base.name, forward=True)
    kind = "slkd" if name.startswith("slkd") else name
    if base.method.name == kind:
        method = base.method.model_dump()
    else:
        shared = {k: getattr(base.method, k) for k in SHARED if hasattr(base.method, k)}
        method = {"name": kind, **shared}
    if kind == "slkd":
        method["slts"] = int(name.removeprefix("slkd"))
    slt, slts = (base.slt, ("slts",)) if kind == "slkd" else (None, ())
    run = kept(base.run, "student", "teacher", *slts)
    made = changed(base, method=method, slt=slt, assistants=(), also={}, run=run)
    return Case(name, made, base.name)


def alone(base: Recipe, role: str) -> Recipe:
    """One of a recipe's networks, trained by cross-entropy without any other."""
    network = base.student
    if role == "slt":
        assert base.teacher is not None
        network = base.slt or base.teacher.anew()
    none: dict[str, Any] = {"teacher": None, "slt": None, "assistants": (), "also": {}}
    run = kept(base.run, "slts" if role == "slt" else role)
    return changed(
        base, method={"name": "ce"}, student=network.model_dump(exclude={"record"}), run=run, **none
    )


def kept(run: Run, *roles: str) -> dict[str, Any]:
    """The section run where networks of these roles alone do the work: each of them compiles or
    not as it did."""
    only = [role for role in roles if role in run.compiled]
    some = only if 0 < len(only) < len(roles) else None
    return run.model_dump() | {"compile": bool(only), "compile_only": some}


def changed(base: Recipe, **sections: Any) -> Recipe:
    return Recipe.model_validate(base.model_dump() | {"expect": None} | sections)


def parts(case: Case) -> list[tuple[Case, int]]:
    """The steps that a case with a teacher is made of, each with how often; empty where there is
    no such sum, since further networks take part."""
    recipe = case.recipe
    if case.forward or recipe.teacher is None or recipe.also or recipe.assistants:
        return []
    found = [(of_pair("student", recipe), 1)]
    if recipe.teacher.cache is None:
        found.append((of_pair("teacher", recipe), 1))
    if recipe.method.slt_count and not (recipe.slt and recipe.slt.record):
        found.append((Case("slt", alone(recipe, "slt"), case.written), recipe.method.slt_count))
    return found
