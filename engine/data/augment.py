"""What is drawn for training images beside crop and flip: RandAugment's ops, and a box to erase.

Each draw is a hash of (seed, epoch, position), as those of the plan; loaders/finish.py does it all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..recipe.data import Data, RandAugment
from .plan import ERASE, RANDAUGMENT, Changes, Floats, Ints, key, uniforms

# RandAugment (Cubuk et al., NeurIPS 2020, "RandAugment") with the ops and ranges of timm's
# "rand-...-inc1" (timm/data/auto_augment.py, _RAND_INCREASING_TRANSFORMS), which DeiT trains with:
# all grow with the strength. A strength of 10 is: rotate 30 degrees; posterize to 0 bits; solarize
# from 0, solarize_add 110; the four factors 1 +- 0.9; shear 0.3; translate 0.45 of the side. The
# place of a name is drawn.
OPS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "saturation",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
OP_DRAWS = 5  # which, whether, strength (2), direction

TRIES = 10  # of a box to erase, before the image is left as it is
BOX_DRAWS = 2 * TRIES + 4  # areas, ratios, whether, top, left, key of the noise
AREA, RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # share of the image; height / width


def changes(data: Data, seed: int, epoch: int, positions: Ints) -> Changes | None:
    """What is done to the crops at these positions (B,) of an epoch; None where nothing ever is."""
    if not data.after_crop:
        return None
    if data.randaugment is None:
        ops, levels = np.empty((len(positions), 0), np.int64), np.empty((len(positions), 0))
    else:
        ops, levels = _ops(data.randaugment, key(seed, epoch, RANDAUGMENT), positions)
    box, noise = _boxes(data, key(seed, epoch, ERASE), positions)
    return Changes(ops, levels, box, noise, data.normalize)


def _ops(options: RandAugment, stream: int, positions: Ints) -> tuple[Ints, Floats]:
    """Ops and their strengths, (B, K) each. As in timm, each op is drawn of all, and done with
    probability 1/2 at a strength of its own, normal about the magnitude and clipped to 0..10.
    """
    number = positions[:, None] * options.ops + np.arange(options.ops)  # (B, K)
    u = uniforms(stream, number[..., None] * OP_DRAWS + np.arange(OP_DRAWS))
    ops = np.where(u[..., 1] < 0.5, (u[..., 0] * len(OPS)).astype(np.int64), -1)
    normal = np.sqrt(-2 * np.log1p(-u[..., 2])) * np.cos(2 * np.pi * u[..., 3])  # Box-Muller
    level = np.clip(options.magnitude + options.std * normal, 0, 10)
    return ops, np.where(u[..., 4] < 0.5, -level, level)


def _boxes(
    data: Data, stream: int, positions: Ints
) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """Boxes (B, 4) and the keys of their noise (B,).

    Random erasing (Zhong et al., AAAI 2020, "Random Erasing Data Augmentation") with timm's ten
    tries at a box of uniform area and log-uniform ratio that is smaller than the image.
    """
    u = uniforms(stream, positions[:, None] * BOX_DRAWS + np.arange(BOX_DRAWS))
    whether, top, left, noise = u[:, 2 * TRIES :].T
    size, (small, large), (wide, tall) = data.size, AREA, np.log(RATIO)
    area = size**2 * (small + (large - small) * u[:, :TRIES])
    ratio = np.exp(wide + (tall - wide) * u[:, TRIES : 2 * TRIES])
    sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio]))).astype(np.int64)
    fits = (sides < size).all(axis=0)  # (B, TRIES)
    first = fits.argmax(axis=1)[:, None]
    height, width = np.take_along_axis(sides, first[None], axis=2)[..., 0]
    corner = np.stack([top * (size - height + 1), left * (size - width + 1)]).astype(np.int64)
    box = np.stack([*corner, height, width], axis=1).astype(np.int32)
    box[~(fits.any(axis=1) & (whether < data.erase))] = 0
    return box, (noise * 2.0**53).astype(np.uint64)
