"""The images of a folder as JSON lines, and how a folder differs from such a list."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import TypeAdapter

from ..recipe import problems
from .check import Image
from .durable import whole_file

IMAGE = TypeAdapter(Image)


def write_listing(images: list[Image], out: Path) -> None:
    """One JSON object a line with the fields of `Image`; the file is there whole or not at all."""
    with whole_file(out, out.with_name(f"{out.name}.tmp-{os.getpid()}")) as file:
        for image in images:
            file.write(json.dumps(image._asdict()).encode() + b"\n")


def read_listing(path: Path) -> list[Image]:
    """What `write_listing` wrote; ValueError names the first line that is none of its."""
    images = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            images.append(IMAGE.validate_python(json.loads(line), strict=True))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} line {number} is not of a list that `kdfuse data check --out` wrote "
                f"({problems.first(error)}); write it anew"
            ) from error
    return images


def differences(before: list[Image], now: list[Image]) -> list[tuple[str, str]]:
    """Paths that are missing, new or changed (other length or checksum), sorted, each with which.

    A file that cannot be read now is changed.
    """
    old, new = ({image.path: image for image in images} for images in (before, now))
    found = [(path, "missing") for path in old.keys() - new.keys()]
    found += [(path, "new") for path in new.keys() - old.keys()]
    for path in old.keys() & new.keys():
        if new[path].sha256 is None or new[path].sha256 != old[path].sha256:
            found.append((path, "changed"))
    return sorted(found)
