"""--import MODULE: modules that bring networks, methods and sources of one's own."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ..recipe.registered import importing


class ImportFailed(ValueError):
    """A module that --import names and that cannot be imported."""

    alike = True  # in all processes


def import_modules(names: Iterable[str]) -> None:
    """Import modules from the current folder or of installed packages, in this order.

    Raises ImportFailed for what is no module's name, is not there, or fails while it is imported.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
            raise ImportFailed(f"--import {name}: wants the name of a module{_cure(name)}")
        _import(name)


def _import(name: str) -> None:
    try:
        with importing(name):
            importlib.import_module(name)
    except (Exception, SystemExit) as error:
        lost = error.name if isinstance(error, ModuleNotFoundError) else None
        if lost is not None and f"{name}.".startswith(f"{lost}."):
            why = f"no module {lost} in {os.getcwd()} or among the installed packages"
        else:
            why = f"{type(error).__name__}: {error}{_place(error.__traceback__, name)}"
        raise ImportFailed(f"--import {name}: {why}") from error


def _cure(name: str) -> str:
    """What to give in place of a file's path."""
    path = Path(name)
    dotted = ".".join(path.with_suffix("").parts)
    if path.suffix != ".py":
        return ", as in --import my_package.kd"
    if ".." in path.parts or path.is_absolute():
        return f"; go to the folder of {path.name} and give --import {path.stem}"
    return f"; give --import {dotted}"


def _place(trace: TracebackType | None, name: str) -> str:
    """Where the module, or one beside it, was when it failed."""
    package = name.partition(".")[0]
    found = ""
    for frame, line in traceback.walk_tb(trace):
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            found = f" ({frame.f_code.co_filename}, line {line})"
    return found
