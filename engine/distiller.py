"""The networks of a run and their forward pass: what is wrapped for many processes.

The student, the SL-Ts and the heads are in the module tree; the teacher is not, so that no
state dict, no train() and no optimiser ever reaches it.
"""

import hashlib
import warnings

import torch
from torch import Tensor, nn

from .methods import Method, Outputs
from .models import FoldError, Tap, create, fold_batchnorm, stage_channels, stages
from .schema import Data, Network, Normalize, Run


class Inputs(nn.Module):
    """uint8 images (N, 3, H, W) to float32: (image / 255 - mean) / std, in the wanted layout."""

    scale: Tensor
    shift: Tensor

    def __init__(self, normalize: Normalize, channels_last: bool) -> None:
        super().__init__()
        mean, std = torch.tensor(normalize.mean), torch.tensor(normalize.std)
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(3, 1, 1), persistent=False)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=self.layout)
        return floats.mul_(self.scale).add_(self.shift)


class Distiller(nn.Module):
    """Student, SL-Ts and heads to train, and a frozen teacher beside them."""

    def __init__(
        self,
        method: Method,
        student: nn.Module,
        teacher: nn.Module | None,
        slts: list[nn.Module],
        classes: int,
        inputs: dict[str, Inputs],  # of "student", "teacher" and "slts"; equal ones are one object
        amp: bool,
    ) -> None:
        super().__init__()
        self.student = student
        self.slts = nn.ModuleList(slts)
        stage = stages(student)[method.tap] if method.tap is not None else None
        channels = stage_channels(student, stage) if stage is not None else None
        self.heads = method.heads(channels, classes)
        self.inputs = nn.ModuleDict(inputs)
        self.amp = amp
        self._stage = stage
        self._tap: Tap | None = None
        # In a tuple, the teacher is no part of the module tree.
        self._teacher: tuple[nn.Module, ...] = ()
        self.teacher_digest: str | None = None
        if teacher is not None:
            self.teacher_digest = digest(teacher)
            self._teacher = (folded(teacher).eval().requires_grad_(False),)

    def prepare(self, compile: bool) -> None:
        """Tap the student, and compile the networks if asked: once, after the student was copied.

        Networks are compiled in place, so that state-dict keys stay. Training and evaluation
        batches have one shape each, for which dynamic shapes would only make slower kernels.
        """
        if self._stage is not None:
            self._tap = Tap(self.student, self._stage)
        if compile:
            for network in (self.student, *self.slts, *self._teacher):
                network.compile(dynamic=False)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def networks(self) -> dict[str, tuple[nn.Module, str]]:
        """The networks that are trained, by the name in logs, each with its role in `inputs`."""
        slts = {f"slt{i}": (slt, "slts") for i, slt in enumerate(self.slts)}
        return {"student": (self.student, "student"), **slts}

    def forward(self, images: Tensor) -> Outputs:
        """Logits of every network for uint8 images (N, 3, H, W) on the networks' device."""
        made = {inputs: inputs(images) for inputs in dict.fromkeys(self.inputs.values())}
        teacher_logits = None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(made[self.inputs["teacher"]])
            student_logits = self.student(made[self.inputs["student"]])
            tap = self._tap.take() if self._tap is not None else None
            return Outputs(
                student=student_logits,
                teacher=teacher_logits,
                slts=[slt(made[self.inputs["slts"]]) for slt in self.slts],
                tap=tap,
                heads={name: head(tap) for name, head in self.heads.items()},
            )

    @torch.no_grad()
    def predict(self, network: nn.Module, role: str, images: Tensor) -> Tensor:
        """Logits (N, classes) of one network for uint8 images, normalised as for `role`."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return network(self.inputs[role](images))


def build(
    method: Method,
    student: Network,
    teacher: Network | None,
    slt: Network | None,
    data: Data,
    run: Run,
    classes: int,
    device: torch.device,
) -> Distiller:
    """The networks that a method needs, on `device`; the caller seeds their random weights first.

    An SL-T is the teacher's architecture with random weights unless `slt` says otherwise.
    Raises ValueError and FileNotFoundError as `create` does.
    """
    if slt is None and teacher is not None:
        slt = teacher.model_copy(update={"checkpoint": None})
    roles = {"student": student, "teacher": teacher, "slts": slt}
    norms = {role: net.normalize or data.normalize for role, net in roles.items() if net}
    inputs = {norm: Inputs(norm, run.channels_last) for norm in norms.values()}

    def make(network: Network | None) -> nn.Module:
        assert network is not None  # a recipe has the networks that its method needs
        return create(network.name, classes, network.checkpoint)

    distiller = Distiller(
        method,
        make(student),
        make(teacher) if method.uses_teacher else None,
        [make(slt) for _ in range(method.slts)],
        classes,
        {role: inputs[norm] for role, norm in norms.items()},
        amp=run.amp == "bf16",
    )
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    for network in (distiller, *distiller._teacher):
        network.to(device).to(memory_format=layout)
    return distiller


def folded(teacher: nn.Module) -> nn.Module:
    """The teacher with its BatchNorm folded; itself, with a warning, where that cannot be done."""
    try:
        return fold_batchnorm(teacher)
    except FoldError as error:
        warnings.warn(f"the teacher runs with its BatchNorm layers unfolded: {error}", stacklevel=2)
        return teacher


def digest(network: nn.Module) -> str:
    """sha256 of all weights and buffers."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
