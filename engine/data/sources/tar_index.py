"""Where the images of tars lie: read from the tars' headers once, kept in the user's cache."""

from __future__ import annotations

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ..images import EXTENSIONS, UnreadableError
from .header_cache import THREADS, fact, keep, kept, kept_under
from .tar_headers import Headers

GZIP = b"\x1f\x8b"
PACKED = tuple(f"{extension}.gz" for extension in EXTENSIONS)
UNLABELLED = -1
LONGEST_LABEL = 18  # bytes: below 2^63
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """An image in a tar."""

    name: str
    offset: int  # of its first byte in the tar
    length: int
    label: int  # what KEY.cls holds, or UNLABELLED


@dataclass(frozen=True)
class Index:
    """The images of several tars, tar by tar in the tars' own order."""

    names: list[str]
    tar: Ints  # (n,) number of the tar
    offset: Ints
    length: Ints
    label: Ints


def read_index(stats: list[tuple[str, int, int]]) -> Index:
    """The images of these tars; `stats`: path, modification time in ns and length of each.

    ValueError names the first tar that cannot be read, the reason and the cure.
    """
    place = kept_under("tars-2", [fact(*stat) for stat in stats])
    index = _index_of(kept(place))
    if index is None:
        with ThreadPoolExecutor(THREADS) as pool:
            index = _joined(list(pool.map(_members, [path for path, _, _ in stats])))
        keep(place, _bytes_of(index), "the tars' members")
    return index


def members(path: str) -> list[Member]:
    """The images of one tar in its order; UnreadableError says why not, without the tar's name."""
    try:
        with open(path, "rb") as file:
            if file.read(len(GZIP)) == GZIP:
                raise UnreadableError(
                    "compressed, so its images cannot be read one by one; gunzip it"
                )
            file.seek(0)
            infos = list(headers := Headers(file))
            # tarfile takes a damaged header, and the end of the file, for the end of the tar.
            file.seek(headers.end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UnreadableError(
                    f"truncated or damaged after byte {headers.end}; make or download it again"
                )
            labels = {_key(i.name): _label(file.fileno(), i) for i in infos if _is_label(i)}
    except tarfile.TarError as error:
        raise UnreadableError(f"not a whole tar ({error}); make or download it again") from error
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    images = [info for info in infos if not info.isdir() and _is_image(info)]
    names = [_name(info) for info in images]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableError(f"member {twice} is there twice; make the tar again")
    return [
        Member(name, info.offset_data, info.size, labels.get(_key(info.name), UNLABELLED))
        for name, info in zip(names, images, strict=True)
    ]


def _members(path: str) -> list[Member]:
    try:
        return members(path)
    except UnreadableError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_image(info: tarfile.TarInfo) -> bool:
    """Whether a member is an image; UnreadableError for one that cannot be read in place."""
    name = info.name.lower()
    if "\0" in name:
        raise UnreadableError(f"member {info.name!r} has a name that no file can have")
    if name.endswith(PACKED):
        raise UnreadableError(f"member {info.name} is gzipped; make the tar of plain images")
    if not name.endswith(EXTENSIONS):
        return False
    if info.issparse():
        raise UnreadableError(f"member {info.name} is sparse; make the tar without --sparse")
    if not info.isreg():
        raise UnreadableError(
            f"member {info.name} is a link; make the tar with --dereference --hard-dereference"
        )
    return True


def _is_label(info: tarfile.TarInfo) -> bool:
    return info.isreg() and info.name.endswith(".cls")


def _label(file: int, info: tarfile.TarInfo) -> int:
    text = os.pread(file, min(info.size, LONGEST_LABEL), info.offset_data).strip()
    if info.size > LONGEST_LABEL or not text.isdigit():
        raise UnreadableError(
            f"member {info.name} holds {text[:20]!r}, wants the number of a class, from 0"
        )
    return int(text)


def _name(info: tarfile.TarInfo) -> str:
    return str(PurePosixPath(info.name))  # without the ./ that `tar -C DIR .` writes


def _key(name: str) -> str:
    """What the members of one sample have in common: the path to the first dot of its last part."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _joined(found: list[list[Member]]) -> Index:
    every = [member for one in found for member in one]
    return Index(
        [member.name for member in every],
        np.repeat(np.arange(len(found)), [len(one) for one in found]),
        np.array([member.offset for member in every], np.int64),
        np.array([member.length for member in every], np.int64),
        np.array([member.label for member in every], np.int64),
    )


def _bytes_of(index: Index) -> bytes:
    names = np.frombuffer(os.fsencode("\0".join(index.names)), np.uint8)
    columns = np.stack([index.tar, index.offset, index.length, index.label])
    np.savez(file := io.BytesIO(), names=names, columns=columns)
    return file.getvalue()


def _index_of(known: bytes | None) -> Index | None:
    if known is None:
        return None
    with np.load(io.BytesIO(known), allow_pickle=False) as held:
        text, columns = os.fsdecode(held["names"].tobytes()), held["columns"]
    return Index(text.split("\0") if text else [], *columns)
