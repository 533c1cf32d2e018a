"""What surrounds a run: the facts that are not in its recipe, and the settings of its process."""

import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import __version__
from ..recipe.schema import Run

PACKAGES = ("numpy", "torchvision", "timm", "triton", "nvidia-dali-cuda130", "pillow", "pydantic")


def environment(world: int) -> dict[str, Any]:
    """Plain facts of this process, ready for JSON; `world` is the number of processes."""
    return {
        "kdfuse": __version__,
        "commit": commit(Path(__file__).resolve().parent),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": world,
    }


def commit(folder: Path) -> str | None:
    """The git commit of the source tree, with "+changes" when files differ; None outside git."""
    try:
        # Installed into a folder of another project's repository, these files are not in it.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        head = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changes else head


@contextmanager
def settings(run: Run) -> Iterator[None]:
    """Threads and determinism of the process as the run wants them, and as they were afterwards."""
    # Read when cuBLAS starts; without it, deterministic matrix products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    torch.use_deterministic_algorithms(run.deterministic)
    cudnn.benchmark = not run.deterministic
    # It would write each new tensor once more than needed, to find reads of what nobody wrote.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fill


def seed(value: int) -> None:
    """Start every random number generator from `value`."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
