"""From a recipe to its networks, with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Size, Tensor, nn

from ..cache.forms import Form
from ..data.loaders.ondevice import Normalise
from ..models import HANDED, OWN, create, shapes
from ..recipe import registered
from ..recipe.load import Recipe
from ..recipe.schema import Network, Normalize
from ..run.past import checkpoints_of, recipe_of
from .frozen import digest
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
        made, found[name] = loaded(network, classes, data.size)
        return made.to(device).to(memory_format=layout)

    drawn: dict[str, tuple[nn.Module, list[nn.Module], Tensor]] = {}
    parts = recipe.learners(MAIN)
    for name, part in parts.items():
        torch.random.set_rng_state(seed)
        slt: Network | None = part.slt
        if slt is None and recipe.teacher is not None:
            slt = recipe.teacher.anew()
        student = make(role(name, "student"), part.student)
        count = 0 if part.slt and part.slt.record else part.method.slt_count
        slts = [make(role(name, "slts"), slt) for _ in range(count)]
        drawn[name] = student, slts, torch.random.get_rng_state()
        for network in (student, *slts) if labels is not None else ():
            _check_learns("student" if network is student else "slt", network)
    # What is only evaluated needs a teacher where a part of it is kept.
    teachers: list[nn.Module] = []
    torch.random.set_rng_state(drawn[MAIN][2])
    reused = any(part.method.deploys_head for part in parts.values())
    if recipe.teacher and not recipe.teacher.cache and (labels is not None or reused):
        teachers.append(make("teacher", recipe.teacher).eval().requires_grad_(False))
    learners, source = {}, teachers[0] if teachers else None
    weights = None  # the digest of those that a cached teacher comes with all the same
    told = recipe.teacher is not None and recipe.teacher.cache is not None
    tapped = any(part.method.takes_taps != "none" for part in parts.values())
    if told and tapped and (labels is not None or reused):
        source, weights = _stilled(recipe, classes, recorded)
        source = source.to(device).to(memory_format=layout)
    for name, part in parts.items():
        student, slts, state = drawn[name]
        torch.random.set_rng_state(state)
        teacher = source if part.method.uses_teacher else None
        learners[name] = Learner(part.method, student, slts, teacher, classes, data.size, labels)
        if recorded is not None:
            _check_taps(part.method.name, learners[name].reads.get("teacher", ()), recorded)
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
    distiller.teacher_digest = weights or distiller.teacher_digest
    distiller.to(device).to(memory_format=layout)
    if ema is not None:
        for learner in learners.values():
            learner.follow(ema)
    return distiller


def _stilled(recipe: Recipe, classes: int, recorded: Form | None) -> tuple[nn.Module, str | None]:
    """A teacher that does not run, for what a method asks of its build: names and shapes of its
    features, layers to build on. With its weights, and their digest, where it has any."""
    assert recipe.teacher is not None
    own = recipe.teacher
    if recorded is None:  # evaluation: the run's checkpoint has the layers that it kept
        own = own.anew()
    made = loaded(own, classes, recipe.data.size)[0].eval().requires_grad_(False)
    weighs = recorded is not None and (own.checkpoint or own.kept)
    return made, digest([made]) if weighs else None


def _check_taps(method: str, reads: Sequence[str], recorded: Form) -> None:
    names = [name for name, _ in recorded.taps]
    if missing := [name for name in reads if name not in names]:
        raise ValueError(
            f"teacher.cache: method {method} reads {', '.join(missing)} of its teacher, and the "
            f"cache holds {', '.join(names) or 'no features'}; record it with "
            f"cache.taps=[{','.join(dict.fromkeys([*names, *missing]))}]"
        )


def frozen(recipe: Recipe, classes: int, device: torch.device) -> tuple[Distiller, dict[str, Size]]:
    """The teachers whose answers `kdfuse cache` records, without anybody to learn from them, and
    the shapes of the features that are recorded, for a batch of one image.

    Raises ValueError and FileNotFoundError as `create` does.
    """
    data, run = recipe.data, recipe.run
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    teachers, inputs = [], {}
    for i, network in enumerate((recipe.teacher, *recipe.cache.teachers)):
        assert network is not None
        made, found = loaded(network, classes, data.size)
        teachers.append(made.to(device).to(memory_format=layout))
        norm = Normalise(found.normalize or data.normalize, run.channels_last)
        inputs["teacher" if i == 0 else f"assistant{i - 1}"] = norm
    taps = recipe.cache.taps
    found_shapes = shapes(teachers[0], taps, data.size)
    made = Distiller({}, teachers, inputs, amp=run.amp == "bf16", taps=taps)
    return made.to(device).to(memory_format=layout), found_shapes


def loaded(network: Network, classes: int, size: int) -> tuple[nn.Module, Network]:
    """A network with its weights, on the CPU, and what is known of its input's statistics.

    Raises ValueError for one of somebody else's that gives no logits of so many classes.
    """
    if network.kept is None:
        made = create(network.name, classes, network.checkpoint, network.match)
        if network.name in registered.NETWORKS or network.name in HANDED:
            _check_fits(network.name, made, classes, size)
        return made, network
    _check_no_objects(network.kept)
    made, normalize = deployed_by(network.kept, classes)
    return made, network.model_copy(update={"normalize": network.normalize or normalize})


def _check_no_objects(run: Path) -> None:
    """Raise ValueError for a run whose networks were objects: a name of theirs may stand for
    another one by now."""
    recipe = recipe_of(run)
    parts = recipe.learners(MAIN).values()
    made = [network for part in parts for network in (part.student, part.slt)]
    if any(part.method.deploys_head for part in parts):
        made.append(recipe.teacher)
    if own := [network.name for network in made if network and network.name.startswith(OWN)]:
        raise ValueError(
            f"run:{run}: its {own[0]} was an object, which no folder has; hand over the network "
            "that distill gave back, as in teacher=run.network()"
        )


def _check_fits(name: str, made: nn.Module, classes: int, size: int) -> None:
    """Raise ValueError for a network that does not give logits of so many classes, in float32."""
    own = name.startswith(OWN)
    where = f"{name.split(':')[1]}: this {type(made).__name__}" if own else f"name: {name}"
    weights = list(made.parameters())
    if odd := [p.dtype for p in weights if p.is_floating_point() and p.dtype != torch.float32]:
        raise ValueError(
            f"{where} has weights of {odd[0]}, wants float32, which run.amp computes with in "
            "bfloat16; call its .float() first"
        )
    training = made.training
    images = torch.zeros(1, 3, size, size, device=weights[0].device if weights else None)
    try:
        with torch.no_grad():
            found = made.eval()(images)
    except Exception as error:  # whatever the network's own code raises
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{where} fails for an image {tuple(images.shape)}: {type(error).__name__}: {why}; it "
            f"has to take images (N, 3, {size}, {size})"
        ) from error
    finally:
        made.train(training)
    wants = f"for an image of {size} x {size}, wants logits {(1, classes)}"
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{where} gives a {type(found).__name__} {wants}; let its forward return the logits "
            "alone"
        )
    if tuple(found.shape) != (1, classes):
        raise ValueError(
            f"{where} gives {tuple(found.shape)} {wants}; its last layer needs an output for each "
            f"of the {classes} classes, whose number a function that makes it gets"
        )


def _check_learns(role: str, made: nn.Module) -> None:
    """Raise ValueError for a network of which nothing would be trained."""
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise ValueError(
            f"{role}: no parameter of this {type(made).__name__} requires a gradient, so nothing "
            "of it would be trained; call its .requires_grad_(True) first"
        )


def deployed_by(
    run: Path, classes: int, which: Literal["best", "last"] = "best"
) -> tuple[nn.Module, Normalize]:
    """What a run keeps, on the CPU: the whole deployed network, and its input's statistics. The
    last one stands for the best where that was never measured.

    Raises FileNotFoundError, ValueError or CheckpointError when it cannot be had.
    """
    recipe = recipe_of(run)
    main = build(recipe, classes, torch.device("cpu")).main
    held = checkpoints_of(run)
    try:
        main.load(held.get(which, held["last"])[0])
    except RuntimeError as error:
        raise ValueError(f"run:{run}: not of {classes} classes, or damaged: {error}") from error
    return main.deployed, recipe.student.normalize or recipe.data.normalize
