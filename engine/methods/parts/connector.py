"""The 1 x 1 convolutions that lead a student's features to the teacher's channels."""

import math
from collections.abc import Mapping

from torch import Size, Tensor, nn

from ..method import Outputs, Role


class Connectors(nn.Module):
    """For each pair of taps a convolution without bias and BatchNorm, on the student's map.

    Weights start as N(0, 2 / Ct) for Ct channels of the teacher (Heo et al. 2019). ValueError
    where a feature is no map.
    """

    def __init__(self, method: str, shapes: Mapping[Role, Mapping[str, Size]]) -> None:
        super().__init__()
        for role in ("student", "teacher"):
            for tap, shape in shapes[role].items():
                if len(shape) != 4:
                    raise ValueError(
                        f"method {method} connects maps (N, C, H, W), and the {role}'s {tap} gives "
                        f"{tuple(shape)} for one image; name maps with method.{role}_taps"
                    )
        pairs = zip(shapes["student"].values(), shapes["teacher"].values(), strict=True)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(student[1], teacher[1], 1, bias=False), nn.BatchNorm2d(teacher[1])
            )
            for student, teacher in pairs
        )
        for layer in self.layers.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.out_channels))

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        taps = out.student_taps.values()
        made = (layer(feature) for layer, feature in zip(self.layers, taps, strict=True))
        return {f"connected{i}": feature for i, feature in enumerate(made)}
