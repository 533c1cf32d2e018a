"""Files that are damaged or mean harm, made of sound ones, and what a reader may do with them."""

import random
import re
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEGABYTES = 200
# In place of a number or a text: what JSON, YAML and Python read in ways of their own.
ODD = [b"-1", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"0.5", b"[]", b"{}", b"null", b'"x"']
ODD += [b"true", b"[" * 1200, b"\xff\xfe", b'"\\ud800"', b"\0"]


def damaged(whole: bytes, count: int) -> Iterator[bytes]:
    """So many copies with flipped, lost, doubled or foreign bytes, or with odd values."""
    chance = random.Random(len(whole))
    values = [m.span() for m in re.finditer(rb'-?\d[\d.e+-]*|"[^"\n]*"|[a-z]{2,}', whole)]
    for number in range(count):
        raw = bytearray(whole)
        if number % 4 == 0 and values:
            begin, end = chance.choice(values)
            raw[begin:end] = chance.choice(ODD)
        for _ in range(0 if number % 4 == 0 and values else chance.choice((1, 1, 2, 5))):
            at, length = chance.randrange(len(raw) + 1), chance.choice((1, 4, 8, 100, 512))
            kind = chance.randrange(6)
            if kind == 0 and at < len(raw):
                raw[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                raw[at : at + length] = bytes([chance.choice((0, 128, 255))]) * length
            elif kind == 2:
                del raw[at : at + length]
            elif kind == 3:
                raw[at:at] = chance.randbytes(length)
            elif kind == 4:
                raw[at:at] = raw[at : at + length]
            else:
                del raw[at:]
        yield bytes(raw)


@contextmanager
def frugal() -> Iterator[None]:
    """What Python and NumPy ask for meanwhile stays below MEGABYTES."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES * 1e6
    finally:
        tracemalloc.stop()


def survives(
    read: Callable[[], Any],
    path: Path,
    count: int,
    *allowed: type[Exception],
    pack: Callable[[bytes], bytes] = bytes,
    unpack: Callable[[bytes], bytes] = bytes,
    told: str = "",
) -> int:
    """How many damaged copies of the file at `path` are refused: by one of the errors that are
    allowed, which names the file (or says `told`), and never by another.

    What is damaged is what `unpack` makes of the file; `pack` makes a file of it.
    """
    whole = path.read_bytes()
    refused = 0
    with frugal():
        for raw in damaged(unpack(whole), count):
            path.write_bytes(pack(raw))
            try:
                read()
            except allowed as error:
                assert path.name in str(error) or (told and told in str(error)), raw
                refused += 1
            except Exception as error:
                raise AssertionError(f"{error!r} of {raw!r}") from error
    path.write_bytes(whole)
    return refused
