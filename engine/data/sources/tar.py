"""Images in tars: one tar a class, a folder a class inside the tars, or KEY.jpg with KEY.cls."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from ...recipe.data import Data
from ..contents import Shards
from ..images import EXTENSIONS
from ..manifest import Manifest, digest_of
from .header_cache import fact
from .image_sizes import sizes_of
from .splits import OTHER, Split, check_classes, root_of, rows_kept
from .tar_index import UNLABELLED, Index, Ints, read_index

LAYOUT = "expected ROOT/train/*.tar and ROOT/val/*.tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
Stats = list[tuple[str, int, int]]  # path, modification time in ns and length of each tar


def open_shards(data: Data, split: Split) -> Manifest:
    """The images of one split, sorted by class and name as in an image folder.

    The digest is that of the image folder with the same images, where classes have names.
    """
    root = root_of(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder; {LAYOUT}")
    stats = _tars(root, split)
    index = read_index(stats)
    classes, target, kind = _classes(root / split, stats, index)
    theirs = _tars(root, OTHER[split])
    others, _, _ = _classes(root / OTHER[split], theirs, read_index(theirs))
    check_classes(data, str(root / split), kind, split, classes, others)
    order = np.array(
        sorted(range(len(target)), key=lambda i: (target[i], index.names[i], index.tar[i]))
    )
    order = order[rows_kept(data, split, target[order], classes)]
    target, names = target[order], [index.names[i] for i in order]
    content = Shards(
        [path for path, _, _ in stats],
        [length for _, _, length in stats],
        names,
        index.tar[order],
        index.offset[order],
        index.length[order],
    )
    tars = [fact(*stat) for stat in stats]
    facts = [f"{tars[index.tar[i]]}\0{index.offset[i]}\0{index.length[i]}" for i in order]
    sizes, bad = sizes_of(facts, [partial(content.open, row) for row in range(len(order))])
    places = [
        f"{split}/{classes[label]}/{name.rpartition('/')[2]}"
        for label, name in zip(target, names, strict=True)
    ]
    digest = digest_of(places, target, sizes, content.lengths)
    return Manifest(content, target, sizes, classes, digest, bad)


def _tars(root: Path, split: Split) -> Stats:
    """The tars of a split, by name."""
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(f"data.root={root} has no folder {split!r}; {LAYOUT}")
    found: Stats = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.endswith(COMPRESSED):
                raise ValueError(
                    f"{entry.path} is compressed, so its images cannot be read one by one; unpack "
                    "it to a plain .tar"
                )
            if entry.name.endswith(".tar"):
                if not entry.is_file():
                    raise ValueError(f"{entry.path} is no file; remove it, or put a tar there")
                stat = entry.stat()
                found.append((entry.path, stat.st_mtime_ns, stat.st_size))
    if not found:
        raise ValueError(f"{folder} holds no .tar; {LAYOUT}")
    return found


def _classes(folder: Path, stats: Stats, index: Index) -> tuple[list[str], Ints, str]:
    """Names of the classes, the number of each image's class, and what stands for a class."""
    labelled = index.label != UNLABELLED
    if not index.names:
        raise ValueError(
            f"the tars in {folder} hold no image ({', '.join(EXTENSIONS)}); where they hold tars, "
            f"unpack those into {folder}"
        )
    if labelled.any():
        if not labelled.all():
            row = int(labelled.argmin())
            raise ValueError(f"{_name(stats, index, row)} has no KEY.cls, though others have one")
        row = int(index.label.argmax())
        if index.label[row] >= len(index.label):
            raise ValueError(
                f"{_name(stats, index, row)}: its KEY.cls holds {index.label[row]}, and there are "
                f"{len(index.label)} images; number the classes from 0 without a gap"
            )
        counts = np.bincount(index.label)
        if not counts.all():
            raise ValueError(
                f"{folder}: the KEY.cls go up to {len(counts) - 1}, but none is "
                f"{int(counts.argmin())}; number the classes from 0 without a gap"
            )
        return [str(number) for number in range(len(counts))], index.label, "number"
    owners = [name.rpartition("/")[0].rpartition("/")[2] for name in index.names]
    kind = "folder"
    if not any(owners):
        kind = "tar"
        owners = [Path(stats[tar][0]).stem for tar in index.tar]
    elif not all(owners):
        alone, held = owners.index(""), next(row for row, owner in enumerate(owners) if owner)
        raise ValueError(
            f"{_name(stats, index, held)} lies in the folder of its class and "
            f"{_name(stats, index, alone)} in none; give every image such a folder, or none"
        )
    classes = sorted(set(owners))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers[owner] for owner in owners], np.int64), kind


def _name(stats: Stats, index: Index, row: int) -> str:
    return f"{stats[index.tar[row]][0]}/{index.names[row]}"
