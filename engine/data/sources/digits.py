"""scikit-learn's handwritten digits as a folder of JPEG files, for runs that need real images."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ...recipe.data import Data
from ..manifest import Manifest
from .folder import open_folder
from .splits import Split, root_of

SIDE = 32  # pixels
VAL_EVERY = 5  # every fifth image of a class is validation


def open_digits(data: Data, split: Split) -> Manifest:
    """The images of one split, written first where they are not."""
    write_digits(root_of(data))
    return open_folder(data, split)


def write_digits(root: Path) -> None:
    """Write root/{train,val}/<digit>/*.jpg, 1797 images of 32 x 32; nothing where they stand.

    The folder appears at once and whole, or not at all; several processes may write at a time.
    ValueError where root holds something else.
    """
    root = Path(root)
    if _written(root):
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"data.root={root} holds other files; name a new folder for the digits")
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, root)
    except OSError:
        if not _written(root):  # else another process was first, with the same files
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _written(root: Path) -> bool:
    return (root / "train").is_dir() and (root / "val").is_dir()


def _write(folder: Path) -> None:
    from sklearn.datasets import load_digits  # a second to import, needed once

    bunch = load_digits()
    seen = [0] * 10
    for number, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        split = "val" if seen[label] % VAL_EVERY == VAL_EVERY - 1 else "train"
        seen[label] += 1
        path = folder / split / str(label) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(image * (255 / 16)).astype(np.uint8)  # (8, 8), 0..16 in the source
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(
            path, quality=95
        )
