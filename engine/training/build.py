"""From a recipe to its networks, with their weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..cache.forms import Form
from ..data.loaders.ondevice import Normalise
from ..models import create
from ..recipe.load import Recipe
from ..recipe.schema import Network, Normalize
from ..run.past import checkpoints_of, recipe_of
from .learner import Learner
from .networks import MAIN, Distiller, role


def build(
    recipe: Recipe,
    classes: int,
    device: torch.device,
    labels: Tensor | None = None,
    recorded: Form | None = None,
    fused: Form | None = None,
) -> Distiller:
    """The networks that a recipe needs, on `device`; the caller seeds their random weights first.

    An SL-T is the teacher's architecture with random weights unless the recipe says otherwise.
    `labels` are the training set's (images,); None to evaluate. `recorded` is the form of the
    teacher's answers where the recipe has a cache of them in place of the network, `fused` the same
    of SL-Ts, none of which are made where the recipe has a record of them. Each learner's
    random weights are those that it would have alone. Raises ValueError and FileNotFoundError as
    `create` does.
    """
    replayed = recipe.slt is not None and recipe.slt.record is not None
    if replayed and fused is None and labels is not None:
        raise ValueError(
            "slt.record: its answers are to the views of a run, and these batches are not; leave "
            "it out"
        )
    seed = torch.random.get_rng_state()
    data, run, ema = recipe.data, recipe.run, recipe.optim.ema
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    found: dict[str, Network] = {}

    def make(name: str, network: Network | None) -> nn.Module:
        assert network is not None  # a recipe has the networks that its method needs
        made, found[name] = _made(network, classes)
        return made.to(device).to(memory_format=layout)

    drawn: dict[str, tuple[nn.Module, list[nn.Module], Tensor]] = {}
    parts = recipe.learners(MAIN)
    for name, part in parts.items():
        torch.random.set_rng_state(seed)
        slt: Network | None = part.slt
        if slt is None and recipe.teacher is not None:
            slt = recipe.teacher.model_copy(update={"checkpoint": None, "cache": None})
        student = make(role(name, "student"), part.student)
        count = 0 if part.slt and part.slt.record else part.method.slt_count
        slts = [make(role(name, "slts"), slt) for _ in range(count)]
        drawn[name] = student, slts, torch.random.get_rng_state()
    # What is only evaluated needs a teacher where a part of it is kept.
    teachers: list[nn.Module] = []
    torch.random.set_rng_state(drawn[MAIN][2])
    reused = any(part.method.deploys_head for part in parts.values())
    if recipe.teacher and not recipe.teacher.cache and (labels is not None or reused):
        teachers.append(make("teacher", recipe.teacher).eval().requires_grad_(False))
    learners = {}
    for name, part in parts.items():
        student, slts, state = drawn[name]
        torch.random.set_rng_state(state)
        teacher = teachers[0] if teachers and part.method.uses_teacher else None
        learners[name] = Learner(part.method, student, slts, teacher, classes, data.size, labels)
    if labels is not None:
        for i, assistant in enumerate(recipe.assistants):
            teachers.append(make(f"assistant{i}", assistant))
    norms = {name: network.normalize or data.normalize for name, network in found.items()}
    inputs = {norm: Normalise(norm, run.channels_last) for norm in norms.values()}
    distiller = Distiller(
        learners,
        teachers,
        {name: inputs[norm] for name, norm in norms.items()},
        amp=run.amp == "bf16",
        recorded=recorded,
        fused=fused,
    )
    distiller.to(device).to(memory_format=layout)
    if ema is not None:
        for learner in learners.values():
            learner.follow(ema)
    return distiller


def frozen(recipe: Recipe, classes: int, device: torch.device) -> Distiller:
    """The teachers whose answers `kdfuse cache` records, without anybody to learn from them.

    Raises ValueError and FileNotFoundError as `create` does.
    """
    data, run = recipe.data, recipe.run
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    teachers, inputs = [], {}
    for i, network in enumerate((recipe.teacher, *recipe.cache.teachers)):
        assert network is not None
        made, found = _made(network, classes)
        teachers.append(made.to(device).to(memory_format=layout))
        norm = Normalise(found.normalize or data.normalize, run.channels_last)
        inputs["teacher" if i == 0 else f"assistant{i - 1}"] = norm
    made = Distiller({}, teachers, inputs, amp=run.amp == "bf16")
    return made.to(device).to(memory_format=layout)


def _made(network: Network, classes: int) -> tuple[nn.Module, Network]:
    """A network with its weights, on the CPU, and what is known of its input's statistics."""
    if network.kept is None:
        return create(network.name, classes, network.checkpoint), network
    made, normalize = deployed_by(network.kept, classes)
    return made, network.model_copy(update={"normalize": network.normalize or normalize})


def deployed_by(run: Path, classes: int) -> tuple[nn.Module, Normalize]:
    """What a run keeps as its best, on the CPU: the whole deployed network, and its input's
    statistics.

    Raises FileNotFoundError, ValueError or CheckpointError when it cannot be had.
    """
    recipe = recipe_of(run)
    main = build(recipe, classes, torch.device("cpu")).main
    held = checkpoints_of(run)
    try:
        main.load((held.get("best") or held["last"])[0])
    except RuntimeError as error:
        raise ValueError(f"run:{run}: not of {classes} classes, or damaged: {error}") from error
    return main.deployed, recipe.student.normalize or recipe.data.normalize
