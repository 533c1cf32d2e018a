"""What does not fit between the sections of a recipe: its methods, networks, data and optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..methods.method import Method
from . import problems
from .records import of_records
from .schema import Network

if TYPE_CHECKING:
    from .load import Also, Recipe


def misfits(recipe: Recipe) -> list[str]:
    """One line for each problem, with the key, the reason and the cure."""
    learners = recipe.learners("")
    methods = [learner.method for learner in learners.values()]
    found = list(_shared(recipe, methods))
    for name, learner in learners.items():
        found += _of_slts(f"also.{name}.slt" if name else "slt", learner, recipe.teacher)
        found += _of_method(f"also.{name}.method" if name else "method", learner.method, recipe)
    return found


def _shared(recipe: Recipe, methods: list[Method]) -> Iterator[str]:
    """Of what all learners share."""
    readers = [method for method in methods if method.uses_teacher]
    yield from problems.teacher((readers or methods)[0], recipe.teacher is not None)
    if "main" in recipe.also:
        yield "also.main: that name is the recipe's own student's; choose another"
    if len({method.teacher_mode for method in readers}) > 1:
        yield (
            "also: the methods share one teacher, and some want the batch's statistics of its "
            "BatchNorm, others its running ones; train them apart or agree on one"
        )
    if recipe.expect is not None and recipe.expect.ap is not None:
        yield "expect.ap: classification is measured as top-1; use expect.top1"
    optim, run = recipe.optim, recipe.run
    if optim.schedule == "cosine" and optim.warmup_epochs >= run.epochs:
        yield (
            f"optim.warmup_epochs: {optim.warmup_epochs} leaves none of run.epochs={run.epochs} "
            "for the cosine; lower it"
        )
    for name, learner in recipe.learners("").items():
        student = learner.student.name
        if optim.layer_decay is not None and not student.startswith(("timm:", "run:")):
            where = f"also.{name}.student" if name else "student"
            yield (
                f"optim.layer_decay: {optim.layer_decay} needs students that number their layers, "
                f"as timm:NAME do, and {where} is {student}; set optim.layer_decay=null"
            )
    if run.capture and optim.name in ("lamb", "lars"):
        yield (
            f"run.capture: optim.name {optim.name} takes its rate from the host in each step; set "
            "run.capture=false"
        )
    runs = recipe.teacher is not None and recipe.teacher.cache is None
    there = {"student": True, "teacher": runs}
    yield from _of_caches(recipe, methods)
    yield from of_records(recipe)
    there["slts"] = any(
        learner.method.slt_count > 0 and not (learner.slt and learner.slt.record)
        for learner in recipe.learners("").values()
    )
    for role in run.compile_only or ():
        if not there[role]:
            yield f"run.compile_only: {role} is not among this recipe's networks; leave it out"
    if recipe.assistants and not any(method.uses_assistants for method in methods):
        yield f"assistants: method {recipe.method.name} reads none; leave them out"


def _of_caches(recipe: Recipe, methods: list[Method]) -> Iterator[str]:
    """Where recorded answers stand for a network, and who cannot learn from them."""
    others = {f"assistants.{i}": network for i, network in enumerate(recipe.assistants)}
    for name, learner in recipe.learners("").items():
        key = f"also.{name}." if name else ""
        others |= {f"{key}student": learner.student}
        others |= {f"{key}slt": learner.slt} if learner.slt else {}
    for where, network in others.items():
        if network.cache is not None:
            yield f"{where}.cache: only a teacher's answers are recorded; leave it out"
    if recipe.teacher is None or recipe.teacher.cache is None:
        return
    for method in methods:
        if method.uses_teacher and method.takes_recorded == "none":
            yield (
                f"teacher.cache: method {method.name} needs more of its teacher than what can be "
                "recorded; give it a checkpoint instead"
            )
    taking = [method.name for method in methods if method.takes_taps == "layers"]
    given = recipe.teacher.checkpoint is not None or recipe.teacher.kept is not None
    if taking and not given:
        yield (
            f"teacher.cache: method {taking[0]} builds on layers of its teacher, which no cache "
            "holds; give teacher.checkpoint beside it"
        )
    if recipe.teacher.checkpoint is not None and not taking:
        yield (
            f"teacher.checkpoint: {recipe.teacher.checkpoint} has no effect with teacher.cache, "
            "which holds what the network said; leave one of them out"
        )


def _of_slts(key: str, learner: Also, teacher: Network | None) -> Iterator[str]:
    name = learner.method.name
    if learner.method.slt_count == 0:
        if learner.slt is not None:
            yield f"{key}: method {name} has no SL-Ts; leave it out"
    elif learner.slt is None and teacher is None:
        yield f"{key}: method {name} trains networks beside the student; add {key}.name=NETWORK"
    elif learner.slt is None and teacher is not None and teacher.kept is not None:
        yield (
            f"{key}: null stands for the teacher's network with random weights, and "
            f"{teacher.name} has no name of its own; add {key}.name=NETWORK"
        )


def _of_method(key: str, method: Method, recipe: Recipe) -> Iterator[str]:
    softening = recipe.data.softening
    if softening and not method.takes_soft_labels:
        yield (
            f"{key}: {method.name}, as set, is not defined for soft labels; set "
            f"{', '.join(softening)} to 0"
        )
    if recipe.data.repeats > 1 and not method.takes_repeats:
        yield (
            f"{key}: {method.name} remembers one row for each image, which data.repeats="
            f"{recipe.data.repeats} would write several times a step; set data.repeats to 1"
        )
    if recipe.run.capture and method.waits:
        yield f"run.capture: method {method.name} waits for the device; set run.capture=false"
    if recipe.run.accumulate > 1 and method.gathers and method.name != "crd":
        yield (
            f"{key}.gather: the images of a step, of which run.accumulate="
            f"{recipe.run.accumulate} shows the loss a part at a time; set one of them back"
        )
    if method.uses_average and recipe.optim.ema is None:
        yield (f"optim.ema: method {method.name} reads the student's average; add optim.ema=0.999")
    if not method.uses_assistants:
        return
    if not recipe.assistants:
        yield f"assistants: method {method.name} needs at least one; add the networks"
        return
    try:
        method.check_assistants(len(recipe.assistants))
    except ValueError as error:
        yield str(error)
