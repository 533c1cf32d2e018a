"""Reading one image file: what counts as readable, its size from the header, its pixels."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from functools import partial
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # what both decoders read, whatever the extension says
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
Opener = Callable[[], BinaryIO]  # opens the file: failing at that makes it unreadable too
FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class UnreadableError(Exception):
    """An image file that cannot be used; the text says why, without the file's name."""


def open_file(path: str) -> BinaryIO:
    """The file at `path`; OSError for what is none: a pipe would be waited for, and never end."""
    file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


def opener_of(path: str) -> Opener:
    """How to open a file that is an image as a whole."""
    return partial(open_file, path)


def decode(opener: Opener) -> Image.Image:
    """All pixels of a file as an RGB image, not rotated by EXIF; raises UnreadableError."""
    try:
        with opener() as file:
            return _open(file).convert("RGB")
    except FAULTS as error:
        raise UnreadableError(_reason(error)) from error


class Facts(NamedTuple):
    """What a file says of its pixels."""

    format: str  # as PIL names it; a JPEG with further images in it is an MPO
    mode: str
    width: int
    height: int
    adobe_transform: int | None  # of a JPEG with Adobe's marker: 0 none, 1 YCbCr, 2 YCCK


def examine(opener: Opener) -> Facts:
    """What the image is, after decoding it whole as `decode` does; raises UnreadableError."""
    try:
        with opener() as file:
            image = _open(file)
            facts = _facts(image)
            image.convert("RGB")
            return facts
    except FAULTS as error:
        raise UnreadableError(_reason(error)) from error


def jpeg_bytes(opener: Opener) -> tuple[bytes, Facts] | None:
    """A whole JPEG of one or three channels, grey or YCbCr, undecoded, with its header's facts.

    None for any other file, one that ends otherwise or cannot be read among them.
    """
    try:
        with opener() as file:
            image = _open(file)
            facts = _facts(image)
            stored = facts.mode == "L" or (facts.mode == "RGB" and facts.adobe_transform != 0)
            if facts.format != "JPEG" or not stored or not _ends_well(file, facts.format):
                return None
            file.seek(0)
            return file.read(), facts
    except FAULTS:
        return None


def inspect(opener: Opener) -> tuple[int, int]:
    """Height and width from the header; raises UnreadableError.

    A file that does not end as its format does may be cut short, which a decoder of a small crop
    would notice or not by chance, so such a file is decoded whole.
    """
    try:
        with opener() as file:
            image = _open(file)
            if not _ends_well(file, image.format):
                image.load()
            return image.height, image.width
    except FAULTS as error:
        raise UnreadableError(_reason(error)) from error


def _open(file: BinaryIO) -> Image.Image:
    if file.seek(0, os.SEEK_END) == 0:
        raise ValueError("the file is empty")
    file.seek(0)
    image = Image.open(file, formats=FORMATS)
    if image.mode not in MODES:
        raise ValueError(f"mode {image.mode} is not 8 bits a channel")
    return image


def _facts(image: Image.Image) -> Facts:
    transform = image.info.get("adobe_transform")
    return Facts(str(image.format), image.mode, *image.size, transform)


def _ends_well(file: BinaryIO, kind: str | None) -> bool:
    end = ENDS.get(kind or "")
    if end is None:
        return False
    place = file.tell()
    file.seek(-len(end), os.SEEK_END)
    found = file.read() == end
    file.seek(place)
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
