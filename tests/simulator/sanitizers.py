"""The kernels under the compiler's sanitizers: addresses and undefined behaviour, and threads.

    python tests/simulator/sanitizers.py [address | thread]

Calls of every kernel are recorded on the simulator, then run again by a program (replay.cpp) in
which each tensor is memory of its own, and have to give the same bits. To the thread sanitizer each
CUDA thread is one, and nothing but barriers, fences and atomics makes an order. Fails where a
sanitizer says anything.
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
from sass import Kernel  # noqa: E402
from simulator import CSRC, FLAGS, UNITS, Device, Gpu, device, sources  # noqa: E402
from test_cuda_build import the_table  # noqa: E402
from test_joins import calls as in_turn  # noqa: E402
from test_kernels import a_case, of_device, sizes, upstream_of  # noqa: E402

OWN = ("turns", "meetings", "memory", "runtime", "call", "replay")
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}


def build(name: str, folder: Path, simulated: Path) -> Path:
    """The program with all kernels. simulated: the simulator's folder; its kernels are compiled for
    the thread sanitizer already. What plays the GPU is not: it makes an order of its own."""
    compiler = shutil.which("g++") or shutil.which("c++")
    common = [*FLAGS, "-O1", f"-DKDFUSE_SANITIZED_{name.upper()}"]
    common += ["-I", str(HERE / "include"), "-I", str(CSRC)]
    common += SANITIZERS[name] if name == "address" else []
    jobs = [(unit, HERE / f"{unit}.cpp", []) for unit in OWN]
    seen = ["-include", "cuda_runtime.h", "-x", "c++"]
    if name == "address":
        jobs += [(unit, source, [*seen, *more]) for unit, source, more in sources(UNITS, CSRC)]
    objects = [folder / f"{unit}.o" for unit, _, _ in jobs]

    def compile_one(job: tuple[str, Path, list[str]], made: Path) -> None:
        _, source, more = job
        command = [compiler, *common, *more, "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, jobs, objects))
    if name == "thread":
        # First: of a function that both have the linker keeps the one whose accesses are seen.
        objects = [*(simulated / f"{unit}.o" for unit in UNITS), *objects]
    program = folder / "replay"
    link = [compiler, *SANITIZERS[name], "-pthread", *map(str, objects), "-o", str(program)]
    subprocess.run(link, check=True)
    return program


def recorded(kernel: Kernel) -> list[tuple[Device, int, int]]:
    """GPUs, rows and classes: of test_kernels.py without the longest, and where a team has several
    rows, in whose memory one follows the other."""
    calls = [(of_device(kernel), n, c) for n, c in sizes(kernel)[:2]]
    if kernel.kind.startswith("fast"):
        return calls + [(gpu, many, c) for gpu, c, _, many in in_turn(kernel)[:2]]
    rows, classes = (26, 33) if kernel.kind == "general_warps" else (9, 1101)
    return [*calls, (device(processors=1), rows, classes)]


def record(library: Path, file: Path) -> int:
    """Returns how many calls there are."""
    count = 0
    lib = Gpu(library).record(file)
    for kernel in sorted(the_table(), key=str):
        for gpu, n, c in recorded(kernel):
            case, settings = a_case(kernel, n, c)
            inputs = arguments(kernel.loss, case, **settings)
            got = Gpu(library, gpu, count).run(kernel.loss, *inputs, upstream=upstream_of(n))
            assert [x.kernel for x in got.launches] == [str(kernel)]
            count += 1
    lib.record(None)
    return count


def replay(program: Path, calls: Path) -> bool:
    """Whether nothing was wrong."""
    # The thread sanitizer finds its own memory only where addresses are not drawn.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, **OPTIONS}
    done = subprocess.run([*fixed, str(program), str(calls)], env=environment, check=False)
    return done.returncode == 0


def main() -> None:
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(SANITIZERS)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        calls = folder / "calls"
        print(f"{record(simulator.build(folder), calls)} calls recorded", flush=True)
        failed = []
        for name in chosen:
            (folder / name).mkdir()
            print(f"{name}: ", end="", flush=True)
            failed += [] if replay(build(name, folder / name, folder), calls) else [name]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
