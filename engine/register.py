"""Networks, methods and sources of images of one's own, by names that recipes use as ours.

A module that calls these is named on the command line, `--import MODULE`, or imported in Python:
docs/extending.md. Registering again what stands already changes nothing; so does the same
definition, imported once more, but that it takes the place of the first.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .data.manifest import Manifest
from .data.sources import SOURCES
from .data.sources.splits import Split
from .methods import METHODS, Method
from .models import NETWORKS
from .recipe import registered, yamlfile
from .recipe.data import Data

__all__ = ["method", "network", "source"]


def network(name: str, make: Callable[[int], nn.Module]) -> None:
    """Let recipes name a network: `make(num_classes)` gives a module with random weights, images
    (N, 3, H, W) of a float type in, logits (N, num_classes) out.

    Its attribute `taps`, {point: path of a module}, names the points that methods read. Raises
    ValueError for a name that is taken or that no word of a recipe can carry, TypeError for what
    makes no network.
    """
    if not callable(make) or isinstance(make, nn.Module):
        raise TypeError(
            f"network {name!r}: got {_shown(make)}, wants what makes it: a class or a function "
            "make(num_classes)"
        )
    _check_call("network", name, make, "make(num_classes)", 1)
    _put("network", name, make, NETWORKS, registered.NETWORKS)


def method(name: str, cls: type[Method]) -> None:
    """Let recipes name a method: a subclass of `engine.methods.Method` whose field `name` has this
    name as its default, and whose other fields are its options.

    Raises ValueError for a name that is taken or that no word of a recipe can carry, TypeError for
    what is no method, lacks its loss or is named otherwise.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(
            f"method {name!r}: got {_shown(cls)}, wants a subclass of kdfuse.engine.methods.Method"
        )
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise TypeError(f"method {name!r}: {cls.__name__} has no {', '.join(missing)}; write it")
    if cls.model_fields["name"].default != name:
        raise TypeError(
            f"method {name!r}: {cls.__name__} has another name; write "
            f'name: Literal["{name}"] = "{name}" in the class'
        )
    _put("method", name, cls, METHODS, registered.METHODS)


def source(name: str, open: Callable[[Data, Split], Manifest]) -> None:
    """Let recipes name a source of images: `open(data, split)` gives the manifest of "train" or
    "val". Of the section `data` it reads what it wants of root, classes, images and subset.

    Raises ValueError for a name that is taken or that no word of a recipe can carry, TypeError for
    what cannot be called so.
    """
    if not callable(open):
        raise TypeError(
            f"source {name!r}: got {_shown(open)}, wants a function open(data, split) that gives "
            "the manifest of a split"
        )
    _check_call("source", name, open, "open(data, split)", 2)
    _put("source", name, open, SOURCES, registered.SOURCES)


def _put(
    kind: registered.Kind, name: str, what: Any, ours: Container[str], table: dict[str, Any]
) -> None:
    """Called by a public function, which its caller's module called."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) or yamlfile.parse(name) != name:
        raise ValueError(
            f"{kind} {name!r}: no word of a recipe can carry that name; take letters, digits, "
            "'_', '-' and '.', a letter first, and no word of YAML (null, true, false)"
        )
    if name in ours:
        raise ValueError(f"{kind} {name!r}: kdfuse has its own; take another name, as my_{name}")
    if name in table and not _same(table[name], what):
        raise ValueError(
            f"{kind} {name!r}: {registered.MODULES[kind, name]} registered another one; take "
            "another name for one of them"
        )
    table[name] = what
    registered.brought(kind, name, _module(sys._getframe(2).f_globals))


def _check_call(kind: str, name: str, what: Callable[..., Any], form: str, count: int) -> None:
    try:
        found = inspect.signature(what)
    except ValueError:  # of what is not written in Python
        return
    try:
        found.bind(*range(count))
    except TypeError as error:
        raise TypeError(
            f"{kind} {name!r}: {_shown(what)} is called as {form}, and takes {found}; "
            "functools.partial fills in the rest"
        ) from error


def _same(one: Any, other: Any) -> bool:
    where = _definition(one)
    return one is other or (where is not None and where == _definition(other))


def _definition(what: Any) -> tuple[Any, ...] | None:
    """Where a class or a function is defined, and what a partial fills in; None where one place
    defines many, as of closures and lambdas."""
    if isinstance(what, partial):
        inner = _definition(what.func)
        return inner and (*inner, what.args, what.keywords)
    name = getattr(what, "__qualname__", "<")
    module = sys.modules.get(getattr(what, "__module__", None) or "")
    return None if "<" in name or module is None else (_module(vars(module)), name)


def _module(inside: Mapping[str, Any]) -> str:
    """The name by which a module with these globals is imported; `__main__` where it has none."""
    if inside["__name__"] != "__main__":
        return inside["__name__"]
    spec, file = inside.get("__spec__"), inside.get("__file__")
    stem = Path(file).stem if file else ""
    return spec.name if spec else stem if stem.isidentifier() else "__main__"


def _shown(what: Any) -> str:
    return getattr(what, "__qualname__", None) or f"an object of type {type(what).__name__}"
