"""Several processes of one group, as torchrun would start them, for what they do together.

They come from a server that has imported PyTorch, and what draws a run's page, which takes longer
than what most of them do.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHILDREN = multiprocessing.get_context("forkserver")
PAGE = ("matplotlib.figure", "matplotlib.backends.backend_svg", "torch.utils.tensorboard")
CHILDREN.set_forkserver_preload(["kdfuse.engine.training.start", "torch._dynamo", *PAGE])


def together(world: int, run: Callable[..., Any], *arguments: Any, lost: int | None = None) -> None:
    """Calls run(*arguments), a function of a module, in `world` processes with a thread each.

    Ends all of them as soon as one fails, and raises what it said; but the one of rank `lost` is
    to fail, and the others go on without it.
    """
    started, said = begin(world, run, *arguments)
    others = [child for rank, child in enumerate(started) if rank != lost]
    try:
        running = others
        while running and not any(child.exitcode for child in others):
            multiprocessing.connection.wait([child.sentinel for child in running])
            running = [child for child in running if child.exitcode is None]
        assert not any(child.exitcode for child in others), said()
    finally:
        for child in started:
            child.kill()  # the one that fails may do so by stopping
            child.join()


def begin(
    world: int, run: Callable[..., Any], *arguments: Any
) -> tuple[list[Any], Callable[[], str]]:
    """Such processes, left to themselves, and what asks for the error of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failures = CHILDREN.SimpleQueue()
    started = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        child = CHILDREN.Process(target=_child, args=(failures, environment, run, arguments))
        child.start()
        started.append(child)
    return started, lambda: "" if failures.empty() else failures.get()


def apart(folder: Path, run: Callable[..., Any], *arguments: Any) -> tuple[int, str]:
    """Calls run(*arguments), a function of a module, in a process of its own in `folder`: its exit
    code, and all that it and its children wrote."""
    seen = folder / ".seen"
    child = CHILDREN.Process(target=_apart, args=(dict(os.environ), folder, seen, run, arguments))
    child.start()
    child.join()
    text = seen.read_text()
    seen.unlink()
    return child.exitcode or 0, text


def kdfuse(*words: str) -> None:
    """The program, for `apart`."""
    from kdfuse.engine.cli.main import main

    sys.argv = ["kdfuse", *words]
    main()


def _apart(
    environment: dict[str, str], folder: Path, seen: Path, run: Callable[..., Any], given: tuple
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, "")  # as of python -c
    file = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    run(*given)


def _child(
    failures: Any, environment: dict[str, str], run: Callable[..., Any], given: tuple
) -> None:
    import torch

    os.environ.clear()  # it came from the server
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        run(*given)
    except BaseException:
        failures.put(traceback.format_exc())
        raise
