"""The tars of one split on its way into a packed set: each whole, with a record, or absent."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .contents import Files
from .durable import whole_file
from .images import UnreadableError, decode
from .manifest import Manifest
from .plan import Ints, permutation
from .shard_record import FORMAT, Record, made_before, to_json


@dataclass(frozen=True)
class Work:
    """One split on its way to the target."""

    manifest: Manifest
    plan: dict[str, Any]  # what decides every byte, but for images that cannot be read
    source: Path
    place: Path  # TARGET/train
    part: Path  # TARGET/.train.part

    @property
    def whole(self) -> Path:
        return self.part / "whole"

    def name(self, row: int) -> str:
        """<class>/<file> of a row."""
        return "/".join(self.manifest.name(row).split(os.sep)[-2:])


def pack(work: Work, told: Callable[[int], None]) -> Record:
    """Make every tar that a killed run did not finish; what all of them hold."""
    _begin(work)
    n, shards = work.plan["images"], work.plan["shards"]
    parts = np.array_split(permutation(work.plan["seed"], 0, n), shards)
    names = _member_names(work)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        make = partial(_shard, work, names, told)
        made = list(pool.map(make, range(shards), parts))
    finally:
        pool.shutdown(cancel_futures=True)  # one error ends the others at their next shard
    skipped = {name: why for one in made for name, why in one.pop("skipped").items()}
    return {
        "format": FORMAT,
        "plan": work.plan,
        "images": sum(one["images"] for one in made),
        "resized": sum(one.pop("resized") for one in made),
        "skipped": dict(sorted(skipped.items())),
        "shards": made,
    }


def _begin(work: Work) -> None:
    """Keep what a killed run of the same plan finished, clear away what one of another did."""
    kept = work.part / "plan.json"
    plan = to_json(work.plan)
    if kept.is_file() and kept.read_bytes() == plan:
        return
    kept.unlink(missing_ok=True)  # first: the rest is no longer of its plan
    for path in work.part.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    work.whole.mkdir()
    with whole_file(kept, work.part / "plan.json.part") as file:
        file.write(plan)


def _member_names(work: Work) -> list[str]:
    """<class>/<file> of each row; one that is made a JPEG is named as one."""
    names = []
    for row in range(work.plan["images"]):
        name = work.name(row)
        jpeg = name.lower().endswith((".jpg", ".jpeg"))
        names.append(name if jpeg or not _shrinks(work, row) else f"{name}.jpg")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{work.source / work.plan['split'] / twice} has the name that its neighbour "
            f"{twice.removesuffix('.jpg')} gets as a JPEG; rename one"
        )
    return names


def _shrinks(work: Work, row: int) -> bool:
    side = work.plan["short_side"]
    return side is not None and bool(work.manifest.sizes[row].min() > side)


def _shard(
    work: Work, names: list[str], told: Callable[[int], None], number: int, rows: Ints
) -> Record:
    """Make one tar, unless its record says that it is there and nothing of it was left out."""
    tar = work.whole / f"{number:05d}.tar"
    kept = work.part / f"{number:05d}.json"
    record = made_before(kept)
    if record is not None and not record["skipped"]:
        told(len(rows))
        return record  # else what could not be read is tried again
    skipped: dict[str, str] = {}
    digest, images, resized = hashlib.sha256(), 0, 0
    with whole_file(tar, work.part / f"{tar.name}.part") as file:
        hashed: Any = _Hashed(file, digest)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.GNU_FORMAT) as out:
            for row in rows.tolist():
                try:
                    data = _image(work, row)
                except UnreadableError as error:
                    skipped[work.name(row)] = str(error)
                else:
                    info = tarfile.TarInfo(names[row])
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))
                    images, resized = images + 1, resized + _shrinks(work, row)
                told(1)
    record = {
        "name": tar.name,
        "images": images,
        "bytes": tar.stat().st_size,
        "sha256": digest.hexdigest(),
        "resized": resized,
        "skipped": skipped,
    }
    with whole_file(kept, work.part / f"{kept.name}.part") as file:
        file.write(to_json(record))
    return record


@dataclass(frozen=True)
class _Hashed:
    """What tarfile writes into; it seeks nowhere."""

    file: BinaryIO
    digest: hashlib._Hash

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _image(work: Work, row: int) -> bytes:
    """The file of a row as it goes into the tar; UnreadableError unless it can be decoded whole."""
    content = work.manifest.content
    changed = content.changed(row)
    if changed is not None:
        raise UnreadableError(changed)
    assert isinstance(content, Files)
    try:
        with content.open(row) as file:
            data = file.read()
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    image = decode(partial(io.BytesIO, data))
    if not _shrinks(work, row):
        return data
    short = min(image.size)
    width, height = (work.plan["short_side"] * side // short for side in image.size)
    small, made = image.resize((width, height), Image.Resampling.BICUBIC), io.BytesIO()
    small.save(made, "JPEG", quality=work.plan["quality"])
    return made.getvalue()
