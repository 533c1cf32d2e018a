"""The members of a tar of unknown origin: Python's reader takes the sizes in headers on trust."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from gzip import GzipFile
from typing import Any, BinaryIO

LONGEST = 1 << 20  # bytes of what a header has beside its block: a long name, attributes
Bytes = BinaryIO | GzipFile


class Headers:
    """The members of a tar that is not compressed, once, in its order; then `end` is their end.

    Raises tarfile.TarError for whatever is wrong with a header, OSError as the file does.
    """

    def __init__(self, file: Bytes) -> None:
        self._file = file
        self.end = 0  # bytes

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        careful: Any = _Careful(self._file)
        try:
            tar = tarfile.TarFile(fileobj=careful)
            for info in tar:
                # Python's reader would go back, and find the same members for ever.
                if info.size < 0 or tar.offset <= info.offset:
                    raise tarfile.ReadError(f"member {info.name} has {info.size} bytes")
                yield info
            self.end = tar.offset
        except (tarfile.TarError, OSError):
            raise
        except Exception as error:  # damage shows as nearly any error
            raise tarfile.ReadError(repr(error)) from error


class _Careful:
    """All that tarfile uses of a file, but for reads that no header needs."""

    def __init__(self, file: Bytes) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)
