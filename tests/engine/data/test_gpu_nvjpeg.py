"""torchvision's decoding on a GPU: the CPU's batches within what two decoders differ in, on the
device, in memory of their own."""

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")  # the engine's, which the losses do without

from test_decode import fresh, loaded, photos, same, section  # noqa: F401 - fixtures
from test_loaders import damage_later, few, folder, save_kinds  # noqa: F401

from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.loaders.ondevice import Normalise
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.recipe.schema import IMAGENET

GPU = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ON_GPU = {"loader": "torchvision", "decode": "gpu"}
ON_CPU = {"loader": "torchvision", "decode": "cpu"}
WAYS = ((ON_GPU, "cuda:0"), (ON_CPU, "cpu"))
# Mean difference of an image to PIL's, levels. torchvision has nvJPEG repeat colours of half the
# size, which PIL interpolates: that alone makes 1.4 of a whole photograph of these.
MEAN = 3.0
VIEWS = [
    {},
    {"augment": "none"},
    {"augment": "pad_crop", "size": 320, "padding": 24, "eval_resize": None},
]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_a_gpu_does_the_same_plan(photos, view, train):  # noqa: F811
    ours = fresh(section(photos, **ON_GPU, **view), 1, train=train, device=GPU)
    pils = fresh(section(photos, **ON_CPU, **view), 1, train=train)
    for batch, want in zip(ours, pils, strict=True):
        assert batch.images.is_cuda and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.index, want.index) and batch.valid == want.valid
        found, pixels = batch.images.cpu().int(), want.images.int()
        assert (found - pixels).abs().float().mean(dim=(1, 2, 3)).max() <= MEAN
        assert (found - pixels.flip(3)).abs().float().mean() > 5  # a flip is not within it
        black = pixels.amax(dim=(1, 3)) == 0  # rows of a padded image, beyond its border
        assert not found.amax(dim=(1, 3))[black].any()


def test_files_of_every_kind_are_there(tmp_path):
    """Progressive, grey and of all sampling by the device; CMYK, PNG and WebP by PIL, exactly."""
    for split in ("train", "val"):
        save_kinds(tmp_path / split / "one", np.random.default_rng(0))
    images = []
    for how, device in WAYS:
        data = folder(tmp_path, size=96, eval_resize=120, **how)
        batches = fresh(data, 0, train=False, device=torch.device(device))
        images.append(torch.cat([batch.images.cpu() for batch in batches]))
    found, pixels = images
    far = (found.int() - pixels.int()).abs().float().mean(dim=(1, 2, 3))
    assert far.max() <= 2 * MEAN  # their colours are less smooth than a photograph's
    assert far[[7, 9, 10, 11]].max() == 0


@pytest.mark.parametrize("train", [True, False])
def test_an_epoch_can_start_anywhere(photos, train):  # noqa: F811
    data = section(photos, **ON_GPU, prefetch=3)
    whole = fresh(data, 2, train=train, device=GPU)
    for start in (1, 2):
        assert same(fresh(data, 2, start, train=train, device=GPU), whole[start:])


def test_batches_are_not_written_to_while_the_gpu_reads_them(photos):  # noqa: F811
    """Work is queued on the GPU in front of each reading, while later batches are decoded."""
    data = section(photos, **ON_GPU, prefetch=1)
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


def test_bad_files_have_the_reasons_of_the_cpu(few):  # noqa: F811
    """Cut, replaced, empty and missing since they were indexed."""
    manifest = open_source(folder(few), "train")
    rows = damage_later(few, manifest).keys()
    reasons, shown = [], []
    for how, device in WAYS:
        loader = make_loader(
            manifest, folder(few, **how), 4, seed=7, train=True, device=torch.device(device)
        )
        with pytest.warns(UserWarning, match="unreadable image"):
            shown.append([batch.index.tolist() for batch in loader.epoch(0)])
        loader.close()
        reasons.append(loader.quarantine.bad)
    assert reasons[0] == reasons[1] and reasons[0].keys() == rows
    assert shown[0] == shown[1]


def test_evaluation_after_training_shares_the_decoder(photos):  # noqa: F811
    """Two loaders at once, as a run has them: torchvision has one decoder for a process."""
    data = section(photos, **ON_GPU)
    want = [fresh(data, 0, train=train, device=GPU) for train in (True, False)]
    train, val = loaded(data, device=GPU), loaded(data, train=False, device=GPU)
    begun = train.epoch(0)
    first = next(begun)
    assert same(val.epoch(0), want[1])
    assert same([first, *begun], want[0])
    train.close()
    val.close()
