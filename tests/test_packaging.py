"""The sdist and the wheel built from it hold everything, and the wheel works on its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(40)

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["kdfuse", "kernels", "engine", "recipes", "csrc"]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]


def copied(copy: Path) -> Path:
    """The sources without anything built."""
    leave = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=leave)
    for name in FILES:
        shutil.copy2(ROOT / name, copy / name)
    return copy


def unoptimised(script: Path, compiler: str) -> Path:
    """The compiler at -O0 whatever it is told, which takes half the time."""
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist made from the sources, and the wheel made from that."""
    copy = copied(tmp_path_factory.mktemp("checkout"))
    environment = {**os.environ, "KDFUSE_CUDA": "0", "KDFUSE_REQUIRE_BUILD": "1"}
    for variable, name in (("CC", "gcc"), ("CXX", "g++")):
        environment[variable] = str(unoptimised(copy / name, os.environ.get(variable, name)))

    def made(what, folder):
        """As pip asks for it, in an environment that has what a build needs."""
        code = f"from setuptools.build_meta import build_{what} as make; make('dist')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (found,) = (folder / "dist").iterdir()
        return found

    sdist = made("sdist", copy)
    with tarfile.open(sdist) as file:
        file.extractall(copy / "unpacked", filter="data")
    (unpacked,) = (copy / "unpacked").iterdir()
    return sdist, made("wheel", unpacked)


def test_sdist_holds_the_sources(built):
    with tarfile.open(built[0]) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    for path in (
        "csrc/cpu/taught.cpp",
        "csrc/losses/kd.h",
        "kdfuse/engine/report/templates/report.html",
    ):
        assert path in names
    assert "kdfuse/recipes/digits/kd.yaml" in names and "LICENSE" in names


def test_wheel_works_away_from_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built[1]) as file:
        file.extractall(tmp_path)
    assert not (tmp_path / "engine").exists() and not (tmp_path / "kernels").exists()
    code = (
        "import kdfuse, torch; assert kdfuse.backends()['cpu'] == '', kdfuse.backends();"
        "z = torch.randn(4, 5, requires_grad=True);"
        "kdfuse.kd_loss(z, torch.randn(4, 5), backend='cpu').backward();"
        "from kdfuse.engine.recipe.load import Recipe, recipes;"
        "assert Recipe.load(recipes()[0]);"
        "import kdfuse.engine.report.page; print(kdfuse.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_without_a_compiler_it_installs_and_says_so(tmp_path):
    copy = copied(tmp_path)
    absent = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "KDFUSE_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, **absent},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no compiled losses" in done.stderr
    code = (
        "import kdfuse, torch;"
        "reason = kdfuse.backends()['cpu']; assert 'C++17 compiler' in reason, reason;"
        "z = torch.randn(4, 5, requires_grad=True);"
        "kdfuse.kd_loss(z, torch.randn(4, 5)).backward(); assert z.grad is not None;"
        "from kdfuse.engine.cli.doctor import doctor;"
        "print([f for f in doctor() if f.what == 'compiled module'])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ok" not in done.stdout.split("detail")[0], done.stdout
