"""The memory of a step on a CPU: the most that its process held, above what it held before.

A program of its own (python -m kdfuse.engine.bench.memory): it reads the cases as a JSON list on
stdin and writes their bytes as one on stdout. Each is measured in a fork of a process that has
imported all and computed nothing, so that no other case's memory is found and used again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ...recipe.load import Recipe
from ...run.imports import imports_of
from ...training.process import settings
from .cases import Case
from .ours import Images, work_of

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of(cases: Sequence[Case]) -> list[int | None]:
    """Bytes of each case; None where nothing measures them: outside Linux, and compiled, where
    the compiler's own memory is most of it."""
    wanted = [case for case in cases if not case.recipe.run.compile]
    if not (wanted and os.access(CLEAR, os.W_OK)):
        return [None] * len(cases)
    path = os.pathsep.join(part for part in sys.path if part)
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([as_words(case) for case in wanted]),
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = dict(zip((case.key for case in wanted), json.loads(done.stdout), strict=True))
    return [found.get(case.key) for case in cases]


def as_words(case: Case) -> dict[str, object]:
    recipe = case.recipe
    own = {"recipe": recipe.model_dump(mode="json"), "imports": list(imports_of(recipe))}
    return own | {"forward": case.forward}


def kilobytes(name: str) -> int:
    """VmRSS (now) or VmHWM (the most) of this process."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0])


def measure(case: Case, to: Connection) -> None:
    made = Images(torch.device("cpu"))
    made.of(case)
    before = kilobytes("VmRSS")
    with settings(case.recipe.run):
        work = work_of(case, made)
        work()
        CLEAR.write_text("5")  # the most from here on
        work()
    to.send((kilobytes("VmHWM") - before) * 1024)


def main() -> None:
    context = multiprocessing.get_context("fork")
    found = []
    for words in json.load(sys.stdin):
        for module in words["imports"]:
            import_module(module)
        recipe = Recipe.model_validate(words["recipe"])
        end, to = context.Pipe(duplex=False)
        case = Case(recipe.name, recipe, recipe.name, words["forward"])
        child = context.Process(target=measure, args=(case, to))
        child.start()
        to.close()
        found.append(end.recv())
        child.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
