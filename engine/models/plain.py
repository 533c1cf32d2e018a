"""JointRD's networks: ResNets in which each block has a shortcut or none, down to plain CNNs.

JointRD is "Residual Distillation: Towards Portable Deep Neural Networks without Shortcuts" (Li et
al. 2020). `PLAIN` holds them by names that are put together so, parts in [] may be left out:

    [imagenet_]jointrd_resnetD             D is 18, 34 or 50; a shortcut in every block: the teacher
    [imagenet_]plainD[_none][_DIRAC]       the student

- Alone, a name means the form for 32 x 32 images: a 3 x 3 stem. `imagenet_`: 7 x 7 with stride 2,
  then max pooling. Either takes images of other sizes.
- `plainD` has the flags of the released code: shortcuts, projections, in the first block of stages
  2 to 4 alone, where the image gets smaller, and in none of the others. `_none`: no shortcut at
  all, the plain CNN of the paper's title.
- `_DIRAC` says how the last two convolutions of each block start near the identity: `_dirac` (alpha
  * delta + beta * W, as released for 32 x 32), `_dirac_normalised` (each filter of W divided by its
  norm, as in DiracNets) or `_dirac_init` (once, in ordinary convolutions). The released ImageNet
  networks also have Dirac weights in the bottlenecks' first convolution and in projections; these
  here do not.

The released networks register layers that they do not use (the projection of a first block without
shortcut and, with Dirac, two connectors a bottleneck). These do not: all parameters get gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from .dirac import DiracConv2d, dirac_init_

# What makes a convolution with "same" padding: channels in and out, kernel size, stride.
Conv = Callable[[int, int, int, int], nn.Conv2d]


def ordinary(channels_in: int, channels: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def dirac(
    channels_in: int, channels: int, kernel: int, stride: int, *, normalised: bool = False
) -> nn.Conv2d:
    conv = DiracConv2d(channels_in, channels, kernel, stride, kernel // 2, normalised=normalised)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def dirac_initialised(channels_in: int, channels: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = ordinary(channels_in, channels, kernel, stride)
    dirac_init_(conv.weight)
    return conv


class BasicBlock(nn.Module):
    """ReLU, two 3 x 3 convolutions, then the shortcut's addition; what comes out is pre-ReLU."""

    expansion = 1

    def __init__(
        self, channels_in: int, width: int, stride: int, shortcut: bool, conv: Conv
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = conv(channels_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels_in, width, stride) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        x = self.relu(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return y if self.downsample is None else y + self.downsample(x)


class Bottleneck(nn.Module):
    """ReLU, convolutions of 1 x 1, 3 x 3 (with the stride) and 1 x 1; what comes out is pre-ReLU.

    `conv` makes the second and the third; the first is an ordinary one.
    """

    expansion = 4

    def __init__(
        self, channels_in: int, width: int, stride: int, shortcut: bool, conv: Conv
    ) -> None:
        super().__init__()
        channels = width * self.expansion
        self.relu = nn.ReLU()
        self.conv1 = ordinary(channels_in, width, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, channels, 1, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(channels_in, channels, stride) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        x = self.relu(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y if self.downsample is None else y + self.downsample(x)


_BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}
_WIDTHS = (64, 128, 256, 512)

Flags = Sequence[Sequence[int]]


def everywhere(depth: int) -> Flags:
    """The flags of a ResNet."""
    return [[1] * blocks for blocks in _BLOCKS[depth][1]]


def released(depth: int) -> Flags:
    """The flags of JointRD's plain CNNs: 1 in the first block of stages 2, 3 and 4."""
    first, *others = _BLOCKS[depth][1]
    return [[0] * first, *([1] + [0] * (blocks - 1) for blocks in others)]


def nowhere(depth: int) -> Flags:
    """The flags of a CNN without shortcuts."""
    return [[0] * blocks for blocks in _BLOCKS[depth][1]]


class ReluFirstResNet(nn.Module):
    """A ResNet of `depth` 18, 34 or 50 layers with the shortcuts that `shortcuts` says.

    It has a flag for each block of each of the four stages: 1 for a shortcut (a projection where
    the shape changes), 0 for none. `conv` makes the last two convolutions of each block. With all
    shortcuts it computes what torchvision's ResNets do, from the same state-dict keys. The ReLU
    opens a block instead of closing it, so that stages hand over pre-ReLU features: that is where
    JointRD leads the student's into the later stages of its teacher. Raises ValueError for another
    depth, or flags that are not 0 or 1 for each block.
    """

    def __init__(
        self, depth: int, shortcuts: Flags, conv: Conv, imagenet: bool, num_classes: int
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"depth: {depth} is not one of {', '.join(map(str, _BLOCKS))}")
        block, blocks = _BLOCKS[depth]
        known = all(flag in (0, 1) for stage in shortcuts for flag in stage)
        if tuple(map(len, shortcuts)) != blocks or not known:
            raise ValueError(
                f"shortcuts: {shortcuts!r}; depth {depth} needs a 0 or 1 for each of the "
                f"{', '.join(map(str, blocks))} blocks of its stages"
            )
        self.conv1 = ordinary(3, 64, 7, 2) if imagenet else ordinary(3, 64, 3, 1)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        stages, channels = [], 64
        for i, (width, flags) in enumerate(zip(_WIDTHS, shortcuts, strict=True)):
            layers: list[nn.Module] = []
            for j, flag in enumerate(flags):
                stride = 2 if i > 0 and j == 0 else 1
                layers.append(block(channels, width, stride, bool(flag), conv))
                channels = width * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind a path means its input.

        A stage's last ReLU opens the next stage, the stem's (after max pooling) the first one.
        """
        relus = {
            "stem": "layer1.0.relu",
            "stage1": "layer2.0.relu",
            "stage2": "layer3.0.relu",
            "stage3": "layer4.0.relu",
            "stage4": "relu",
        }
        points: dict[str, str] = {}
        for name, path in relus.items():
            points |= {f"{name}.pre": f"{path}:in", name: path}
        return points | {"pooled": "avgpool", "classifier": "fc"}

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        # max(relu(x)) is relu(max(x)): the first block's ReLU is the stem's, on fewer numbers.
        x = self.layer1(self.maxpool(self.bn1(self.conv1(x))))
        return self.forward_from(x, 1)[1]  # (N, num_classes)

    def forward_from(self, feature: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Go on from `feature`, the pre-ReLU output (N, C, H, W) of `stage`, which is 1, 2 or 3.

        Returns the pre-ReLU output of stage 4 and the logits (N, num_classes). `feature` may be
        another network's: JointRD's path from the student through the later stages of the teacher.
        Raises ValueError for another stage.
        """
        if stage not in (1, 2, 3):
            raise ValueError(f"stage: {stage} is not 1, 2 or 3, after which other stages follow")
        for layer in (self.layer2, self.layer3, self.layer4)[stage - 1 :]:
            feature = layer(feature)
        return feature, self.fc(self.avgpool(self.relu(feature)).flatten(1))


def _shortcut(channels_in: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels:
        return nn.Identity()
    return nn.Sequential(ordinary(channels_in, channels, 1, stride), nn.BatchNorm2d(channels))


_FLAGS = {"": released, "_none": nowhere}
_DIRAC: dict[str, Conv] = {
    "": ordinary,
    "_dirac": dirac,
    "_dirac_normalised": partial(dirac, normalised=True),
    "_dirac_init": dirac_initialised,
}
_VARIANTS: list[tuple[str, Callable[[int], Flags], Conv]] = [
    ("jointrd_resnet{}", everywhere, ordinary),
    *(
        ("plain{}" + which + start, flags, conv)
        for which, flags in _FLAGS.items()
        for start, conv in _DIRAC.items()
    ),
]

# Each makes the network for a number of classes.
PLAIN: dict[str, Callable[[int], nn.Module]] = {
    form + name.format(depth): partial(ReluFirstResNet, depth, flags(depth), conv, imagenet)
    for form, imagenet in (("", False), ("imagenet_", True))
    for name, flags, conv in _VARIANTS
    for depth in _BLOCKS
}
