"""Checkpoints that survive a crash at any moment: a folder written aside, then renamed.

A checkpoint folder holds state.pt (tensors and plain values), facts.json (what a person wants to
read) and sha256.json (the checksums of both). What a dead process left aside is cleared away by the
next save. The files of "best" may be hard links to those of a step's checkpoint: none is ever
changed in place.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor, nn

from .aside import aside, clear, find, link, replace
from .disk import FULL, check_room, new_file, shortage, sync

STATE, FACTS, SUMS = "state.pt", "facts.json", "sha256.json"
BEST = "best"
_STEP = re.compile(r"step-(\d{8,})")

# Exact types, because a subclass (numpy.float64 is a float) would be refused when it is loaded.
_PLAIN = (type(None), bool, int, float, str, bytes)

# What torch.load raises for intact bytes that hold anything but tensors and plain values.
_REFUSED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError)


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
    folder: str | Path,
    name: str,
    tensors: dict[str, Any],
    facts: dict[str, Any],
    *,
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Write the checkpoint `folder`/`name`, replacing one of that name; the path of the new one.

    `tensors` may hold tensors, plain values and dicts, lists and tuples of them; `facts` what JSON
    can. After a `step_name` the newest `keep` of those stay, and no later step does: the run has
    gone on from an earlier one. Other names ("best") are never pruned. With `best` it is
    `folder`/best as well: hard links to the same files, which stay when the step is pruned, or
    copies where the file system has no links. One process of a run saves.

    Raises TypeError or ValueError for what could not be loaded again, before anything is written,
    and CheckpointError when the disk is full or fails; what was there before is then still there.
    """
    if keep < 1:
        raise ValueError(f"keep: {keep}; at least the checkpoint just written has to stay")
    _check_plain(tensors, "tensors")
    about, size = _json(facts), _size(tensors)
    folder = Path(folder)
    step, linked = aside(folder / name), aside(folder / BEST)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        check_room(folder, size)
        step.mkdir()
        with new_file(step / STATE) as state:
            torch.save(tensors, cast(BinaryIO, state))  # which asks no more of it
        with new_file(step / FACTS) as written:
            written.write(about)
        sums = {STATE: state.sum.hexdigest(), FACTS: written.sum.hexdigest()}
        with new_file(step / SUMS) as written:
            written.write(_json(sums))
        sync(step)
        if best:
            # First: a run that goes on from this step will not write that best again.
            link(step, linked)
            replace(linked, folder / BEST)
            sync(folder)
        replace(step, folder / name)
        sync(folder)
        sync(folder.parent)
    except OSError as error:
        for unfinished in (step, linked):
            shutil.rmtree(unfinished, ignore_errors=True)
        problem = _explain(error, folder, size)
        raise CheckpointError(f"checkpoint {folder / name}: {problem}") from error
    if _STEP.fullmatch(name):
        try:
            _prune(folder, name, keep)
        except OSError as error:
            problem = f"written, but {error.filename} cannot be removed: {error.strerror}"
            raise CheckpointError(f"checkpoint {folder / name}: {problem}") from error
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


def verified(path: Path, *files: str) -> list[bytes]:
    """What these files of the folder `path` hold; CheckpointError names one missing or damaged."""
    sums = _parse(path, SUMS, _read(path, SUMS))
    contents = [_read(path, file) for file in files]
    for file, data in zip(files, contents, strict=True):
        if sums.get(file) != sha256(data).hexdigest():
            raise CheckpointError(f"checkpoint {path}: {file} does not match its checksum")
    return contents


def latest(folder: str | Path, before: int | None = None) -> Latest | None:
    """The newest `step_name` checkpoint in `folder` that can be used; None when there is none.

    With `before` only those of fewer steps than that are looked at.
    One that cannot be used is passed over for the one before and named in `skipped`. Raises
    CheckpointError when there are checkpoints and none can be used. Changes nothing on disk.
    """
    skipped: list[str] = []
    for path in reversed(_steps(Path(folder))):
        if before is not None and _step(path) >= before:
            continue
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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def _size(tensors: dict[str, Any]) -> int:
    """Bytes of the tensors, of each storage once, as they are written."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(tensors))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _explain(error: OSError, folder: Path, size: int) -> str:
    text = f"cannot write {error.filename}: {error.strerror}; earlier checkpoints are intact"
    if error.errno in FULL:
        text += f"; its tensors alone take {shortage(folder, size)}"
    return text


def _prune(folder: Path, name: str, keep: int) -> None:
    steps = _steps(folder)
    here = next(i for i, path in enumerate(steps) if path.name == name)
    for path in steps[: max(here + 1 - keep, 0)] + steps[here + 1 :]:
        shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    """Step checkpoints, oldest first; [] when there is no such folder."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
