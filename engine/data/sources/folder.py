"""The image folder: ROOT/{train,val}/<class>/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ...recipe.data import Data
from ..contents import Files
from ..images import EXTENSIONS
from ..manifest import Manifest, digest_of
from .image_sizes import read_sizes
from .splits import OTHER, Split, check_classes, root_of, rows_kept

LAYOUT = "expected ROOT/train/<class>/*.jpg and ROOT/val/<class>/*.jpg"


def open_folder(data: Data, split: Split) -> Manifest:
    """The images of one split, sorted by class and name."""
    root = root_of(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder; {LAYOUT}")
    classes = _classes(root, split)
    others = _classes(root, OTHER[split])
    check_classes(data, str(root / split), "folder", split, classes, others)
    found = [_files(root / split / name) for name in classes]
    target = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    rows = rows_kept(data, split, target, classes)
    every = [stat for files in found for stat in files]
    stats, target = [every[row] for row in rows], target[rows]
    sizes, bad = read_sizes(stats)
    paths = [path for path, _, _ in stats]
    lengths = np.array([length for _, _, length in stats], np.int64)
    names = [os.path.relpath(path, root) for path in paths]
    digest = digest_of(names, target, sizes, lengths)
    return Manifest(Files(paths, lengths), target, sizes, classes, digest, bad)


def _classes(root: Path, split: Split) -> list[str]:
    """Sorted names of the class folders of a split."""
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(f"data.root={root} has no folder {split!r}; {LAYOUT}")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise ValueError(
            f"{folder} holds no class folders; {LAYOUT}: move each image into a folder of its class"
        )
    return names


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Path, modification time in ns and length of the images in one class folder, by name.

    Both are 0 of what leads nowhere, whose header cannot be read then.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
                try:
                    stat = entry.stat()
                except OSError:
                    found.append((entry.path, 0, 0))
                else:
                    found.append((entry.path, stat.st_mtime_ns, stat.st_size))
    if not found:
        raise ValueError(
            f"class folder {folder} holds no image ({', '.join(EXTENSIONS)}); add its images or "
            "remove the folder from both train and val"
        )
    return sorted(found)
