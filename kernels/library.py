"""The compiled losses: two libraries without a symbol of Python, and what they say of themselves.

libkdfuse.so has all schemas and the ops on CPU tensors, libkdfuse_cuda.so those on CUDA tensors;
they are registered with torch here, in the namespace of this copy of the losses. By torch's stable
ABI the libraries serve every torch from 2.11 on.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from .namespace import COMPILED

HERE = Path(__file__).parent


class Cpu:
    """What libkdfuse.so says of itself. Its SIMD level is one for the whole process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for of_text in (library.kdfuse_compiler, library.kdfuse_level_name):
            of_text.restype = ctypes.c_char_p
        self.compiler: str = library.kdfuse_compiler().decode()

    def levels(self) -> list[str]:
        """SIMD levels that this machine runs, best first."""
        names: list[str] = []
        while name := self._library.kdfuse_level_name(len(names)):
            names.append(name.decode())
        return names[::-1]

    def level(self) -> str:
        """The SIMD level in use."""
        return self._library.kdfuse_level_name(self._library.kdfuse_level()).decode()

    def set_level(self, name: str) -> None:
        """Use another of `levels`.

        Raises:
            ValueError: it is not one of them.
        """
        levels = self.levels()
        if name not in levels:
            raise ValueError(f"SIMD level {name!r}: this machine runs {', '.join(levels)}")
        self._library.kdfuse_set_level(levels[::-1].index(name))


@dataclass
class Cuda:
    """What libkdfuse_cuda.so says of itself; constants, for torch.compile cannot trace a call."""

    file: Path
    archs: list[str]  # of the kernels, as in "sm_90"
    runtime: int  # the CUDA that they were built with, as 13000
    driver: int  # the newest CUDA that the driver supports, as 13000; 0 without one


def load_cpu() -> tuple[Cpu | None, str]:
    """The library, whose ops are registered now, or why it is not there."""
    file = HERE / "libkdfuse.so"
    if not file.is_file():
        return None, (
            "kdfuse was built without its compiled losses (no libkdfuse.so); install a C++17 "
            "compiler and reinstall it, or run `python setup.py build_ext --inplace` in a checkout"
        )
    library, reason = load(file)
    return (Cpu(library), "") if library else (None, reason)


def load_cuda(cpu: str) -> tuple[Cuda | None, str]:
    """The same of the CUDA kernels. cpu: why the library with their schemas is not there, or ""."""
    file = HERE / "libkdfuse_cuda.so"
    if cpu:
        return None, cpu
    if not file.is_file():
        return None, (
            "kdfuse was built without its CUDA kernels (no libkdfuse_cuda.so); install nvcc and a "
            "CUDA build of torch and reinstall it with KDFUSE_CUDA=1, which says what is missing"
        )
    if torch.version.cuda is None:
        return None, (
            f"torch {torch.__version__} is built without CUDA; install one that is, from "
            "pytorch.org: kdfuse itself can stay"
        )
    library, reason = load(file)
    if library is None:
        return None, reason
    library.kdfuse_cuda_archs.restype = ctypes.c_char_p
    archs = library.kdfuse_cuda_archs().decode().split()
    return Cuda(file, archs, library.kdfuse_cuda_runtime(), library.kdfuse_cuda_driver()), ""


def load(file: Path) -> tuple[ctypes.CDLL | None, str]:
    try:
        library = ctypes.CDLL(str(file))
        registered = library.kdfuse_register(COMPILED.encode())
    except (OSError, AttributeError) as error:  # the second: a library of older sources
        return None, (
            f"{file.name} cannot be loaded ({error}); it needs torch 2.11 or later, this is "
            f"{torch.__version__}, and a system not older than that of its build: update them, or "
            "reinstall kdfuse from source"
        )
    if not registered:
        return None, (
            f"torch refuses the ops of {file.name}: this process has others as "
            f"torch.ops.{COMPILED}, of a kdfuse in another place; import one of them alone"
        )
    return library, ""
