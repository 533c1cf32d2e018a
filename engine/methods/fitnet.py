"""FitNets (Romero et al. 2015): the student's features, regressed to the teacher's shape."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Size, Tensor, nn

from .method import Networks, Outputs, Terms
from .parts.feature import FeatureMethod
from .parts.maps import map_shapes


class FitNet(FeatureMethod):
    """Mean squared difference of the regressed hint of the student and that of the teacher.

    The hint is the second stage's map. As in RepDistiller and mdistiller, from which the weight is,
    it is learnt together with the classes and not before them. The regressors' BatchNorm takes
    the statistics of each process's own images.
    """

    name: Literal["fitnet"] = "fitnet"
    default_taps: ClassVar[str] = "stage2"

    feature_weight: float = Field(100.0, ge=0, description="weight of the feature loss")

    def head(self, networks: Networks) -> nn.Module:
        return Hints(map_shapes(networks))

    def features(self, out: Outputs, target: Tensor) -> Terms:
        hints = zip(out.head.values(), self.pairs(out), strict=True)
        losses = [F.mse_loss(hint.float(), teacher) for hint, (_, teacher) in hints]
        return {"hint": torch.stack(losses).sum()}


class Hints(nn.Module):
    """A regressor for each pair of taps."""

    def __init__(self, shapes: list[tuple[Size, Size]]) -> None:
        super().__init__()
        self.regressors = nn.ModuleList(regressor(*pair) for pair in shapes)

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        maps = zip(self.regressors, out.student_taps.values(), strict=True)
        return {f"hint{i}": regress(x) for i, (regress, x) in enumerate(maps)}


def regressor(student: Size, teacher: Size) -> nn.Sequential:
    """From maps of shape (1, C, H, W) to the teacher's: one convolution, BatchNorm and ReLU.

    It halves or doubles the size, or cuts the borders off a larger one. ValueError for a student's
    map that is smaller in any other way.
    """
    (channels_in, height, width), (channels, *size) = student[1:], teacher[1:]
    conv: nn.Module
    if [height, width] == [2 * n for n in size]:
        conv = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1)
    elif [2 * height, 2 * width] == size:
        conv = nn.ConvTranspose2d(channels_in, channels, 4, stride=2, padding=1)
    elif height >= size[0] and width >= size[1]:
        conv = nn.Conv2d(channels_in, channels, (1 + height - size[0], 1 + width - size[1]))
    else:
        raise ValueError(
            f"method fitnet cannot regress the student's {height} x {width} map to the teacher's "
            f"{size[0]} x {size[1]}: it doubles, halves or cuts; name taps that fit with "
            "method.student_taps and method.teacher_taps"
        )
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
