"""Which backends this machine can run, why not the others, and which one a call takes.

The CUDA kernels are experimental: backend="cuda" takes them; on a GPU backend=None takes the
reference.
"""

import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("kdfuse.kernels._C"), ""
    except ImportError as error:
        return None, (
            f"kdfuse.kernels._C cannot be loaded ({error}); install a C++17 compiler and reinstall "
            "kdfuse, or run `python setup.py build_ext --inplace` in a checkout"
        )


# Loaded here, not on the first call: torch.compile can trace neither an import nor a cache.
_LOADED = _load()


def compiled() -> tuple[ModuleType | None, str]:
    """The compiled module (loading it registers the ops), or None and the reason."""
    return _LOADED


def backends() -> dict[str, str]:
    """Every backend's name with "" where this machine can run it, else the reason why not."""
    return {name: reason() for name, reason in REASONS.items()}


def _cuda() -> str:
    module, reason = compiled()
    if module is None:
        return reason
    if not module.cuda_archs:
        return (
            "kdfuse was built without its CUDA kernels; install nvcc and a CUDA build of torch and "
            "reinstall kdfuse with KDFUSE_CUDA=1, which says what is missing"
        )
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _triton() -> str:
    return (
        "this version of kdfuse has no Triton kernels yet; "
        "use backend='cuda' or 'reference' on a GPU"
    )


# Why a backend cannot run here; "" where it can. Asked for one at a time on the way of a call.
REASONS = {
    "reference": lambda: "",
    "cpu": lambda: compiled()[1],
    "cuda": _cuda,
    "triton": _triton,
}


def in_functorch() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is at work."""
    return torch._C._are_functorch_transforms_active()


def is_tracing() -> bool:
    """Whether the values of tensors are out of reach: under torch.func or torch.compile."""
    return torch.compiler.is_compiling() or in_functorch()


def scales_in_place(upstream: Tensor) -> bool:
    """Whether gradients on the device of `upstream` are scaled by the compiled op."""
    if torch.compiler.is_compiling() or upstream.device.type != "cuda":
        return False
    module, _ = compiled()
    return module is not None and bool(module.cuda_archs)


def choose(backend: str | None, student: Tensor) -> str:
    """The backend of a call on `student`; None takes the fused one on a CPU.

    Elsewhere, without a fused one, and under torch.func transforms, None takes the reference.

    Raises:
        ValueError: an unknown name, or a backend for another device.
        RuntimeError: a backend that this machine cannot run, or not under torch.func.
    """
    device = student.device.type
    if backend is None:
        usable = device == "cpu" and compiled()[0] is not None and not in_functorch()
        if device == "cuda" and not is_tracing():
            warnings.warn(
                "logits on a GPU take the plain-PyTorch reference; backend='cuda' names the "
                "experimental fused kernels, backend='reference' ends this warning",
                stacklevel=5,
            )
        return "cpu" if usable else "reference"
    if backend not in REASONS:
        raise ValueError(
            f"backend={backend!r} is unknown; choose one of {', '.join(REASONS)}, or None"
        )
    reason = REASONS[backend]()
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")
    if backend in ("cpu", "cuda") and device != backend:
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
