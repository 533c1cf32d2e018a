"""The kernels under the compiler's sanitizers of addresses and of undefined behaviour.

    python tests/simulator/sanitizers.py

Calls of every kernel are recorded on the simulator, then run again by a program (replay.cpp) in
which each tensor is memory of its own, and have to give the same bits. Fails where a sanitizer
says anything.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kernels"), str(HERE)]

import simulator  # noqa: E402
import torch  # noqa: E402
from calls import arguments  # noqa: E402
from simulator import CSRC, FLAGS, UNITS, Gpu  # noqa: E402
from test_cuda_build import the_table  # noqa: E402
from test_kernels import a_case, of_device, sizes, upstream_of  # noqa: E402

OWN = ("turns", "meetings", "memory", "runtime", "call", "replay")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def build(folder: Path) -> Path:
    """The program with all kernels."""
    compiler = shutil.which("g++") or shutil.which("c++")
    common = [*FLAGS, *SANITIZERS, "-O1", "-DKDFUSE_SANITIZED"]
    common += ["-I", str(HERE / "include"), "-I", str(CSRC)]
    jobs = [(HERE / f"{unit}.cpp", []) for unit in OWN]
    seen = ["-include", "cuda_runtime.h", "-x", "c++"]
    jobs += [(CSRC / f"cuda/{unit}.cu", seen) for unit in UNITS]
    objects = [folder / f"{source.stem}.o" for source, _ in jobs]

    def compile_one(job: tuple[Path, list[str]], made: Path) -> None:
        source, more = job
        command = [compiler, *common, *more, "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, jobs, objects))
    program = folder / "replay"
    subprocess.run(
        [compiler, *SANITIZERS, "-pthread", *map(str, objects), "-o", program], check=True
    )
    return program


def record(library: Path, file: Path) -> int:
    """The calls of test_kernels.py but the longest; returns how many."""
    count = 0
    lib = Gpu(library).record(file)
    for kernel in sorted(the_table(), key=str):
        for n, c in sizes(kernel)[:2]:
            case, settings = a_case(kernel, n, c)
            inputs = arguments(kernel.loss, case, **settings)
            gpu = Gpu(library, of_device(kernel), seed=count)
            got = gpu.run(kernel.loss, *inputs, upstream=upstream_of(n))
            assert [x.kernel for x in got.launches] == [str(kernel)]
            count += 1
    lib.record(None)
    return count


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        calls = folder / "calls"
        print(f"{record(simulator.build(folder), calls)} calls recorded", flush=True)
        (folder / "sanitized").mkdir()
        program = build(folder / "sanitized")
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        sys.exit(subprocess.run([program, calls], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
