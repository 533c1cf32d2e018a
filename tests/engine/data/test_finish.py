"""What is done to a crop: each op against its formula written in numpy, noise against its law."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.augment import OPS
from kdfuse.engine.data.loaders.finish import DO, finish, noise
from kdfuse.engine.data.plan import Changes
from kdfuse.engine.recipe.data import Data
from kdfuse.engine.recipe.schema import IMAGENET, Normalize

# Pillow's cubic d -> 2 d - 3 d^2 + 2 d^3 is off a ramp of slope 1 by so much at most; it truncates.
OFF = 0.097
FILL = [124, 116, 104]  # 255 times the mean of IMAGENET, rounded


def grain(side=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def done(name, image, level):
    out = np.asarray(DO[name](Image.fromarray(image), level, FILL))
    assert out.dtype == np.uint8 and out.shape == image.shape
    return out.astype(int)


def close(one, other, most=1.0):
    return np.abs(np.asarray(one, float) - other).max() <= most + 1e-6


def test_every_op_that_is_drawn_is_there():
    assert list(DO) == list(OPS)


@pytest.mark.parametrize("sign", [1, -1])
def test_ops_on_single_values(sign):
    x = grain().astype(int)
    image = x.astype(np.uint8)
    assert (done("invert", image, sign * 9.0) == 255 - x).all()
    for level, first in ((0.0, 256), (5.0, 128), (9.0, 26), (10.0, 0)):
        wanted = np.where(x < first, x, 255 - x)
        assert (done("solarize", image, sign * level) == wanted).all()
    for level, bits in ((0.0, 4), (2.4, 4), (2.5, 3), (5.0, 2), (9.0, 1), (10.0, 0)):
        step = 2 ** (8 - bits)
        assert (done("posterize", image, sign * level) == x // step * step).all()
    for level, more in ((0.0, 0), (5.0, 55), (9.0, 99), (10.0, 110)):
        wanted = np.where(x < 128, np.minimum(x + more, 255), x)
        assert (done("solarize_add", image, sign * level) == wanted).all()


LEVELS = [(9.0, 1.81), (10.0, 1.9), (4.0, 1.36), (0.0, 1.0), (-5.0, 0.55), (-10.0, 0.1)]


@pytest.mark.parametrize(("level", "factor"), LEVELS)
def test_factors(level, factor):
    image = grain()
    x = image.astype(float)
    grey = x @ [0.299, 0.587, 0.114]

    def blended(still):
        return np.clip(still + factor * (x - still), 0, 255)

    assert close(done("brightness", image, level), blended(0.0), 1)
    assert close(done("contrast", image, level), blended(np.full_like(x, round(grey.mean()))), 2)
    assert close(done("saturation", image, level), blended(np.round(grey)[..., None]), 2)
    soft = x.copy()
    near = sum(x[i : i + 18, j : j + 18] for i in range(3) for j in range(3))
    soft[1:-1, 1:-1] = np.round((near + 4 * x[1:-1, 1:-1]) / 13)
    assert close(done("sharpness", image, level), blended(soft), 2)


def test_autocontrast_stretches_each_channel():
    image = (grain() // 3 + np.array([10, 60, 100])).astype(np.uint8)
    low, high = image.min(axis=(0, 1)).astype(float), image.max(axis=(0, 1))
    out = done("autocontrast", image, 9.0)
    assert close(out, 255 * (image - low) / (high - low))
    assert (out.min(axis=(0, 1)) == 0).all() and (out.max(axis=(0, 1)) >= 254).all()


def test_equalize_flattens_the_distribution():
    """A value goes to 255 times the share of pixels below it, in whole steps of a histogram."""
    image = (255 * (grain(64) / 255.0) ** 3).astype(np.uint8)
    out = done("equalize", image, 9.0)
    for channel in range(3):
        x = image[..., channel].ravel()
        step = (len(x) - (x == x.max()).sum()) // 255
        below = np.array([(x < value).sum() for value in x])
        wanted = np.minimum((below + step // 2) // step, 255)
        assert (out[..., channel].ravel() == wanted).all()


@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
def test_translation_and_its_direction(name):
    """Level 10 of 20 pixels is 9: content goes left or up, and fill comes in behind it."""
    turned = (1, 0, 2) if name == "translate_y" else (0, 1, 2)
    image = grain()
    ahead, back = (done(name, image, level).transpose(turned) for level in (10.0, -10.0))
    x = image.transpose(turned)
    assert (ahead[:, :11] == x[:, 9:]).all() and (ahead[:, 11:] == FILL).all()
    assert (back[:, 9:] == x[:, :11]).all() and (back[:, :9] == FILL).all()


@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
@pytest.mark.parametrize("level", [10.0, -10.0, 4.0])
def test_shear_and_its_direction(name, level):
    """A ramp moves with the distance from the upper left corner: f(x + 0.03 level (y + 1/2))."""
    turned = (1, 0, 2) if name == "shear_y" else (0, 1, 2)
    y, x = np.mgrid[0:20, 0:20].astype(float)
    image = np.repeat((12 * x)[..., None], 3, axis=2).astype(np.uint8)
    out = done(name, image.transpose(turned), level).transpose(turned)
    source = x + 0.03 * level * (y + 0.5)
    inside = (source > 1) & (source < 17)  # all four that bicubic reads are there
    assert inside.sum() > 200
    assert close(out[inside], np.repeat(12 * source[inside][:, None], 3, axis=1), 1 + 12 * OFF)
    outside = (source < -1) | (source > 20)
    assert outside.any() or level == 4
    assert (out[outside] == FILL).all()


@pytest.mark.parametrize("level", [10.0, -10.0, 3.0])
def test_rotation_and_its_direction(level):
    """Counter-clockwise by 3 degrees a level about the centre, for a viewer whose y goes down."""
    y, x = np.mgrid[0:24, 0:24] - 11.5
    image = np.repeat((128.5 + 4 * x + 3 * y)[..., None], 3, axis=2).astype(np.uint8)
    out = done("rotate", image, level)
    turn = math.radians(3 * level)
    from_x, from_y = (
        x * math.cos(turn) - y * math.sin(turn),
        x * math.sin(turn) + y * math.cos(turn),
    )
    wanted = 128.5 + 4 * from_x + 3 * from_y
    inside = np.hypot(x, y) < 9
    assert close(out[inside], np.repeat(wanted[inside][:, None], 3, axis=1), 1 + 7 * OFF)
    if abs(level) == 10:
        assert (out[[0, 0, -1, -1], [0, -1, 0, -1]] == FILL).all()


THEIRS = (
    "AutoContrast Equalize Invert Rotate PosterizeIncreasing SolarizeIncreasing SolarizeAdd "
    "ColorIncreasing ContrastIncreasing BrightnessIncreasing SharpnessIncreasing ShearX ShearY "
    "TranslateXRel TranslateYRel"
).split()


@pytest.mark.parametrize(("ours", "theirs"), [*zip(OPS, THEIRS, strict=True)])
def test_ops_and_ranges_are_timms(ours, theirs, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    assert THEIRS == timm._RAND_INCREASING_TRANSFORMS
    image = np.asarray(Image.fromarray(grain(8)).resize((48, 48), Image.Resampling.BICUBIC))
    strength = timm.LEVEL_TO_ARG[theirs]
    for level in (0.0, 0.3, 2.6, 5.17, 7.3, 9.0, 9.63):
        for sign in (1, -1):
            monkeypatch.setattr(timm, "_randomly_negate", lambda v, sign=sign: sign * v)
            options = strength(level, {}) if strength else ()
            how = {"fillcolor": tuple(FILL), "resample": Image.Resampling.BICUBIC}
            wanted = timm.NAME_TO_OP[theirs](Image.fromarray(image), *options, **how)
            assert close(done(ours, image, sign * level), np.asarray(wanted), 1)


def normal_below(bound):
    return (1 + math.erf(bound / math.sqrt(2))) / 2


@pytest.mark.parametrize(
    "statistics", [IMAGENET, Normalize(mean=(0.5, 0.1, 0.9), std=(0.5, 0.02, 0.3))]
)
def test_noise_has_the_law_of_normalised_noise_in_bytes(statistics):
    drawn = noise(77, (200, 300), statistics)
    assert drawn.shape == (200, 300, 3) and drawn.dtype == np.uint8
    n = 60000
    for channel in range(3):
        mean, std = 255 * statistics.mean[channel], 255 * statistics.std[channel]
        below = np.array([normal_below((k + 0.5 - mean) / std) for k in range(255)] + [1.0])
        share = np.diff(below, prepend=0.0)  # the ends hold what was clipped
        values, x = np.arange(256), drawn[..., channel].astype(float)
        wanted = (share * values).sum()
        spread = (share * (values - wanted) ** 2).sum()
        fourth = (share * (values - wanted) ** 4).sum()
        assert abs(x.mean() - wanted) < 5 * math.sqrt(spread / n)
        assert abs(x.var() - spread) < 5 * math.sqrt((fourth - spread**2) / n)
        for k in (0, 40, 128, 200, 254):
            counted, p = (x <= k).sum(), below[k]
            assert abs(counted - n * p) <= 5 * math.sqrt(n * p * (1 - p))
        assert abs(np.corrcoef(x[:, 1:].ravel(), x[:, :-1].ravel())[0, 1]) < 5 / math.sqrt(n)
        beside = drawn[..., (channel + 1) % 3].ravel()
        assert abs(np.corrcoef(x.ravel(), beside)[0, 1]) < 5 / math.sqrt(n)


def test_noise_is_a_function_of_its_key():
    assert (noise(5, (9, 7), IMAGENET) == noise(5, (9, 7), IMAGENET)).all()
    assert (noise(5, (9, 7), IMAGENET) == noise(6, (9, 7), IMAGENET)).mean() < 0.1


def planned(*rows):
    """A plan of rows (ops, levels, box, key); nothing but its changes is read."""
    ops, levels, box, keys = zip(*rows, strict=True)
    changes = Changes(
        np.array(ops),
        np.array(levels),
        np.array(box, np.int32),
        np.array(keys, np.uint64),
        IMAGENET,
    )
    data = Data(source="folder", root="unused", size=20)
    sizes = np.full((len(rows), 2), 50, np.int32)
    plan = sampler.eval_plan(data, sizes, np.arange(len(rows)))
    return replace(plan, changes=changes)


def finished(plan, i, image):
    out = image.copy()
    finish(plan, i, out)
    return out


def test_ops_are_done_in_turn_and_the_box_is_erased_last():
    solarize, invert, shear = (OPS.index(name) for name in ("solarize", "invert", "shear_x"))
    plan = planned(
        ([invert, solarize], [3.0, 6.0], [0, 0, 0, 0], 1),
        ([solarize, invert], [6.0, 3.0], [2, 3, 8, 5], 9),
        ([-1, shear], [1.0, -9.0], [0, 0, 0, 0], 1),
        ([-1, -1], [1.0, 1.0], [0, 0, 0, 0], 1),
    )
    image = grain()
    x = image.astype(int)
    first = 256 - int(0.6 * 256)
    inverted = 255 - x
    assert (finished(plan, 0, image) == np.where(inverted < first, inverted, x)).all()
    turned = 255 - np.where(x < first, x, 255 - x)
    turned[2:10, 3:8] = noise(9, (8, 5), IMAGENET)
    assert (finished(plan, 1, image) == turned).all()
    assert (finished(plan, 2, image) == done("shear_x", image, -9.0)).all()
    assert (finished(plan, 3, image) == image).all()
    assert (finished(replace(plan, changes=None), 1, image) == image).all()
