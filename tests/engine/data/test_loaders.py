"""Loaders: each does what the plan says, whatever the files, the threads or the place to start."""

import os
import struct
import sys
import threading
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.augment import changes
from kdfuse.engine.data.contents import Files
from kdfuse.engine.data.loaders import LOADERS, kind_of, make_loader, resident
from kdfuse.engine.data.loaders.finish import finish
from kdfuse.engine.data.loaders.nvjpeg import NvjpegLoader
from kdfuse.engine.data.manifest import Manifest
from kdfuse.engine.data.schedule import Schedule, share
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.recipe.data import Data

pytestmark = pytest.mark.slow(15)

DALI = pytest.param(
    "dali", marks=pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs NVIDIA DALI")
)
CHANGERS = [DALI, "torchvision"]  # what follows the crop they do too
READERS = [*CHANGERS, "nvjpeg"]
EVERY = [*READERS, "resident"]
# Mean difference to PIL, levels.
PIXELS = {"dali": 0.25, "torchvision": 0.0, "nvjpeg": 0.25, "resident": 0.25}
LARGEST = {"dali": 1, "torchvision": 0, "nvjpeg": 1, "resident": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def field(rng, height, width, channels=3):
    """A smooth random field with gradients and some grain, uint8: what a photo is to a decoder."""
    coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, channels), dtype=np.uint8)
    planes = [
        np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC))
        for c in range(channels)
    ]
    y, x = np.mgrid[0:height, 0:width]
    slope = 255 * np.stack([x / width, y / height, (x + y) / (width + height), x / width], -1)
    image = 0.7 * np.stack(planes, -1) + 0.3 * slope[..., :channels]
    return (image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def photo(rng, height, width):
    return Image.fromarray(field(rng, height, width))


def save_kinds(folder, rng, sized=lambda height, width: (height, width)):
    """Twelve kinds of file, all named .jpg as a crawl of the web leaves them."""

    def photo(rng, height, width):
        return Image.fromarray(field(rng, *sized(height, width)))

    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees", which nobody may do
    photo(rng, 375, 500).save(folder / "00.jpg", quality=90)
    photo(rng, 333, 217).save(folder / "01.jpg", quality=75)
    photo(rng, 61, 47).save(folder / "02.jpg", quality=90)
    photo(rng, 241, 320).save(folder / "03.jpg", quality=95, subsampling=0)
    photo(rng, 241, 321).save(folder / "04.jpg", quality=85, subsampling=1)
    photo(rng, 301, 200).convert("L").save(folder / "05.jpg")
    photo(rng, 301, 400).save(folder / "06.jpg", progressive=True)
    photo(rng, 200, 301).convert("CMYK").save(folder / "07.jpg")
    photo(rng, 200, 301).save(folder / "08.jpg", exif=exif)
    photo(rng, 200, 301).save(folder / "09.jpg", format="PNG")
    photo(rng, 160, 99).convert("RGBA").save(folder / "10.jpg", format="PNG")
    photo(rng, 160, 99).save(folder / "11.jpg", format="WEBP", lossless=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """root/{train,val}/one: the twelve kinds."""
    root = tmp_path_factory.mktemp("photos")
    for number, split in enumerate(("train", "val")):
        save_kinds(root / split / "one", np.random.default_rng(number))
    return root


@pytest.fixture
def few(tmp_path):
    """Two classes of twelve training and five validation images, all 48 x 40."""
    rng = np.random.default_rng(2)
    for split, count in (("train", 12), ("val", 5)):
        for name in ("cat", "dog"):
            folder = tmp_path / "few" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                photo(rng, 48, 40).save(folder / f"{i:02d}.jpg", quality=92)
    return tmp_path / "few"


def folder(root, loader="auto", **changes):
    """ "nvjpeg" stands for loader torchvision with decode gpu."""
    chosen = {"nvjpeg": {"loader": "torchvision", "decode": "gpu"}}.get(loader, {"loader": loader})
    fixed = {"size": 32, "eval_resize": 40} | chosen
    return Data(source="folder", root=root, **(fixed | changes))


def synthetic(**changes):
    fixed = {"classes": 10, "size": 16, "images": 200, "eval_resize": None}
    return Data(source="synthetic", **(fixed | changes))


def made(manifest, data, batch, **changes):
    """A loader on the CPU; the one for a GPU too, which only asks for one by its recipe."""
    if data.decode != "gpu":
        return make_loader(manifest, data, batch, **changes)
    schedule = Schedule(manifest, data, batch, **changes)
    return NvjpegLoader(schedule, torch.device("cpu"))


def loaded(data, split="train", batch=4, rank=0, world=1, **changes):
    """For a process that takes `batch` images of each step."""
    whole = batch * world
    fixed = {"seed": 7, "train": split == "train", "part": share(whole, rank, world)}
    return made(open_source(data, split), data, whole, **(fixed | changes))


def collect(loader, epoch=0, start=0):
    """Every batch of an epoch as one tuple of tensors, the loader closed."""
    batches = list(loader.epoch(epoch, start))
    loader.close()
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.target.dtype == batch.index.dtype == torch.int64
    return tuple(torch.cat([getattr(b, f) for b in batches]) for f in ("images", "target", "index"))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(manifest, plan, size, shift=0):
    """The plan done with nothing but PIL, its boxes moved right by `shift` pixels."""
    out = []
    for i, row in enumerate(plan.index):
        top, left, height, width = plan.box[i].tolist()
        image = Image.open(manifest.content.paths[row]).convert("RGB")
        image = image.crop((left + shift, top, left + shift + width, top + height))
        y, x = plan.window[i].tolist()
        image = image.resize(tuple(plan.scaled[i, ::-1].tolist()), Image.BILINEAR)
        image = image.crop((x, y, x + size, y + size))
        pixels = np.asarray(image)
        out.append(pixels[:, ::-1] if plan.flip[i] else pixels)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def distance(a, b):
    """Mean absolute difference of each image, levels: (B,)."""
    return (a.float() - b.float()).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("size", [64, 224])
def test_random_crops_of_every_kind_of_file_are_the_plans(photos, name, size):
    data = folder(photos, size=size, eval_resize=None, loader=name)
    manifest = open_source(data, "train")
    for epoch in range(3):
        images, target, index = collect(loaded(data), epoch)
        plan = sampler.plan(data, manifest.sizes, 7, epoch, np.arange(12))
        assert index.tolist() == plan.index.tolist() and not target.any()
        assert images.shape == (12, 3, size, size)
        want = by_hand(manifest, plan, size)
        assert distance(images, want).max() <= PIXELS[name]
        assert (images.float() - want.float()).abs().max() <= LARGEST[name]
        # The bound means something: a mirrored image or a box one pixel off is far outside.
        assert (distance(images, want.flip(3)) > 5).all()
        moved = distance(images, by_hand(manifest, plan, size, shift=1))
        assert (moved > max(3 * PIXELS[name], 0.5)).all()


@pytest.mark.parametrize("name", [DALI, "nvjpeg"])
def test_others_decode_as_pil_does(photos, name):
    """Without a resize the two differ nowhere, at the crop's borders neither."""
    view = {"augment": "pad_crop", "size": 45, "padding": 0, "eval_resize": None}
    for epoch in range(3):
        ours, pils = (
            collect(loaded(folder(photos, loader=loader, **view)), epoch)
            for loader in (name, "torchvision")
        )
        assert same(ours, pils)


AFTER = {"randaugment": {"ops": 3}, "erase": 0.5, "repeats": 2}


@pytest.mark.parametrize("name", CHANGERS)
def test_what_follows_the_crop_is_the_plans(photos, name):
    """The same bytes of every loader where the crop has the same, as pad_crop's has."""
    data = folder(photos, augment="pad_crop", size=45, padding=0, eval_resize=None, loader=name)
    data = Data.model_validate(data.model_dump() | AFTER)
    manifest = open_source(data, "train")
    order, changed = sampler.permutation(7, 1, 12), 0
    at = np.repeat([[0, 1], [2, 3], [4, 5]], 2, axis=0).ravel()  # two images in each step of four
    images, _, index = collect(loaded(data), 1)
    assert index.tolist() == order[at].tolist()
    plan = sampler.plan(data, manifest.sizes, 7, 1, np.arange(12), index=order[at])
    plan = replace(plan, changes=changes(data, 7, 1, np.arange(12)))
    for i, crop in enumerate(by_hand(manifest, plan, 45).permute(0, 2, 3, 1).numpy()):
        wanted = crop.copy()
        finish(plan, i, wanted)
        changed += (wanted != crop).any()
        assert np.array_equal(images[i].permute(1, 2, 0), wanted)
    assert changed > 6


@pytest.mark.parametrize("name", CHANGERS)
def test_what_follows_the_crop_leaves_evaluation_alone(few, name):
    plain = folder(few, loader=name)
    more = Data.model_validate(plain.model_dump() | AFTER)
    assert same(collect(loaded(plain, "val")), collect(loaded(more, "val")))


@pytest.mark.parametrize("name", CHANGERS)
def test_what_follows_the_crop_knows_no_threads_start_or_processes(few, name):
    data = Data.model_validate(folder(few, loader=name).model_dump() | AFTER)
    whole = collect(loaded(data), 2)
    for start in (1, 5):
        assert same(collect(loaded(data), 2, start), tuple(part[start * 4 :] for part in whole))
    busy = data.model_copy(update={"workers": 4, "prefetch": 5})
    assert same(whole, collect(loaded(busy), 2))
    ranks = [collect(loaded(data, batch=2, rank=rank, world=2), 2) for rank in (0, 1)]
    for part, one, other in zip(whole, *ranks, strict=True):
        pairs = torch.stack([one.unflatten(0, (-1, 2)), other.unflatten(0, (-1, 2))], 1)
        assert torch.equal(part, pairs.flatten(0, 2))


def test_resident_refuses_what_follows_the_crop(few):
    for settings, keys in (
        ({"randaugment": {}}, "data.randaugment"),
        ({"erase": 0.1}, "data.erase"),
        ({"randaugment": {}, "erase": 0.1}, "data.randaugment and data.erase"),
    ):
        data = folder(few, augment="none", **settings).model_copy(update={"loader": "resident"})
        with pytest.raises(ValueError, match=f"data.loader=resident cannot do {keys}; use auto"):
            loaded(data)
        loaded(data, "val").close()


@pytest.mark.parametrize("name", EVERY)
def test_repeats_are_every_loaders(few, name):
    data = folder(few, augment="pad_crop", size=40, loader=name, repeats=3)
    loader = loaded(data, batch=6)
    named = [file for step in range(4) for file in loader.names(0, step)]
    _, _, index = collect(loader)
    assert named == [open_source(data, "train").name(row) for row in index.tolist()]
    order = sampler.permutation(7, 0, 24)
    assert index.view(4, 3, 2).tolist() == [[pair] * 3 for pair in order[:8].reshape(4, 2).tolist()]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("eval_resize", [80, None])
def test_evaluation_view_is_the_plans(photos, name, eval_resize):
    data = folder(photos, size=64, eval_resize=eval_resize, loader=name)
    manifest = open_source(data, "val")
    images, _, index = collect(loaded(data, "val"))
    assert index.tolist() == list(range(12))
    want = by_hand(manifest, sampler.eval_plan(data, manifest.sizes, np.arange(12)), 64)
    assert distance(images, want).max() <= PIXELS[name]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("augment", ["random_resized_crop", "pad_crop", "none"])
def test_each_augmentation_is_the_plans(few, name, augment):
    data = folder(few, augment=augment, size=40, loader=name)
    manifest = open_source(data, "train")
    images, target, index = collect(loaded(data), epoch=1)
    plan = sampler.plan(data, manifest.sizes, 7, 1, np.arange(24))
    assert plan.flip.any() and not plan.flip.all()
    assert index.tolist() == plan.index.tolist()
    assert target.tolist() == (plan.index >= 12).tolist()
    bound = PIXELS[name] if augment == "random_resized_crop" or name == "dali" else 0
    want = by_hand(manifest, plan, 40)
    assert distance(images, want).max() <= bound
    assert (images.int() - want.int()).abs().max() <= (LARGEST[name] if bound else 0)
    if augment == "pad_crop":  # black beyond the border, where the box reaches out
        rows = np.flatnonzero((plan.box[:, 0] < 0) & ~plan.flip)
        assert len(rows)
        for i in rows:
            assert not images[i, :, : -plan.box[i, 0]].any()
            assert images[i, :, -plan.box[i, 0] :].any()


def test_images_are_stored_channels_last(few):
    for name in (*LOADERS, "nvjpeg"):
        batch = next(loaded(folder(few, loader=name)).epoch(0))
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", EVERY)
def test_threads_and_prefetching_change_nothing(few, name):
    want = collect(loaded(folder(few, loader=name, workers=1, prefetch=1)), epoch=3)
    for workers, prefetch in ((1, 4), (3, 1), (4, 9)):
        data = folder(few, loader=name, workers=workers, prefetch=prefetch)
        assert same(want, collect(loaded(data), epoch=3))


@pytest.mark.parametrize("name", EVERY)
def test_an_evaluation_may_be_of_some_rows(few, name):
    rows = [7, 0, 3, 9, 8]
    data = folder(few, loader=name)
    images, target, _ = collect(loaded(data, "val"))
    loader = loaded(data, "val", rows=np.array(rows))
    assert loader.steps == 2
    batches = list(loader.epoch(0))
    loader.close()
    assert [batch.valid for batch in batches] == [4, 1]
    for batch, start in zip(batches, (0, 4), strict=True):
        these = rows[start : start + batch.valid]
        assert batch.index[: batch.valid].tolist() == these
        assert torch.equal(batch.images[: batch.valid], images[these])
        assert torch.equal(batch.target[: batch.valid], target[these])


@pytest.mark.parametrize("name", EVERY)
def test_an_epoch_can_start_anywhere(few, name):
    data = folder(few, loader=name, prefetch=3)
    whole = collect(loaded(data), epoch=2)
    for start in (1, 4, 5):
        tail = collect(loaded(data), 2, start)
        assert same(tail, tuple(part[start * 4 :] for part in whole))
    loader = loaded(data)
    assert loader.steps == 6 and list(loader.epoch(2, 6)) == []
    for start in (-1, 7):
        with pytest.raises(ValueError, match=f"start={start} is outside an epoch of 6 steps"):
            loader.epoch(2, start)
    loader.close()


@pytest.mark.parametrize("name", EVERY)
def test_epochs_follow_one_another_and_differ(few, name):
    data = folder(few, loader=name)
    loader = loaded(data)
    orders = []
    for epoch in (0, 1, 0):
        batches = list(loader.epoch(epoch))
        orders.append(torch.cat([batch.index for batch in batches]))
        assert sorted(orders[-1].tolist()) == list(range(24))
    loader.close()
    assert orders[0].tolist() != orders[1].tolist()
    assert torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("name", ["torchvision", "resident"])
def test_two_processes_of_32_see_what_one_of_64_sees(name):
    data = synthetic(loader=name, augment="pad_crop")
    whole = [batch for batch in loaded(data, batch=64).epoch(5)]
    halves = [list(loaded(data, batch=32, rank=rank, world=2).epoch(5)) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 3  # the last 8 images are left out
    for one, first, second in zip(whole, *halves, strict=True):
        for part in ("images", "target", "index"):
            both = torch.cat([getattr(first, part), getattr(second, part)])
            assert torch.equal(getattr(one, part), both)


def test_the_training_set_must_fill_a_batch(few):
    with pytest.raises(ValueError, match="run.batch=26 is larger than the training set of 24"):
        loaded(folder(few), batch=13, world=2)
    assert loaded(folder(few), batch=12, world=2).steps == 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_each_image_once(few, name, world):
    data = folder(few, loader=name)
    parts = [
        list(loaded(data, "val", batch=4, rank=rank, world=world).epoch(0)) for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert {batch.images.shape for batch in batches} == {(4, 3, 32, 32)}
    assert sum(batch.valid for batch in batches) == 10
    seen = [i for batch in batches for i in batch.index[: batch.valid].tolist()]
    assert sorted(seen) == list(range(10))
    first = parts[0][0].images[0]
    for batch in batches:
        for row in range(batch.valid, 4):
            assert batch.index[row] == 0 and torch.equal(batch.images[row], first)


def tasks():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("name", EVERY)
def test_threads_end_with_the_loader(few, name):
    collect(loaded(folder(few, loader=name)))  # what the libraries keep for good
    before = tasks()
    loader = loaded(folder(few, loader=name, workers=5))
    halfway = loader.epoch(0)
    next(halfway)
    assert tasks() > before or name == "resident"
    next(loader.epoch(1))  # abandoned at once
    loader.close()
    # join() returns just before the system's thread is gone; a thread that leaks stays for good.
    for _ in range(500):
        if tasks() <= before:
            break
        time.sleep(0.01)
    assert tasks() <= before
    assert not [t for t in threading.enumerate() if t.name.startswith("kdfuse")]


@pytest.mark.parametrize("name", EVERY)
def test_batches_outlive_their_epoch(few, name):
    """A loader's memory is not reused under a batch that someone still holds."""
    data = folder(few, loader=name)
    loader = loaded(data)
    held = list(loader.epoch(0))
    copies = [batch.images.clone() for batch in held]
    list(loader.epoch(1))
    loader.close()
    for batch, copy in zip(held, copies, strict=True):
        assert torch.equal(batch.images, copy)


HTML = b"<html><body>404 Not Found</body></html>"


def broken(root, split="train"):
    """Four kinds of damage, in two neighbours of one class and at the ends of the other."""
    cat, dog = root / split / "cat", root / split / "dog"
    whole = (cat / "03.jpg").read_bytes()
    (cat / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (cat / "04.jpg").write_bytes(HTML)
    (dog / "00.jpg").write_bytes(b"")
    (dog / "11.jpg").write_bytes((dog / "11.jpg").read_bytes()[:-30])
    return {3: 5, 4: 5, 12: 13, 23: 13}  # row: the row that takes its place


def damage_later(root, manifest):
    """The same after the files were indexed, and one with the length unchanged."""
    replaced = broken(root)
    os.remove(root / "train" / "cat" / "04.jpg")
    path = root / "train" / "dog" / "05.jpg"
    path.write_bytes(HTML.ljust(os.path.getsize(path)))
    return replaced | {17: 18}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_bad_files_are_named_counted_and_replaced(few, name, later):
    data = folder(few, loader=name, augment="pad_crop")
    clean = open_source(data, "train")
    replaced = damage_later(few, clean) if later else broken(few)
    manifest = clean if later else open_source(data, "train")

    def epoch(start=0, rank=0, world=1):
        part = share(4 * world, rank, world)
        loader = made(manifest, data, 4 * world, seed=7, train=True, part=part)
        batches = list(loader.epoch(4, start))
        for step, batch in enumerate(batches, start):
            assert loader.names(4, step) == [manifest.name(row) for row in batch.index.tolist()]
        loader.close()
        bad.update(loader.quarantine.bad)
        return batches

    bad = {}
    with pytest.warns(UserWarning, match="unreadable image") as told:
        whole = epoch()
    assert bad.keys() == replaced.keys()
    for row in replaced:
        (text,) = [
            str(w.message) for w in told if f"image {manifest.content.paths[row]} (" in str(w)
        ]
        assert bad[row] in text
    plan = sampler.plan(data, clean.sizes, 7, 4, np.arange(24))
    index = np.array([replaced.get(row, row) for row in plan.index])
    want = sampler.plan(data, clean.sizes, 7, 4, np.arange(24), index=index)
    assert torch.cat([batch.index for batch in whole]).tolist() == index.tolist()
    pixels = torch.cat([batch.images for batch in whole])
    assert torch.equal(pixels, by_hand(manifest, want, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = epoch(start=3)
        ranks = [epoch(rank=rank, world=2) for rank in (0, 1)]
    for batch, again in zip(whole[3:], resumed, strict=True):
        assert torch.equal(batch.index, again.index) and torch.equal(batch.images, again.images)
    of_two = [batch.index for pair in zip(*ranks, strict=True) for batch in pair]
    assert torch.cat(of_two).tolist() == index.tolist()


@pytest.mark.parametrize("name", EVERY)
def test_a_file_of_another_length_is_found_whatever_its_crop(few, name):
    """It decodes as it did, and is no longer the file that was indexed."""
    data = folder(few, loader=name, **({"augment": "pad_crop"} if name == "resident" else {}))
    manifest = open_source(data, "train")
    path = few / "train" / "dog" / "05.jpg"
    length = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"12345")
    with pytest.warns(UserWarning, match=f"05.jpg .{length + 5} bytes, was {length} when indexed"):
        loader = made(manifest, data, 4, seed=7, train=True)
        index = torch.cat([batch.index for batch in loader.epoch(0)]).tolist()
    loader.close()
    wanted = sampler.permutation(7, 0, 24).tolist()
    assert list(loader.quarantine.bad) == [17]
    assert index == [18 if row == 17 else row for row in wanted]


@pytest.mark.parametrize("name", EVERY)
def test_what_another_process_found_is_left_out_though_it_is_decoded(few, name):
    """DALI has the first steps of the next epoch under way when one ends."""
    data = folder(few, loader=name, **({"augment": "pad_crop"} if name == "resident" else {}))
    loader = loaded(data)
    list(loader.epoch(0))
    row = sampler.permutation(7, 1, 24)[1]
    loader.quarantine.take({int(row): "bad elsewhere"})
    assert loader.quarantine.found() == {row: "bad elsewhere"}
    index = torch.cat([batch.index for batch in loader.epoch(1)]).tolist()
    loader.close()
    replacement = row + 1 if row not in (11, 23) else row - 11
    wanted = sampler.permutation(7, 1, 24).tolist()
    assert index == [replacement if r == row else r for r in wanted]


@pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs NVIDIA DALI")
def test_dali_is_fed_without_a_look_at_the_files(few, monkeypatch):
    """One stat an image on the training loop's thread is slow on a network's disk."""
    data = folder(few, loader="dali")
    loader = loaded(data)
    monkeypatch.setattr("kdfuse.engine.data.contents._changed", None)
    assert len(list(loader.epoch(0))) == 6
    loader.close()


@pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs NVIDIA DALI")
def test_a_file_that_only_dali_refuses_is_found(few):
    """A bitmap of 16 bits a pixel: its batch decodes without fault in PIL."""
    head = b"BM" + struct.pack("<IHHI", 54 + 16 * 16 * 2, 0, 0, 54)
    head += struct.pack("<IiiHHIIiiII", 40, 16, 16, 1, 16, 0, 16 * 16 * 2, 0, 0, 0, 0)
    (few / "train" / "cat" / "02.jpg").write_bytes(head + bytes(16 * 16 * 2))
    loader = loaded(folder(few, loader="dali"))
    with pytest.warns(UserWarning, match=r"02.jpg \(DALI cannot decode it"):
        index = torch.cat([batch.index for batch in loader.epoch(0)])
    loader.close()
    assert list(loader.quarantine.bad) == [2]
    assert sorted(set(range(24)) - set(index.tolist())) == [2]


@pytest.mark.parametrize("name", EVERY)
def test_too_many_bad_files_stop_the_run(few, name):
    clean = open_source(folder(few), "train")
    data = folder(few, loader=name, bad_images=3, augment="pad_crop")
    broken(few)
    with pytest.raises(RuntimeError, match="4 unreadable images, data.bad_images=3") as error:
        loaded(data)
    for file in ("cat/03.jpg", "cat/04.jpg", "dog/00.jpg", "dog/11.jpg"):
        assert file in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="4 unreadable images, data.bad_images=3"):
            loader = made(clean, data, 4, seed=7, train=True)  # resident reads all here
            list(loader.epoch(0))


def test_a_class_without_a_readable_image_stops_the_run(few):
    for path in (few / "train" / "dog").iterdir():
        path.write_bytes(HTML)
    with pytest.raises(RuntimeError, match="no readable image of class 'dog' is left"):
        loaded(folder(few))


@pytest.mark.parametrize("name", EVERY)
def test_evaluation_replaces_bad_files_too(few, name):
    (few / "val" / "cat" / "00.jpg").write_bytes(HTML)
    with pytest.warns(UserWarning, match="cat/00.jpg .*cat/01.jpg takes its place"):
        loader = loaded(folder(few, loader=name), "val")
    batches = list(loader.epoch(0))
    loader.close()
    seen = [i for batch in batches for i in batch.index[: batch.valid].tolist()]
    assert seen == [1, 1, 2, 3, 4, 5, 6, 7, 8, 9] and list(loader.quarantine.bad) == [0]


BEST = "torchvision" if find_spec("nvidia.dali") is None else "dali"  # of files, where not resident


def listed(n, height, width, **changes):
    """A manifest of n files of that size, without their names."""
    sizes = np.tile(np.array([height, width], np.int32), (n, 1))
    fixed = {"sizes": sizes, "target": np.zeros(n, np.int64), "classes": ["a", "b"], "digest": ""}
    return Manifest(Files([], np.empty(0, np.int64)), **(fixed | changes))


def auto(manifest, train=True, **changes):
    return kind_of(manifest, folder("unused", **changes), train)


def test_auto_is_resident_up_to_half_a_gigabyte_of_pixels():
    most = 2**29 // (3 * 32 * 32)  # whole images in 512 MiB
    for augment in ("random_resized_crop", "none"):
        crop = {"augment": augment}
        assert auto(listed(most, 32, 32), **crop) == "resident"
        assert auto(listed(most + 1, 32, 32), **crop) == BEST
    padded = 2**29 // (3 * 36 * 36)
    for n, name in ((padded, "resident"), (padded + 1, BEST)):
        assert auto(listed(n, 32, 32), augment="pad_crop", padding=2) == name
    # Views of 32 x 32 of larger images, which are all to be decoded; and large views of small ones.
    large = 2**29 // (3 * 375 * 500)
    for n, name in ((large, "resident"), (large + 1, BEST), (50_000, BEST)):
        assert auto(listed(n, 375, 500), train=False) == name
    large = 2**29 // (3 * 224 * 224)
    for n, name in ((large, "resident"), (large + 1, BEST)):
        view = {"size": 224, "eval_resize": None}
        assert auto(listed(n, 32, 32), train=False, **view) == name


def test_auto_is_resident_for_crops_of_one_size_and_for_fixed_views():
    mixed = np.tile(np.array([[48, 40], [40, 48]], np.int32), (10, 1))
    for augment in ("random_resized_crop", "pad_crop", "none"):
        crop = {"augment": augment}
        assert auto(listed(20, 48, 40), **crop) == "resident"
        other = "resident" if augment == "none" else BEST
        assert auto(listed(20, 48, 40, sizes=mixed), **crop) == other
        assert auto(listed(20, 48, 40, sizes=mixed), train=False, **crop) == "resident"
    # What cannot be read has no size.
    sizes = np.tile(np.array([48, 40], np.int32), (20, 1))
    sizes[[0, 7]] = 0
    assert auto(listed(20, 48, 40, sizes=sizes)) == "resident"
    assert auto(listed(20, 48, 40, sizes=sizes * 0)) == BEST


def test_auto_is_never_resident_for_what_it_cannot_do():
    small = listed(20, 48, 40)
    for more in ({"erase": 0.1}, {"randaugment": {}}):
        assert auto(small, **more) == auto(small, augment="none", **more) == BEST
        assert auto(small, train=False, **more) == "resident"
    for train in (True, False):
        assert [auto(small, train, decode=mode) for mode in ("hybrid", "gpu")] == [BEST, BEST]
        assert auto(small, train, decode="cpu") == "resident"
        assert [auto(small, train, loader=name) for name in LOADERS] == list(LOADERS)


def test_auto_takes_dali_for_files_and_torchvision_without_it(photos, few, monkeypatch):
    for split, name in (("train", BEST), ("val", "resident")):
        assert loaded(folder(photos), split).name == name
        assert loaded(folder(few), split).name == loaded(synthetic(), split).name == "resident"
    assert loaded(synthetic(erase=0.5)).name == "torchvision"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as if it were not installed
    assert loaded(folder(photos)).name == "torchvision"
    with pytest.raises(ValueError, match="data.loader=dali needs NVIDIA DALI.*pip install"):
        loaded(folder(few, loader="dali"))


def test_dali_refuses_a_source_without_files():
    manifest = open_source(synthetic(), "train")
    schedule = Schedule(manifest, synthetic(), 4, seed=0, train=True)
    with pytest.raises(ValueError, match="data.loader=dali reads files and data.source=synthetic"):
        LOADERS["dali"](schedule, torch.device("cpu"))


@pytest.mark.parametrize("name", ["torchvision", "resident"])
@pytest.mark.parametrize("augment", ["random_resized_crop", "pad_crop", "none"])
def test_synthetic_images_take_every_augmentation(name, augment):
    data = synthetic(augment=augment, loader=name, eval_resize=20)
    images, target, index = collect(loaded(data, batch=50))
    assert images.shape == (200, 3, 16, 16) and images.float().std() > 10
    assert torch.equal(target, index % 10)
    assert collect(loaded(data, "val", batch=20))[0].shape == (60, 3, 16, 16)


def test_resident_needs_one_size_for_random_crops(photos):
    data = folder(photos, loader="resident", size=32)
    with pytest.raises(ValueError, match="images of one size, found 375 x 500 and others.*=auto"):
        loaded(data)
    ours = collect(loaded(folder(photos, loader="resident"), "val"))
    assert same(ours, collect(loaded(folder(photos, loader="torchvision"), "val")))


@pytest.fixture
def kinds(tmp_path):
    """Both splits: the twelve kinds of file of `photos`, all 60 x 52."""
    rng = np.random.default_rng(5)
    for split in ("train", "val"):
        save_kinds(tmp_path / "kinds" / split / "one", rng, lambda height, width: (60, 52))
    return tmp_path / "kinds"


@pytest.mark.parametrize("augment", ["random_resized_crop", "pad_crop", "none"])
def test_resident_agrees_with_torchvision_on_every_kind_of_file(kinds, augment):
    for epoch in range(3):
        for split, size in (("train", 40), ("train", 52), ("val", 40)):
            both = []
            for name in ("resident", "torchvision"):
                data = folder(kinds, augment=augment, size=size, eval_resize=56, loader=name)
                both.append(collect(loaded(data, split), epoch))
            assert same(both[0][1:], both[1][1:])
            apart = (both[0][0].int() - both[1][0].int()).abs()
            resized = split == "train" and augment == "random_resized_crop"
            assert apart.max() <= resized and (apart > 0).float().mean() < 0.1


def test_a_long_start_is_told_once(few, monkeypatch, capsys):
    data = folder(few, loader="resident")
    text = "decoding 24 images, which then stay in memory: 1 are done\n"
    for seconds, rank, told in ((0.0, 0, text), (0.0, 1, ""), (1e9, 0, "")):
        monkeypatch.setattr(resident, "PATIENCE", seconds)
        loaded(data, batch=2, rank=rank, world=2).close()
        assert capsys.readouterr() == ("", told)


def test_of_many_processes_that_decode_all_one_warns(few):
    data = folder(few, loader="resident")
    manifest = open_source(data, "train")
    broken(few)
    with pytest.warns(UserWarning, match="unreadable image") as told:
        for rank in (0, 1):
            part = share(4, rank, 2)
            loader = make_loader(manifest, data, 4, seed=7, train=True, part=part)
            assert sorted(loader.quarantine.bad) == [3, 4, 12, 23]
    assert len(told) == 4


def test_decoding_ends_at_one_bad_file_too_many(few, monkeypatch):
    data = folder(few, loader="resident", workers=1, bad_images=0)
    manifest = open_source(data, "train")
    (few / "train" / "cat" / "00.jpg").write_bytes(HTML)
    read, seen = Manifest.read, []

    def slow(self, row):
        seen.append(row)
        time.sleep(0.05)
        return read(self, row)

    monkeypatch.setattr(Manifest, "read", slow)
    with pytest.raises(RuntimeError, match="1 unreadable images, data.bad_images=0 allows no more"):
        make_loader(manifest, data, 4, seed=7, train=True)
    assert len(seen) < 24


def test_pad_crop_needs_images_as_large_as_the_crop(few):
    with pytest.raises(ValueError, match="data.size=49 .*data.padding=4.*48 x 40 pixels"):
        loaded(folder(few, augment="pad_crop", size=49, eval_resize=None))
    loaded(folder(few, augment="pad_crop", size=48, eval_resize=None)).close()
