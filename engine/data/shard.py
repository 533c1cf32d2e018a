"""An image folder packed into shuffled tars: every image decoded once, a split in place at once.

TARGET/.train.part holds a split while it is made: `plan.json`, the lock, for each finished tar a
record, and the tars in `whole/`. Renaming `whole` to TARGET/train ends it, so no reader ever sees a
part, and a run that was killed goes on with the tars that have a record.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..recipe.data import Data
from .contents import Files
from .durable import sync, whole_file
from .shard_record import RECORD, Record, read_record, to_json, wrong_lengths
from .shard_tars import Work, pack
from .sources import open_source
from .sources.splits import SPLITS, Split

SHARD_MB = 256.0
QUALITY = 90
MOST = 99_999  # shards, for names of five digits
SHOWN = 20  # images named in an error
Told = Callable[[int, int], None]  # images done since the last call, and all that there are


@dataclass(frozen=True)
class Packing:
    """How a folder is packed. ValueError for settings that exclude each other or have no effect."""

    shards: int | None = None  # tars of each split
    shard_mb: float | None = None  # or about so many MB (1e6 bytes) of the source in each
    short_side: int | None = None  # pixels; images above it are made smaller
    quality: int | None = None  # of the JPEGs that are made smaller; None: QUALITY
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.shards is not None and self.shard_mb is not None:
            raise ValueError(
                f"--shards {self.shards} and --shard-mb {self.shard_mb:g} both set the number of "
                "tars; leave one out"
            )
        if self.quality is not None and self.short_side is None:
            raise ValueError(
                f"--quality {self.quality}: images are copied as they are without --short-side; "
                "leave it out or add --short-side"
            )


def shard_folder(
    source: Path,
    target: Path,
    packing: Packing,
    splits: tuple[Split, ...] = SPLITS,
    told: Told = lambda done, total: None,
) -> list[Record]:
    """Pack SOURCE/{train,val}/<class>/* into TARGET/{train,val}/*.tar; the record of each split.

    Row i of the tars is row permutation(seed, 0, n)[i] of the folder sorted by class and name. A
    tar's members are <class>/<file>, the files' bytes as they are; with `short_side` images whose
    short side is larger are decoded, resized (bicubic, antialiased) and written as JPEG. A split
    that is there with the same plan stays as it is. FileNotFoundError and ValueError as of the
    source; ValueError too for images that cannot be decoded whole (unless `skip_bad` leaves them
    out), for a class without any other, for a target with other content or in use by another.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in the source {source}; name a folder outside of it")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a new folder")
    works = [_work(source, target, packing, split) for split in splits]
    for work in works:
        _there(work, packing)
    with ExitStack() as locks:
        todo = []
        for work in works:
            work.part.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_alone(work.part))
            if _there(work, packing):
                shutil.rmtree(work.part)  # of a run that was killed after its last rename
            else:
                todo.append(work)
        total = sum(len(work.manifest.target) for work in todo)
        packed = [pack(work, lambda done: told(done, total)) for work in todo]
        pairs = zip(todo, packed, strict=True)
        problems = [line for pair in pairs for line in _problems(*pair, packing)]
        if problems:
            raise ValueError("\n".join([*problems, "nothing was put into place"]))
        for work, record in zip(todo, packed, strict=True):
            _put(work, record)
    if all((target / split).is_dir() for split in SPLITS):
        for split in SPLITS:  # keeps the index and the sizes in the user's cache
            open_source(Data.model_validate({"source": "tar", "root": target}), split)
    return [read_record(work.place) for work in works]


def _work(source: Path, target: Path, packing: Packing, split: Split) -> Work:
    manifest = open_source(Data.model_validate({"source": "folder", "root": source}), split)
    assert isinstance(manifest.content, Files)
    n = len(manifest.target)
    shards, option = packing.shards, "--shards"
    if shards is None:
        megabytes = SHARD_MB if packing.shard_mb is None else packing.shard_mb
        shards = math.ceil(int(manifest.content.lengths.sum()) / (1e6 * megabytes))
        shards, option = min(max(shards, 1), n), "--shard-mb"
    if shards > min(n, MOST):
        cure = "lower it" if option == "--shards" else "raise it"
        raise ValueError(
            f"{option}: {shards} tars of the {n} images in {source / split}, at most "
            f"{min(n, MOST)} can be made; {cure}"
        )
    side, quality = packing.short_side, packing.quality
    plan = {
        "split": split,
        "source": manifest.digest,
        "images": n,
        "shards": shards,
        "seed": packing.seed,
        "short_side": side,
        "quality": None if side is None else QUALITY if quality is None else quality,
    }
    return Work(manifest, plan, source, target / split, target / f".{split}.part")


def _there(work: Work, packing: Packing) -> bool:
    """Whether the split is in place as asked for; ValueError where something else is."""
    place = work.place
    if not place.exists() or not any(place.iterdir()):
        return False
    if not (place / RECORD).is_file():
        raise ValueError(f"{place} holds other files; name a new folder")
    record = read_record(place)
    other = [
        f"{key} {record['plan'].get(key)}, now {value}"
        for key, value in work.plan.items()
        if record["plan"].get(key) != value
    ]
    other += [f"{path.name}: {why}" for path, why in wrong_lengths(place, record)]
    if record["skipped"] and not packing.skip_bad:
        other.append(f"{len(record['skipped'])} images left out, now --skip-bad is not given")
    if other:
        raise ValueError(
            f"{place} was packed otherwise ({'; '.join(other[:SHOWN])}); name a new folder or "
            "remove it"
        )
    return True


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Nobody else works there; the lock goes with its process, however that ends."""
    with open(part / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{part} is in use by another `kdfuse data shard`; wait for its end"
            ) from error
        yield


def _problems(work: Work, record: Record, packing: Packing) -> list[str]:
    """What of a split could not be read although it has to be there."""
    skipped = record["skipped"]
    where = work.source / work.plan["split"]
    if skipped and not packing.skip_bad:
        more = [f"and {len(skipped) - SHOWN} more"] if len(skipped) > SHOWN else []
        return [
            f"{len(skipped)} unreadable images in {where}; repair or remove them, or leave them "
            "out with --skip-bad (tars that are done are kept for that):",
            *[f"{where}/{name}: {why}" for name, why in list(skipped.items())[:SHOWN]],
            *more,
        ]
    left_out = Counter(name.split("/")[0] for name in skipped)
    counts = np.bincount(work.manifest.target)
    return [
        f"no image of class {name!r} in {where} can be read; repair them"
        for name, count in zip(work.manifest.classes, counts, strict=True)
        if left_out[name] == count
    ]


def _put(work: Work, record: Record) -> None:
    with whole_file(work.whole / RECORD, work.part / f"{RECORD}.part") as file:
        file.write(to_json(record))
    os.rename(work.whole, work.place)
    sync(work.place.parent)
    shutil.rmtree(work.part)
