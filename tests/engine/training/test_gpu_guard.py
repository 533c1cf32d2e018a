"""A step that is not finite, on a GPU: what test_guard.py says of the CPU's kernels."""

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from on_gpu import MARKS
from test_guard import SETTINGS, Trained, recipe_of
from test_resume import assert_same

pytestmark = MARKS


@pytest.mark.parametrize("name", [*SETTINGS, "crd"])
def test_it_changes_nothing_and_waits_for_nothing(name):
    method, changes = SETTINGS.get(name, ("crd", {}))
    run = Trained(recipe_of(method, **changes), device="cuda")
    run.train(range(2), bad=[0])
    before = run.held()
    step = run.step

    def unwaiting(*batch):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run.step = unwaiting
    run.train([2, 3], bad=[2, 3])
    assert_same(run.held(), before)
    assert all(p.isfinite().all() for p in run.networks.parameters())
    assert run.state.meters.read()["skipped"] == 3
