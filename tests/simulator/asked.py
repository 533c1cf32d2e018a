"""A call of an op as call.cpp takes it (record.h): where its tensors lie, and what they are."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sass import LOSSES
from torch import Tensor

from kdfuse.kernels.table import OPS

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
REDUCTIONS = ("none", "mean", "sum")
IGNORED = -100  # labels


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


@dataclass
class Call:
    asked: Asked
    tensors: dict[str, Tensor | None]  # by name, those that it writes too
    loss: Tensor
    terms: Tensor
    gradients: list[Tensor]
    kept: list[object]  # what `asked` points to


def given(x: Tensor) -> Given:
    return Given(x.data_ptr(), x.stride(0) if x.numel() > 1 and x.dim() else 0, TYPES[x.dtype])


def ask(
    scratch_numbers: Callable[[int, int], int],
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
) -> Call:
    """scratch_numbers: of so many rows and terms, in doubles. The others: as the op has them."""
    rows, classes = students[0].shape
    wide = torch.float64 in [x.dtype for x in (*students, *teachers)]
    real = torch.float64 if wide else torch.float32
    of_terms = OPS[name].terms(len(students))
    loss = torch.empty(rows if reduction == "none" else (), dtype=real)
    terms = torch.empty(len(of_terms) + 1, dtype=real)
    types = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in students]
    gradients = [torch.empty(rows, classes, dtype=t) for t in types] if with_gradient else []
    scratch = torch.empty(scratch_numbers(rows, len(of_terms)), dtype=torch.float64)
    tensors = {f"student {k}": x for k, x in enumerate(students)}
    tensors |= {f"teacher {k}": x for k, x in enumerate(teachers)}
    tensors |= {f"gradient {k}": x for k, x in enumerate(gradients)}
    tensors |= {f"indices {k}": x for k, x in enumerate(indices)}
    tensors |= {f"mass {k}": x for k, x in enumerate(masses)}
    tensors |= {"target": target, "denominator": denominator, "upstream": upstream}
    tensors |= {"loss": loss, "terms": terms, "scratch": scratch}
    hard = target is not None and target.dim() == 1
    asked = Asked(
        op=LOSSES.index(name),
        rows=rows,
        classes=classes,
        students=len(students),
        teachers=len(teachers),
        wide=wide,
        reduction=REDUCTIONS.index(reduction),
        ignore_index=IGNORED,
        num_params=len(params),
        num_terms=len(of_terms),
        labels=target.data_ptr() if hard else None,
        label_stride=target.stride(0) if hard else 0,
        scratch=scratch.data_ptr(),
        loss=loss.data_ptr(),
        terms=terms.data_ptr(),
        divisor=divisor,
    )
    counts = (ctypes.c_uint64 * 4)()
    for k, term in enumerate(of_terms):
        counts[k // 64] |= ("top" in term) << (k % 64)
    pointed = {
        "logits": (Given * 64)(*[given(x) for x in (*students, *teachers)]),
        "gradients": (Given * 64)(*[given(x) for x in gradients]) if with_gradient else None,
        "listed": (Listed * 8)(*map(_listed, indices, masses)) if indices else None,
        "soft": None if hard or target is None else given(target),
        "denominator": None if denominator is None else given(denominator),
        "upstream": None if upstream is None else given(upstream),
        "params": (ctypes.c_double * max(1, len(params)))(*params),
        "counts": counts,
    }
    for field, value in pointed.items():
        if value is not None:
            setattr(asked, field, ctypes.addressof(value))
    return Call(asked, tensors, loss, terms, gradients, list(pointed.values()))


def _listed(indices: Tensor, mass: Tensor) -> Listed:
    if not indices.numel():
        return Listed()
    return Listed(indices.data_ptr(), indices.shape[1], given(mass) if mass.numel() else Given())
