"""The network of a run that is exported, and what is known of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.loaders.ondevice import Normalise
from ..recipe.load import Recipe
from ..recipe.schema import Network
from ..run.past import PastRun
from ..training.build import build
from ..training.networks import MAIN, Distiller, prefix


@dataclass(frozen=True)
class Chosen:
    """One network of a checkpoint, in evaluation mode on the CPU."""

    past: PastRun
    recipe: Recipe  # without the files of weights that the run began with
    which: str  # best, last
    name: str  # as in logs: student, ema, slt0, ...
    spec: Network  # as the recipe has it
    network: nn.Module
    normalise: Normalise
    facts: dict[str, Any]  # of the checkpoint
    alone: bool  # it is the network of spec's name, without a projector or a reused classifier

    @property
    def classes(self) -> int:
        return self.facts["classes"]

    @property
    def evaluation(self) -> dict[str, Any]:
        """The log's record of the evaluation of these weights; {} where there was none."""
        found = [r for r in self.past.evaluations if r["step"] == self.facts["step"]]
        return found[-1] if found else {}

    @property
    def top1_key(self) -> str:
        """The name of its top-1 accuracy in records."""
        return "top1" if self.name == "student" else f"{self.name}_top1"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image, in order, of JSON's types. The file of a program takes the
        crop's pixels and normalises them itself."""
        data, statistics = self.recipe.data, self.normalise.statistics
        return {
            "colour": "RGB",
            "resize": data.eval_resize,  # the short side, pixels; null: straight to size
            "interpolation": "bilinear, antialiased",
            "crop": "centre" if data.eval_resize else None,
            "size": data.size,
            "mean": list(statistics.mean),  # (pixels / 255 - mean) / std
            "std": list(statistics.std),
        }

    def about(self, class_names: list[str] | None) -> dict[str, Any]:
        """What a file says of itself, of JSON's types."""
        environment = self.past.environment
        return {
            "recipe": self.recipe.name,
            "network": self.name,
            "step": self.facts["step"],
            "results": self.facts["results"],
            "classes": self.classes,
            "size": self.recipe.data.size,
            "preprocessing": self.preprocessing,
            "class_names": class_names,
            "kdfuse": environment.get("kdfuse"),
            "commit": environment.get("commit"),
        }


def choose(
    past: PastRun,
    recipe: Recipe,
    which: str,
    weights: dict[str, Any],
    facts: dict[str, Any],
    name: str,
) -> Chosen:
    """The network `name` of a checkpoint's weights and facts; ValueError where the run has none."""
    distiller = build(recipe, facts["classes"], torch.device("cpu"))
    distiller.load(weights)
    networks = distiller.evaluated()
    if name not in networks:
        raise ValueError(f"network = {name!r}: this run has {', '.join(networks)}")
    network, role = networks[name]
    normalise = distiller.inputs[role]
    assert isinstance(normalise, Normalise)
    spec, alone = spec_of(recipe, name), _alone(distiller, network)
    return Chosen(past, recipe, which, name, spec, network.eval(), normalise, facts, alone)


def spec_of(recipe: Recipe, name: str) -> Network:
    """What a recipe says of one of the networks that it has, by its name in logs."""
    for learner, part in recipe.learners(MAIN).items():
        short = name.removeprefix(prefix(learner))
        if short in ("student", "ema"):
            return part.student
        if re.fullmatch(r"slt\d+", short):
            spec = part.slt or recipe.teacher  # without a network of its own, the teacher's
            assert spec is not None
            return spec
    raise AssertionError(name)


def _alone(distiller: Distiller, network: nn.Module) -> bool:
    learners = distiller.learners.values()
    plain = [learner for learner in learners if not learner.method.deploys_head]
    known = [slt for learner in learners for slt in learner.slts]
    known += [learner.student for learner in plain]
    known += [learner.average.module for learner in plain if learner.average is not None]
    return any(network is module for module in known)
