"""What is drawn for crops: RandAugment's ops and boxes to erase follow their laws and the position;
repeated augmentation is one order for any number of processes."""

import math

import numpy as np
import pytest

from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.augment import OPS, changes
from kdfuse.engine.data.contents import Pixels
from kdfuse.engine.data.manifest import Manifest
from kdfuse.engine.data.schedule import Schedule, share
from kdfuse.engine.recipe.data import Data

N = 20000
PINNED_OPS = [[9, -1], [3, 13], [-1, 4]]
PINNED_LEVELS = [[5.086, 5.439], [-5.174, -5.488], [5.338, -4.897]]
PINNED_BOXES = [[51, 47, 107, 142], [60, 90, 34, 103], [62, 122, 160, 100]]
PINNED_KEYS = [8964118344117670, 5033449368480863, 5590795498795036]
ALL = {"randaugment": {}, "erase": 0.25}


def data(**changes):
    return Data(source="folder", root="unused", **({"size": 224} | changes))


def drawn(positions, seed=0, epoch=0, **settings):
    return changes(data(**settings), seed, epoch, np.asarray(positions))


def fields(found):
    return found.ops, found.levels, found.box, found.noise


def test_a_part_has_the_draws_of_the_whole_and_others_have_their_own():
    whole = drawn(np.arange(4000), 1, 4, **ALL)
    for one, other in zip(fields(drawn([3000, 3, 3001], 1, 4, **ALL)), fields(whole), strict=True):
        assert (one == other[[3000, 3, 3001]]).all()
    for seed, epoch in ((2, 4), (1, 5)):
        other = drawn(np.arange(4000), seed, epoch, **ALL)
        assert (whole.levels == other.levels).mean() < 0.03  # but for those clipped to 10
        assert not (whole.noise == other.noise).any()
        assert (whole.box == other.box).all(axis=1).mean() < 0.65  # both none: 0.75 ** 2
    assert len(np.unique(whole.noise)) == 4000


def test_one_setting_does_not_move_the_draws_of_another():
    both = drawn(np.arange(500), **ALL)
    assert (drawn(np.arange(500), randaugment={}).ops == both.ops).all()
    assert not drawn(np.arange(500), randaugment={}).box.any()
    alone = drawn(np.arange(500), erase=0.25)
    assert (alone.box == both.box).all() and alone.ops.shape == (500, 0)
    assert drawn(np.arange(500)) is None


def test_draws_are_pinned():
    """A change here breaks the resume of every run that stands on disk."""
    found = drawn([3, 6, 2**40], 5, 2, randaugment={"magnitude": 5}, erase=1.0)
    assert found.ops.tolist() == PINNED_OPS
    np.testing.assert_allclose(found.levels, PINNED_LEVELS, atol=1e-3)
    assert found.box.tolist() == PINNED_BOXES
    assert found.noise.tolist() == PINNED_KEYS


def within(count, n, share):
    """A count of n draws, within five standard deviations of its share."""
    return abs(count - n * share) <= 5 * math.sqrt(n * share * (1 - share))


def test_ops_are_drawn_evenly_and_half_of_them_done():
    found = drawn(np.arange(N), randaugment={"ops": 3})
    assert found.ops.shape == found.levels.shape == (N, 3)
    done = found.ops >= 0
    for column in range(3):
        assert within(done[:, column].sum(), N, 1 / 2)
        counts = np.bincount(found.ops[done[:, column], column], minlength=15)
        assert len(counts) == len(OPS) == 15
        assert all(within(count, N / 2, 1 / 15) for count in counts)
    assert within((done[:, 0] & done[:, 1]).sum(), N, 1 / 4)
    both = found.ops[done[:, 0] & done[:, 2]]
    assert within((both[:, 0] == both[:, 2]).sum(), len(both), 1 / 15)  # with replacement


@pytest.mark.parametrize(("magnitude", "std"), [(9, 0.5), (1, 2.0), (5, 0)])
def test_strengths_are_normal_and_clipped(magnitude, std):
    levels = drawn(np.arange(N), randaugment={"magnitude": magnitude, "std": std}).levels.ravel()
    assert within(np.signbit(levels).sum(), 2 * N, 1 / 2)
    strength = np.abs(levels)
    assert strength.max() <= 10
    if std == 0:
        assert (strength == magnitude).all()
        return
    for bound in (0, 0.5, 1, 3, 8, 8.5, 9, 9.25, 9.999):
        below = (1 + math.erf((bound - magnitude) / std / math.sqrt(2))) / 2
        assert within((strength <= bound).sum(), 2 * N, below)
    one, two = np.abs(drawn(np.arange(N), randaugment={}).levels).T
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(N)


def law_of_boxes(size, n):
    """Height, width and whether there is a box, by a loop over a generator: (n, 2), (n,)."""
    rng = np.random.default_rng(0)
    sides, found = np.zeros((n, 2)), np.zeros(n, bool)
    for i in range(n):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * size * size
            ratio = math.exp(rng.uniform(math.log(3 / 10), math.log(10 / 3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < size and w < size:
                sides[i], found[i] = (h, w), True
                break
    return sides, found


def apart(one, other):
    """The largest difference of two empirical distribution functions, in its own scale."""
    grid = np.concatenate([one, other])
    shares = [np.searchsorted(np.sort(part), grid, "right") / len(part) for part in (one, other)]
    return np.abs(shares[0] - shares[1]).max() * math.sqrt(len(one) * len(other) / len(grid))


@pytest.mark.parametrize("size", [224, 32])
def test_boxes_have_the_law_of_random_erasing(size):
    top, left, height, width = drawn(np.arange(N), erase=1.0, size=size).box.T.astype(float)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size).all() and (left + width <= size).all()
    assert (height > 0).all() and height.max() < size and width.max() < size
    slack = (height + width + 1) / 2  # both sides were rounded
    assert (height * width > 0.02 * size**2 - slack).all()
    assert (height * width < size**2 / 3 + slack).all()
    wanted, found = law_of_boxes(size, N // 4)
    assert found.all()
    # 1.95: one of a thousand pairs of samples of one law is further apart; here both are fixed
    assert apart(height * width, wanted.prod(axis=1)) < 1.95
    assert apart(height / width, wanted[:, 0] / wanted[:, 1]) < 1.95
    for corner, side in ((top, height), (left, width)):
        share = (corner + 0.5) / (size - side + 1)  # of mean 1/2 whatever the box
        assert abs(share.mean() - 0.5) < 5 * math.sqrt(1 / 12 / N)
        assert (corner == 0).any() and (corner == size - side).any()


@pytest.mark.parametrize("erase", [0.25, 0.6])
def test_the_share_of_erased_crops_is_the_setting(erase):
    box = drawn(np.arange(N), erase=erase).box
    erased = box[:, 2:].all(axis=1)
    assert within(erased.sum(), N, erase) and not box[~erased].any()


def schedule(n, batch, *, rank=0, world=1, train=True, **settings):
    unread = Pixels("nothing", np.empty((0, 100, 100, 3), np.uint8))
    sizes = np.full((n, 2), 100, np.int32)
    manifest = Manifest(unread, np.zeros(n, np.int64), sizes, ["one"], "")
    part = share(batch, rank, world)
    return Schedule(manifest, data(**settings), batch, seed=3, train=train, part=part)


@pytest.mark.parametrize("batch", [4, 10, 12, 1024])
def test_without_repeats_places_are_positions(batch):
    positions = np.arange(5000)
    assert (sampler.places(positions, batch, 1) == positions).all()


@pytest.mark.parametrize(
    ("batch", "repeats", "wanted"),
    [
        (6, 2, [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]),
        (4, 3, [0, 1, 0, 1, 2, 3, 2, 3]),
        (8, 3, [0, 1, 2, 0, 1, 2, 0, 1, 3, 4, 5, 3, 4, 5, 3, 4]),
    ],
)
def test_places_by_hand(batch, repeats, wanted):
    assert sampler.places(np.arange(2 * batch), batch, repeats).tolist() == wanted


@pytest.mark.parametrize(("batch", "repeats"), [(24, 3), (16, 3), (24, 5), (8, 7)])
def test_repeats_are_one_order_for_any_number_of_processes(batch, repeats):
    settings = {"repeats": repeats, **ALL}
    alone = schedule(100, batch, **settings)
    order = sampler.permutation(3, 6, 100)
    images = math.ceil(batch / repeats)
    assert alone.steps == 100 // batch
    for step in range(alone.steps):
        whole = alone.task(6, step).plan
        own = order[step * images : (step + 1) * images]  # those of no other step
        counts = np.bincount(whole.index, minlength=100)
        assert set(np.flatnonzero(counts)) == set(own)
        assert counts.sum() == batch and counts.max() == -(-batch // images) <= repeats
        assert counts[own].min() >= batch // images
        pairs = whole.index.reshape(-1, 2)
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert (whole.index[1:] != whole.index[:-1]).all()
        for image in own:  # a crop of its own each time
            crops = whole.box[whole.index == image]
            assert len(np.unique(crops, axis=0)) == len(crops)
        for world in (2, 4):
            ranks = [
                schedule(100, batch, rank=rank, world=world, **settings).task(6, step).plan
                for rank in range(world)
            ]
            for name in ("index", "box", "flip"):
                parts = [getattr(plan, name) for plan in ranks]
                assert (np.concatenate(parts) == getattr(whole, name)).all()
            for name in ("ops", "levels", "box", "noise"):
                parts = [getattr(plan.changes, name) for plan in ranks]
                assert (np.concatenate(parts) == getattr(whole.changes, name)).all()


def test_epochs_show_other_images():
    made = schedule(100, 24, repeats=3)
    shown = [
        {int(row) for step in range(4) for row in made.task(epoch, step).plan.index}
        for epoch in range(30)
    ]
    assert {len(rows) for rows in shown} == {32} and set.union(*shown) == set(range(100))


def test_settings_of_augmentation_leave_crops_and_evaluation_alone():
    plain, more = schedule(50, 10), schedule(50, 10, **ALL)
    one, other = plain.task(2, 3).plan, more.task(2, 3).plan
    assert one.changes is None and other.changes is not None
    for name in ("index", "box", "flip", "scaled", "window"):
        assert (getattr(one, name) == getattr(other, name)).all()
    seen = schedule(50, 10, train=False, repeats=20, **ALL).task(0, 1).plan
    assert seen.index.tolist() == list(range(10, 20)) and seen.changes is None


@pytest.mark.parametrize(("batch", "world", "repeats"), [(3, 1, 3), (4, 2, 5), (2, 1, 2)])
def test_a_batch_of_one_image_is_refused(batch, world, repeats):
    wanted = f"data.repeats={repeats} would fill run.batch={batch} with crops of a single"
    with pytest.raises(ValueError, match=wanted):
        schedule(50, batch, world=world, repeats=repeats)
    schedule(50, batch, world=world, repeats=batch - 1)
    schedule(50, 1)  # nothing is repeated
