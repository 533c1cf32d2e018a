"""The compiled libraries as files: what is loaded, and what is said where it cannot be."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdfuse.kernels import backends, library

CPU, NO_CPU = backends.compiled()
needs_library = pytest.mark.skipif(CPU is None, reason=NO_CPU)


@needs_library
def test_levels_are_those_of_the_machine_best_first():
    levels = CPU.levels()
    assert levels[-1] == "base" and CPU.level() in levels
    wider = {"avx2": "AVX2", "avx512": "AVX512"}
    if torch.backends.cpu.get_cpu_capability() in wider.values():
        assert wider[levels[0]] in ("AVX2", "AVX512")
    before = CPU.level()
    try:
        for level in levels:
            CPU.set_level(level)
            assert CPU.level() == level
    finally:
        CPU.set_level(before)


@needs_library
@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_a_level_that_the_machine_does_not_run_is_refused(name):
    before = CPU.level()
    with pytest.raises(ValueError, match=f"SIMD level '{name}': this machine runs .*base"):
        CPU.set_level(name)
    assert CPU.level() == before


def test_what_was_not_built_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "HERE", tmp_path)
    made, reason = library.load_cpu()
    assert made is None and "no libkdfuse.so" in reason and "C++17 compiler" in reason
    assert library.load_cuda(reason) == (None, reason)  # the schemas are in the other one
    made, reason = library.load_cuda("")
    assert made is None and "no libkdfuse_cuda.so" in reason and "KDFUSE_CUDA=1" in reason


def test_kernels_beside_a_torch_without_cuda_are_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "libkdfuse_cuda.so").write_text("whatever")
    monkeypatch.setattr(library, "HERE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    made, reason = library.load_cuda("")
    assert made is None and f"torch {torch.__version__} is built without CUDA" in reason


def test_a_library_that_cannot_be_loaded_says_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "libkdfuse.so").write_text("no library")
    monkeypatch.setattr(library, "HERE", tmp_path)
    made, reason = library.load_cpu()
    assert (
        made is None and "libkdfuse.so cannot be loaded" in reason and torch.__version__ in reason
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    "source, lacks",
    [
        # A torch before 2.11 has fewer functions in its stable ABI, ...
        ('extern "C" void torch_1(); extern "C" void f() { torch_1(); }', "torch_1"),
        # ... and a library of older sources fewer that are asked for.
        ('extern "C" void f() {}', "kdfuse_register"),
    ],
    ids=("torch", "library"),
)
def test_a_function_that_is_lacking_is_named(tmp_path, source, lacks):
    file = tmp_path / "libkdfuse.so"
    (tmp_path / "of.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", str(tmp_path / "of.cpp"), "-o", str(file)]
    subprocess.run(command, check=True)
    made, reason = library.load(file)
    assert made is None and f"undefined symbol: {lacks}" in reason
    assert "torch 2.11 or later" in reason


@needs_library
def test_a_second_copy_under_the_same_name_is_refused(tmp_path):
    """torch would else end the process, or run the one copy's losses for the other."""
    file = shutil.copy(library.HERE / "libkdfuse.so", tmp_path)
    made, reason = library.load(Path(file))
    assert made is None and "torch refuses the ops of libkdfuse.so" in reason
    assert "has others as torch.ops.kdfuse," in reason
    assert backends.backends()["cpu"] == ""
