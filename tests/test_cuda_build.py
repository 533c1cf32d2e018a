"""What can be said of the CUDA kernels without a device: the build and the code that it made.

cuobjdump stands beside nvcc or in triton. Row arithmetic is tested in test_host_rows.py.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdfuse.kernels import backends

ROOT = Path(__file__).resolve().parent.parent
MODULE = backends.compiled()[0]
ARCHS = MODULE.cuda_archs if MODULE else []
CUBINS = [name for name in ARCHS if name.startswith("sm_")]
ROWS = ("kd_row", "dkd_row", "nkd_row", "tf_nkd_row", "tf_nkd_score", "uskd_row", "uskd_score")
ROWS += ("slkd_row",)


def _tool() -> str | None:
    found = shutil.which("cuobjdump")
    nvcc = shutil.which("nvcc")
    near = [Path(os.path.realpath(nvcc)).parent] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        near.append(Path(triton.origin).parent / "backends/nvidia/bin")
    places = [found, *(str(folder / "cuobjdump") for folder in near)]
    return next((p for p in places if p and Path(p).is_file()), None)


needs_kernels = pytest.mark.skipif(not ARCHS, reason="_C was built without its CUDA kernels")
needs_tool = pytest.mark.skipif(_tool() is None, reason="no cuobjdump beside nvcc or in triton")


def dump(option: str, arch: str) -> str:
    command = [_tool(), option, "-arch", arch, MODULE.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def resources(arch: str) -> dict[tuple[str, str], dict[str, int]]:
    """Of each kernel of rows, by (kind of team, row): REG, STACK, LOCAL, ..."""
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s+(.+)", dump("-res-usage", arch)):
        values = {k: int(v) for k, v in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", numbers)}
        key = _key(name)
        if key:
            found[key] = values
    return found


def _key(name: str) -> tuple[str, str] | None:
    row = re.search(r"\d\d?((?:tf_|us|sl|d|n)?n?kd_(?:row|score))I", name)
    if not row:
        return None
    kind = "warp" if "warp_rows" in name else "wide" if "block_rowsId" in name else "block"
    return kind, row[1]


@functools.cache
def code(arch: str) -> dict[tuple[str, str], list[str]]:
    """The instructions of each kernel of rows."""
    found = {}
    for part in dump("-sass", arch).split("Function : ")[1:]:
        key = _key(part.split("\n", 1)[0])
        if key:
            pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)"
            found[key] = re.findall(pattern, part)
    return found


@needs_kernels
def test_module_holds_code_for_every_arch_and_ptx():
    assert CUBINS and ARCHS[-1] == CUBINS[0].replace("sm", "compute")


@needs_kernels
@needs_tool
@pytest.mark.parametrize("arch", CUBINS)
def test_every_kernel_is_there(arch):
    kinds = {(kind, row) for kind in ("warp", "block", "wide") for row in ROWS}
    assert set(resources(arch)) == kinds


@needs_kernels
@needs_tool
@pytest.mark.parametrize("row", ("kd_row", "dkd_row", "nkd_row", "tf_nkd_row", "uskd_row"))
@pytest.mark.parametrize("arch", CUBINS)
def test_short_rows_stay_in_registers(arch, row):
    usage = resources(arch)["warp", row]
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0
    assert usage["REG"] <= 128  # four blocks of 128 threads on a multiprocessor
    names = {name.split(".")[0] for name in code(arch)["warp", row]}
    assert not names & {"LDL", "STL"}


@needs_kernels
@needs_tool
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ("warp", "block"))
@pytest.mark.parametrize("arch", CUBINS)
def test_rows_move_in_16_bytes(arch, kind, row):
    names = code(arch)[kind, row]
    assert any(re.match(r"LDG\.E\.128", name) for name in names)
    assert any(re.match(r"STG\.E\.128", name) for name in names)
    assert any(re.match(r"LDS\.128", name) for name in names)
    assert any(re.match(r"STS\.128", name) for name in names)


@needs_kernels
def test_module_needs_no_cuda_runtime():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    done = subprocess.run([readelf, "-d", MODULE.__file__], capture_output=True, text=True)
    assert "libcudart" not in done.stdout and "libcuda.so" not in done.stdout


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


@pytest.mark.skipif(MODULE is None, reason="nothing can be built here")
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


def test_reason_names_what_to_do():
    reason = backends.backends()["cuda"]
    if not ARCHS and MODULE:
        assert "KDFUSE_CUDA=1" in reason
    elif MODULE:
        assert reason in ("", "torch sees no CUDA device")
