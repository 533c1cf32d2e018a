"""What the methods share that compare feature maps place by place."""

from typing import ClassVar

from torch import Size, Tensor, nn

from ..method import Networks, Outputs
from .feature import FeatureMethod
from .pooling import pooled_to


class MapMethod(FeatureMethod):
    """A feature method whose pairs are maps (N, C, H, W) of one size, by default each stage's."""

    default_taps: ClassVar[str] = "stages"

    def head(self, networks: Networks) -> nn.Module | None:
        """None. ValueError for taps that give no maps."""
        map_shapes(networks)
        return None

    def pairs(self, out: Outputs) -> list[tuple[Tensor, Tensor]]:
        return [same_size(student, teacher) for student, teacher in super().pairs(out)]


def map_shapes(networks: Networks) -> list[tuple[Size, Size]]:
    """Student's and teacher's (1, C, H, W) at each pair of taps. ValueError for other shapes."""
    for role in ("student", "teacher"):
        for tap, shape in networks.shapes[role].items():
            if len(shape) != 4:
                raise ValueError(
                    f"method.{role}_taps: {tap} gives {tuple(shape)} for an image, and this method "
                    "compares maps (1, C, H, W); name points that give maps"
                )
    student, teacher = (networks.shapes[role].values() for role in ("student", "teacher"))
    return list(zip(student, teacher, strict=True))


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (N, C, H, W), averaged to the smaller height and the smaller width of the two."""
    height = min(student.shape[2], teacher.shape[2])
    width = min(student.shape[3], teacher.shape[3])
    return pooled_to(student, height, width), pooled_to(teacher, height, width)
