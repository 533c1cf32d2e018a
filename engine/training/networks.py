"""The networks of a run and their forward pass: what is wrapped for many processes.

Students, SL-Ts and heads are in the module tree; the teachers are not, so that no state dict, no
train() and no optimiser ever reaches them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.forms import Form
from ..cache.told import told
from ..data.loaders.ondevice import Normalise
from ..methods import Now, Outputs, Terms
from ..models import Taps, cast_weights
from .compiled import compile_all
from .ema import EMA
from .frozen import digest, folded
from .learner import Learner

MAIN = "main"  # the learner of the recipe's own student


class Distiller(nn.Module):
    """Learners, and the frozen teachers beside them whose forward pass they share."""

    def __init__(
        self,
        learners: dict[str, Learner],  # the main one first
        teachers: list[nn.Module],  # the teacher and the assistants, to be frozen
        inputs: dict[str, Normalise],  # by role (see `role`); equal ones are one object
        amp: bool,
        recorded: Form | None = None,  # of the teacher's answers, which then come with the images
        taps: Collection[str] = (),  # of the teacher, beside what the learners read
        fused: Form | None = None,  # of the main learner's SL-Ts', which come behind them
    ) -> None:
        super().__init__()
        self.fused = fused
        self.recorded = recorded
        for learner in learners.values():
            learner.recorded = recorded
        self.learners = learners
        self.tree = nn.ModuleDict(learners)
        self.inputs = nn.ModuleDict(inputs)
        self.amp = amp
        self.teacher_digest: str | None = None
        reads = [name for one in learners.values() for name in one.reads.get("teacher", ())]
        reads += taps
        self.trains_teacher = any(o.method.teacher_mode == "train" for o in learners.values())
        # In a tuple, the teachers are no part of the module tree.
        self._teachers: tuple[nn.Module, ...] = ()
        self._taps: Taps | None = None
        if teachers:
            self.teacher_digest = digest(teachers)
            self._taps = Taps(teachers[0], list(dict.fromkeys(reads)))
            kept = [self._frozen(teacher) for teacher in teachers]
            if kept[0] is not teachers[0]:
                self._taps.remove()
                self._taps = self._taps.moved(kept[0])
            self._teachers = tuple(kept)

    def _frozen(self, teacher: nn.Module) -> nn.Module:
        kept = teacher if self.trains_teacher else folded(teacher)
        if self.amp and kept is not teacher:  # which heads may share layers with
            kept = cast_weights(kept, torch.bfloat16)
        return kept.eval().requires_grad_(False)

    @property
    def main(self) -> Learner:
        return self.learners[MAIN]

    @property
    def teacher(self) -> nn.Module | None:
        return self._teachers[0] if self._teachers else None

    def prepare(self, compile: Collection[str]) -> None:
        """Tap the networks and compile those of the roles "student", "teacher" and "slts" that are
        asked for: once, after the students were copied."""
        for learner in self.learners.values():
            learner.prepare()
        roles = {"teacher": {name: network for name, (network, _) in self.frozen().items()}}
        for name, learner in self.learners.items():
            for kind, own in learner.networks().items():
                named = {f"{prefix(name)}{role}": network for role, network in own.items()}
                roles[kind] = roles.get(kind, {}) | named
        if chosen := {
            n: x for kind, own in roles.items() if kind in compile for n, x in own.items()
        }:
            compile_all(chosen)
        if "student" in compile:
            for name, learner in self.learners.items():
                learner.compile_features(f"{prefix(name)}features")

    def train(self, mode: bool = True) -> Distiller:
        """As every module; the teacher follows where a method wants its batch statistics."""
        super().train(mode)
        if self.trains_teacher and self.teacher is not None:
            self.teacher.train(mode)
        return self

    def forward(
        self, now: Now, images: Tensor, target: Tensor, index: Tensor, *answers: Tensor
    ) -> tuple[Tensor, Terms]:
        """The loss of all learners together (0-dim), and what `terms` says; see `outputs`.

        The learners share no parameter, so that the sum trains each as if it were alone. `now`
        has the numbers of `schedule`.
        """
        losses: list[Tensor] = []
        found: Terms = {}
        for name, out in self.outputs(images, target, index, *answers).items():
            own = self.learners[name].method.schedule(0)
            loss, terms = self.learners[name].loss(
                out, target, {short: now[f"{prefix(name)}{short}"] for short in own}
            )
            terms = {"loss": loss.detach(), **terms}
            if losses:
                del terms["rows"]  # the main learner's rows are everybody's
            found |= {f"{prefix(name)}{term}": value for term, value in terms.items()}
            losses.append(loss)
        return sum(losses[1:], start=losses[0]), found

    def outputs(
        self, images: Tensor, target: Tensor, index: Tensor, *answers: Tensor
    ) -> dict[str, Outputs]:
        """What the networks of every learner give, by its name.

        `images` (N, 3, H, W) of 0..255, uint8 or float32, are on the networks' device; `target` are
        their labels (N,) int64, or class probabilities (N, C) where all methods take them; `index`
        (N,) int64 their numbers in the training set, `answers` those of a recorded teacher, behind
        them those of recorded SL-Ts.
        """
        made = {inputs: inputs(images) for inputs in dict.fromkeys(self.inputs.values())}
        named = {name: made[inputs] for name, inputs in self.inputs.items()}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            count = len(answers) - (self.fused.tensors if self.fused else 0)
            if self.recorded is None:
                taught = self._taught(named)
            else:
                taught = told(self.recorded, answers[:count], next(iter(named.values())))
            if self.fused is not None:
                taught.fused = self.fused.answer(answers[count:])
            found = {}
            for name, learner in self.learners.items():
                roles = {own: role(name, own) for own in ("student", "slts")}
                own = {short: named[full] for short, full in roles.items() if full in named}
                found[name] = learner(own, taught, target, index)
        return found

    @torch.no_grad()
    def _taught(self, named: dict[str, Tensor]) -> Outputs:
        """The frozen teachers' part of the outputs."""
        out = Outputs(student=torch.empty(0))
        for i, teacher in enumerate(self._teachers):
            logits = teacher(named["teacher" if i == 0 else f"assistant{i - 1}"])
            if i == 0:
                out.teacher = logits
                assert self._taps is not None
                out.teacher_taps = self._taps.take()
            else:
                out.assistants.append(logits)
        return out

    def teach(self, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The logits (N, C) of the frozen teachers for images as `outputs` takes them, and what the
        first one gave at its taps."""
        named = {role: self.inputs[role](images) for _, role in self.frozen().values()}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            out = self._taught(named)
        assert out.teacher is not None
        return [out.teacher, *out.assistants], out.teacher_taps

    @torch.no_grad()
    def predict(self, network: nn.Module, role: str, images: Tensor) -> Tensor:
        """Logits (N, classes) of one network for uint8 images, normalised as for `role`."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return network(self.inputs[role](images))

    def frozen(self) -> dict[str, tuple[nn.Module, str]]:
        """The teacher and the assistants, by their role in `inputs`, each with that role."""
        roles = ["teacher", *(f"assistant{i}" for i in range(len(self._teachers) - 1))]
        return {role: (network, role) for role, network in zip(roles, self._teachers, strict=False)}

    def evaluated(self) -> dict[str, tuple[nn.Module, str]]:
        """The networks that are evaluated, by the name in logs, each with its role in `inputs`."""
        found: dict[str, tuple[nn.Module, str]] = {}
        for name, learner in self.learners.items():
            found[f"{prefix(name)}student"] = (learner.deployed, role(name, "student"))
            for i, slt in enumerate(learner.slts):
                found[f"{prefix(name)}slt{i}"] = (slt, role(name, "slts"))
        for name, learner in self.learners.items():
            if learner.average is not None:
                averaged = learner.average.module
                found[f"{prefix(name)}ema"] = (averaged, role(name, "student"))
        return found

    def trained(self) -> dict[str, list[nn.Module]]:
        """The modules of each optimiser, by its name in checkpoints."""
        return {
            f"{prefix(name)}{network}": modules
            for name, learner in self.learners.items()
            for network, modules in learner.trained().items()
        }

    def averages(self) -> list[EMA]:
        """The students' averages."""
        return [one.average for one in self.learners.values() if one.average is not None]

    def schedule(self, epoch: float) -> dict[str, float]:
        """The numbers of each method at `epoch`, 0-based and fractional, by name."""
        return {
            f"{prefix(name)}{short}": value
            for name, learner in self.learners.items()
            for short, value in learner.method.schedule(epoch).items()
        }

    def update_averages(self, share: Tensor) -> None:
        """Take a share (0-dim) of the students' weights into their averages."""
        for learner in self.learners.values():
            if learner.average is not None:
                learner.average.update(learner.deployed, share)

    def weights(self, whole: bool) -> dict[str, Any]:
        """What a checkpoint holds of the networks; `whole`: all that a resumed run needs."""
        held = {name: learner.weights(whole) for name, learner in self.learners.items()}
        return {**held.pop(MAIN), "also": held}

    def load(self, held: Mapping[str, Any]) -> None:
        """Take the weights of everything that is trained from what a checkpoint holds."""
        for name, own in {MAIN: held, **held["also"]}.items():
            self.learners[name].load(own)


def prefix(learner: str) -> str:
    """What stands before the names of a learner's networks and loss terms."""
    return "" if learner == MAIN else f"{learner}_"


def role(learner: str, network: str) -> str:
    """The name in `inputs` of a learner's "student" or "slts"."""
    return network if learner == MAIN else f"{learner}/{network}"
