"""A full decode of every image under a folder, to find bad files before a run does."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from .byte_range import open_range
from .images import EXTENSIONS, Opener, UnreadableError, decode, opener_of
from .sources.tar_index import members

Found = tuple[str, Opener]  # an image's name and how to open it


def check_folder(root: Path) -> list[tuple[Path, str]]:
    """Unreadable images anywhere under root, sorted, each with the reason.

    Every file, and every image in a .tar (named as if the tar were a folder), is decoded whole, on
    all cores. FileNotFoundError where root is not a folder, ValueError where it holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name the folder of the images")
    found: list[Found] = []
    faults: list[tuple[str, str]] = []
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = os.path.join(folder, name)
            if name.lower().endswith(EXTENSIONS):
                found.append((path, opener_of(path)))
            elif name.endswith(".tar"):
                try:
                    found += _members(path)
                except UnreadableError as error:
                    faults.append((path, str(error)))
    if not found and not faults:
        raise ValueError(f"{root} holds no image ({', '.join(EXTENSIONS)}, or such in a .tar)")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(_fault, [opener for _, opener in found])
        faults += [
            (name, why) for (name, _), why in zip(found, reasons, strict=True) if why is not None
        ]
    return [(Path(name), why) for name, why in sorted(faults)]


def _members(tar: str) -> list[Found]:
    return [
        (f"{tar}/{member.name}", partial(open_range, tar, member.offset, member.length))
        for member in members(tar)
    ]


def _fault(opener: Opener) -> str | None:
    try:
        decode(opener)
    except UnreadableError as error:
        return str(error)
    return None
