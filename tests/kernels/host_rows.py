"""The CUDA row pass on the host (host_rows.cpp), called as the compiled ops are."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from calls import Case, call
from torch import Tensor

from kdfuse.kernels import run as front
from kdfuse.kernels.table import OPS

SOURCE = Path(__file__).with_name("host_rows.cpp")
FLAGS = ["-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
NAMES = ("kd", "dkd", "nkd", "tf_nkd", "uskd", "slkd")
# Which rows of the kernels: their number in host_rows.cpp, and whether rows read twice are held.
PATHS = {"general": (0, 0), "resident": (1, 0), "streamed": (2, 0), "held": (2, 1)}
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Given(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int64),
    ]


class Listed(ctypes.Structure):
    _fields_ = [("classes", ctypes.c_void_p), ("count", ctypes.c_int64), ("mass", Given)]


def listed(indices: Tensor, mass: Tensor) -> Listed:
    if not indices.numel():
        return Listed()
    of_mass = given(mass) if mass.numel() else Given()
    return Listed(indices.data_ptr(), indices.shape[1], of_mass)


def given(x: Tensor) -> Given:
    return Given(x.data_ptr(), x.stride(0) if x.dim() else 0, TYPES[x.dtype])


def built(folder: Path) -> ctypes.CDLL:
    """The library in `folder`, compiled where it is not there yet."""
    library = folder / "host_rows.so"
    compiler = shutil.which("g++") or shutil.which("c++")
    if not library.exists():
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def arguments(monkeypatch, name: str, case: Case, **settings) -> tuple:
    """What the public function hands to the compiled op: students, teachers, target, params."""
    caught = []

    def catch(op, students, teachers, target, params, options):
        caught.append((list(students), list(teachers), target, list(params)))
        return torch.zeros(()), torch.zeros(64)

    monkeypatch.setattr(front, "run_fused", catch)
    call(name, case, backend="cpu", **settings)
    return caught[0]


def run(
    library: ctypes.CDLL,
    name: str,
    students: list[Tensor],
    teachers: list[Tensor],
    target: Tensor | None,
    params: list[float],
    *,
    reduction: int,
    denominator: Tensor | None = None,
    upstream: Tensor | None = None,
    threads: int = 1,
    held: int = 8,
    path: str = "general",
    indices: Sequence[Tensor] = (),
    masses: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, terms and gradients, as torch.ops.kdfuse.<name> returns them.

    threads: of the team. held: how many of a row's inputs the team's memory keeps. path: of PATHS.
    """
    rows, classes = students[0].shape
    wide = torch.float64 in [x.dtype for x in (*students, *teachers)]
    real = torch.float64 if wide else torch.float32
    names = OPS[name].terms(len(students))
    counts = (ctypes.c_uint64 * 4)()
    for k, term in enumerate(names):
        counts[k // 64] |= ("top" in term) << (k % 64)
    loss = torch.empty(rows if reduction == 0 else (), dtype=real)
    terms = torch.empty(len(names) + 1, dtype=real)
    types = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in students]
    gradients = [torch.empty(rows, classes, dtype=t) for t in types]
    logits = (Given * 64)(*[given(x) for x in (*students, *teachers)])
    outputs = (Given * 64)(*[given(g) for g in gradients])
    labels = target.data_ptr() if target is not None and target.dim() == 1 else None
    soft = given(target) if target is not None and target.dim() == 2 else None
    above = given(upstream) if upstream is not None else None
    library.host_rows(
        NAMES.index(name),
        *PATHS[path],
        threads,
        held,
        int(wide),
        ctypes.c_int64(rows),
        ctypes.c_int64(classes),
        len(students),
        len(teachers),
        logits,
        outputs,
        (Listed * 8)(*[listed(*x) for x in zip(indices, masses, strict=True)]) if indices else None,
        ctypes.c_void_p(labels),
        ctypes.byref(soft) if soft else None,
        (ctypes.c_double * len(params))(*params),
        len(params),
        ctypes.c_void_p(denominator.data_ptr() if denominator is not None else None),
        ctypes.byref(above) if above else None,
        reduction,
        len(names),
        counts,
        ctypes.c_void_p(loss.data_ptr()),
        ctypes.c_void_p(terms.data_ptr()),
    )
    return loss, terms, gradients


def scale(library: ctypes.CDLL, gradient: Tensor, factor: Tensor) -> None:
    """In place, by one number or one for each row."""
    rows, classes = gradient.shape
    at = ctypes.c_void_p(gradient.data_ptr())
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(classes))
    library.host_scale(at, TYPES[gradient.dtype], *sizes, ctypes.byref(given(factor)), 11)
