"""A case's peer: the plain loop with the same networks, weights, images and settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...models import create
from ...recipe.schema import Network, Strict
from ...training.build import deployed_by
from ...training.process import seed_weights
from ...training.rate import lr_at
from . import plain
from .cases import Case
from .ours import Images, middle

# The methods that the plain loop knows, each with the options that have to be at their defaults.
PLAIN: dict[str, tuple[str, ...]] = {
    "ce": (),
    "kd": ("standardise", "reduction"),
    "slkd": ("detach_slts", "teachers", "fusion"),
}

# What it does not read of a recipe: how the engine computes.
OURS = set("amp capture channels_last compile compile_only deterministic speed tf32".split())


def same(one: Case, other: Case) -> bool:
    """Whether the plain loop beside one case is that beside the other."""
    first, second = (case.recipe.model_dump(exclude={"run": OURS}) for case in (one, other))
    return first == second


def why_not(case: Case) -> str | None:
    """Why the plain loop has no such step; None where it has."""
    recipe = case.recipe
    odd = [*recipe.data.softening]
    roles = {"student": recipe.student, "teacher": recipe.teacher, "slt": recipe.slt}
    odd += [f"{role}.normalize" for role, network in roles.items() if network and network.normalize]
    odd += ["teacher.cache"] if recipe.teacher and recipe.teacher.cache else []
    odd += ["slt.record"] if recipe.slt and recipe.slt.record else []
    if not case.forward:
        name = recipe.method.name
        odd += (
            changed("method", recipe.method, PLAIN[name]) if name in PLAIN else [f"method {name}"]
        )
        odd += changed("optim", recipe.optim, ("name", "decay", "layer_decay", "ema", "clip"))
        odd += [section for section in ("also", "assistants") if getattr(recipe, section)]
    return f"the plain loop knows no {', no '.join(odd)}" if odd else None


def changed(name: str, section: Strict, fields: tuple[str, ...]) -> list[str]:
    """Those of a section's fields that have not their default, as a.b=c."""
    declared = type(section).model_fields
    now = {field: getattr(section, field) for field in fields}
    return [f"{name}.{f}={value}" for f, value in now.items() if value != declared[f].default]


def networks_of(case: Case) -> tuple[nn.Module, nn.Module | None, list[nn.Module]]:
    """Student, teacher and SL-Ts, drawn in the order in which the engine draws them."""
    recipe = case.recipe

    def make(network: Network) -> nn.Module:
        if network.kept is not None:
            return deployed_by(network.kept, case.classes)[0]
        return create(network.name, case.classes, network.checkpoint, network.match)

    seed_weights(recipe.run.seed)
    student = make(recipe.student)
    slt: Network | None = recipe.slt
    if slt is None and recipe.teacher is not None:
        slt = recipe.teacher.anew()
    slts = [make(slt) for _ in range(recipe.method.slt_count) if slt is not None]
    teacher = None
    if recipe.teacher is not None:
        teacher = make(recipe.teacher).requires_grad_(False)
    return student, teacher, slts


def peer_of(case: Case, made: Images, bf16: bool, workers: int) -> plain.Loop:
    """The plain loop for a case; it starts its workers with its first step."""
    pixels, target = (part.cpu() for part in made.of(case))
    on_gpu = made.device.type == "cuda"
    loader = plain.in_memory(pixels.contiguous(), target, case.recipe.run.batch, workers, on_gpu)
    view = case.recipe.data.normalize.model_dump()
    return loop_of(case, plain.Batches(loader), made.device, bf16, **view)


def loop_of(
    case: Case, batches: plain.Batches, device: torch.device, bf16: bool, **view: Any
) -> plain.Loop:
    """The plain loop for a case over these batches; `view`: mean and std that it normalises by."""
    recipe, method = case.recipe, case.recipe.method
    student, teacher, slts = networks_of(case)
    own = method.model_dump(
        include={"temperature", "ce_weight", "kd_weight", "fused_ce_weight", "fused_kd_weight"}
    )
    optim = recipe.optim
    settings = plain.Settings(
        **own,
        **optim.model_dump(include={"momentum", "nesterov", "weight_decay"}),
        lr=lr_at(optim, recipe.run, middle(recipe)),
        **view,
        bf16=bf16,
    )
    alone = None if case.forward else student
    return plain.Loop(alone, teacher, [] if case.forward else slts, batches, device, settings)


@contextmanager
def usual() -> Iterator[None]:
    """How such repositories set their process: any algorithm, the fastest that cuDNN finds; TF32 as
    PyTorch has it by default, in convolutions alone."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    tf32 = cudnn.allow_tf32, matmul.allow_tf32
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark = cudnn.allow_tf32 = True
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        cudnn.benchmark = benchmark
        cudnn.allow_tf32, matmul.allow_tf32 = tf32
