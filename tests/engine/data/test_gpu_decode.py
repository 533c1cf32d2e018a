"""Decoding for a GPU and on it: the same plan, batches on the device, in memory of their own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")  # the engine's, which the losses do without

from test_decode import (  # noqa: F401 - fixtures
    GPU,
    IMAGES,
    builds,
    fresh,
    loaded,
    made,
    needs_dali,
    photos,
    same,
    section,
)

from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.loaders.ondevice import Normalise
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.recipe.schema import IMAGENET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    needs_dali,
]
ON_GPU = ["hybrid", "gpu"]
# Mean difference to the graph's result on the CPU, levels. hybrid: the same arithmetic on the same
# pixels, in another order; gpu: nvJPEG's inverse transform and colours, a level or two a pixel.
MEAN = {"hybrid": 0.05, "gpu": 2.0}


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("mode", ON_GPU)
def test_a_gpu_does_the_same_plan(photos, builds, mode, pads):  # noqa: F811
    window = {"augment": "pad_crop", "size": 320, "padding": 24, "eval_resize": None}
    data = section(photos, decode=mode, **(window if pads else {}))
    manifest = open_source(data, "train")
    loader = loaded(data, device=GPU)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        for batch in batches:
            assert batch.images.is_cuda and batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.to(GPU) is batch.images
        plan = sampler.plan(data, manifest.sizes, 7, epoch, np.arange(IMAGES))
        assert torch.cat([batch.index for batch in batches]).tolist() == plan.index.tolist()
        images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
        found = images.cpu().numpy().astype(np.int64)
        want = made(manifest, plan, data.size, pads=pads)
        far = np.abs(found - want)
        assert far.mean(axis=(1, 2, 3)).max() <= MEAN[mode]
        if mode == "hybrid":
            assert far.max() <= (0 if pads else 1)
        assert np.abs(found - want[:, :, ::-1]).mean() > 5  # a flip is not within it
    assert builds.count(loader) == 1
    loader.close()


@pytest.mark.parametrize("mode", ON_GPU)
@pytest.mark.parametrize("train", [True, False])
def test_an_epoch_can_start_anywhere(photos, mode, train):  # noqa: F811
    data = section(photos, decode=mode, prefetch=3)
    whole = fresh(data, 2, train=train, device=GPU)
    for start in (1, 2):
        assert same(fresh(data, 2, start, train=train, device=GPU), whole[start:])


@pytest.mark.parametrize("mode", ON_GPU)
def test_batches_are_not_written_to_while_the_gpu_reads_them(photos, mode):  # noqa: F811
    """Work is queued on the GPU in front of each reading, while DALI fills its memory anew."""
    data = section(photos, decode=mode, prefetch=1)
    want = [batch.images for batch in fresh(data, 0, device=GPU)]
    loader = loaded(data, device=GPU)
    normalise = Normalise(IMAGENET, channels_last=True).to(GPU)
    busy = torch.randn(4096, 4096, device=GPU)
    read = []
    for batch in loader.epoch(0):
        for _ in range(20):
            busy = busy @ busy / 64
        read.append(normalise(batch.images))
        del batch  # its memory may be used anew, once it was read
    list(loader.epoch(1))
    loader.close()
    for images, floats in zip(want, read, strict=True):
        assert torch.equal(normalise(images), floats)


@pytest.mark.parametrize("mode", ON_GPU)
def test_a_bad_file_is_named_and_replaced(tmp_path, photos, mode):  # noqa: F811
    root = tmp_path / "copy"
    shutil.copytree(photos, root, symlinks=True)
    data = section(root, decode=mode)
    path = Path(open_source(data, "train").content.paths[5])
    loader = loaded(data, device=GPU)
    path.write_bytes(b"<html>".ljust(path.stat().st_size))
    with pytest.warns(UserWarning, match="unreadable image"):
        index = torch.cat([batch.index for batch in loader.epoch(2)])
    assert list(loader.quarantine.bad) == [5] and 5 not in index.tolist()
    loader.close()
