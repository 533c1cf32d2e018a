"""CIFAR-10 and CIFAR-100 from the files of the official archives, unpacked or not.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html describes both versions.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...recipe.data import Data
from ..manifest import Manifest
from .plain_pickle import UnpicklingError, load_plain
from .splits import Split, in_memory, root_of
from .tar_headers import Headers

SIDE = 32  # pixels
BYTES = 3 * SIDE * SIDE  # of an image: the red plane, the green, the blue
LARGEST = 1 << 28  # bytes of a file; the largest official one has 155,249,918
Part = tuple[NDArray[np.uint8], NDArray[np.int64]]  # (n, BYTES) and (n,)


@dataclass(frozen=True)
class Version:
    """One of the two official archives of a set, and how its files are read."""

    folder: str
    archive: str
    parts: dict[Split, tuple[str, ...]]
    names: str  # file with the classes' names
    read: Callable[[bytes], Part]
    read_names: Callable[[bytes], list[str]]


def open_cifar(data: Data, split: Split) -> Manifest:
    """The images of one split, as `read_cifar` finds them."""
    return in_memory(data, split, *read_cifar(data.source, root_of(data), split))


def read_cifar(
    source: str, root: Path, split: Split
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Images (n, 32, 32, 3) and labels (n,; fine ones) in the archive's order, and class names.

    `root` is the archive's folder, or holds it, or holds the archive itself, which is read without
    unpacking. FileNotFoundError names what was looked for; ValueError names a damaged file.
    """
    place, version = _find(source, root)
    wanted = (*version.parts[split], version.names)
    files = _from_archive(place, version, wanted) if place.is_file() else _from(place, wanted)
    classes = _parsed(place / version.names, version.read_names, files[version.names])
    found = [
        _parsed(place / name, lambda raw: _checked(version.read(raw), len(classes)), files[name])
        for name in version.parts[split]
    ]
    planes = np.concatenate([pixels for pixels, _ in found]).reshape(-1, 3, SIDE, SIDE)
    target = np.concatenate([labels for _, labels in found])
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), target, classes


def _find(source: str, root: Path) -> tuple[Path, Version]:
    """The folder or the archive to read, and which of the set's versions it is."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.root={root} is not a folder; name the one that holds "
            f"{VERSIONS[source][0].folder} or {VERSIONS[source][0].archive}"
        )
    looked = []
    for version in VERSIONS[source]:
        first = version.parts["train"][0]
        folder, archive = root / version.folder, root / version.archive
        if folder.is_dir():
            return folder, version
        if (root / first).is_file():
            return root, version
        if archive.is_file():
            return archive, version
        looked += [f"{version.folder}/", first, version.archive]
    raise FileNotFoundError(
        f"data.root={root} holds no {source}: looked for {', '.join(looked)}; unpack the official "
        "archive there, or put it there as it is"
    )


def _from(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; unpack the official archive anew")
        _check_size(folder / name, (folder / name).stat().st_size)
    return {name: (folder / name).read_bytes() for name in names}


def _from_archive(path: Path, version: Version, names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of these names, in one pass over the archive."""
    found = {}
    try:
        with gzip.open(path) as file:
            for info in Headers(file):
                folder, _, name = info.name.removeprefix("./").partition("/")
                if folder == version.folder and name in names and info.isreg():
                    _check_size(path / folder / name, info.size)
                    file.seek(info.offset_data)
                    found[name] = file.read(info.size)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    for name in names:
        if name not in found:
            raise FileNotFoundError(
                f"{path} does not hold {version.folder}/{name}; download the official archive"
            )
    return found


def _check_size(path: Path, size: int) -> None:
    """Before that much memory is asked for."""
    if size > LARGEST:
        raise ValueError(
            f"{path}: {size} bytes, the official files have at most {LARGEST}; unpack or download "
            "the archive again"
        )


def _parsed(path: Path, parse: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return parse(raw)
    except (UnpicklingError, ValueError) as error:
        raise ValueError(f"{path}: {error}; unpack or download the archive again") from error


def _checked(part: Part, classes: int) -> Part:
    pixels, target = part
    if not len(target):
        raise ValueError("no image")
    if target.min() < 0 or target.max() >= classes:
        raise ValueError(f"labels {target.min()} to {target.max()} of {classes} classes")
    return part


def _binary(labels: int) -> Callable[[bytes], Part]:
    """Records of so many labels, the last of which counts, and an image."""
    record = labels + BYTES

    def read(raw: bytes) -> Part:
        if len(raw) % record:
            raise ValueError(f"{len(raw)} bytes, wants a multiple of {record}")
        table = np.frombuffer(raw, np.uint8).reshape(-1, record)
        return table[:, labels:], table[:, labels - 1].astype(np.int64)

    return read


def _pickled(key: str) -> Callable[[bytes], Part]:
    """A dict with `data` and, under `key`, the list of labels."""

    def read(raw: bytes) -> Part:
        entries = _entries(raw)
        pixels, target = entries.get("data"), entries.get(key)
        if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (BYTES,):
            raise ValueError(f"'data' is not an array of {BYTES} bytes an image")
        if not isinstance(target, list) or not all(_is_label(label) for label in target):
            raise ValueError(f"{key!r} is not a list of classes' numbers")
        if len(target) != len(pixels):
            raise ValueError(f"{len(pixels)} images with {len(target)} labels")
        return pixels, np.array(target, np.int64)

    return read


def _is_label(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _pickled_names(key: str) -> Callable[[bytes], list[str]]:
    def read(raw: bytes) -> list[str]:
        names = _entries(raw).get(key)
        if not isinstance(names, list) or not names:
            raise ValueError(f"{key!r} is not a list of names")
        return [_text(name) for name in names]

    return read


def _entries(raw: bytes) -> dict[str, Any]:
    """A pickled dict; Python 2 wrote its keys as bytes."""
    entries = load_plain(raw)
    if not isinstance(entries, dict):
        raise ValueError("not a dict")
    return {_text(name): value for name, value in entries.items()}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} is not a name")
    return value


def _lines(raw: bytes) -> list[str]:
    return raw.decode("latin1").split()


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
VERSIONS = {
    "cifar10": (
        Version(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            {"train": BATCHES, "val": ("test_batch",)},
            "batches.meta",
            _pickled("labels"),
            _pickled_names("label_names"),
        ),
        Version(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            {"train": tuple(f"{name}.bin" for name in BATCHES), "val": ("test_batch.bin",)},
            "batches.meta.txt",
            _binary(labels=1),
            _lines,
        ),
    ),
    "cifar100": (
        Version(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            {"train": ("train",), "val": ("test",)},
            "meta",
            _pickled("fine_labels"),
            _pickled_names("fine_label_names"),
        ),
        Version(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            {"train": ("train.bin",), "val": ("test.bin",)},
            "fine_label_names.txt",
            _binary(labels=2),
            _lines,
        ),
    ),
}
