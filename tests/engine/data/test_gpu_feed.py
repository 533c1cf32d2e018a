"""Batches that are copied while a step runs are whole when the next step reads them."""

import pytest
import torch

pytest.importorskip("pydantic")  # the engine's, which the losses do without

from kdfuse.engine.data.batch import Batch
from kdfuse.engine.data.loaders.feed import on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_copies_under_a_busy_device_are_whole():
    device, count = torch.device("cuda"), 12

    def batches():
        for number in range(count):
            images = torch.full((64, 3, 224, 224), number, dtype=torch.uint8, pin_memory=True)
            yield Batch(images, torch.full((64,), number), torch.arange(64), 64)

    busy = torch.randn(4096, 4096, device=device)
    seen = []
    for batch in on_device(batches(), device):
        assert batch.images.is_cuda and batch.target.is_cuda and batch.index.is_cuda
        for _ in range(8):  # the device is behind when the next copies are asked for
            busy = (busy @ busy).clamp_(-1, 1)
        seen.append((batch.images.amin(), batch.images.amax(), batch.target.amax()))
        del batch
    found = [[part.item() for part in parts] for parts in seen]
    assert found == [[number] * 3 for number in range(count)]
