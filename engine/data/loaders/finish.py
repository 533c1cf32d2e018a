"""What a plan does to a crop after it is cut and flipped: RandAugment's ops, and erasing.

The ops are torchvision's on PIL images, which compute what timm's do; PyTorch's own would start
threads in each of a loader's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ...recipe.schema import Normalize
from ..augment import OPS
from ..plan import Plan

Picture = Image.Image
Fill = list[int]
Op = Callable[[Picture, float, Fill], Picture]


def finish(plan: Plan, i: int, crop: NDArray[np.uint8]) -> None:
    """Does the changes of row i of the plan to its crop, uint8 (size, size, 3), in place."""
    changes = plan.changes
    if changes is None:
        return
    done = changes.ops[i] >= 0
    if done.any():
        picture = Image.fromarray(crop)
        fill = [round(255 * mean) for mean in changes.normalize.mean]
        for op, level in zip(changes.ops[i][done], changes.levels[i][done].tolist(), strict=True):
            picture = DO[OPS[op]](picture, level, fill)
        crop[:] = np.asarray(picture)
    top, left, height, width = changes.box[i].tolist()
    if height and width:
        drawn = noise(int(changes.noise[i]), (height, width), changes.normalize)
        crop[top : top + height, left : left + width] = drawn


def noise(key: int, shape: tuple[int, int], statistics: Normalize) -> NDArray[np.uint8]:
    """Random pixels (height, width, 3), a pure function of the key.

    They are standard normal where images are normalised, as timm's mode "pixel" draws them; being
    written into bytes, they are rounded and clipped to 0..255.
    """
    normal = np.random.Generator(np.random.Philox(key=key)).standard_normal((*shape, 3), np.float32)
    mean, std = (255 * np.array(v, np.float32) for v in (statistics.mean, statistics.std))
    return np.rint(normal * std + mean).clip(0, 255).astype(np.uint8)


def autocontrast(image: Picture, level: float, fill: Fill) -> Picture:
    return F.autocontrast(image)


def equalize(image: Picture, level: float, fill: Fill) -> Picture:
    return F.equalize(image)


def invert(image: Picture, level: float, fill: Fill) -> Picture:
    return F.invert(image)


def rotate(image: Picture, level: float, fill: Fill) -> Picture:
    """Counter-clockwise by 3 degrees a level."""
    return F.rotate(image, 3 * level, InterpolationMode.BICUBIC, fill=fill)


def posterize(image: Picture, level: float, fill: Fill) -> Picture:
    """Keeps 4 bits, and one less for each 2.5 levels; at level 10 the image is black."""
    bits = 4 - int(abs(level) / 10 * 4)
    kept = 256 - 2 ** (8 - bits)  # F.posterize fails for 0 bits
    return image.point([v & kept for v in range(256)] * 3)


def solarize(image: Picture, level: float, fill: Fill) -> Picture:
    return F.solarize(image, 256 - int(abs(level) / 10 * 256))


def solarize_add(image: Picture, level: float, fill: Fill) -> Picture:
    """Adds 11 a level to what is below 128."""
    add = int(abs(level) / 10 * 110)
    return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


def adjust(change: Callable[[Picture, float], Picture]) -> Op:
    """Blends with what the factor 0 leaves of the image, or away from it."""
    return lambda image, level, fill: change(image, max(0.1, 1 + 0.09 * level))


def shear(axis: int, image: Picture, level: float, fill: Fill) -> Picture:
    """The pixel at (x, y) is of (x + 0.03 level y, y); or with axis 1, x and y the other way."""
    angle = math.degrees(math.atan(0.03 * level))
    return affine(image, fill, shear=(0.0, angle) if axis else (angle, 0.0))


def translate(axis: int, image: Picture, level: float, fill: Fill) -> Picture:
    """The pixel at x is of x + 0.045 level times the side; with axis 1 that at y."""
    offset = -(level / 10 * 0.45) * image.size[axis]
    return affine(image, fill, translate=(0.0, offset) if axis else (offset, 0.0))


def affine(
    image: Picture,
    fill: Fill,
    *,
    translate: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Picture:
    """torchvision's, about the upper left corner as timm's."""
    mode = InterpolationMode.BICUBIC
    return F.affine(image, 0, translate, 1, shear, mode, fill=fill, center=[0, 0])


DO: dict[str, Op] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "saturation": adjust(F.adjust_saturation),
    "contrast": adjust(F.adjust_contrast),
    "brightness": adjust(F.adjust_brightness),
    "sharpness": adjust(F.adjust_sharpness),
    "shear_x": partial(shear, 0),
    "shear_y": partial(shear, 1),
    "translate_x": partial(translate, 0),
    "translate_y": partial(translate, 1),
}
