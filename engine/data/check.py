"""A full decode of every image under a folder, to find bad files before a run does."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .byte_range import open_range
from .images import ENDS, EXTENSIONS, Opener, UnreadableError, examine, opener_of
from .shard_record import RECORD, faults_of
from .sources.splits import SPLITS
from .sources.tar_index import UNLABELLED, Member, members

BATCH = 64  # images a job of the pool
PARTS = tuple(f".{split}.part" for split in SPLITS)  # of a set that is being packed
KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
Told = Callable[[int, int], None]  # images done since the last call, and all that there are


class Image(NamedTuple):
    """One image file, or member of a tar (named as if the tar were a folder)."""

    path: str  # relative to the folder that was checked, with /
    bytes: int | None  # None, as sha256, where the file could not be read at all
    format: str | None  # this and what follows up to height: None where it cannot be decoded
    mode: str | None
    width: int | None
    height: int | None
    sha256: str | None  # of the file


class _Found(NamedTuple):
    path: str
    owner: str  # the class that a source would give it
    open: Opener


class _Seen(NamedTuple):
    image: Image
    fault: str | None
    odd: list[str]


@dataclass(frozen=True)
class Report:
    """What was found; all lists are sorted by path."""

    images: list[Image]
    faults: list[tuple[Path, str]]  # what cannot be read, or is not what its checksum says
    warnings: list[tuple[Path, str]]  # what can be read, but not by everybody alike
    classes: int = field(kw_only=True)

    def summary(self) -> list[str]:
        """Lines for people: how many images of which kind, and how large they are."""
        formats: dict[str, int] = {}
        for image in self.images:
            kind = image.format or "unreadable"
            formats[kind] = formats.get(kind, 0) + 1
        kinds = ", ".join(f"{formats[kind]} {kind}" for kind in sorted(formats))
        told = [f"{len(self.images)} images of {self.classes} classes: {kinds}"]
        for what, unit, values in (
            ("width", "pixels", [image.width for image in self.images]),
            ("height", "pixels", [image.height for image in self.images]),
            ("file", "bytes", [image.bytes for image in self.images]),
        ):
            known = [value for value in values if value is not None]
            if known:
                middle = median(known)
                told.append(f"{what} {min(known)} to {max(known)} {unit}, median {middle:g}")
        return told


def check_folder(root: Path, told: Told = lambda done, total: None) -> Report:
    """Decode every image under root whole, and those in .tar files there, on all cores.

    A shards.json (see `shard_record`) is held against the tars beside it. FileNotFoundError where
    root is not a folder, ValueError where it holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name the folder of the images")
    found: list[_Found] = []
    faults: list[tuple[Path, str]] = []
    warnings: list[tuple[Path, str]] = []
    packed: list[Path] = []
    for folder, folders, names in os.walk(root, followlinks=True):
        for part in sorted(set(folders) & set(PARTS)):
            folders.remove(part)
            why = "left by a `kdfuse data shard` that did not end; run it again, or remove it"
            warnings.append((Path(folder, part), why))
        packed += [Path(folder)] * (RECORD in names)
        for name in names:
            path = os.path.join(folder, name)
            if name.lower().endswith(EXTENSIONS):
                owner = os.path.basename(folder)
                found.append(_Found(_relative(path, root), owner, opener_of(path)))
            elif name.endswith(".tar"):
                try:
                    found += _members(path, root)
                except UnreadableError as error:
                    faults.append((Path(path), str(error)))
    if not found and not faults:
        begun = "".join(f"; {path}: {why}" for path, why in warnings)
        kinds = ", ".join(EXTENSIONS)
        raise ValueError(f"{root} holds no image ({kinds}, or such in a .tar){begun}")
    found.sort(key=lambda one: one.path)
    images = []
    for image, fault, odd in _see_all(found, told):
        images.append(image)
        if fault is not None:
            faults.append((root / image.path, fault))
        warnings += [(root / image.path, why) for why in odd]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for wrong in pool.map(faults_of, packed):
            faults += wrong
    owners = {one.owner for one in found}
    return Report(images, sorted(faults), sorted(warnings), classes=len(owners))


def _relative(path: str, root: Path) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def _members(tar: str, root: Path) -> Iterator[_Found]:
    place = _relative(tar, root)
    for member in members(tar):
        opener = partial(open_range, tar, member.offset, member.length)
        yield _Found(f"{place}/{member.name}", _owner(tar, member), opener)


def _owner(tar: str, member: Member) -> str:
    if member.label != UNLABELLED:
        return str(member.label)
    return os.path.basename(os.path.dirname(member.name)) or Path(tar).stem


def _see_all(found: list[_Found], told: Told) -> Iterator[_Seen]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [found[at : at + BATCH] for at in range(0, len(found), BATCH)]
        for seen in pool.map(lambda job: [_see(one) for one in job], jobs):
            told(len(seen), len(found))
            yield from seen


def _see(found: _Found) -> _Seen:
    nothing = (None, None, None, None)
    try:
        with found.open() as file:
            data = file.read()
    except OSError as error:
        image = Image(found.path, None, *nothing, None)
        return _Seen(image, error.strerror or str(error), [])
    digest = hashlib.sha256(data).hexdigest()
    try:
        facts = examine(partial(io.BytesIO, data))
    except UnreadableError as error:
        return _Seen(Image(found.path, len(data), *nothing, digest), str(error), [])
    image = Image(
        found.path, len(data), facts.format, facts.mode, facts.width, facts.height, digest
    )
    odd = []
    kind = "JPEG" if facts.format == "MPO" else facts.format
    extension = os.path.splitext(found.path)[1]
    if kind != KINDS[extension.lower()]:
        odd.append(f"holds a {kind}, though its name ends in {extension}; it is read as a {kind}")
    if kind == "JPEG" and facts.mode == "CMYK":
        inks = "YCCK" if facts.adobe_transform == 2 else "CMYK"
        odd.append(f"a JPEG of {inks}, whose colours decoders differ in; save it as RGB")
    if kind == "PNG" and ENDS["PNG"] not in data:
        odd.append("a PNG without its end, though all of its pixels are there; save it anew")
    return _Seen(image, None, odd)
