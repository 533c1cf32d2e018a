"""The CUDA kernels, executed: the project's own .cu files on a GPU that the host plays.

`Gpu` calls an op as csrc/cuda/ops.cpp does, on tensors of the CPU. What a kernel does wrong on the
way (see docs/testing.md) is a `Failed` with the place in csrc.
"""

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from asked import LOSSES, Call, Given, ask, given
from sass import TAUGHT
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
UNITS = (*LOSSES, "launch")  # of csrc/cuda
OWN = ("turns", "meetings", "memory", "hooks", "runtime", "call")
FLAGS = ["-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-threadsafe-statics", "-pthread"]
FLAGS += ["-fno-gnu-unique"]  # each library has its own statics
FLAGS += ["-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare"]


class Failed(AssertionError):
    """What a kernel has done that no kernel may do."""


class _Named(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_void_p), ("name", ctypes.c_char * 64)]


class _Launched(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("blocks", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("bytes", ctypes.c_size_t),
        ("together", ctypes.c_bool),
        ("non_portable", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class Launched:
    kernel: str  # str() of its sass.Kernel; "other" of scale_rows, which has none
    blocks: int
    threads: int
    cluster: int
    bytes: int
    together: bool
    non_portable: bool  # the kernel may have clusters of more than 8 blocks


class Device(ctypes.Structure):
    """A GPU's sizes, as the runtime tells them."""

    _fields_ = [
        ("processors", ctypes.c_int),
        ("major", ctypes.c_int),
        ("memory", ctypes.c_int),
        ("memory_of_processor", ctypes.c_int),
        ("cluster", ctypes.c_uint),
        ("built_for", ctypes.c_int),
        ("static_bytes", ctypes.c_int),
        ("registers", ctypes.c_int),
        ("failing", ctypes.c_int),
        ("refused", ctypes.c_int),
        ("runs", ctypes.c_int),
    ]


_AMPERE = {"major": 8, "memory": 163 << 10, "memory_of_processor": 164 << 10, "cluster": 1}
_HOPPER = {"major": 9, "memory": 227 << 10, "memory_of_processor": 228 << 10, "cluster": 16}
GPUS = {
    "A100": {"processors": 108, **_AMPERE, "built_for": 80},
    "H100": {"processors": 132, **_HOPPER, "built_for": 90},
    "H200": {"processors": 132, **_HOPPER, "built_for": 90},
    "B200": {"processors": 148, **_HOPPER, "major": 10, "built_for": 100},
}


def device(name: str = "H100", **other: int) -> Device:
    """One of the GPUs that are known here, by default with 2 multiprocessors."""
    facts = {"processors": 2, "static_bytes": 5648, "registers": 168, "runs": 1}
    return Device(**{**GPUS[name], **facts, **other})


def whole(name: str, **other: int) -> Device:
    """With all its multiprocessors; it takes launches down and runs none."""
    return device(name, processors=GPUS[name]["processors"], runs=0, **other)


def sources(units: Sequence[str], csrc: Path) -> list[tuple[str, Path, list[str]]]:
    """Each unit of csrc/cuda with its file, and what is defined for it, as setup.py does."""
    found = []
    for name in units:
        facts = TAUGHT.get(name)
        defined = [f"-DKDFUSE_OP={name}", f"-DKDFUSE_FACTS={facts}"] if facts else []
        found.append((name, csrc / f"cuda/{'taught' if facts else name}.cu", defined))
    return found


def build(
    folder: Path, *, csrc: Path = CSRC, units: Sequence[str] = UNITS, base: Path | None = None
) -> Path:
    """The simulator with the kernels of `csrc`, in a library that is compiled in `folder`.

    base: the folder of another one, from which all is taken but these `units`.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the simulator needs a C++ compiler"
    include = ["-I", str(HERE / "include"), "-I", str(csrc)]
    seen = ["-include", "cuda_runtime.h", "-fsanitize=thread", "-O1", "-x", "c++"]
    jobs = [(name, HERE / f"{name}.cpp", ["-O2"]) for name in OWN if base is None]
    jobs += [(name, source, [*seen, *more]) for name, source, more in sources(units, csrc)]
    library = folder / "simulator.so"
    objects = [folder / f"{name}.o" for name, _, _ in jobs]

    def compile_one(job: tuple[str, Path, list[str]], made: Path) -> None:
        _, source, flags = job
        command = [compiler, *FLAGS, *include, *flags, "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, jobs, objects))
    if base:
        kept = {path.name for path in objects}
        objects += [path for path in base.glob("*.o") if path.name not in kept]
    link = [compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)]
    subprocess.run(link, check=True)
    return library


def of_run(tmp_path_factory) -> Path:
    """The simulator, compiled once for all workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "simulator"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "simulator.so"
        return made if made.exists() else build(folder)


@dataclass(frozen=True)
class Traffic:
    """Bytes that the threads read and wrote, in accesses of 16 and in smaller ones."""

    read: int
    written: int
    read_singly: int
    written_singly: int


@dataclass(frozen=True)
class Counts:
    """How often threads have met: a barrier once for all that take part in it, a shuffle once for
    its warp; and how often a thread wrote into the memory of another block."""

    block_barriers: int = 0
    cluster_barriers: int = 0
    grid_barriers: int = 0
    warp_barriers: int = 0
    shuffles: int = 0
    remote_stores: int = 0


@dataclass
class Result:
    loss: Tensor
    terms: Tensor
    gradients: list[Tensor]
    launches: list[Launched]
    traffic: dict[str, Traffic]  # by tensor
    counts: Counts


_KINDS: dict[tuple[str, bytes], int] = {}


@dataclass
class Gpu:
    library: Path
    of: Device = field(default_factory=device)
    seed: int = 0

    def __post_init__(self):
        lib = self._lib = ctypes.CDLL(str(self.library))
        for name in ("run", "capture", "scale", "failed"):
            getattr(lib, name).restype = ctypes.c_char_p
        lib.scratch.restype = ctypes.c_int64
        lib.launched.restype = lib.table.restype = ctypes.c_size_t
        lib.use_device.argtypes = [ctypes.c_int, ctypes.POINTER(Device), ctypes.c_uint64]
        lib.add_memory.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_bool,
            ctypes.c_bool,
        ]
        found = (_Named * 256)()
        count = lib.table(found)
        self.kernels = {x.kernel: x.name.decode() for x in found[:count]}

    def record(self, file: Path | None) -> "Gpu":
        """From here on all calls of this library are kept in `file`, for replay.cpp; or no more."""
        self._lib.record(str(file).encode() if file else None)
        return self

    def _number(self) -> int:
        """The launcher keeps what it has learnt of a device: each kind is one of its own."""
        return _KINDS.setdefault((str(self.library), bytes(self.of)), len(_KINDS))

    def _open(self, tensors: dict[str, Tensor | None], writable: Sequence[str]) -> list[str]:
        self._lib.clear()
        self._lib.use_device(self._number(), ctypes.byref(self.of), self.seed)
        names = []
        for name, x in tensors.items():
            if x is None or not x.numel():
                continue
            whole = x.untyped_storage()
            at, size = whole.data_ptr(), whole.nbytes()
            kind = name.split()[0]
            self._lib.add_memory(at, size, name.encode(), kind in writable, kind == "written")
            names.append(name)
        return names

    def _close(self, said: bytes) -> list[Launched]:
        if said:
            raise RuntimeError(said.decode())
        failed = self._lib.failed().decode()
        if failed:
            raise Failed(self._placed(failed))
        found = (_Launched * 64)()
        count = self._lib.launched(found, 64)
        return [
            Launched(
                self.kernels.get(x.kernel, "other"),
                x.blocks,
                x.threads,
                x.cluster,
                x.bytes,
                x.together,
                x.non_portable,
            )
            for x in found[:count]
        ]

    def _placed(self, text: str) -> str:
        """With the lines of csrc in the place of addresses."""
        base = next(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(self.library))
        )

        def lines(match: re.Match) -> str:
            at = hex(int(match[1], 16) - base - 1)
            command = ["addr2line", "-i", "-s", "-e", str(self.library), at]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return "in " + " < ".join(done.stdout.split("\n")[:4]).strip(" <")

        return re.sub(r"@(0x[0-9a-f]+)", lines, text)

    def _ask(self, *inputs, **options) -> tuple[Call, list[str]]:
        """A call on this GPU, and the names of its tensors."""
        call = ask(self._scratch, *inputs, **options)
        names = self._open(call.tensors, ("gradient", "loss", "terms", "scratch"))
        call.asked.device = self._number()
        return call, names

    def run(
        self,
        name: str,
        students: list[Tensor],
        teachers: list[Tensor],
        target: Tensor | None,
        params: list[float],
        **options,
    ) -> Result:
        """Loss, terms and gradients, as torch.ops.kdfuse.<name> returns them; options: of ask()."""
        call, names = self._ask(name, students, teachers, target, params, **options)
        launches = self._close(self._lib.run(ctypes.byref(call.asked)))
        traffic = self._traffic(names)
        return Result(call.loss, call.terms, call.gradients, launches, traffic, self._counts())

    def capture(self, inputs: tuple, count: int, destroyed: bool) -> None:
        """As many calls of kd, each into a graph of its own, which is destroyed before the next
        one is captured or, as all the others, at the end."""
        call, _ = self._ask("kd", *inputs)
        how = ctypes.c_int64(count), ctypes.c_int64(destroyed)
        self._close(self._lib.capture(ctypes.byref(call.asked), *how))

    def _scratch(self, rows: int, terms: int) -> int:
        return self._lib.scratch(ctypes.c_int64(rows), ctypes.c_int64(terms))

    def scale(
        self, gradients: list[Tensor], factor: Tensor, halves: Sequence[Tensor] = ()
    ) -> Result:
        """By one number or one for each row, in place or into `halves`."""
        rows, classes = gradients[0].shape
        tensors = {f"written {k}": x for k, x in enumerate(gradients)} | {"factor": factor}
        tensors |= {f"half {k}": x for k, x in enumerate(halves)}
        names = self._open(tensors, ("written", "half"))
        outputs = (Given * 64)(*[given(g) for g in gradients])
        into = (ctypes.c_void_p * 64)(*[x.data_ptr() for x in halves]) if halves else None
        size = (ctypes.c_int64(len(gradients)), ctypes.c_int64(rows), ctypes.c_int64(classes))
        by = ctypes.byref(given(factor))
        launches = self._close(
            self._lib.scale(outputs, into, *size, by, ctypes.c_int64(self._number()))
        )
        traffic = self._traffic(names)
        return Result(factor, factor, gradients, launches, traffic, self._counts())

    def _counts(self) -> Counts:
        six = (ctypes.c_uint64 * 6)()
        self._lib.counted(ctypes.byref(six))
        return Counts(*six)

    def _traffic(self, names: list[str]) -> dict[str, Traffic]:
        found = {}
        for k, name in enumerate(names):
            four = (ctypes.c_uint64 * 4)()
            self._lib.traffic(ctypes.c_size_t(k), ctypes.byref(four))
            found[name] = Traffic(*four)
        return found
