"""A set of 100 classes that any machine makes by itself: characters in the fonts of matplotlib.

Each image is a character under a random affine map, over a piece of another one, in random colours,
with blur and noise: a pure function of split and row, but for the FreeType and Pillow versions.
A mirror makes some characters others (b and d), so recipes set data.flip to false.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ...recipe.data import Data
from ..manifest import Manifest
from ..plan import key, uniforms
from .splits import SPLITS, Split, in_memory, root_of

# No two that a change of size or slant makes the same, such as O and 0, c and C, Latin A and Alpha.
CHARACTERS = (
    "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabdefghijmnqrty"
    "\u0393\u0394\u0398\u039b\u039e\u03a0\u03a3\u03a6\u03a8\u03a9"  # Gamma to Omega
    "\u03b2\u03b4\u03b5\u03b6\u03b7\u03bb\u03bc\u03be\u03c0\u03c1\u03c3\u03c4\u03c9"  # to omega
    "#$%&@+=?!*\u00a7\u00b6\u00a9\u00a3\u00a5\u20ac\u00b1\u00f7"
    "\u221e\u222b\u221a\u2202\u2207\u2200\u2203\u2248\u2260\u2192"  # infinity to the arrow
)
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *("STIXGeneral", "STIXGeneralBol"),  # the slanted ones lack the mathematical signs
)
SIDE = 32  # pixels
FINE = 2 * SIDE  # glyphs are drawn and mapped at twice the size
IMAGES = 50_000  # for training, unless the recipe says otherwise; a fifth of it for validation
CHUNK = 500  # images that one thread draws at a time
VERSION = 1  # of the drawing: another one has files of another name
STREAM = 0x676C797068  # keeps the draws from those of the sampler
MAP, COLOURS, NOISE = 8, 9, SIDE * SIDE * 3
OTHERS = 4  # blur, grain, distance and class of the other character
DRAWS = 2 * MAP + COLOURS + OTHERS + NOISE  # of an image
Floats = NDArray[np.float64]
Images = NDArray[np.uint8]


def open_glyphs(data: Data, split: Split) -> Manifest:
    """The images of one split, drawn first where they are not."""
    return in_memory(data, split, *read_glyphs(root_of(data), data.images, split))


def write_glyphs(root: Path, images: int | None = None) -> Path:
    """Draw the set into one file under root and return its path; nothing where it stands.

    The file appears at once and whole, or not at all; several processes may write at a time.
    ValueError where a damaged or another file has its name.
    """
    train = IMAGES if images is None else images
    path = Path(root) / f"glyphs-{VERSION}-{train}.npz"
    if path.exists():
        for split in SPLITS:
            _load(path, split, _count(train, split))
        return path
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        arrays[split] = draw(split, np.arange(_count(train, split)))
        arrays[f"{split}_sha256"] = np.array(_digest(arrays[split]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def read_glyphs(
    root: Path, images: int | None, split: Split
) -> tuple[Images, NDArray[np.int64], list[str]]:
    """Images (n, 32, 32, 3), labels (n,) and the classes' names."""
    train = IMAGES if images is None else images
    count = _count(train, split)
    path = Path(root) / f"glyphs-{VERSION}-{train}.npz"
    if not path.exists():
        write_glyphs(root, train)
    return _load(path, split, count), labels(np.arange(count)), list(CHARACTERS)


def labels(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The classes of these rows, in turn."""
    return rows % len(CHARACTERS)


def draw(split: Split, rows: NDArray[np.int64]) -> Images:
    """The images of these rows of a split: (n, 32, 32, 3) uint8. Drawn on all cores."""
    atlas = _atlas()
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda chunk: _draw(atlas, split, chunk), chunks))
    return np.concatenate(parts)


def _count(train: int, split: Split) -> int:
    return train if split == "train" else max(train // 5, len(CHARACTERS))


def _draw(atlas: list[list[Image.Image]], split: Split, rows: NDArray[np.int64]) -> Images:
    stream = key(STREAM, SPLITS.index(split))
    u = uniforms(stream, rows[:, None] * DRAWS + np.arange(DRAWS))
    main, other, rest = np.split(u, [MAP, 2 * MAP], axis=1)
    colours = rest[:, :COLOURS].reshape(-1, 3, 1, 1, 3)
    blur, grain, distance, stray = rest[:, COLOURS : COLOURS + OTHERS].T
    paper, ink, second = colours[:, 0], colours[:, 1], colours[:, 2]
    # Light on dark: with either on either, small networks stay at chance for thousands of steps.
    paper, ink = 0.5 * paper, 0.5 + 0.5 * ink
    glyph, piece = np.empty((2, len(rows), SIDE, SIDE, 1))
    for i, label in enumerate(labels(rows)):
        sigma = 0.25 + 0.75 * float(blur[i])
        glyph[i, :, :, 0] = _mapped(atlas, label, main[i], 0.0, sigma)
        away, of = 0.42 + 0.2 * distance[i], int(stray[i] * len(CHARACTERS))
        piece[i, :, :, 0] = _mapped(atlas, of, other[i], away, sigma)
    image = paper + piece * (second - paper)
    image = image + glyph * (ink - image)
    noise = rest[:, COLOURS + OTHERS :].reshape(-1, SIDE, SIDE, 3) - 0.5
    image = image + (0.1 + 0.3 * grain[:, None, None, None]) * noise
    return (255 * image.clip(0, 1)).astype(np.uint8)


def _mapped(
    atlas: list[list[Image.Image]], label: int, u: Floats, away: float, sigma: float
) -> Floats:
    """Coverage (32, 32) of a glyph in a random font, size, slant and place.

    `away`: distance from the middle, share of the side, in a random direction.
    """
    angle = (u[1] - 0.5) * 1.0
    shear = (u[2] - 0.5) * 0.8
    size = 0.6 * np.exp2(u[3] * 0.8)
    stretch = np.exp2((u[4] - 0.5) * 0.7)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    lean = np.array([[1.0, shear], [0.0, 1.0]])
    back = np.linalg.inv(size * turn @ lean @ np.diag([stretch, 1 / stretch]))
    direction = 2 * np.pi * u[7]
    place = (u[5:7] - 0.5) * 0.3 + away * np.array([np.cos(direction), np.sin(direction)])
    middle = np.full(2, FINE / 2)
    start = middle - back @ (middle + place * FINE)
    rows = np.concatenate([back, start[:, None]], axis=1)
    image = atlas[int(u[0] * len(FONTS))][label].transform(
        (FINE, FINE), Image.Transform.AFFINE, tuple(rows.ravel()), Image.Resampling.BILINEAR
    )
    image = image.filter(ImageFilter.GaussianBlur(2 * sigma)).reduce(2)
    return np.asarray(image) / 255


def _atlas() -> list[list[Image.Image]]:
    """Every character in every font, (64, 64) coverage, its ink in the middle."""
    import matplotlib  # half a second to import, needed once

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [[_glyph(font, text) for text in CHARACTERS] for font in _fonts(folder)]


def _fonts(folder: Path) -> list[ImageFont.FreeTypeFont]:
    for name in FONTS:
        if not (folder / f"{name}.ttf").is_file():
            raise FileNotFoundError(f"{folder} has no {name}.ttf; install matplotlib from PyPI")
    basic = ImageFont.Layout.BASIC
    return [
        ImageFont.truetype(folder / f"{name}.ttf", 3 * FINE // 4, layout_engine=basic)
        for name in FONTS
    ]


def _glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (FINE, FINE))
    place = ((FINE - left - right) / 2, (FINE - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, text, fill=255, font=font)
    return image


def _load(path: Path, split: Split, count: int) -> Images:
    try:
        with zipfile.ZipFile(path) as held:
            images = _array(held, split, np.dtype(np.uint8), (count, SIDE, SIDE, 3))
            digest = _array(held, f"{split}_sha256", np.dtype("<U64"), ()).item()
    except Exception as error:  # damage shows as nearly any error
        raise ValueError(_refused(path, str(error) or repr(error))) from error
    if _digest(images) != digest:
        raise ValueError(_refused(path, f"the pixels of {split} do not match their digest"))
    return images


def _array(
    held: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """An array that `np.savez` wrote; its size is checked before memory is asked for."""
    with held.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of another format")
        its_shape, columns_first, its_dtype = np.lib.format.read_array_header_1_0(file)
        if (its_shape, columns_first, its_dtype) != (shape, False, dtype):
            raise ValueError(f"{name} is {its_dtype} {its_shape}")
        raw = bytearray(file.read(math.prod(shape) * dtype.itemsize))
    return np.frombuffer(raw, dtype).reshape(shape)


def _refused(path: Path, why: str) -> str:
    return f"{path} is not what `kdfuse data glyphs` wrote ({why}); delete it to have it drawn anew"


def _digest(images: Images) -> str:
    return hashlib.sha256(images.data).hexdigest()
