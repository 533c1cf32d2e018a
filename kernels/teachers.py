"""The teachers of a call, whole or of k logits a row, as its backends take them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .checks import check_teacher
from .sparse import SparseTeacher, check_entries, check_sparse, spread

Teacher = Tensor | SparseTeacher


def logits_of(teacher: Teacher) -> Tensor:
    """(N, C), or (N, k) of a SparseTeacher."""
    return teacher.values if isinstance(teacher, SparseTeacher) else teacher


def whole_logits(
    teachers: Sequence[Teacher],
    valid: Tensor,  # (N,) bool: in other rows a SparseTeacher may hold anything
    classes: int,
    temperature: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """(N, C) each: the teachers of the reference, those of k logits with the softmax of `dense`."""
    whole = []
    for name, x in zip(names_of(teachers), teachers, strict=True):
        if not isinstance(x, SparseTeacher):
            whole.append(x.to(dtype))
            continue
        if not backends.is_tracing():
            check_entries(name, x, classes, valid)
        values = x.values.to(dtype)
        if x.mass is not None:
            # Far from 0 the fill would be rounded at the size of the logits; softmax sees no shift.
            peak = values.amax(1, keepdim=True)
            far = (peak.abs() > 32 * min(1.0, temperature)) & peak.isfinite()
            values = values - torch.where(far, peak, 0.0)
        indices = torch.where(valid[:, None], x.indices.long(), 0)
        whole.append(spread(values, indices, x.mass, classes, temperature))
    return whole


def lists_of(teachers: Sequence[Teacher], student: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The compiled op's `indices` and `masses`; see `op.py`."""
    if not any(isinstance(x, SparseTeacher) for x in teachers):
        return [], []
    indices, masses = [], []
    for x in teachers:
        sparse = x if isinstance(x, SparseTeacher) else None
        index = sparse.indices.long().contiguous() if sparse else None
        mass = sparse.mass if sparse else None
        indices.append(student.new_empty(0, dtype=torch.int64) if index is None else index)
        masses.append(student.new_empty(0, dtype=torch.float32) if mass is None else mass)
    return indices, masses


def names_of(teachers: Sequence[Teacher]) -> list[str]:
    return ["teacher"] if len(teachers) == 1 else [f"teacher[{k}]" for k in range(len(teachers))]


def check_teachers(op: str, sparse: bool, teachers: Sequence[Teacher], student: Tensor) -> None:
    """sparse: whether the op takes a SparseTeacher."""
    for name, x in zip(names_of(teachers), teachers, strict=True):
        if not isinstance(x, SparseTeacher):
            check_teacher(name, x, student)
        elif sparse:
            check_sparse(name, x, student)
        else:
            raise TypeError(
                f"{op}_loss takes whole teacher logits, got a SparseTeacher; pass "
                f"teacher.dense(classes={student.shape[1]}, temperature=...)"
            )
