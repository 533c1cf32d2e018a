"""The network that SimKD leaves behind: a student's features, a projector, a reused classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Size, Tensor, nn

from .pooling import pooled_to


class Projector(nn.Module):
    """Student features (N, Cs, H, W) to the teacher's shape (N, Ct, h, w).

    1 x 1, 3 x 3 and 1 x 1 convolutions, each with BatchNorm and ReLU, Ct / factor channels between
    them (Chen et al. 2022). A larger map is first pooled to the teacher's size; a smaller one
    stays, and `aligned` pools the teacher's.
    """

    def __init__(
        self,
        student: int,
        teacher: int,
        factor: int,
        bias: Literal["none", "added", "instead"],
        student_size: Sequence[int],
        teacher_size: Sequence[int],
    ) -> None:
        super().__init__()
        if teacher % factor:
            raise ValueError(
                f"method.factor: {factor} does not divide the teacher's {teacher} channels"
            )
        inside = teacher // factor
        self.size = (
            (teacher_size[0], teacher_size[1]) if student_size[0] > teacher_size[0] else None
        )
        layers: list[nn.Module] = []
        for channels_in, channels, kernel in (
            (student, inside, 1),
            (inside, inside, 3),
            (inside, teacher, 1),
        ):
            layers.append(
                nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=bias != "none")
            )
            layers += [] if bias == "instead" else [nn.BatchNorm2d(channels)]
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if self.size is None else pooled_to(x, *self.size))


def aligned(teacher: Tensor, size: Size) -> Tensor:
    """The teacher's map (N, C, H, W), pooled where the student's `size` is smaller."""
    height, width = size
    return teacher if teacher.shape[2:] == size else pooled_to(teacher, height, width)


class Reused(nn.Module):
    """Images (N, 3, H, W) to logits (N, C): backbone, projector, mean over places, classifier."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.projector(self.backbone(images)).mean((2, 3)))
