"""The CUDA kernels, executed: the project's own .cu files on a GPU that the host plays.

`Gpu` calls an op as csrc/cuda/ops.cpp does, on tensors of the CPU. What a kernel does wrong on the
way (see docs/testing.md) is a `Failed` with the place in csrc.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kdfuse.kernels.table import OPS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
LOSSES = ("kd", "dkd", "nkd", "tf_nkd", "uskd", "slkd")  # as in csrc/cuda/kernel_table.h
UNITS = (*LOSSES, "launch")  # of csrc/cuda
OWN = ("machine", "memory", "hooks", "runtime", "call")
FLAGS = ["-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-threadsafe-statics", "-pthread"]
FLAGS += ["-fno-gnu-unique"]  # each library has its own statics
FLAGS += ["-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
REDUCTIONS = ("none", "mean", "sum")


class Failed(AssertionError):
    """What a kernel has done that no kernel may do."""


class Given(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int64),
    ]


class Listed(ctypes.Structure):
    _fields_ = [("classes", ctypes.c_void_p), ("count", ctypes.c_int64), ("mass", Given)]


_NUMBERS = "op rows classes students teachers wide reduction ignore_index num_params num_terms"
_POINTERS = "counts scratch loss terms stream"


class Asked(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS.split()),
        *((name, ctypes.c_void_p) for name in ("logits", "gradients", "listed", "labels")),
        ("label_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("soft", "params", "denominator", "upstream")),
        ("divisor", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        ("device", ctypes.c_int64),
    ]


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
    ]


@dataclass(frozen=True)
class Launched:
    kernel: str  # as in sass.Kernel, or "other" for scale_rows
    blocks: int
    threads: int
    cluster: int
    bytes: int
    together: bool


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
        ("failing", ctypes.c_int),
        ("refused", ctypes.c_int),
        ("runs", ctypes.c_int),
    ]


def device(name: str = "H100", **other: int) -> Device:
    """One of the GPUs that are known here, by default with 2 multiprocessors."""
    ampere = {"major": 8, "memory": 163 << 10, "memory_of_processor": 164 << 10, "cluster": 1}
    hopper = {"major": 9, "memory": 227 << 10, "memory_of_processor": 228 << 10, "cluster": 16}
    known = {"A100": (108, ampere), "H100": (132, hopper), "H200": (132, hopper)}
    known["B200"] = (148, {**hopper, "major": 10})
    _, sizes = known[name]
    built = {"A100": 80, "B200": 100}.get(name, 90)
    given = {"processors": 2, **sizes, "built_for": built, "static_bytes": 5648, "runs": 1}
    return Device(**{**given, **other})


def whole(name: str) -> Device:
    """With all its multiprocessors; it takes launches down and runs none."""
    return device(name, processors={"A100": 108, "B200": 148}.get(name, 132), runs=0)


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
    jobs = [(HERE / f"{name}.cpp", ["-O2"]) for name in OWN if base is None]
    jobs += [(csrc / f"cuda/{name}.cu", seen) for name in units]
    library = folder / "simulator.so"
    objects = [folder / f"{source.stem}.o" for source, _ in jobs]

    def compile_one(job: tuple[Path, list[str]], made: Path) -> None:
        source, flags = job
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


def given(x: Tensor | None) -> Given | None:
    if x is None:
        return None
    return Given(x.data_ptr(), x.stride(0) if x.numel() > 1 and x.dim() else 0, TYPES[x.dtype])


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

    block_barriers: int
    cluster_barriers: int
    grid_barriers: int
    warp_barriers: int
    shuffles: int
    remote_stores: int


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

    def run(
        self,
        name: str,
        students: list[Tensor],
        teachers: list[Tensor],
        target: Tensor | None,
        params: list[float],
        *,
        reduction: str = "none",
        denominator: Tensor | None = None,
        divisor: float = 0.0,
        upstream: Tensor | None = None,
        with_gradient: bool = True,
        indices: Sequence[Tensor] = (),
        masses: Sequence[Tensor] = (),
        ignore_index: int = -100,
        stream: int = 0,
    ) -> Result:
        """Loss, terms and gradients, as torch.ops.kdfuse.<name> returns them."""
        rows, classes = students[0].shape
        wide = torch.float64 in [x.dtype for x in (*students, *teachers)]
        real = torch.float64 if wide else torch.float32
        terms = OPS[name].terms(len(students))
        counts = (ctypes.c_uint64 * 4)()
        for k, term in enumerate(terms):
            counts[k // 64] |= ("top" in term) << (k % 64)
        out = torch.empty(rows if reduction == "none" else (), dtype=real)
        out_terms = torch.empty(len(terms) + 1, dtype=real)
        types = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in students]
        gradients = [torch.empty(rows, classes, dtype=t) for t in types] if with_gradient else []
        size = self._lib.scratch(ctypes.c_int64(rows), ctypes.c_int64(len(terms)))
        scratch = torch.empty(size, dtype=torch.float64)
        hard = target is not None and target.dim() == 1
        tensors = {f"student {k}": x for k, x in enumerate(students)}
        tensors |= {f"teacher {k}": x for k, x in enumerate(teachers)}
        tensors |= {f"gradient {k}": x for k, x in enumerate(gradients)}
        tensors |= {f"indices {k}": x for k, x in enumerate(indices)}
        tensors |= {f"mass {k}": x for k, x in enumerate(masses)}
        tensors |= {"target": target, "denominator": denominator, "upstream": upstream}
        tensors |= {"loss": out, "terms": out_terms, "scratch": scratch}
        names = self._open(tensors, ("gradient", "loss", "terms", "scratch"))
        asked = Asked(
            op=LOSSES.index(name),
            rows=rows,
            classes=classes,
            students=len(students),
            teachers=len(teachers),
            wide=wide,
            reduction=REDUCTIONS.index(reduction),
            ignore_index=ignore_index,
            num_params=len(params),
            num_terms=len(terms),
            labels=target.data_ptr() if hard else None,
            label_stride=target.stride(0) if hard else 0,
            scratch=scratch.data_ptr(),
            loss=out.data_ptr(),
            terms=out_terms.data_ptr(),
            divisor=divisor,
            stream=stream,
            device=self._number(),
        )
        keep = [(Given * 64)(*[given(x) for x in (*students, *teachers)]), counts]
        asked.logits, asked.counts = (ctypes.addressof(x) for x in keep)
        keep += [(ctypes.c_double * max(1, len(params)))(*params)]
        asked.params = ctypes.addressof(keep[-1])
        if with_gradient:
            keep += [(Given * 64)(*[given(x) for x in gradients])]
            asked.gradients = ctypes.addressof(keep[-1])
        if indices:
            lists = zip(indices, masses, strict=True)
            keep += [(Listed * 8)(*[_listed(*pair) for pair in lists])]
            asked.listed = ctypes.addressof(keep[-1])
        soft = None if hard else target
        for key, x in (("soft", soft), ("denominator", denominator), ("upstream", upstream)):
            if x is not None:
                keep += [given(x)]
                setattr(asked, key, ctypes.addressof(keep[-1]))
        if hasattr(self, "_captures"):
            said = self._lib.capture(ctypes.byref(asked), *map(ctypes.c_int64, self._captures))
        else:
            said = self._lib.run(ctypes.byref(asked))
        launches = self._close(said)
        return Result(out, out_terms, gradients, launches, self._traffic(names), self._counts())

    def capture(self, inputs: tuple, count: int, destroyed: bool) -> None:
        """As many calls of kd as given, each captured into a graph of its own."""
        self._captures = count, destroyed
        try:
            self.run("kd", *inputs)
        finally:
            del self._captures

    def scale(self, gradients: list[Tensor], factor: Tensor) -> Result:
        """In place, by one number or one for each row."""
        rows, classes = gradients[0].shape
        tensors = {f"written {k}": x for k, x in enumerate(gradients)} | {"factor": factor}
        names = self._open(tensors, ("written",))
        outputs = (Given * 64)(*[given(g) for g in gradients])
        size = (ctypes.c_int64(len(gradients)), ctypes.c_int64(rows), ctypes.c_int64(classes))
        launches = self._close(
            self._lib.scale(
                outputs, *size, ctypes.byref(given(factor)), ctypes.c_int64(self._number())
            )
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


def _listed(indices: Tensor, mass: Tensor) -> Listed:
    if not indices.numel():
        return Listed()
    of_mass = given(mass) if mass.numel() else Given()
    return Listed(indices.data_ptr(), indices.shape[1], of_mass)
