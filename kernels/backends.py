"""Which backends this machine can run, why not the others, and which one a call takes."""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import library
from .triton import lang as triton_lang

# Loaded here, not on the first call: torch.compile can trace neither a load nor a cache.
_CPU = library.load_cpu()
_CUDA = library.load_cuda(_CPU[1])


def compiled() -> tuple[library.Cpu | None, str]:
    """The compiled losses, whose ops are registered, or None and the reason."""
    return _CPU


def compiled_cuda() -> tuple[library.Cuda | None, str]:
    """The same of the CUDA kernels, whatever GPU there is."""
    return _CUDA


def backends() -> dict[str, str]:
    """Every backend's name with "" where this machine can run it, else the reason why not."""
    return {name: reason() for name, reason in REASONS.items()}


def _cuda() -> str:
    kernels, reason = compiled_cuda()
    if kernels is None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return too_old(kernels.driver, kernels.runtime)


def too_old(driver: int, runtime: int) -> str:
    """Why a driver cannot run kernels that were built with this runtime, or "". As 13000."""
    if driver // 1000 >= runtime // 1000:
        return ""
    newest, built = (f"{x // 1000}.{x % 1000 // 10}" for x in (driver, runtime))
    return (
        f"the driver supports CUDA {newest} at most and kdfuse's kernels were built with {built}; "
        "update the driver, or reinstall kdfuse with that CUDA's nvcc"
    )


def _triton() -> str:
    if triton_lang.MISSING:
        return triton_lang.MISSING
    if triton_lang.INTERPRETED or torch.cuda.is_available():
        return ""
    return (
        "torch sees no CUDA or ROCm device; TRITON_INTERPRET=1 in the environment runs the kernels "
        "on CPU tensors, for tests"
    )


# Why a backend cannot run here; "" where it can. Asked for one at a time on the way of a call.
REASONS = {
    "reference": lambda: "",
    "cpu": lambda: compiled()[1],
    "cuda": _cuda,
    "triton": _triton,
}


class Rule(NamedTuple):
    """On a GPU, rows of up to `longest` classes take the first of `order` that can run."""

    op: str  # "" for any
    longest: int
    order: tuple[str, ...]
    why: str


ANY = 2**31
# The first rule that fits a call decides where backend=None. Derived from compiled code and
# complexity, not measured.
RULES = (
    Rule("uskd", 4096, ("cuda", "triton"), "CUDA sorts a row, Triton compares all its classes"),
    Rule("uskd", 65536, ("cuda",), "where a block's shared memory has room for the sort"),
    Rule("uskd", ANY, (), "a longer row does not fit the memory in which it is ranked"),
    Rule("", ANY, ("cuda", "triton"), "CUDA moves 16 bytes at any C; Triton where 8 divides C"),
)


def rules() -> list[str]:
    """What a call without a backend takes on a GPU, and why, in words."""
    lines, seen = [], set()
    for rule in RULES:
        what = rule.op or "any other loss"
        above = "longer rows" if rule.op in seen else "any C"
        size = above if rule.longest == ANY else f"C up to {rule.longest}"
        seen.add(rule.op)
        order = ", else ".join((*rule.order, "reference"))
        lines.append(f"{what}, {size}: {order} ({rule.why}; derived, not measured)")
    return lines


def has_code(archs: list[str], major: int, minor: int) -> bool:
    """Whether one of `archs` ("sm_90", "compute_80") runs on a device of this capability."""
    for name in archs:
        kind, number = name.split("_")
        of = (int(number[:-1]), int(number[-1]))
        if kind == "compute" and of <= (major, minor):  # compiled by the driver
            return True
        if kind == "sm" and of[0] == major and of[1] <= minor:
            return True
    return False


def _fits(name: str, student: Tensor, op: str) -> bool:
    # torch.compile cannot trace a device's properties; what does not fit says so when it is run.
    if is_tracing():
        return not REASONS[name]()
    sorts = name == "cuda" and op == "uskd"
    return _runs_on(name, student.device) and (not sorts or fits_sort(student))


def fits_sort(student: Tensor) -> bool:
    """Whether a block can sort a row of `student`: its number and 2 bytes for each class."""
    most = torch.cuda.get_device_properties(student.device).shared_memory_per_block_optin
    number = 8 if student.dtype == torch.float64 else 4
    beside = 10240  # bytes that a block has beside the sort, at most
    return student.shape[1] * (number + 2) + beside <= most


@functools.cache
def _runs_on(name: str, device: torch.device) -> bool:
    """What does not change while a process lives; asking costs more than a small loss."""
    if REASONS[name]():
        return False
    if name != "cuda":
        return True
    kernels = compiled_cuda()[0]
    found = torch.cuda.get_device_properties(device)
    return kernels is not None and has_code(kernels.archs, found.major, found.minor)


_WARNED: set[str] = set()


def _warn_of_untried(name: str) -> None:
    """Once a process, until a device's results stand in docs/results."""
    if name in _WARNED:
        return
    _WARNED.add(name)
    warnings.warn(
        f"kdfuse's {name} kernels are checked on the host, but have not been run on a GPU by their "
        f"authors; `kdfuse doctor` compares them with the reference here, backend={name!r} ends "
        "this warning",
        stacklevel=7,
    )


def _on_gpu(student: Tensor, op: str) -> str:
    """The backend of a call without one, for logits on a GPU."""
    if in_functorch():
        return "reference"
    classes = student.shape[1]
    rule = next(r for r in RULES if r.op in ("", op) and classes <= r.longest)
    for name in rule.order:
        if _fits(name, student, op):
            if not is_tracing():
                _warn_of_untried(name)
            return name
    if not is_tracing():
        unfit = "no code or no room for it on this GPU"
        why = "; ".join(f"{n}: {REASONS[n]() or unfit}" for n in rule.order) or rule.why
        warnings.warn(
            f"logits on a GPU take the plain-PyTorch reference ({why}); backend='reference' ends "
            "this warning",
            stacklevel=5,
        )
    return "reference"


def in_functorch() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is at work."""
    return torch._C._are_functorch_transforms_active()


def is_tracing() -> bool:
    """Whether the values of tensors are out of reach: under torch.func or torch.compile."""
    return torch.compiler.is_compiling() or in_functorch()


def scales_on_gpu(upstream: Tensor) -> bool:
    """Whether gradients on the device of `upstream` are scaled by the compiled op."""
    if not upstream.is_cuda or torch.compiler.is_compiling():
        return False
    return compiled_cuda()[0] is not None


def choose(backend: str | None, student: Tensor, op: str = "") -> str:
    """The backend of a call of `op` on `student`; None takes the fused one of its device.

    Without a fused one, and under torch.func transforms, None takes the reference.

    Raises:
        ValueError: an unknown name, or a backend for another device.
        RuntimeError: a backend that this machine cannot run, or not under torch.func.
    """
    if backend is None:
        if student.is_cuda:
            return _on_gpu(student, op)
        usable = student.is_cpu and compiled()[0] is not None and not in_functorch()
        return "cpu" if usable else "reference"
    if backend not in REASONS:
        raise ValueError(
            f"backend={backend!r} is unknown; choose one of {', '.join(REASONS)}, or None"
        )
    reason = REASONS[backend]()
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")
    of = {"triton": "cpu" if triton_lang.INTERPRETED else "cuda"}.get(backend, backend)
    if backend != "reference" and student.device.type != of:
        raise ValueError(
            f"backend={backend!r} cannot take logits on {student.device}; "
            "move them or use backend=None"
        )
    if backend != "reference" and in_functorch():
        raise RuntimeError(
            f"backend={backend!r} does not run under torch.func transforms; "
            "use backend='reference' or None"
        )
    return backend
