"""Data sets that are objects: what their items may be, and the loader of those that are tensors."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from kdfuse.engine.data.contents import Files
from kdfuse.engine.data.items import ItemError, Pictures, Tensors
from kdfuse.engine.data.loaders import kind_of, make_loader
from kdfuse.engine.data.loaders.ondevice import Normalise
from kdfuse.engine.data.schedule import Schedule, share
from kdfuse.engine.data.sources.handed import labels_of, manifest_of
from kdfuse.engine.recipe.data import Data
from kdfuse.engine.recipe.schema import Normalize

pytestmark = pytest.mark.slow(8)
N, SIDE = 23, 6


class Listed:
    """A data set of these items."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class Noisy:
    """Items that say which row they are, and what the generators of three libraries drew."""

    def __len__(self):
        return N

    def __getitem__(self, row):
        image = torch.full((3, SIDE, SIDE), float(row))
        image[1, 0, :3] = torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])
        return image, row % 4


def as_they_are(**changes):
    return Data(source="own", size=SIDE, augment="none", flip=False, eval_resize=None, **changes)


def batches(manifest, data, epoch=0, start=0, part=None, train=True, batch=5):
    loader = make_loader(manifest, data, batch, seed=7, train=train, part=part)
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


def picture(rng, height, width, mode="RGB"):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def test_tensors_come_as_they_are_in_the_order_of_the_plan():
    manifest, data = manifest_of(Noisy(), "mine"), as_they_are(workers=2)
    schedule = Schedule(manifest, data, 5, seed=7, train=True)
    assert kind_of(manifest, data, train=True) == "items"
    for step, batch in enumerate(batches(manifest, data)):
        index = schedule.task(0, step).plan.index
        assert batch.index.tolist() == index.tolist()
        assert batch.images[:, 0, 2, 2].tolist() == index.astype(float).tolist()
        assert batch.target.tolist() == (index % 4).tolist()
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_their_random_numbers_are_those_of_the_position_and_no_others():
    manifest = manifest_of(Noisy(), "mine")
    before = torch.get_rng_state()
    one = torch.cat([b.images for b in batches(manifest, as_they_are(workers=1))])
    assert torch.equal(torch.get_rng_state(), before)
    two = torch.cat([b.images for b in batches(manifest, as_they_are(workers=2))])
    assert torch.equal(one, two)
    late = torch.cat([b.images for b in batches(manifest, as_they_are(workers=2), start=2)])
    assert torch.equal(late, one[10:])
    drawn = one[:, 1, 0, :3]
    assert len(drawn.unique()) == drawn.numel()
    again = torch.cat([b.images for b in batches(manifest, as_they_are(workers=1), epoch=1)])
    assert not np.isin(again[:, 1, 0, :3], drawn).any()


def test_a_digest_is_of_the_pixels_and_draws_from_nobodys_generators():
    images = torch.rand(50, 3, 4, 4)
    labels = torch.arange(50) % 2
    first = manifest_of(TensorDataset(images, labels), "mine").digest
    assert manifest_of(TensorDataset(images.clone(), labels), "mine").digest == first
    assert manifest_of(TensorDataset(images + 1, labels), "mine").digest != first
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    manifest_of(Late(), "mine")
    assert (random.getstate(), np.random.get_state()[2]) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert manifest_of(Counting(), "mine").digest == manifest_of(Counting(7), "mine").digest


class Late(Noisy):
    """Draws for all rows but the first."""

    targets = [row % 4 for row in range(N)]

    def __getitem__(self, row):
        return super().__getitem__(row) if row else (torch.zeros(3, SIDE, SIDE), 0)


class Counting(Listed):
    """Images that say how often one was asked for, which no seed brings back."""

    def __init__(self, count=0):
        super().__init__(*[(FLOAT, 0)] * 3)
        self.count = count

    def __getitem__(self, row):
        self.count += 1
        return FLOAT + self.count, 0


def test_processes_share_a_step_out():
    manifest, data = manifest_of(Noisy(), "mine"), as_they_are(workers=1)
    whole = batches(manifest, data)
    parts = [batches(manifest, data, part=share(5, rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        both = torch.cat([part[step].images for part in parts])
        assert torch.equal(both, batch.images)


def test_a_loader_can_be_asked_for_another_epoch_before_one_is_over():
    manifest, data = manifest_of(Noisy(), "mine"), as_they_are(workers=2)
    loader = make_loader(manifest, data, 5, seed=7, train=True)
    try:
        next(iter(loader.epoch(0)))
        found = torch.cat([b.images for b in loader.epoch(3)])
    finally:
        loader.close()
    assert torch.equal(found, torch.cat([b.images for b in batches(manifest, data, epoch=3)]))


def test_evaluation_shows_each_once_and_fills_the_last_batch():
    found = batches(manifest_of(Noisy(), "mine"), as_they_are(), train=False)
    assert [b.valid for b in found] == [5, 5, 5, 5, 3]
    rows = torch.cat([b.images[: b.valid, 0, 2, 2] for b in found])
    assert rows.tolist() == list(range(N))


def test_floats_reach_the_network_bit_by_bit():
    images = torch.randn(64, 3, 5, 5)
    statistics = Normalize(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert torch.equal(Normalise(statistics, channels_last=False)(images), images)


@pytest.mark.parametrize("size", [(9, 9), (12, 7)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_are_cropped_as_files_are(tmp_path, size, mode):
    rng = np.random.default_rng(0)
    items, paths = [], []
    for row in range(8):
        image = picture(rng, *size, mode)
        path = tmp_path / f"{row}.png"
        image.save(path)
        items.append((image, row % 2))
        paths.append((path, row % 2))
    data = Data(source="own", size=6, eval_resize=None, scale=(0.5, 1.0), loader="torchvision")
    mine, files = manifest_of(Listed(*items), "mine"), manifest_of(Listed(*paths), "mine")
    assert isinstance(mine.content, Pictures) and isinstance(files.content, Files)
    for a, b in zip(batches(mine, data), batches(files, data), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.target, b.target)


def test_an_image_folder_is_read_as_files_unless_it_changes_its_images(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for row in range(3):
            picture(rng, 8, 8).save(tmp_path / label / f"{row}.png")
    plain = manifest_of(ImageFolder(tmp_path), "mine")
    assert isinstance(plain.content, Files) and plain.classes == ["ant", "bee"]
    assert plain.target.tolist() == [0, 0, 0, 1, 1, 1]
    turned = manifest_of(ImageFolder(tmp_path, lambda image: image.rotate(90)), "mine")
    assert isinstance(turned.content, Pictures)
    subset = manifest_of(Subset(ImageFolder(tmp_path), [5, 0]), "mine")
    assert subset.classes == ["ant", "bee"] and subset.target.tolist() == [1, 0]


def test_labels_that_stand_aside_are_not_read_from_the_items():
    labels = torch.tensor([2, 0, 1])
    dataset = TensorDataset(torch.zeros(3, 3, 4, 4), labels)
    assert labels_of(dataset).tolist() == [2, 0, 1]
    assert labels_of(Subset(dataset, [2, 0])).tolist() == [1, 2]
    listed = Listed((torch.zeros(3, 4, 4), 1), (torch.zeros(3, 4, 4), 0))
    assert labels_of(listed) is None
    assert manifest_of(listed, "mine").target.tolist() == [1, 0]
    listed.targets = [1, 0]
    assert labels_of(listed).tolist() == [1, 0]
    listed.target_transform = lambda label: 1 - label
    assert labels_of(listed) is None


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


FLOAT = torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    "dataset, kind, text",
    [
        (Stream(), TypeError, "mine: wants a data set with __len__"),
        (Listed(), ValueError, "mine: the data set is empty"),
        (Listed({"image": FLOAT}), ItemError, r"mine\[0\]: .*wants \(image, label\), got a dict"),
        (Listed((FLOAT, 0.5)), ItemError, r"mine\[0\]: .*number of a class as its label, got 0.5"),
        (Listed((FLOAT, 0), (FLOAT, -1)), ItemError, r"mine\[1\]: .* got -1"),
        (Listed((3, 0)), TypeError, r"mine\[0\]: wants a path, a PIL image or a tensor"),
        (
            Listed((FLOAT[:1], 0)),
            ValueError,
            r"wants an image of \(3, side, side\), got \(1, 4, 4\)",
        ),
        (Listed((FLOAT.double(), 0)), ValueError, "got torch.float64"),
        (Listed(("a.png", 0), (FLOAT, 1)), ItemError, r"mine\[1\]: .*wants a path"),
    ],
)
def test_what_cannot_be_used_is_named(dataset, kind, text):
    with pytest.raises(kind, match=text):
        manifest_of(dataset, "mine")


def test_a_label_above_the_classes_is_named():
    with pytest.raises(ValueError, match=r"mine\[1\]: label 7 of 2 classes"):
        manifest_of(Listed((FLOAT, 0), (FLOAT, 7)), "mine", ["a", "b"])


def test_labels_are_counted_from_0():
    listed = Listed(*[(FLOAT, row % 4 + 1) for row in range(8)])
    with pytest.raises(ValueError, match=r"mine\[3\]: label 4 of 4 classes; .* from 0"):
        manifest_of(listed, "mine", list("abcd"))
    with pytest.raises(ValueError, match=r"mine: its labels are 1 to 4; .* none .* is 0"):
        manifest_of(listed, "mine")
    assert manifest_of(listed, "mine", list("abcde")).target.max() == 4


def test_files_none_of_which_can_be_read_are_refused(tmp_path):
    gone = Listed(*[(str(tmp_path / f"{row}.png"), 0) for row in range(3)])
    with pytest.raises(ValueError, match=r"mine: none of its 3 images .* .*0.png: .*No such file"):
        manifest_of(gone, "mine")


@pytest.mark.parametrize(
    "other, text",
    [
        ((FLOAT[:, :2], 0), r"mine\[4\]: got a tensor of \(3, 2, 4\)"),
        ((FLOAT.to(torch.uint8), 0), "give all images one shape and type"),
        ((FLOAT, 1), "got label 1, which was 0 when the labels were read"),
    ],
)
def test_an_item_that_is_not_like_the_others_ends_the_epoch_by_name(other, text):
    dataset = Listed(*[(FLOAT, 0)] * 4, other)
    dataset.targets = [0] * 5
    data = Data(source="own", size=4, augment="none", flip=False, eval_resize=None)
    with pytest.raises(ItemError, match=text) as met:
        batches(manifest_of(dataset, "mine"), data, batch=2, train=False)
    assert "\n" not in str(met.value) and "in item" in str(met.value.__cause__)


@pytest.mark.parametrize(
    "change", [{"augment": "pad_crop"}, {"flip": True}, {"erase": 0.5}, {"loader": "resident"}]
)
def test_tensors_are_not_cropped(change):
    manifest = manifest_of(Noisy(), "mine")
    assert isinstance(manifest.content, Tensors)
    base = {"source": "own", "size": SIDE, "augment": "none", "flip": False, "eval_resize": None}
    with pytest.raises(ValueError, match=f"data.{next(iter(change))}"):
        make_loader(manifest, Data(**base | change), 5, seed=0, train=True)
