"""Weights from a file: finds them in the usual layouts and refuses, in words, what does not fit."""

from __future__ import annotations

import io
import pickle
import re
import struct
import tarfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..run.aside import find
from ..run.checkpoint import STATE, SUMS, CheckpointError, verified
from .matching import Unmatched, in_order, renamed

Match = Literal["names", "order"]

_HOLDERS = ("student", "model", "state_dict")  # a run of this engine, published teachers, others
_PREFIXES = ("module.", "_orig_mod.")  # left by data parallelism and by torch.compile
_SHOWN = 3  # keys of each kind that a message lists

# Accuracies stored as NumPy scalars stand beside the weights of published teachers. These can
# only make numbers. The function that does has one name in NumPy 1 and another in NumPy 2.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]

# What torch.load raises for bytes that are not a checkpoint, depending on where it notices.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
)


@dataclass(frozen=True)
class Difference:
    """How weights from a file differ from what a network holds."""

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # key: (file's, network's)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    name: str,
    num_classes: int,
    known: Mapping[str, Callable[[int], nn.Module]],
    match: Match = "names",
) -> None:
    """Copy the weights at `path` (see `read_weights`) into `model`, which is left alone on errors.

    `name` and `num_classes` say in messages what the model is; `known` are the networks that
    weights which do not fit are compared with. Raises ValueError when a key is missing,
    unexpected or of another shape. BatchNorm's step counter may be missing. With `match` "order"
    names may differ (see `matching.in_order`), and what was paired is printed.
    """
    weights = read_weights(path)
    difference = compare(weights, model)
    if difference and match == "order":
        weights = renamed(weights, model, name, path)
    elif difference:
        problem = _explain(difference, weights, model, name, num_classes, known)
        raise ValueError(f"checkpoint {path}: {problem}")
    model.load_state_dict(weights)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict, on the CPU, held by a file, by a checkpoint folder, or by a run's best one.

    The file may hold it directly or under "student", "model" or "state_dict"; the prefixes that
    wrappers leave on every key are removed. Only tensors and plain values are loaded, never code.
    Raises FileNotFoundError or ValueError.
    """
    file = locate(Path(path))
    held = _load(file, path)
    candidates = [held]
    if isinstance(held, Mapping):
        candidates += [held[key] for key in _HOLDERS if key in held]
    for candidate in candidates:
        if _is_state(candidate):
            return _strip(candidate)
    keys = f"the keys {_first(map(str, held))}" if isinstance(held, Mapping) else type(held)
    raise ValueError(
        f"checkpoint {path}: no state dict in it, directly or under {', '.join(_HOLDERS)}; "
        f"it holds {keys}"
    )


def compare(weights: Mapping[str, Tensor], model: nn.Module) -> Difference:
    """What keeps `weights` from being loaded into `model`; false when nothing does."""
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in weights and not k.endswith(".num_batches_tracked")]
    shapes = {
        key: (tuple(weights[key].shape), tuple(tensor.shape))
        for key, tensor in wanted.items()
        if key in weights and weights[key].shape != tensor.shape
    }
    return Difference(missing, [key for key in weights if key not in wanted], shapes)


def locate(path: Path) -> Path:
    """The file of weights that a file, a checkpoint folder or a run's folder stands for.
    FileNotFoundError where there is none."""
    if path.is_file():
        return path
    for folder in (path, path / "checkpoints" / "best"):
        file = find(folder) / STATE
        if file.is_file():
            return file
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path}: no such file or folder")
    raise FileNotFoundError(
        f"checkpoint {path}: a folder with neither state.pt nor checkpoints/best/state.pt; "
        "give a file, a checkpoint folder or the folder of a run"
    )


def _load(file: Path, path: str | Path) -> Any:
    if _is_tar(file):
        raise ValueError(f"checkpoint {path}: a tar archive; unpack it and give a file from it")
    source: Path | io.BytesIO = file
    if file.name == STATE and file.with_name(SUMS).is_file():
        try:
            source = io.BytesIO(*verified(file.parent, STATE))
        except CheckpointError as error:
            raise ValueError(str(error)) from error
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = "not a PyTorch checkpoint, or a damaged one"
        if refused:
            reason = f"refused, loading it could run code: it holds {refused[1]}"
        raise ValueError(f"checkpoint {path}: {reason}") from error


def _is_tar(file: Path) -> bool:
    """Whether it is a tar archive with something in it; a file of zeros counts as an empty one."""
    if not tarfile.is_tarfile(file):
        return False
    with tarfile.open(file) as archive:
        return archive.next() is not None


def _is_state(held: object) -> bool:
    if not isinstance(held, Mapping) or not held:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items())


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _strip({key[len(prefix) :]: tensor for key, tensor in state.items()})
    return dict(state)


def _explain(
    difference: Difference,
    weights: Mapping[str, Tensor],
    model: nn.Module,
    name: str,
    num_classes: int,
    known: Mapping[str, Callable[[int], nn.Module]],
) -> str:
    classes = _other_classes(difference, num_classes)
    if classes is not None:
        return f"has {classes} classes, asked for {num_classes}"
    missing, unexpected, shapes = difference.missing, difference.unexpected, difference.shapes
    lines = [
        f"does not fit {name} with {num_classes} classes: {len(missing)} keys missing, "
        f"{len(unexpected)} unexpected, {len(shapes)} of another shape"
    ]
    if missing:
        lines.append(f"missing: {_first(missing)}")
    if unexpected:
        lines.append(f"unexpected: {_first(unexpected)}")
    if shapes:
        described = [f"{k} is {have}, needs {want}" for k, (have, want) in shapes.items()]
        lines.append(f"other shape: {_first(described)}")
    fitting = _fitting(weights, known)
    if fitting is not None:
        lines.append(f"it fits {fitting}")
    with suppress(Unmatched):
        in_order(weights, model)
        lines.append("order and shapes fit: match=order beside checkpoint takes it so")
    return "\n  ".join(lines)


def _other_classes(difference: Difference, num_classes: int) -> int | None:
    """The file's number of classes when nothing but the classifier's rows differs."""
    if difference.missing or difference.unexpected:
        return None
    rows = set()
    for have, want in difference.shapes.values():
        if not have or not want or have[1:] != want[1:] or want[0] != num_classes:
            return None
        rows.add(have[0])
    return rows.pop() if len(rows) == 1 else None


def _fitting(
    weights: Mapping[str, Tensor], known: Mapping[str, Callable[[int], nn.Module]]
) -> str | None:
    """Which of `known` the weights belong to; the last tensor is the classifier's bias."""
    last = list(weights.values())[-1]
    if last.ndim != 1:
        return None
    for name, build in known.items():
        with torch.device("meta"):  # shapes alone, no memory
            network = build(len(last))
        if not compare(weights, network):
            return f"{name} with {len(last)} classes"
    return None


def _first(items: Iterable[str]) -> str:
    listed = list(items)
    more = f", ... ({len(listed) - _SHOWN} more)" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
