"""What every distillation method states about itself, and the outputs its loss is made from.

A method is its options: adding one is one file with a subclass and one line in METHODS.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..schema import Strict

Terms = dict[str, Tensor]


@dataclass
class Outputs:
    """What the networks of a run give for one batch of N images and C classes."""

    student: Tensor  # (N, C) logits
    teacher: Tensor | None = None  # (N, C) logits, never with a gradient
    slts: list[Tensor] = field(default_factory=list)  # each (N, C) logits
    tap: Tensor | None = None  # (N, channels, H, W) feature map of the tapped student stage
    heads: dict[str, Tensor] = field(default_factory=dict)  # what each head made of the tap


class Method(Strict):
    """Base of the methods: the networks and features it needs, and its loss."""

    name: str
    uses_teacher: ClassVar[bool] = False
    slts: ClassVar[int]  # self-learning teachers, trained beside the student
    tap: ClassVar[int | None] = None  # which of the student's stage outputs the heads read

    def heads(self, channels: int | None, classes: int) -> nn.ModuleDict:
        """Extra modules trained with the student and dropped after training.

        `channels` is the width of the tapped stage, None for a method without a tap.
        Each module maps the tap (N, channels, H, W) to (N, classes).
        """
        return nn.ModuleDict()

    @abstractmethod
    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        """The loss of one batch (0-dim, float32) and its detached 0-dim terms.

        `target` is (N,) int64; `epoch` is 0-based and fractional. Terms whose names end in top1
        or top5, and rows, are counts over the batch; all others are means over its rows.
        """


def with_terms(result: Tensor | tuple[Tensor, Terms]) -> tuple[Tensor, Terms]:
    """What a loss function gives back when it is called with return_terms=True."""
    assert isinstance(result, tuple)
    return result
