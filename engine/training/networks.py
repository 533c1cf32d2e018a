"""The networks of a run and their forward pass: what is wrapped for many processes.

Students, SL-Ts and heads are in the module tree; the teachers are not, so that no state dict, no
train() and no optimiser ever reaches them.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..methods import Outputs
from ..models import FoldError, Taps, create, fold_batchnorm, fold_dirac
from ..recipe.load import Recipe
from ..recipe.schema import Network, Normalize
from ..run.past import checkpoints_of, recipe_of
from .learner import Branch

MAIN = "main"  # the branch of the recipe's own student


class Inputs(nn.Module):
    """Images (N, 3, H, W) of 0..255, uint8 or float32, to (image / 255 - mean) / std.

    The result is a new float32 tensor in the wanted layout.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, normalize: Normalize, channels_last: bool) -> None:
        super().__init__()
        mean, std = torch.tensor(normalize.mean), torch.tensor(normalize.std)
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(3, 1, 1), persistent=False)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=self.layout, copy=True)
        return floats.mul_(self.scale).add_(self.shift)


class Distiller(nn.Module):
    """Branches to train, and frozen teachers beside them whose forward pass they share."""

    def __init__(
        self,
        branches: dict[str, Branch],  # the main one first
        teachers: list[nn.Module],  # the teacher and the assistants, to be frozen
        inputs: dict[str, Inputs],  # by role (see `build`); equal ones are one object
        amp: bool,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.inputs = nn.ModuleDict(inputs)
        self.amp = amp
        self.teacher_digest: str | None = None
        parts = self.parts.values()
        names = list(dict.fromkeys(n for part in parts for n in part.reads.get("teacher", ())))
        self.trains_teacher = any(part.method.teacher_mode == "train" for part in parts)
        # In a tuple, the teachers are no part of the module tree.
        self._teachers: tuple[nn.Module, ...] = ()
        self._taps: Taps | None = None
        if teachers:
            self.teacher_digest = digest(teachers)
            self._taps = Taps(teachers[0], names)
            kept = [self._frozen(teacher) for teacher in teachers]
            if kept[0] is not teachers[0]:
                self._taps.remove()
                self._taps = self._taps.moved(kept[0])
            self._teachers = tuple(kept)

    def _frozen(self, teacher: nn.Module) -> nn.Module:
        kept = teacher if self.trains_teacher else folded(teacher)
        return kept.eval().requires_grad_(False)

    @property
    def parts(self) -> dict[str, Branch]:
        """The branches by name, the main one first."""
        return {n: part for n, part in self.branches.items() if isinstance(part, Branch)}

    @property
    def main(self) -> Branch:
        return self.parts[MAIN]

    @property
    def teacher(self) -> nn.Module | None:
        return self._teachers[0] if self._teachers else None

    def prepare(self, compile: bool) -> None:
        """Tap the networks and compile them if asked: once, after the students were copied.

        Networks are compiled in place, so that state-dict keys stay. Training and evaluation
        batches have one shape each, for which dynamic shapes would only make slower kernels.
        """
        for part in self.parts.values():
            part.prepare(compile)
        if compile:
            for teacher in self._teachers:
                teacher.compile(dynamic=False)

    def train(self, mode: bool = True) -> Distiller:
        """As every module; the teacher follows where a method wants its batch statistics."""
        super().train(mode)
        if self.trains_teacher and self.teacher is not None:
            self.teacher.train(mode)
        return self

    def frozen(self) -> dict[str, tuple[nn.Module, str]]:
        """The teacher and the assistants, by their role in `inputs`, each with that role."""
        roles = ["teacher", *(f"assistant{i}" for i in range(len(self._teachers) - 1))]
        return {role: (network, role) for role, network in zip(roles, self._teachers, strict=False)}

    def networks(self) -> dict[str, tuple[nn.Module, str]]:
        """The networks that are evaluated, by the name in logs, each with its role in `inputs`."""
        found = {}
        for name, part in self.parts.items():
            found[f"{prefix(name)}student"] = (part.deployed, role(name, "student"))
            for i, slt in enumerate(part.slts):
                found[f"{prefix(name)}slt{i}"] = (slt, role(name, "slts"))
        return found

    def forward(self, images: Tensor, target: Tensor, index: Tensor) -> dict[str, Outputs]:
        """What every branch gives for images (N, 3, H, W), as Inputs takes them, on the networks'
        device.

        `target` are their labels (N,) or class probabilities (N, C), `index` (N,) their numbers in
        the training set.
        """
        made = {inputs: inputs(images) for inputs in dict.fromkeys(self.inputs.values())}
        named = {name: made[inputs] for name, inputs in self.inputs.items()}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            taught = self._taught(named)
            found = {}
            for name, part in self.parts.items():
                roles = {own: role(name, own) for own in ("student", "slts")}
                own = {short: named[full] for short, full in roles.items() if full in named}
                found[name] = part(own, taught, target, index)
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

    @torch.no_grad()
    def predict(self, network: nn.Module, role: str, images: Tensor) -> Tensor:
        """Logits (N, classes) of one network for uint8 images, normalised as for `role`."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return network(self.inputs[role](images))


def prefix(branch: str) -> str:
    """What stands before the names of a branch's networks and loss terms."""
    return "" if branch == MAIN else f"{branch}_"


def role(branch: str, network: str) -> str:
    """The name in `inputs` of a branch's "student" or "slts"."""
    return network if branch == MAIN else f"{branch}/{network}"


def build(
    recipe: Recipe, classes: int, device: torch.device, labels: Tensor | None = None
) -> Distiller:
    """The networks that a recipe needs, on `device`; the caller seeds their random weights first.

    An SL-T is the teacher's architecture with random weights unless the recipe says otherwise.
    `labels` are the training set's (images,); None to evaluate. Each branch's random weights are
    those that it would have alone. Raises ValueError and FileNotFoundError as `create` does.
    """
    seed = torch.random.get_rng_state()
    data, run = recipe.data, recipe.run
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    found: dict[str, Network] = {}

    def make(name: str, network: Network | None) -> nn.Module:
        assert network is not None  # a recipe has the networks that its method needs
        if network.kept is not None:
            made, normalize = of_run(network.kept, classes)
            network = network.model_copy(update={"normalize": network.normalize or normalize})
        else:
            made = create(network.name, classes, network.checkpoint)
        found[name] = network
        return made.to(device).to(memory_format=layout)

    drawn: dict[str, tuple[nn.Module, list[nn.Module], Tensor]] = {}
    for name, part in recipe.branches(MAIN).items():
        torch.random.set_rng_state(seed)
        slt = part.slt
        if slt is None and recipe.teacher is not None:
            slt = recipe.teacher.model_copy(update={"checkpoint": None})
        student = make(role(name, "student"), part.student)
        slts = [make(role(name, "slts"), slt) for _ in range(part.method.slt_count)]
        drawn[name] = student, slts, torch.random.get_rng_state()
    # What is only evaluated needs a teacher where a part of it is kept.
    parts = recipe.branches(MAIN).values()
    teachers: list[nn.Module] = []
    torch.random.set_rng_state(drawn[MAIN][2])
    if recipe.teacher and (labels is not None or any(p.method.deploys_head for p in parts)):
        teachers.append(make("teacher", recipe.teacher).eval().requires_grad_(False))
    branches = {}
    for name, part in recipe.branches(MAIN).items():
        student, slts, state = drawn[name]
        torch.random.set_rng_state(state)
        teacher = teachers[0] if teachers and part.method.uses_teacher else None
        branches[name] = Branch(part.method, student, slts, teacher, classes, data.size, labels)
    if labels is not None:
        for i, assistant in enumerate(recipe.assistants):
            teachers.append(make(f"assistant{i}", assistant))
    norms = {name: network.normalize or data.normalize for name, network in found.items()}
    inputs = {norm: Inputs(norm, run.channels_last) for norm in norms.values()}
    distiller = Distiller(
        branches,
        teachers,
        {name: inputs[norm] for name, norm in norms.items()},
        amp=run.amp == "bf16",
    )
    return distiller.to(device).to(memory_format=layout)


def of_run(run: Path, classes: int) -> tuple[nn.Module, Normalize]:
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


def folded(teacher: nn.Module) -> nn.Module:
    """The teacher with its BatchNorm folded; itself, with a warning, where that cannot be done."""
    try:
        return fold_batchnorm(fold_dirac(teacher))
    except FoldError as error:
        warnings.warn(f"the teacher runs with its BatchNorm layers unfolded: {error}", stacklevel=2)
        return teacher


def digest(networks: list[nn.Module]) -> str:
    """sha256 of all weights and buffers."""
    found = hashlib.sha256()
    for network in networks:
        for name, value in network.state_dict().items():
            found.update(name.encode())
            found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
