"""What people bring under names of their own, and by which module.

`engine/register.py` fills these tables; whatever reads a name of a recipe looks here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from torch import nn

    from ..methods.method import Method

Kind = Literal["network", "method", "source"]

NETWORKS: dict[str, Callable[[int], nn.Module]] = {}
METHODS: dict[str, type[Method]] = {}
SOURCES: dict[str, Callable[[Any, Any], Any]] = {}
MODULES: dict[tuple[Kind, str], str] = {}  # whose import registers the name

_importing: list[str] = []


@contextmanager
def importing(module: str) -> Iterator[None]:
    """What is registered within was brought by this module, whichever it imports itself."""
    _importing.append(module)
    try:
        yield
    finally:
        _importing.pop()


def brought(kind: Kind, name: str, caller: str) -> None:
    """Note who brought a name: the module that is being imported, or else the caller's."""
    MODULES.setdefault((kind, name), _importing[0] if _importing else caller)


def unknown(name: object, known: list[str], field: str = "") -> PydanticCustomError:
    """The finding that a recipe's name is none of those; `field` of the value that is checked."""
    return PydanticCustomError(
        "unknown_name",
        "wants one of {known}",
        {"name": name, "known": ", ".join(known), "field": field},
    )
