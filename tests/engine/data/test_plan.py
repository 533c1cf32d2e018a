"""The plan: a pure function of (seed, epoch, position) that follows torchvision's algorithms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.contents import Pixels
from kdfuse.engine.data.manifest import Manifest
from kdfuse.engine.data.schedule import plan_digest
from kdfuse.engine.recipe.data import Data

SIZES = np.stack([np.arange(40, 140), np.arange(160, 60, -1)], axis=1).astype(np.int32)  # (100, 2)
PINNED_ORDER = [2, 0, 5, 11, 7, 3, 6, 4, 1, 8, 9, 10]
PINNED_BOXES = [[23, 34, 34, 33], [0, 80, 42, 52], [21, 78, 34, 29]]
PINNED_FLIPS = [False, False, True]


def data(**changes):
    return Data(source="folder", root="unused", **({"size": 32} | changes))


def chi_square(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def assert_uniform(counts):
    """Within five standard deviations of what uniform draws give."""
    freedom = counts.size - 1
    assert abs(chi_square(counts) - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1, 2, 97, 1_281_167])
def test_permutation_holds_every_row_once(n):
    order = sampler.permutation(3, 7, n)
    assert order.dtype == np.int64
    assert (np.bincount(order, minlength=n) == 1).all()


def test_order_depends_on_seed_and_epoch():
    orders = [sampler.permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # about one agreement is expected by chance


def test_draws_are_pinned():
    """A change here breaks the resume of every run that stands on disk."""
    assert sampler.permutation(0, 0, 12).tolist() == PINNED_ORDER
    plan = sampler.plan(data(), SIZES, 5, 2, np.arange(3))
    assert plan.box.tolist() == PINNED_BOXES
    assert plan.flip.tolist() == PINNED_FLIPS


def test_plan_of_a_part_is_the_part_of_the_plan():
    whole = sampler.plan(data(), SIZES, 1, 4, np.arange(100))
    part = sampler.plan(data(), SIZES, 1, 4, np.array([70, 3, 71]))
    for field in ("index", "box", "flip", "scaled", "window"):
        assert (getattr(part, field) == getattr(whole, field)[[70, 3, 71]]).all()


def test_augmentation_depends_on_seed_epoch_and_position():
    plans = [
        sampler.plan(data(), np.full((500, 2), 100, np.int32), seed, epoch, np.arange(500))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for i, one in enumerate(plans):
        assert len(np.unique(one.box, axis=0)) > 480
        for other in plans[:i]:
            assert (one.box == other.box).all(axis=1).sum() < 5


def test_draws_are_uniform_and_unrelated():
    u = sampler.uniforms(sampler.key(9, 9), np.arange(2**17))
    assert u.min() >= 0 and u.max() < 1
    assert_uniform(np.bincount((u * 64).astype(int), minlength=64))
    pairs = (u[0::2] * 16).astype(int) * 16 + (u[1::2] * 16).astype(int)
    assert_uniform(np.bincount(pairs, minlength=256))
    fresh = [sampler.uniforms(sampler.key(9, i), np.zeros(1, int))[0] for i in range(4096)]
    assert_uniform(np.bincount((np.array(fresh) * 16).astype(int), minlength=16))


def test_each_row_comes_to_each_place_equally_often():
    orders = np.stack([sampler.permutation(0, epoch, 16) for epoch in range(8192)])
    for place in (0, 7, 15):
        assert_uniform(np.bincount(orders[:, place], minlength=16))


def test_flips_are_half_and_can_be_switched_off():
    sizes = np.full((20000, 2), 50, np.int32)
    flips = sampler.plan(data(), sizes, 0, 0, np.arange(20000)).flip
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(20000)
    assert not sampler.plan(data(flip=False), sizes, 0, 0, np.arange(20000)).flip.any()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (9, 13)])
def test_random_resized_crop_has_torchvisions_distribution(height, width):
    n = 20000
    plan = sampler.plan(data(), np.full((n, 2), (height, width), np.int32), 0, 0, np.arange(n))
    top, left, h, w = plan.box.astype(float).T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    share = h * w / (height * width)
    slack = (h + w + 1) / (2 * height * width)  # both sides were rounded
    assert (share > 0.08 - slack).all() and (share < 1 + slack).all()
    # Both sides were rounded by at most half a pixel; the fall-back obeys the limits too.
    assert (w + 0.5 >= 0.75 * (h - 0.5)).all() and (h + 0.5 >= 0.75 * (w - 0.5)).all()

    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(32)
    image = torch.empty(3, height, width)
    made = [theirs.make_params([image]) for _ in range(3000)]
    want = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in made], float)
    for mine, other in (
        (share, want[:, 2] * want[:, 3] / (height * width)),
        (np.log(w / h), np.log(want[:, 3] / want[:, 2])),
        (top / height, want[:, 0] / height),
        (left / width, want[:, 1] / width),
    ):
        error = np.sqrt(mine.var() / n + other.var() / len(other))
        assert abs(mine.mean() - other.mean()) < 4.5 * error
        assert abs(mine.std() / other.std() - 1) < 0.06


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (3, 100), (101, 3), (1, 1), (7, 200)])
def test_fall_back_of_extreme_shapes_is_torchvisions(size):
    """No box of area 8 % fits here (or only the whole image), so both take the fixed box."""
    params = v2.RandomResizedCrop(32).make_params([torch.empty(3, *size)])
    plan = sampler.plan(data(), np.array([size] * 50, np.int32), 0, 0, np.arange(50))
    want = [params["top"], params["left"], params["height"], params["width"]]
    assert plan.box.tolist() == [want] * 50


def test_fall_back_of_a_full_area_is_the_whole_image():
    sizes = np.full((200, 2), 100, np.int32)
    boxes = sampler.plan(data(scale=(1.0, 1.0), ratio=(1.2, 1.3)), sizes, 0, 0, np.arange(200)).box
    assert (boxes == [8, 0, 83, 100]).all()  # 100 / 1.2 rows: torchvision's rule for a narrow image
    boxes = sampler.plan(data(scale=(1.0, 1.0), ratio=(0.8, 1.3)), sizes, 0, 0, np.arange(200)).box
    assert ((boxes == [0, 0, 100, 100]).all(axis=1)).mean() > 0.8


def test_pad_crop_reaches_each_offset_equally():
    n = 81 * 200
    plan = sampler.plan(data(augment="pad_crop"), np.full((n, 2), 32, np.int32), 0, 0, np.arange(n))
    assert (plan.box[:, 2:] == 32).all()
    top, left = plan.box[:, 0] + 4, plan.box[:, 1] + 4
    assert top.min() == left.min() == 0 and top.max() == left.max() == 8
    assert_uniform(np.bincount(top * 9 + left, minlength=81))


def test_pad_crop_of_larger_images_stays_within_the_padding():
    n = 5000
    sizes = np.full((n, 2), (40, 35), np.int32)
    box = sampler.plan(data(augment="pad_crop", padding=2), sizes, 0, 0, np.arange(n)).box
    assert (box.min(axis=0)[:2] == -2).all()
    assert (box.max(axis=0)[:2] == (40 + 2 - 32, 35 + 2 - 32)).all()


def test_evaluation_follows_torchvisions_rounding():
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 700, (300, 2)).astype(np.int32)
    plan = sampler.eval_plan(data(size=45, eval_resize=64), sizes, np.arange(300))
    assert not plan.flip.any()
    assert (plan.box == np.concatenate([np.zeros_like(sizes), sizes], axis=1)).all()
    resize = v2.Resize(64)
    for (height, width), scaled, window in zip(sizes, plan.scaled, plan.window, strict=True):
        image = torch.empty(1, height, width, device="meta")
        assert tuple(scaled) == resize(image).shape[-2:]
        assert window.tolist() == [round((int(side) - 45) / 2) for side in scaled]


def test_no_augmentation_is_the_evaluation_view_with_flips():
    options = data(augment="none", eval_resize=None)
    plan = sampler.plan(options, SIZES, 0, 0, np.arange(100))
    fixed = sampler.eval_plan(options, SIZES, plan.index)
    assert (plan.box == fixed.box).all() and (plan.scaled == 32).all() and not plan.window.any()
    assert 20 < plan.flip.sum() < 80


def test_the_plan_digest_is_that_of_the_batches():
    sizes = np.full((60, 2), 40, np.int32)
    target = np.arange(60) % 3
    images = Manifest(
        content=Pixels("made", np.zeros((60, 40, 40, 3), np.uint8)),
        target=target,
        sizes=sizes,
        classes=["a", "b", "c"],
        digest="",
        bad={},
    )
    found = plan_digest(images, data(), 16, 1)
    assert found == plan_digest(images, data(), 16, 1)
    for other in (
        plan_digest(images, data(), 16, 2),
        plan_digest(images, data(flip=False), 16, 1),
        plan_digest(images, data(repeats=2), 16, 1),
        plan_digest(images, data(erase=0.5), 16, 1),
        plan_digest(replace(images, sizes=sizes + 1), data(), 16, 1),
        plan_digest(replace(images, target=target[::-1].copy()), data(), 16, 1),
    ):
        assert other != found
