"""Resized crops on a GPU: the CPU's bytes, and no wait for the device."""

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")  # the engine's, which the losses do without

from kdfuse.engine.data.loaders.resize import resized_crop
from kdfuse.engine.data.plan import plan
from kdfuse.engine.recipe.data import Data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_same_bytes_without_a_wait():
    images = torch.randint(0, 256, (50, 40, 57, 3), dtype=torch.uint8)
    data = Data(source="synthetic", classes=2, size=32, eval_resize=None)
    crops = plan(data, np.full((50, 2), (40, 57), np.int32), 3, 1, np.arange(50))
    held = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = resized_crop(held, crops, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.is_cuda and torch.equal(made.cpu(), resized_crop(images, crops, 32))
