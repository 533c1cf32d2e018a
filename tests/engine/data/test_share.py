"""How a step's images go round processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdfuse.engine.data.contents import Pixels
from kdfuse.engine.data.manifest import Manifest
from kdfuse.engine.data.schedule import Schedule, share
from kdfuse.engine.recipe.data import Data


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 50))
def test_every_image_goes_to_one_process_and_all_have_almost_as_many(unit, world, more):
    batch = unit * (world + more)
    parts = [share(batch, rank, world, unit) for rank in range(world)]
    assert [place for part in parts for place in part] == list(range(batch))
    counts = {len(part) for part in parts}
    assert max(counts) - min(counts) <= unit and all(n % unit == 0 for n in counts)


@pytest.mark.parametrize(("batch", "world", "unit"), [(2, 3, 1), (9, 2, 2), (4, 3, 2)])
def test_what_does_not_go_round_is_refused(batch, world, unit):
    with pytest.raises(ValueError, match=f"{batch} images do not go round .* of {unit * world}"):
        share(batch, 0, world, unit)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_has_the_batches_of_one(world, train):
    sizes = np.full((40, 2), 50, np.int32)
    unread = Pixels("nothing", np.empty((0, 50, 50, 3), np.uint8))
    images = Manifest(unread, np.zeros(40, np.int64), sizes, ["one"], "")
    data = Data(source="folder", root="unused", size=32)

    def schedule(part=None):
        return Schedule(images, data, 16, seed=3, train=train, part=part)

    whole, parts = schedule(), [schedule(share(16, rank, world)) for rank in range(world)]
    assert {made.steps for made in parts} == {whole.steps}
    for step in range(whole.steps):
        one, tasks = whole.task(2, step), [made.task(2, step) for made in parts]
        assert sum(task.valid for task in tasks) == one.valid
        for name in ("index", "box", "flip"):
            found = np.concatenate([getattr(task.plan, name) for task in tasks])
            assert (found[: one.valid] == getattr(one.plan, name)[: one.valid]).all()
