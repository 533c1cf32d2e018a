"""Where images are decoded: the choice, DALI's graph of each mode, one pipeline for all epochs."""

import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfuse.engine.bench.data.photos import write_photos
from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.loaders import dali as dali_loader
from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.loaders.dali_feed import inputs
from kdfuse.engine.data.loaders.dali_graph import (
    DEVICES,
    Devices,
    graph,
    import_dali,
    mixed_options,
)
from kdfuse.engine.data.loaders.decoding import decoding
from kdfuse.engine.data.quarantine import BadImagesError
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.recipe.data import DECODED_BY, Data

pytestmark = pytest.mark.slow(10)

needs_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs NVIDIA DALI")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IMAGES, BATCH = 12, 4
PARTS = ("images", "target", "index")
ON_CPU = Devices("cpu", "cpu")  # the whole graph, where there is no GPU


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve photographs as JPEGs of many sizes, about 110 kB each."""
    root = tmp_path_factory.mktemp("decode") / "photos"
    write_photos(root, IMAGES)
    return root


def section(root, **changes):
    return Data(source="folder", root=root, **({"size": 64, "eval_resize": 72} | changes))


def loaded(data, train=True, **changes):
    manifest = open_source(data, "train" if train else "val")
    return make_loader(manifest, data, BATCH, seed=7, train=train, **changes)


def fresh(data, epoch, start=0, **changes):
    """The batches of an epoch by a loader that does nothing else."""
    loader = loaded(data, **changes)
    batches = list(loader.epoch(epoch, start))
    loader.close()
    return batches


def same(one, other):
    """Whether the batches are equal, all parts, and as many."""
    return all(
        a.valid == b.valid and all(torch.equal(getattr(a, k), getattr(b, k)) for k in PARTS)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def builds(monkeypatch):
    """The loader that each new pipeline was made for."""
    made_for, build = [], dali_loader.DaliLoader._pipeline

    def counted(loader, batch, feed):
        made_for.append(loader)
        return build(loader, batch, feed)

    monkeypatch.setattr(dali_loader.DaliLoader, "_pipeline", counted)
    return made_for


def made(manifest, plan, size, *, pads=False, devices=ON_CPU):
    """What the graph makes of a plan on the CPU: (B, size, size, 3) uint8."""
    files = [np.frombuffer(os.fsencode(manifest.content.paths[i]), np.uint8) for i in plan.index]
    pipe = import_dali().Pipeline(len(files), 2, None, prefetch_queue_depth=1)
    with pipe:
        feed = [inputs(files, plan, resizes=True)]
        pipe.set_outputs(*graph(feed, devices, size, pads=pads, packed=False, mixed={}))
    pipe.build()
    return np.array(pipe.run()[0].as_tensor())


def triangle(n, m):
    """How m pixels are made of n, (m, n) in float64: the triangle filter over the last pixels
    repeated without end; and which of the m see none of those."""
    step = n / m
    reach = max(step, 1.0)
    weights, inside = np.zeros((m, n)), np.zeros(m, bool)
    for i in range(m):
        centre = (i + 0.5) * step
        places = np.arange(int(centre - reach) - 2, int(centre + reach) + 3)
        w = np.maximum(0, 1 - np.abs(places + 0.5 - centre) / reach)
        np.add.at(weights[i], places.clip(0, n - 1), w / w.sum())
        inside[i] = centre - reach >= 0 and centre + reach <= n
    return weights, inside


def by_formula(manifest, plan, size):
    """The plan in float64 on PIL's decoded pixels, (B, size, size, 3), and its inner pixels."""
    images, inner = [], []
    for i, row in enumerate(plan.index):
        top, left, height, width = plan.box[i].tolist()
        pixels = np.asarray(Image.open(manifest.content.paths[row]).convert("RGB"), np.float64)
        (down, rows), (across, columns) = (
            triangle(n, m) for n, m in zip((height, width), plan.scaled[i], strict=True)
        )
        box = pixels[top : top + height, left : left + width]
        scaled = np.einsum("yh,hwc,xw->yxc", down, box, across, optimize=True)
        y, x = plan.window[i].tolist()
        for found, whole in ((images, scaled), (inner, rows[:, None] & columns)):
            cut = whole[y : y + size, x : x + size]
            found.append(cut[:, ::-1] if plan.flip[i] else cut)
    return np.stack(images), np.stack(inner)


# Half a level, and float32 coordinates of up to 500 pixels between neighbours of up to 255 levels.
ROUNDING = 0.5 + 500 * 2**-24 * 255
MOVED = [("hybrid", "cpu", "gpu"), ("gpu", "mixed", "gpu")]
VIEWS = [{}, {"augment": "none"}, {"augment": "none", "eval_resize": None}, {"size": 200}]


@needs_dali
@pytest.mark.parametrize("changes", VIEWS)
def test_the_whole_graph_does_the_plan(photos, changes):
    """Regions, resize up and down, window and flip: the triangle filter's formula, rounded.

    Against PyTorch's resize, which rounds to whole levels between its two passes: that is half a
    level on the way and half a level at the end, on top of DALI's half, so whole levels differ by
    one at most, wherever the filter sees the crop alone.
    """
    data = section(photos, **({"eval_resize": 256} | changes))
    manifest = open_source(data, "train")
    plan = sampler.plan(data, manifest.sizes, 3, 1, np.arange(IMAGES))
    assert plan.flip.any() and not plan.flip.all()
    found = made(manifest, plan, data.size).astype(np.float64)
    want, inner = by_formula(manifest, plan, data.size)
    assert np.abs(found - want).max() <= ROUNDING
    assert np.abs(found - want[:, :, ::-1]).mean() > 5  # a flip is not within it

    loader = make_loader(manifest, data, IMAGES, seed=3, train=True)
    (batch,) = loader.epoch(1)
    loader.close()
    torchs = batch.images.permute(0, 2, 3, 1).numpy().astype(np.float64)
    assert np.abs(found - torchs)[inner].max() <= 1
    assert inner.mean() > 0.9 and np.abs(found - torchs).mean() <= 0.5


@needs_dali
def test_without_a_resize_the_graph_changes_no_pixel(photos):
    """Padded crops that reach outside, and boxes that are as large as what they become."""
    data = section(photos, augment="pad_crop", size=320, padding=24, eval_resize=None)
    manifest = open_source(data, "train")
    plan = sampler.plan(data, manifest.sizes, 3, 0, np.arange(IMAGES))
    assert (plan.box[:, :2] < 0).any()
    loader = make_loader(
        manifest, data.model_copy(update={"loader": "torchvision"}), IMAGES, seed=3, train=True
    )
    (batch,) = loader.epoch(0)
    loader.close()
    found = made(manifest, plan, data.size, pads=True)
    assert np.array_equal(found, batch.images.permute(0, 2, 3, 1).numpy())


def traced(mode, *, pads=False):
    """The operators of a mode's graph as DALI holds them before it builds, the last one first: name
    and device, arguments, and where the first input lies."""
    pipe = import_dali().Pipeline(BATCH, 2, None if mode == "cpu" else 0)
    with pipe:
        options = mixed_options(np.array([[300, 500]]), 0.5)
        out, _ = graph(lambda: None, DEVICES[mode], 64, pads=pads, packed=False, mixed=options)
    found, node = [], out
    while node.source.inputs:  # along the images, from operator to operator
        text = str(node.source.spec)
        name = re.match(r"OpSpec for (\w+):", text)[1].rpartition("__")[2]
        given = dict(re.findall(r"^    (\w+): (.*)$", text, re.M))
        node = node.source.inputs[0]
        node = node[0] if isinstance(node, list) else node
        found.append((name, given["device"], given, node.device))
    return found


@needs_dali
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("mode, decode, resize", [("cpu", "cpu", None), *MOVED])
def test_each_operator_stands_on_its_device(mode, decode, resize, pads):
    found = traced(mode, pads=pads)
    want = [("Read", "cpu"), ("Image" if pads else "ImageSlice", decode)]
    pixels = "gpu" if decode == "mixed" else "cpu"
    if pads:
        want.append(("Slice", pixels))
    if resize is not None:
        want += [("Resize", resize), ("Slice", resize), ("Flip", resize)]
    assert [(name, device) for name, device, *_ in reversed(found)] == want
    of = {name: (given, lies) for name, _, given, lies in found}
    decoder = next(given for name, (given, _) in of.items() if name.startswith("Image"))
    assert decoder["adjust_orientation"] == "False"
    hints = {"hw_decoder_load": "0.500000", "jpeg_fancy_upsampling": "True"}
    hints |= {"preallocate_width_hint": "500", "preallocate_height_hint": "300"}
    for key, value in hints.items():
        assert decoder.get(key) == (value if decode == "mixed" else None)
    if resize is not None:
        given, lies = of["Resize"]
        assert given["antialias"] == "True" and lies == resize


def test_a_gpus_decoder_has_room_for_the_largest_image():
    """Bytes of DALI's own example for ImageNet, whose largest image has 5980 x 6430 pixels."""
    sizes = np.array([[375, 500], [5980, 6430], [0, 0], [40, 7000]], np.int32)
    found = mixed_options(sizes, 0.9)
    assert found["hw_decoder_load"] == 0.9
    assert found["device_memory_padding"] == pytest.approx(211025920, abs=1)
    assert found["host_memory_padding"] == pytest.approx(140544512, abs=1)
    assert (found["preallocate_height_hint"], found["preallocate_width_hint"]) == (5980, 7000)
    small = mixed_options(sizes[:1], 0.9)
    assert (small["device_memory_padding"], small["host_memory_padding"]) == (1 << 24, 1 << 23)


def test_auto_is_cpu_and_says_why(photos):
    auto, missing = section(photos), {"dali": "hybrid and gpu are", "torchvision": "gpu is"}
    for kind, others in missing.items():
        on_cpu, on_gpu = (decoding(auto, kind, device) for device in (CPU, GPU))
        assert on_cpu.mode == on_gpu.mode == "cpu"
        assert on_cpu.text.endswith("(data.decode=auto: the run is on the CPU)")
        assert on_gpu.text.endswith(f"(data.decode=auto: {others} not measured yet)")
        assert decoding(section(photos, decode="cpu"), kind, GPU).mode == "cpu"
    resident = decoding(auto, "resident", GPU)
    assert resident == (
        "cpu",
        "PIL once, whole image (data.decode=auto: loader resident is on the CPU)",
    )


@pytest.mark.parametrize(
    "kind, mode", [(kind, mode) for mode, kinds in DECODED_BY.items() for kind in kinds]
)
def test_a_gpus_ways_are_refused_on_a_cpu(photos, kind, mode):
    data = section(photos, decode=mode, loader=kind)
    found = decoding(data, kind, GPU)
    assert found.mode == mode and found.text.endswith(f"(data.decode={mode})")
    with pytest.raises(ValueError, match=f"data.decode={mode} .*run is on the CPU; set data.d"):
        loaded(data)


@needs_dali
def test_a_loader_says_where_it_decodes(photos):
    loader = loaded(section(photos))
    assert loader.mode == "cpu" and loader.decode.startswith("DALI on the CPU, the crop")
    with pytest.raises(ValueError, match="data.decode=hybrid works on a CUDA device"):
        loaded(section(photos, decode="hybrid"))
    other = loaded(section(photos, loader="torchvision", decode="cpu"))
    assert other.mode == "cpu" and other.decode == "PIL, whole image (data.decode=cpu)"


def test_what_each_loader_leaves_to_others(photos, monkeypatch):
    for mode, name, others in (
        ("hybrid", "torchvision", "dali"),
        ("gpu", "resident", "dali or torchvision"),
    ):
        data = section(photos, decode=mode).model_copy(update={"loader": name})
        with pytest.raises(ValueError, match=f"data.decode={mode} is done by loader {others}, and"):
            loaded(data, device=GPU)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as if it were not installed
    with pytest.raises(ValueError, match="data.loader=auto is torchvision here.*pip install"):
        loaded(section(photos, decode="hybrid"), device=GPU)
    with pytest.raises(ValueError, match="hw_decoder_load: 0.9 has no effect with loader torchv"):
        loaded(section(photos, decode="gpu", hw_decoder_load=0.9), device=GPU)
    assert "auto: the run is on the CPU" in loaded(section(photos)).decode


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decode": "gpu", "loader": "resident"}, "gpu is done by loader dali or torchvision, got"),
        ({"decode": "hybrid", "loader": "torchvision"}, "hybrid is done by loader dali, got"),
        (
            {"decode": "gpu", "loader": "torchvision", "hw_decoder_load": 0.9},
            "data.hw_decoder_load: 0.9 has no effect with loader torchvision",
        ),
        (
            {"decode": "gpu", "loader": "torchvision", "erase": 0.5},
            "gpu leaves no crop on the CPU for data.erase; use data.decode=cpu",
        ),
        (
            {"decode": "gpu", "source": "cifar10"},
            "decode: gpu decodes files and source cifar10 has",
        ),
        ({"hw_decoder_load": 0.9}, "data.hw_decoder_load: 0.9 has no effect with decode auto"),
        (
            {"decode": "gpu", "erase": 0.5, "randaugment": {}},
            "gpu leaves no crop on the CPU for data.randaugment and data.erase; use data",
        ),
        ({"decode": "hybrid", "hw_decoder_load": 0.9}, "no effect with decode hybrid"),
        ({"decode": "gpu", "hw_decoder_load": 1.1}, "less than or equal to 1"),
        ({"decode": "nvjpeg"}, "'auto', 'cpu', 'hybrid' or 'gpu'"),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Data(**({"source": "folder", "root": tmp_path} | changes))


@needs_dali
def test_one_pipeline_serves_a_whole_run(photos, builds):
    """Epochs in order and validations, abandoned ones too; a jump starts another."""
    data = section(photos, prefetch=3, loader="dali")
    loader = loaded(data)
    for epoch in (4, 5, 6):
        assert same(loader.epoch(epoch), fresh(data, epoch))
    assert builds.count(loader) == 1
    part = loader.epoch(7)
    begun = [next(part)]
    assert same(loader.epoch(7, 1), fresh(data, 7, 1)) and builds.count(loader) == 2
    assert same(loader.epoch(8), fresh(data, 8)) and builds.count(loader) == 2
    assert (
        same([*begun, *part], fresh(data, 7)) and builds.count(loader) == 3
    )  # jumps back by itself
    assert same(loader.epoch(3), fresh(data, 3)) and builds.count(loader) == 4
    loader.close()

    val = loaded(data, train=False)
    for _ in range(3):
        assert same(val.epoch(0), fresh(data, 0, train=False))
    assert builds.count(val) == 1
    val.close()


@needs_dali
def test_an_error_of_a_step_is_raised_at_that_step(photos):
    """DALI asks for steps ahead; a run that ends before them does not fail for them."""
    data = section(photos, bad_images=0, prefetch=3)
    loader = loaded(data)
    reader, calls = loader._reader, []

    class Failing:
        packed, close = reader.packed, staticmethod(reader.close)

        def __call__(self, rows):
            calls.append(rows)
            return reader(rows) if len(calls) <= loader.steps else ["gone"] * len(rows)

    loader._reader = Failing()
    assert same(loader.epoch(0), fresh(data, 0))
    assert len(calls) == loader.steps + 1  # it had been asked for
    for _ in range(2):
        with pytest.raises(BadImagesError, match="unreadable images, data.bad_images=0"):
            next(loader.epoch(1))
    loader.close()


@needs_dali
@pytest.mark.parametrize("mode", ["hybrid", "gpu"])
def test_a_gpus_way_through_the_loader(photos, tmp_path, monkeypatch, builds, mode):
    """On the CPU, with all operators there and a copy in place of the GPU's: the plan's pixels, in
    order, channels last, over the ends of epochs and a file that cannot be decoded."""
    monkeypatch.setitem(DEVICES, mode, ON_CPU)
    monkeypatch.setattr(dali_loader, "gpu_of", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    copied = lambda images, stream: torch.from_dlpack(images.as_tensor()).clone()  # noqa: E731
    monkeypatch.setattr(dali_loader, "taken", copied)
    root = tmp_path / "copy"
    shutil.copytree(photos, root, symlinks=True)
    data = section(root, decode=mode)
    loader = loaded(data, device=GPU)
    manifest = open_source(data, "train")
    assert loader.mode == mode and f"data.decode={mode}" in loader.decode
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        plan = sampler.plan(data, manifest.sizes, 7, epoch, np.arange(IMAGES))
        images = torch.cat([batch.images for batch in batches])
        assert images.shape == (IMAGES, 3, 64, 64) and images.dtype == torch.uint8
        assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
        want, _ = by_formula(manifest, plan, 64)
        found = images.permute(0, 2, 3, 1).numpy().astype(np.float64)
        assert np.abs(found - want).max() <= ROUNDING
        assert torch.cat([batch.index for batch in batches]).tolist() == plan.index.tolist()
    assert builds.count(loader) == 1

    loader.close()
    loader = loaded(data, device=GPU)
    path = Path(manifest.content.paths[5])
    path.write_bytes(b"<html>".ljust(path.stat().st_size))
    with pytest.warns(UserWarning, match="unreadable image .*000"):
        index = torch.cat([batch.index for batch in loader.epoch(2)])
    assert list(loader.quarantine.bad) == [5] and 5 not in index.tolist()
    loader.close()
