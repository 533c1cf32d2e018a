"""Disks that are full, read-only or without links, as file systems of their own in memory."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int):
    """A file system of `size` bytes at `folder`; the test is skipped where mount is refused."""
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    except (FileNotFoundError, PermissionError) as error:
        pytest.skip(f"needs a disk of its own: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())


def fill(folder: Path, left: int = 0) -> Path:
    """Take all of a disk but `left` bytes, in whole pages: the file that does."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - left)
    return filler
