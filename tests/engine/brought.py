"""Registered names that do not outlive a test, nor the modules that registered them."""

import sys
from contextlib import contextmanager

from kdfuse.engine.recipe import registered

TABLES = (registered.NETWORKS, registered.METHODS, registered.SOURCES, registered.MODULES)


@contextmanager
def restored(empty=False):
    """Names, their modules and sys.path are afterwards what they were; `empty`: none before."""
    tables, path = [dict(table) for table in TABLES], list(sys.path)
    modules = {name: sys.modules[name] for name in brought()}
    if empty:
        forget()
    try:
        yield
    finally:
        forget()
        for table, before in zip(TABLES, tables, strict=True):
            table.update(before)
        sys.modules.update(modules)
        sys.path[:] = path


def brought():
    tests = {name for name in sys.modules if name.startswith("test_")}
    return sys.modules.keys() & set(registered.MODULES.values()) - tests


def forget():
    for name in brought():
        del sys.modules[name]
    for table in TABLES:
        table.clear()
