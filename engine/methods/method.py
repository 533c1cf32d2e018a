"""What every distillation method states about itself, and the outputs its loss is made from.

A method is its options: adding one is one file with a subclass and one line in METHODS.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Size, Tensor, nn

from ...kernels.sparse import SparseTeacher
from ..recipe.schema import Strict

Terms = dict[str, Tensor]
Now = Mapping[str, Tensor]  # the numbers of Method.schedule in the step at hand
Taps = dict[str, Tensor]  # what the network gave at each of its tapped points
Points = Mapping[str, str]  # a network's named points, as models.points gives them
Role = Literal["student", "teacher", "slts"]


@dataclass
class Outputs:
    """What the networks of a run give for one batch of N images and C classes."""

    student: Tensor  # (N, C) logits
    teacher: Tensor | None = None  # (N, C) logits, never with a gradient
    listed: SparseTeacher | None = None  # a recorded teacher's, where it kept some of them
    assistants: list[Tensor] = field(default_factory=list)  # further frozen teachers' (N, C) logits
    slts: list[Tensor] = field(default_factory=list)  # each (N, C) logits
    fused: Tensor | SparseTeacher | None = None  # SL-Ts' as one, where they are or were recorded
    average: Tensor | None = None  # (N, C) logits of the student's average, never with a gradient
    student_taps: Taps = field(default_factory=dict)
    teacher_taps: Taps = field(default_factory=dict)
    slt_taps: list[Taps] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)  # what the method's head made
    features: Terms = field(default_factory=dict)  # what Method.features made

    @property
    def taught(self) -> Tensor | SparseTeacher:
        """What the teacher says, for the losses that take either."""
        found = self.teacher if self.listed is None else self.listed
        assert found is not None
        return found


@dataclass
class Networks:
    """What a head is built for: all networks of the run, and what they give at their taps."""

    classes: int
    student: nn.Module
    teacher: nn.Module | None = None  # frozen, in evaluation mode, BatchNorm not folded
    slts: list[nn.Module] = field(default_factory=list)
    points: Mapping[Role, Points] = field(default_factory=dict)
    shapes: dict[Role, dict[str, Size]] = field(default_factory=dict)  # of taps, for one image
    labels: Tensor | None = None  # (images,) int64, of the training set; None in evaluation
    size: int = 32  # side of the images, pixels


class Method(Strict):
    """Base of the methods: the networks and features it needs, and its loss."""

    name: str
    uses_teacher: ClassVar[bool] = False
    uses_assistants: ClassVar[bool] = False  # further frozen teachers
    deploys_head: ClassVar[bool] = False  # whether the head is part of the network that is kept
    waits: ClassVar[bool] = False  # for the device, in each step
    splits_target: ClassVar[bool] = False  # whether it treats the teacher's target class apart
    reads_student: ClassVar[Literal["logits", "taps"]] = "logits"  # taps: not what is behind them

    @property
    def teacher_mode(self) -> Literal["eval", "train"]:
        """Whether the teacher's BatchNorm takes its running statistics or those of the batch."""
        return "eval"

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        """What of a recorded teacher the loss takes: all logits, `Outputs.teacher`, be they made of
        those that were kept (dense) or not (whole); or `Outputs.taught` (listed).

        A method that learns while its teacher runs takes none.
        """
        return "none"

    @property
    def takes_taps(self) -> Literal["none", "values", "layers"]:
        """What beside the logits the method takes of a recorded teacher: the values of its features
        (`reads`), and with "layers" some of its layers too, whose weights a cache does not hold."""
        return "none"

    @property
    def nonlinear(self) -> str:
        """Why the loss is not linear in the probabilities of a teacher; "" where it is."""
        return ""

    @property
    def slt_count(self) -> int:
        """How many networks are trained beside the student: SL-Ts, peers, or a teacher."""
        return 0

    @property
    def takes_soft_labels(self) -> bool:
        """Whether the loss is defined for class probabilities (mixup, CutMix, smoothing)."""
        return False

    @property
    def takes_repeats(self) -> bool:
        """Whether an image may stand several times in a batch (data.repeats)."""
        return True

    @property
    def gathers(self) -> bool:
        """Whether processes exchange the rows of their images, as many each."""
        return False

    @property
    def uses_average(self) -> bool:
        """Whether the loss reads the logits of the student's running average (optim.ema)."""
        return False

    def check_assistants(self, count: int) -> None:
        """Raise ValueError unless the options fit that many assistants."""
        return None

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        """The points that are tapped, by role; `points` are those that the networks name.

        Raises ValueError for networks that do not have what the method reads.
        """
        return {}

    def head(self, networks: Networks) -> nn.Module | None:
        """The module that is trained with the student: head(out, target, index) -> dict of Tensor.

        It runs under autocast; `out` is all of Outputs but head and features, `index` the (N,)
        numbers of the images in the training set. It may hold buffers, and a network of the run in
        a tuple, so that it does not train it. All of its buffers are copied in each step, to put
        them back if the step is skipped; a head with large ones does so itself, by `mark` and
        `undo` (training/guard.py).
        """
        return None

    def features(self, out: Outputs, target: Tensor) -> Terms:
        """0-dim float32 losses of the feature maps, not weighted; compiled as one when asked."""
        return {}

    def schedule(self, epoch: float) -> dict[str, float]:
        """The numbers of the loss that change in the course of a run, by name, always the same
        ones; `epoch` is 0-based and fractional."""
        return {}

    @abstractmethod
    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        """The loss of one batch (0-dim, float32) and its detached 0-dim terms.

        `target` is (N,) int64, or (N, C) float32 class probabilities where the method takes them;
        `now` has what `schedule` gives, as 0-dim tensors. Terms whose names end in top1 or top5,
        and rows, are counts over the batch; all others are means over its rows. The right class of
        probabilities is the one with the largest.
        """

    def deployed(
        self, student: nn.Module, head: nn.Module | None, until: Callable[[str], nn.Module]
    ) -> nn.Module:
        """What is evaluated and exported: images (N, 3, H, W) in, (N, C) logits out.

        `until(point)` is the student as a module that gives what passes at `point`.
        """
        return student


def stage_names(points: Points, suffix: str = "") -> tuple[str, ...]:
    """The stages among a network's named points, shallow to deep; `suffix` "" or ".pre"."""
    return tuple(name for name in points if re.fullmatch(rf"stage\d+{re.escape(suffix)}", name))


def own_taps(*names: str) -> str:
    """For messages: how a network of one's own names these points."""
    named = ", ".join(f'"{name}": MODULE_PATH' for name in names)
    return f"give the network's class an attribute taps = {{{named}}} (docs/extending.md)"


def with_terms(result: Tensor | tuple[Tensor, Terms]) -> tuple[Tensor, Terms]:
    """What a loss function gives back when it is called with return_terms=True."""
    assert isinstance(result, tuple)
    return result
