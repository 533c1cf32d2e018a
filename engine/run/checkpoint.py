"""Checkpoints that survive a crash at any moment: a folder written aside, then renamed.

A checkpoint folder holds state.pt (tensors and plain values), facts.json (what a person wants to
read) and sha256.json (the checksums of both). "NAME.tmp-PID" is one being written by process PID,
"NAME.old-PID" one being replaced; a dead process's are cleared away by the next save.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STATE, FACTS, SUMS = "state.pt", "facts.json", "sha256.json"
_STEP = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"(.+)\.(tmp|old)-(\d+)")

# Exact types, because a subclass (numpy.float64 is a float) would be refused when it is loaded.
_PLAIN = (type(None), bool, int, float, str, bytes)

# What torch.load raises for intact bytes that hold anything but tensors and plain values.
_REFUSED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or cannot be used; the text names the file."""


class Latest(NamedTuple):
    """The newest usable checkpoint, and a line for each newer one that is not."""

    path: Path
    state: dict[str, Any]
    facts: dict[str, Any]
    skipped: list[str]


def step_name(step: int) -> str:
    """The name of the checkpoint after `step` steps; names sort as the steps do."""
    return f"step-{step:08d}"


def save(
    folder: str | Path, name: str, tensors: dict[str, Any], facts: dict[str, Any], *, keep: int = 2
) -> Path:
    """Write the checkpoint `folder`/`name`, replacing one of that name; the path of the new one.

    `tensors` may hold tensors, plain values and dicts, lists and tuples of them; `facts` what JSON
    can. After a `step_name` the newest `keep` of those stay, and no later step does: the run has
    gone on from an earlier one. Other names ("best") are never pruned. One process of a run saves.
    Raises TypeError or ValueError for what could not be loaded again, before anything is written,
    and CheckpointError when the disk is full or fails; what was there before is then still there.
    """
    if keep < 1:
        raise ValueError(f"keep: {keep}; at least the checkpoint just written has to stay")
    _check_plain(tensors, "tensors")
    torch.save(tensors, state := io.BytesIO())
    contents = {STATE: state.getvalue(), FACTS: _json(facts)}
    contents[SUMS] = _json({file: sha256(data).hexdigest() for file, data in contents.items()})
    folder = Path(folder)
    aside = folder / f"{name}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        aside.mkdir()
        for file, data in contents.items():
            _write(aside / file, data)
        _sync(aside)
        _replace(aside, folder / name)
        _sync(folder)
        _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        problem = _explain(error, folder, sum(map(len, contents.values())))
        raise CheckpointError(f"checkpoint {folder / name}: {problem}") from error
    if _STEP.fullmatch(name):
        _prune(folder, name, keep)
    return folder / name


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors (on the CPU) and the facts of the checkpoint folder `path`, checksums verified.

    Never runs code from a checkpoint. Raises CheckpointError naming the file that is missing,
    damaged or refused.
    """
    path = find(Path(path))
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder")
    data, facts = verified(path, STATE, FACTS)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _REFUSED as error:
        raise CheckpointError(f"checkpoint {path}: {STATE} is refused: {error}") from error
    return state, _parse(path, FACTS, facts)


def find(path: Path) -> Path:
    """The folder `path`, or what it was to replace where a writer was killed between renames."""
    replaced = [] if path.is_dir() else sorted(path.parent.glob(f"{escape(path.name)}.old-*"))
    return replaced[-1] if replaced else path


def verified(path: Path, *files: str) -> list[bytes]:
    """What these files of the folder `path` hold; CheckpointError names one missing or damaged."""
    sums = _parse(path, SUMS, _read(path, SUMS))
    contents = [_read(path, file) for file in files]
    for file, data in zip(files, contents, strict=True):
        if sums.get(file) != sha256(data).hexdigest():
            raise CheckpointError(f"checkpoint {path}: {file} does not match its checksum")
    return contents


def latest(folder: str | Path) -> Latest | None:
    """The newest `step_name` checkpoint in `folder` that can be used; None when there is none.

    One that cannot be used is passed over for the one before and named in `skipped`. Raises
    CheckpointError when there are checkpoints and none can be used. Changes nothing on disk.
    """
    skipped: list[str] = []
    for path in reversed(_steps(Path(folder))):
        try:
            state, facts = load(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return Latest(path, state, facts, skipped)
    if skipped:
        raise CheckpointError("no checkpoint can be used:\n  " + "\n  ".join(skipped))
    return None


def _check_plain(value: Any, where: str) -> None:
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in _PLAIN:
                raise TypeError(f"{where}: the key {key!r} is a {type(key).__name__}")
            _check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif kind not in (*_PLAIN, Tensor, nn.Parameter):
        raise TypeError(f"{where}: a {kind.__name__}; store a tensor or a plain value instead")


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _read(path: Path, file: str) -> bytes:
    try:
        return (path / file).read_bytes()
    except OSError as error:
        why = f"{file} cannot be read: {error.strerror}"
        raise CheckpointError(f"checkpoint {path}: {why}") from error


def _parse(path: Path, file: str, data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {file} is damaged: {error}") from error


def _explain(error: OSError, folder: Path, size: int) -> str:
    text = f"cannot write {error.filename}: {error.strerror}; earlier checkpoints are intact"
    if error.errno in _FULL:
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        text += f"; it takes {size / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB free"
    return text


def _write(path: Path, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a failed write, unlike a failed open, does not name its file
        raise


def _sync(folder: Path) -> None:
    """Make the names in `folder` durable; without it a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, target: Path) -> None:
    """Put the folder `new` at `target`. A folder cannot be renamed over a full one: two renames."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    if old.exists():
        shutil.rmtree(old)


def _clear(folder: Path) -> None:
    """Clear what dead writers left; a replaced checkpoint whose successor never came returns."""
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


def _prune(folder: Path, name: str, keep: int) -> None:
    steps = _steps(folder)
    here = next(i for i, path in enumerate(steps) if path.name == name)
    for path in steps[: max(here + 1 - keep, 0)] + steps[here + 1 :]:
        shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    """Step checkpoints, oldest first; [] when there is no such folder."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))
