"""Resized crops of a batch: PIL's bytes of two steps, torchvision's of one to a level."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from kdfuse.engine.data.loaders import resize
from kdfuse.engine.data.loaders.resize import resized_crop
from kdfuse.engine.data.plan import Plan


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def planned(index, box, flip, size):
    index, box, flip = np.array(index), np.array(box, np.int32), np.array(flip, bool)
    scaled = np.full((len(index), 2), size, np.int32)
    return Plan(index, box, flip, scaled, np.zeros_like(scaled))


def boxes(seed, count, height, width):
    """The whole image, a pixel in each of two corners, a row, a column, and random boxes."""
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    ends = [
        [0, 0, height, width],
        [0, 0, 1, 1],
        [height - 1, width - 1, 1, 1],
        [height // 2, 0, 1, width],
        [0, width // 2, height, 1],
    ]
    return np.concatenate([ends, np.stack([top, left, h, w], axis=1)])


def drawn(seed, count, height, width, size):
    """Images, and crops of them, every other one mirrored."""
    images, box = noise(seed, 7, height, width, 3), boxes(seed, count, height, width)
    at = np.arange(len(box))
    return torch.from_numpy(images), planned(at % 7, box, at % 2, size)


def pils(images, plan, size):
    """PIL's resizes of each crop, in two steps: along its rows and then along its columns."""
    out = []
    for row, box, flip in zip(plan.index, plan.box.tolist(), plan.flip, strict=True):
        top, left, height, width = box
        crop = Image.fromarray(images[row].numpy()).crop((left, top, left + width, top + height))
        made = crop.resize((size, height), Image.BILINEAR).resize((size, size), Image.BILINEAR)
        out.append(np.asarray(made)[:, ::-1] if flip else np.asarray(made))
    return torch.from_numpy(np.stack(out))


def torchvisions(images, plan, size, kind):
    """torchvision's own resized crops and flips, of PIL's images or of tensors."""
    out = []
    for row, box, flip in zip(plan.index, plan.box.tolist(), plan.flip, strict=True):
        image = images[row].permute(2, 0, 1)
        image = F.to_pil_image(image) if kind == "PIL" else image
        made = F.resized_crop(image, *box, [size, size], antialias=True)
        made = F.horizontal_flip(made) if flip else made
        out.append(F.pil_to_tensor(made) if kind == "PIL" else made)
    return torch.stack(out).permute(0, 2, 3, 1)


UNEQUAL = {"PIL": 0.1, "tensor": 0.2}  # share of values; without AVX2 torch's bytes round once
SHAPES = [(32, 32, 32), (32, 32, 24), (40, 57, 32), (96, 96, 64), (9, 130, 17), (64, 48, 2)]


@pytest.mark.parametrize("kind", ["PIL", "tensor"])
@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_a_level_from_torchvisions_of_noise(height, width, size, kind):
    """On noise, where roundings matter most; smooth images differ in fewer values.

    Pillow 13 begins with the columns at times, and torch rounds its weights otherwise.
    """
    images, plan = drawn(1, 95, height, width, size)
    made = resized_crop(images, plan, size)
    assert made.dtype == torch.uint8 and made.shape == (100, size, size, 3)
    apart = (made.int() - torchvisions(images, plan, size, kind).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < UNEQUAL[kind]
    # The bound means something: a box one pixel off is far outside.
    moved = planned(plan.index, plan.box - [0, 1, 0, 0], plan.flip, size)
    inside = plan.box[:, 1] > 0
    off = (made.int() - torchvisions(images, moved, size, kind).int()).abs()[inside]
    assert off.float().mean() > 2


@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_the_bytes_of_pil_in_two_steps(height, width, size):
    images, plan = drawn(2, 95, height, width, size)
    assert torch.equal(resized_crop(images, plan, size), pils(images, plan, size))


@pytest.mark.parametrize("size", [32, 45])
def test_the_bytes_of_torchvision_where_nothing_shrinks(size):
    images, plan = drawn(3, 95, 30, 32, size)
    made = resized_crop(images, plan, size)
    assert torch.equal(made, torchvisions(images, plan, size, "PIL"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bytes_of_pil_of_any_boxes(data):
    height, width, size = (data.draw(st.integers(1, most)) for most in (40, 40, 24))
    box = []
    for _ in range(data.draw(st.integers(1, 4))):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        box.append(
            [data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w]
        )
    index = [data.draw(st.integers(0, 2)) for _ in box]
    flip = [data.draw(st.booleans()) for _ in box]
    images = torch.from_numpy(noise(data.draw(st.integers(0, 99)), 3, height, width, 3))
    plan = planned(index, box, flip, size)
    assert torch.equal(resized_crop(images, plan, size), pils(images, plan, size))


def test_exact_to_the_largest_sums():
    """Nearly white images, 14 times smaller; white ones stay white at any size."""
    images = np.full((1, 8, 140, 3), 255, np.uint8)
    images[:, :, ::7] = noise(0, 1, 8, 20, 3)
    images = torch.from_numpy(images)
    plan = planned([0, 0], [[0, 0, 8, 140], [1, 3, 2, 137]], [False, True], 10)
    assert torch.equal(resized_crop(images, plan, 10), pils(images, plan, 10))
    for level in (0, 1, 127, 254, 255):
        flat = torch.full((1, 300, 700, 3), level, dtype=torch.uint8)
        for size in (1, 2, 3, 7, 33, 900):
            plan = planned([0, 0], [[0, 0, 300, 700], [5, 6, 31, 2]], [False, True], size)
            assert (resized_crop(flat, plan, size) == level).all()


def test_a_crop_of_the_size_is_the_crop():
    images = noise(0, 2, 20, 30, 3)
    plan = planned([1, 0], [[4, 7, 12, 12], [8, 0, 12, 12]], [False, True], 12)
    made = resized_crop(torch.from_numpy(images), plan, 12).numpy()
    assert np.array_equal(made[0], images[1, 4:16, 7:19])
    assert np.array_equal(made[1], images[0, 8:20, 0:12][:, ::-1])


def test_pieces_and_the_order_in_memory_change_nothing(monkeypatch):
    images, plan = drawn(5, 20, 30, 40, 16)
    whole = resized_crop(images, plan, 16)
    columns = images.transpose(1, 2).contiguous().transpose(1, 2)
    for pixels in (1, 7 * 30 * 40 * 3):
        monkeypatch.setattr(resize, "PIECE", pixels)
        for stored in (images, columns):
            assert torch.equal(resized_crop(stored, plan, 16), whole)
