"""Ten kinds of bad image before every loader, there from the start or since the run began."""

import io
import shutil
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.loaders.nvjpeg import NvjpegLoader
from kdfuse.engine.data.schedule import Schedule
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.recipe.data import Data

SIDE, IMAGES, ROW = 40, 12, 3
LOADERS = ["torchvision", "nvjpeg", "resident"] + (["dali"] if find_spec("nvidia.dali") else [])


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def huge():
    """A PNG that says it has 10^9 pixels."""
    head = struct.pack(">IIBBBBB", 32768, 32768, 8, 2, 0, 0, 0)

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


WHOLE = encoded(picture(), quality=95)
BAD = {
    "empty": b"",
    "one byte": b"\xff",
    "HTML": b"<html><body>404 Not Found</body></html>",
    "half": WHOLE[: len(WHOLE) // 2],
    "without its end": WHOLE[:-30],
    "header alone": WHOLE[:200],
    "zeros": bytes(len(WHOLE)),
    "of 10^9 pixels": huge(),
    "16 bits": encoded(Image.new("I;16", (SIDE, SIDE)), "PNG"),
    "a tar": b"a.jpg" + bytes(95) + b"0000644" + bytes(924),
}


@pytest.fixture
def root(tmp_path):
    for seed in range(IMAGES):
        path = tmp_path / "train" / ("cat", "dog")[seed >= IMAGES // 2] / f"{seed:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed), quality=95))
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    return tmp_path


def batches(root, name, manifest=None):
    """Rows and pixels of an epoch, and the loader's list of bad rows."""
    decode = "gpu" if name == "nvjpeg" else "auto"
    loader = "torchvision" if name == "nvjpeg" else name
    data = Data(
        source="folder", root=root, size=32, augment="pad_crop", loader=loader, decode=decode
    )
    manifest = open_source(data, "train") if manifest is None else manifest(data)
    if name == "nvjpeg":  # which make_loader gives to a GPU alone
        made = NvjpegLoader(Schedule(manifest, data, 4, seed=0, train=True), torch.device("cpu"))
    else:
        made = make_loader(manifest, data, 4, seed=0, train=True)
    found = list(made.epoch(0))
    made.close()
    rows = torch.cat([batch.index for batch in found])
    return rows, torch.cat([batch.images for batch in found]), made.quarantine.bad


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", LOADERS)
def test_it_is_named_and_replaced(name, kind, later, root):
    clean = batches(root, name)
    path = root / "train" / "cat" / f"{ROW:02d}.jpg"

    def damaged(data):
        manifest = open_source(data, "train") if later else None
        path.write_bytes(BAD[kind])
        return manifest or open_source(data, "train")

    with pytest.warns(UserWarning, match=f"unreadable image {path} .*{ROW + 1:02d}.jpg takes"):
        rows, pixels, bad = batches(root, name, damaged)
    assert list(bad) == [ROW]
    assert rows.tolist() == [ROW + 1 if row == ROW else row for row in clean[0].tolist()]
    others = clean[0] != ROW
    assert torch.equal(pixels[others], clean[1][others])
