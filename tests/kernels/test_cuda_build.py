"""What can be said of the CUDA kernels without a device: the build and the code that it made.

The kernels are executed in tests/simulator, the instructions that a row takes are counted in
test_instructions.py.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sass
from sass import Kernel

from kdfuse.kernels import backends
from kdfuse.kernels.table import OPS

pytestmark = pytest.mark.slow(45)

ROOT = Path(__file__).resolve().parents[2]
CPU, KERNELS = backends.compiled()[0], backends.compiled_cuda()[0]
ARCHS = KERNELS.archs if KERNELS else []
CUBINS = [name for name in ARCHS if name.startswith("sm_")]
MAIN = "sm_90" if "sm_90" in CUBINS else CUBINS[-1] if CUBINS else ""
TYPES = ("bf16", "f16", "f32")


def variants(loss: str, dtype: str) -> tuple[str, ...]:
    """Of float16 students there are rows of one type alone."""
    if loss == "slkd":
        return ("1", "2")
    if loss == "tf_nkd":
        return ("labelled",)
    free, more = not OPS[loss].needs_target, dtype != "f16"
    found = {"labelled": True, "mixed": more, "bare": free, "soft": free and more}
    found["two"] = more and OPS[loss].teacher_weights is not None
    return tuple(name for name, there in found.items() if there)


LOSSES = ("slkd", "tf_nkd", *sass.TAUGHT)
FAST_ROWS = [(loss, t, variant) for loss in LOSSES for t in TYPES for variant in variants(loss, t)]
# Threads that a multiprocessor holds of fast rows: a block, or blocks of four warps.
FAST_BLOCK = 256
WARPS = {"bf16": 384, "f16": 256, "f32": 256}

needs_kernels = pytest.mark.skipif(not ARCHS, reason="there are no CUDA kernels")
needs_tool = pytest.mark.skipif(
    sass.tool("cuobjdump") is None, reason="no cuobjdump beside nvcc or in triton"
)
on_main_arch = pytest.mark.parametrize(
    "arch",
    [name if name == MAIN else pytest.param(name, marks=pytest.mark.long) for name in CUBINS],
)
on_every_arch = pytest.mark.parametrize("arch", CUBINS)


def kinds_of(loss: str, _dtype: str, variant: str) -> list[str]:
    """tf_nkd waits for the whole grid, as clusters cannot; only rows of one type with one teacher
    at most are streamed."""
    long = [] if loss == "tf_nkd" else ["fast_clusters"]
    long += ["fast_streams"] if variant in ("labelled", "bare") else []
    return ["fast_warps", "fast_blocks", *long]


def the_table() -> set[Kernel]:
    found = {Kernel(kind, *row) for row in FAST_ROWS for kind in kinds_of(*row)}
    for loss in sass.LOSSES:
        found |= {Kernel(f"general_{kind}", loss, "f32", "any") for kind in ("warps", "blocks")}
        found.add(Kernel("general_blocks", loss, "f64", "any"))
    return found


def has_code(kernel: Kernel, arch: str) -> bool:
    return kernel.kind != "fast_clusters" or int(arch[3:]) >= 90


def registers(kernel: Kernel) -> int:
    """What the launch bounds leave to a thread: four warps at a time, each to a register file of
    its own, of 65536 in all, in steps of 8."""
    threads = {"fast_streams": 768, "general_warps": 256, "general_blocks": 256}
    pair = kernel.variant in ("labelled", "bare") or kernel.loss == "slkd"
    threads["fast_warps"] = WARPS.get(kernel.type, 0) if pair else 256
    of_pair = kernel.loss != "slkd" and kernel.type != "f32"
    blocks = 2 if of_pair and kernel.variant in ("labelled", "bare", "mixed") else 1
    threads |= dict.fromkeys(("fast_blocks", "fast_clusters"), blocks * FAST_BLOCK)
    together = -(-threads[kernel.kind] // 128) * 128
    return min(255, 65536 // together // 8 * 8)


def usage(arch: str) -> dict[Kernel, dict[str, int]]:
    return sass.resources(KERNELS.file, arch)


def code(arch: str) -> dict[Kernel, list[str]]:
    """Of one architecture all kernels, of the others some of each kind: the disassembly takes long.
    What is said of the rest is said by their resources."""
    few = [k for k in the_table() if k.type == "bf16" or k.variant == "any"]
    some = tuple(k for k in few if k.loss == "kd" or k.loss not in sass.TAUGHT)
    return sass.names(KERNELS.file, arch, () if arch == MAIN else some)


@needs_kernels
def test_the_library_holds_code_for_every_arch_and_ptx():
    assert CUBINS and ARCHS[-1] == CUBINS[-1].replace("sm", "compute")


@needs_kernels
@needs_tool
@on_every_arch
def test_every_kernel_is_there_and_no_other(arch):
    assert set(usage(arch)) == the_table()
    for kernel, used in usage(arch).items():
        # A kernel without code is a return.
        assert (used["REG"] > 20) == has_code(kernel, arch), f"{kernel}: {used['REG']} registers"


def spills(arch: str, kernels: set[Kernel]) -> list[str]:
    found = {k: usage(arch)[k]["STACK"] + usage(arch)[k]["LOCAL"] for k in kernels}
    return [
        f"{kernel}: {found[kernel]} bytes" for kernel in sorted(found, key=str) if found[kernel]
    ]


@needs_kernels
@needs_tool
@on_every_arch
def test_rows_stay_in_registers(arch):
    """Of fast rows, and of short rows in the general kernels; SLKD's many students may spill."""
    kept = {k for k in the_table() if k.kind.startswith("fast") or k.kind == "general_warps"}
    assert spills(arch, {k for k in kept if k.kind != "general_warps" or k.loss != "slkd"}) == []


@needs_kernels
@needs_tool
@on_every_arch
def test_registers_are_those_of_the_launch_bounds(arch):
    for kernel, used in usage(arch).items():
        assert used["REG"] <= registers(kernel), f"{kernel} takes {used['REG']} registers"


MOVES = {
    **dict.fromkeys(("fast_warps", "fast_blocks", "fast_clusters"), "LDGSTS.E.BYPASS"),
    **dict.fromkeys(("fast_streams", "general_warps", "general_blocks"), "LDG.E"),
}


@needs_kernels
@needs_tool
@on_main_arch
def test_rows_move_in_16_bytes(arch):
    """But for those in double."""
    assert arch != MAIN or set(code(arch)) == the_table()
    for kernel, names in code(arch).items():
        if not has_code(kernel, arch):
            continue
        assert len(names) > 300, f"{kernel}: {len(names)} instructions"
        local = [n for n in names if n.startswith(("LDL", "STL"))]
        assert not local or usage(arch)[kernel]["STACK"], f"{kernel}: {local}"
        for move in (MOVES[kernel.kind], "LDS", "STG.E"):
            wide = any(n.startswith(f"{move}.128") for n in names)
            assert wide or kernel.type == "f64", f"{kernel}: no {move}.128"


@needs_kernels
def test_the_library_needs_no_cuda_runtime():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    done = subprocess.run([readelf, "-d", KERNELS.file], capture_output=True, text=True)
    assert "libcudart" not in done.stdout and "libcuda.so" not in done.stdout


def source(name: str) -> str:
    """Without comments."""
    return re.sub(r"//[^\n]*", "", (ROOT / name).read_text())


@pytest.mark.parametrize("name", ("csrc/cuda/ops.cpp", "csrc/cuda/launch.cu"))
def test_no_call_of_the_host_waits_for_the_device(name):
    waits = (
        r"cuda\w*Synchronize\w*|cudaMem(?:cpy|set)\w*|cudaMalloc\w*|cudaFree\w*|\w*_to_cpu|item\("
    )
    assert re.findall(waits, source(name)) == []


def test_no_python_line_reads_a_tensor_of_the_device():
    """What reads a tensor's value, by function; these do where the number is on the host."""
    found = set()
    for function in ast.parse((ROOT / "kernels/op.py").read_text()).body:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                reads = ("item", "cpu", "tolist", "numpy", "nonzero", "synchronize")
                if node.func.attr in reads and isinstance(function, ast.FunctionDef):
                    found.add((function.name, ast.unparse(node.func)))
                else:
                    assert node.func.attr not in reads, ast.unparse(node)
    assert found == {("scaled", "upstream.item"), ("denominator_of", "given.item")}


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(CPU is None, reason="nothing can be built here")
@pytest.mark.parametrize(
    "environment, said",
    [
        ({"KDFUSE_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "holds no bin/nvcc"),
        ({"KDFUSE_CUDA": "yes"}, "KDFUSE_CUDA='yes' is unknown"),
        ({"KDFUSE_CUDA": "1", "KDFUSE_CUDA_ARCHS": "70"}, "KDFUSE_CUDA_ARCHS='70'"),
    ],
    ids=("no nvcc", "unknown wish", "old arch"),
)
def test_what_is_missing_is_named(tmp_path, environment, said):
    import torch

    if not torch.version.cuda and environment["KDFUSE_CUDA"] == "1":
        said = "built without CUDA"
    done = build(tmp_path, **environment)
    assert done.returncode != 0 and said in done.stderr


@pytest.mark.skipif(CPU is None, reason="nothing can be built here")
def test_a_toolkit_of_another_cuda_is_refused(tmp_path):
    """Its runtime would ask for another driver than torch's does."""
    import torch

    if not torch.version.cuda:
        pytest.skip("torch is built without CUDA")
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    done = build(tmp_path, KDFUSE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert f"is of CUDA 11.8 and torch of CUDA {torch.version.cuda}" in done.stderr


def test_reason_names_what_to_do():
    reason = backends.backends()["cuda"]
    if not ARCHS and CPU:
        assert "KDFUSE_CUDA=1" in reason
    elif CPU:
        assert reason in ("", "torch sees no CUDA device")
