"""Pickles of plain values and byte arrays, read without running anything that they name."""

from __future__ import annotations

import io
import pickle
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["UnpicklingError", "load_plain"]

BYTE = ("u1", b"u1")


def load_plain(raw: bytes) -> Any:
    """Dicts, lists, tuples, texts, numbers and uint8 arrays; text of Python 2 comes as bytes.

    UnpicklingError for a pickle that holds anything else or is damaged.
    """
    try:
        return _arrays(_Plain(io.BytesIO(raw), encoding="bytes").load())
    except UnpicklingError:
        raise
    except Exception as error:  # damage shows as nearly any error
        raise UnpicklingError(f"a damaged pickle ({error!r})") from error


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
