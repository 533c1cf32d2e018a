"""COCO's layout: images in train2017/ and val2017/, boxes in annotations/instances_*.json."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
LAYOUT = "expected ROOT/annotations/instances_{train,val}2017.json, ROOT/train2017/, ROOT/val2017/"
NEEDED: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
MOST, LONGEST = 1 << 63, 1 << 20  # of a number; pixels of an image's side
SMALLEST = 1.0  # pixels; a box that is narrower or lower inside its image is left out


@dataclass(frozen=True)
class Coco:
    """One split of n images with m boxes, by the images' ids."""

    annotations: Path
    folder: Path
    names: list[str]  # files in `folder`
    ids: NDArray[np.int64]  # (n,) of the images
    sizes: NDArray[np.int64]  # (n, 2) height, width
    boxes: NDArray[np.float32]  # (m, 4) left, top, right, bottom in pixels, inside the image
    labels: NDArray[np.int64]  # (m,) 1 .. C; 0 is the background
    starts: NDArray[np.int64]  # (n + 1,) boxes starts[i]:starts[i + 1] are those of image i
    categories: dict[int, str]  # C ids as in the file, rising, with their names
    digest: str  # of all of the above but the paths

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> Path:
        """The file of image `row`."""
        return self.folder / self.names[row]

    def targets(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The boxes and labels of image `row`."""
        own = slice(self.starts[row], self.starts[row + 1])
        return self.boxes[own], self.labels[own]


def read_coco(root: Path, split: Split) -> Coco:
    """The images and boxes of one split; label k is the category with the k-th smallest id.

    Crowds and boxes without a pixel are left out, and of "train" the images that have no box
    then, as the published detectors are trained. Raises FileNotFoundError for a file or folder
    that is missing and ValueError naming the entry for annotations that are not COCO's.
    """
    annotations, folder = root / f"annotations/instances_{split}2017.json", root / f"{split}2017"
    if not folder.is_dir():
        raise FileNotFoundError(f"data.root={root}: no folder {folder.name}; {LAYOUT}")
    held = _load(annotations, root)
    try:
        categories = _categories(held)
        images = _images(held)
        found = _boxes(held, images, list(categories))
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from error
    rows = [images[i] for i in sorted(images) if split == "val" or found[i]]
    if not rows:
        raise ValueError(f"{annotations}: no image with a box that can be used")
    own = [found[row["id"]] for row in rows]
    counts = np.array([len(boxes) for boxes in own], np.int64)
    every = np.array([box for boxes in own for box in boxes], np.float64).reshape(-1, 5)
    names = [row["file_name"] for row in rows]
    _check_files(folder, names)
    ids = np.array([row["id"] for row in rows], np.int64)
    sizes = np.array([(row["height"], row["width"]) for row in rows], np.int64)
    boxes, labels = every[:, :4].astype(np.float32), every[:, 4].astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    digest = hashlib.sha256(json.dumps([names, list(categories.items())]).encode())
    for array in (ids, sizes, boxes, labels, starts):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Coco(
        annotations,
        folder,
        names,
        ids,
        sizes,
        boxes,
        labels,
        starts,
        categories,
        digest.hexdigest(),
    )


def check_same_categories(train: Coco, val: Coco) -> None:
    """ValueError where the splits' ids or names of categories differ."""
    if train.categories != val.categories:
        lone = sorted(set(train.categories.items()) ^ set(val.categories.items()))
        raise ValueError(
            f"{val.annotations}: its categories are not those of {train.annotations.name}: "
            f"{lone[:5]} stand in one of the two alone; both need the same ids and names"
        )


def _load(path: Path, root: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists of the file named in NEEDED, whose entries hold what is asked there."""
    try:
        held = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.root={root}: no file {path}; {LAYOUT}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    for part, keys in NEEDED.items():
        entries = held.get(part) if isinstance(held, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list {part!r}; instances_*2017.json of COCO has one")
        for number, entry in enumerate(entries):
            for name, kind in keys.items():
                value = entry.get(name) if isinstance(entry, dict) else None
                if type(value) is not kind:
                    raise ValueError(
                        f"{path}: {part}[{number}] has {name} {value!r}, wants {kind.__name__}"
                    )
    return held


def _categories(held: dict[str, list[dict[str, Any]]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in held["categories"]:
        if entry["id"] in found:
            raise ValueError(f"category id {entry['id']} stands twice")
        found[entry["id"]] = entry["name"]
    if not found:
        raise ValueError("no categories")
    return dict(sorted(found.items()))


def _images(held: dict[str, list[dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for entry in held["images"]:
        if entry["id"] in found:
            raise ValueError(f"image id {entry['id']} stands twice")
        if not -MOST < entry["id"] < MOST:
            raise ValueError(f"image id {entry['id']} is beyond 64 bits")
        for side in ("height", "width"):
            if not 1 <= entry[side] <= LONGEST:
                raise ValueError(
                    f"image id {entry['id']} has {side} {entry[side]}, wants 1 to {LONGEST} pixels"
                )
        found[entry["id"]] = entry
    return found


def _boxes(
    held: dict[str, list[dict[str, Any]]], images: dict[int, dict[str, Any]], ids: list[int]
) -> dict[int, list[tuple[float, ...]]]:
    """For each image its (left, top, right, bottom, label), in the order of the file."""
    labels = {category: label for label, category in enumerate(ids, 1)}
    found: dict[int, list[tuple[float, ...]]] = {image: [] for image in images}
    for number, entry in enumerate(held["annotations"]):
        where = f"annotations[{number}] (id {entry.get('id')})"
        if entry["image_id"] not in images:
            raise ValueError(f"{where}: there is no image {entry['image_id']}")
        if entry["category_id"] not in labels:
            raise ValueError(f"{where}: there is no category {entry['category_id']}")
        left, top, width, height = _four(entry["bbox"], where)
        image = images[entry["image_id"]]
        right, bottom = min(left + width, image["width"]), min(top + height, image["height"])
        left, top = max(left, 0.0), max(top, 0.0)
        whole = min(right - left, bottom - top) >= SMALLEST
        if whole and not entry.get("iscrowd"):
            label = labels[entry["category_id"]]
            found[entry["image_id"]].append((left, top, right, bottom, label))
    return found


def _four(box: list[Any], where: str) -> list[float]:
    numbers = all(type(v) in (int, float) and -MOST < v < MOST for v in box)
    if not numbers or len(box) != 4:
        raise ValueError(f"{where}: bbox {box!r}, wants [left, top, width, height] in pixels")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(f"{where}: bbox {box!r} has a negative width or height")
    return [float(v) for v in box]


def _check_files(folder: Path, names: list[str]) -> None:
    with os.scandir(folder) as entries:
        there = {entry.name for entry in entries}
    missing = [name for name in names if name not in there]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(names)} images are missing, the first is "
            f"{missing[0]}; add them or take them out of the annotations"
        )
