"""Pickles of plain values and byte arrays, read without running anything that they name."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["UnpicklingError", "load_plain"]

BYTE = ("u1", b"u1")
MOST = 4_000_000  # steps; CIFAR's have 300,000
OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
# Bytes of the number before what has its length stated, by what pickletools has for a length.
COUNTED = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
LINES = {"GLOBAL": 2, "INST": 2}  # of text after an opcode; others have one


def load_plain(raw: bytes) -> Any:
    """Dicts, lists, tuples, texts, numbers and uint8 arrays; text of Python 2 comes as bytes.

    UnpicklingError for a pickle that holds anything else or is damaged.
    """
    try:
        _check_sizes(raw)
        return _arrays(_Plain(io.BytesIO(raw), encoding="bytes").load())
    except UnpicklingError:
        raise
    except Exception as error:  # damage shows as nearly any error
        raise UnpicklingError(f"a damaged pickle ({error!r})") from error


def _check_sizes(raw: bytes) -> None:
    """Refuse what would make the unpickler ask for more memory than the file can fill.

    It makes room for a text before it reads it, and for all numbers of its memo up to the one that
    is written, though every pickler counts them up from 0 or 1.
    """
    memo = 0
    for steps, (name, number) in enumerate(_steps(raw)):
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo += 1
            if number > memo:
                raise UnpicklingError(f"a damaged pickle (memo {number} after {memo - 1})")
        if name == "BYTEARRAY8" or steps >= MOST:
            raise UnpicklingError(f"a pickle with {name} at step {steps}, which CIFAR's have not")


def _steps(raw: bytes) -> Iterator[tuple[str, int]]:
    """Names of the opcodes, each with its number or the length of its text, 0 for neither."""
    at, name = 0, ""
    while name != "STOP":
        opcode = OPCODES[raw[at]]
        name, argument, at, number = opcode.name, opcode.arg, at + 1, 0
        if argument is None:
            pass
        elif argument.n == pickletools.UP_TO_NEWLINE:
            for _ in range(LINES.get(name, 1)):
                end = raw.index(b"\n", at)
                line, at = raw[at:end], end + 1
            number = int(line) if name == "PUT" else 0
        else:
            width = COUNTED.get(argument.n, argument.n)
            number = int.from_bytes(raw[at : at + width], "little")
            at += width
            if argument.n in COUNTED:
                at += number
        if at > len(raw):
            raise UnpicklingError("pickle data was truncated")
        yield name, number


class _Plain(pickle.Unpickler):
    """NumPy's globals get stand-ins that only take down what they are given."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise UnpicklingError(
                f"the pickle names {module}.{name}, which plain data has no use for; it was refused"
            ) from None


class _Dtype:
    def __init__(self, code: object, *rest: object) -> None:
        if code not in BYTE:
            raise UnpicklingError(f"an array of {code!r}, wants bytes (u1)")

    def __setstate__(self, state: object) -> None:
        """The byte order, which a byte has not."""


class _Array:
    def __init__(self, *shape_and_type: object) -> None:
        self.pixels: NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
            raise UnpicklingError("an array of something else than bytes")
        order: Literal["F", "C"] = "F" if fortran else "C"
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order=order)


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # written by NumPy 2
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
}


def _arrays(value: Any) -> Any:
    """The value of a dict with arrays in place of what stood for them."""
    if not isinstance(value, dict):
        return value
    return {k: v.pixels if isinstance(v, _Array) else v for k, v in value.items()}
