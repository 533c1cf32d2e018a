"""What surrounds a run: the facts that are not in its recipe."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from . import job

ENVIRONMENT = "environment.json"  # of a run's folder
PACKAGES = ("numpy", "torchvision", "timm", "triton", "nvidia-dali-cuda130", "pillow", "pydantic")


def environment(world: int) -> dict[str, Any]:
    """Plain facts of this process, ready for JSON; `world` is the number of processes."""
    return {
        "kdfuse": __version__,
        "commit": commit(Path(__file__).resolve().parent),
        "command": sys.argv,
        "job": job.name(),
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


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
