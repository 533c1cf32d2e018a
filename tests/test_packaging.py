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
        "kdfuse/engine/report/templates/colours.css",
    ):
        assert path in names
    assert "kdfuse/recipes/digits/kd.yaml" in names and "LICENSE" in names


def told_by(folder: Path, code: str) -> str:
    """What a program says that takes kdfuse from this folder."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert told_by(tmp_path, code).startswith(str(tmp_path))


def lacking_a_runtime(file: Path) -> None:
    """A library that asks for a CUDA runtime that is not there."""
    runtime = file.parent / "libcudart.so.0"
    source = file.with_suffix(".cpp")
    source.write_text('extern "C" void cuda() {}')
    make = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-o"]
    subprocess.run([*make, runtime, source, f"-Wl,-soname,{runtime.name}"], check=True)
    source.write_text('extern "C" void cuda(); extern "C" void call() { cuda(); }')
    subprocess.run([*make, file, source, runtime], check=True)
    runtime.unlink()


@pytest.mark.parametrize(
    "cuda, there, said",
    [
        ("13.0", False, "kdfuse was built without its CUDA kernels (no libkdfuse_cuda.so)"),
        ("12.8", True, "libkdfuse_cuda.so cannot be loaded (libcudart.so.0: cannot open shared"),
        (None, True, "is built without CUDA; install one that is"),
    ],
    ids=("no CUDA part", "no runtime", "torch without CUDA"),
)
def test_the_cuda_part_that_is_missing_is_named(built, tmp_path, cuda, there, said):
    """By an installed wheel, beside a torch of this CUDA; the losses on the CPU are compiled."""
    with zipfile.ZipFile(built[1]) as file:
        file.extractall(tmp_path)
    if there:
        lacking_a_runtime(tmp_path / "kdfuse/kernels/libkdfuse_cuda.so")
    code = (
        f"import torch; torch.version.cuda = {cuda!r};"
        "import kdfuse;"
        "z = torch.randn(4, 5, requires_grad=True);"
        "kdfuse.kd_loss(z, torch.randn(4, 5), backend='cpu').backward();"
        "from kdfuse.engine.cli.doctor import doctor;"
        "found = {f.what: f for f in doctor()};"
        "assert found['backend cpu'].state == 'ok', found['backend cpu'];"
        "assert found['backend cuda'].detail == kdfuse.backends()['cuda'];"
        "print(found['backend cuda'].state, found['backend cuda'].detail)"
    )
    told = told_by(tmp_path, code)
    assert told.startswith("absent") and said in told


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
        "print([f.state for f in doctor() if f.what == 'compiled losses'])"
    )
    assert told_by(copy, code) == "['absent']\n"
