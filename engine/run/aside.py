"""Folders that are whole or not there: written aside, then renamed.

"NAME.tmp-PID" is one being written by process PID, "NAME.old-PID" one being replaced.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from glob import escape
from pathlib import Path

from .disk import new_file, sync

_ASIDE = re.compile(r"(.+)\.(tmp|old)-(\d+)")


def aside(path: Path) -> Path:
    """Where this process writes the folder that is to be at `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def find(path: Path) -> Path:
    """The folder `path`, or what it was to replace where a writer was killed between renames."""
    replaced = [] if path.is_dir() else sorted(path.parent.glob(f"{escape(path.name)}.old-*"))
    return replaced[-1] if replaced else path


def replace(new: Path, target: Path) -> None:
    """Put the folder `new` at `target`. A folder cannot be renamed over a full one: two renames."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    if old.exists():
        shutil.rmtree(old)


def link(source: Path, target: Path) -> None:
    """Make the folder `target`, durable, with the files of `source`, which are.

    They are hard links, or copies on a file system that has none.
    """
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # said in many ways; a disk that fails does so again
            with file.open("rb") as held, new_file(target / file.name) as copy:
                shutil.copyfileobj(held, copy)
    sync(target)


def clear(folder: Path) -> None:
    """Clear what dead writers left; a replaced folder whose successor never came returns."""
    for path in sorted(folder.iterdir()):
        found = _ASIDE.fullmatch(path.name)
        if found is None or not path.is_dir() or _alive(int(found[3])):
            continue
        target = path.with_name(found[1])
        if found[2] == "old" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path)


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # ours are from an earlier life: in a container the number comes back
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:  # of a living process: it is another user's
        return error.errno != errno.ESRCH
    return True
