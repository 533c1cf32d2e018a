"""What every Triton op does before its kernels: types, strides, outputs. N rows, C classes."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..op import Op
from .lang import tl
from .launch import counter, launch, power_of_two, shape

COUNTED_BY_EACH = 2048  # labels that every program counts for itself
MOST = 8  # SL-Ts, and teachers: the kernels' loops over them are unrolled


@dataclass
class Call:
    """One call of an op, checked, with its outputs."""

    op: Op
    students: list[Tensor]
    teachers: list[Tensor]
    target: Tensor | None
    denominator: Tensor | None
    upstream: Tensor | None
    numbers: list[float]
    reduction: int
    ignore: int
    with_gradient: bool

    def __post_init__(self) -> None:
        student = self.students[0]
        self.rows, self.classes = student.shape
        logits = (*self.students, *self.teachers)
        for x in (*logits, *([] if self.target is None else [self.target])):
            if x.device != student.device or (x.dim() == 2 and x.stride(1) != 1 and self.rows):
                raise ValueError(
                    f"{self.op.name} takes logits and target on one device, {student.device}, with "
                    f"unit stride along the classes; got {x.device}, strides {x.stride()}; call "
                    ".contiguous()"
                )
        self.wide = any(x.dtype == torch.float64 for x in logits)
        self.real = torch.float64 if self.wide else torch.float32
        self.kind = 0 if self.target is None else self.target.dim()
        names = self.op.terms(len(self.students))
        self.columns = 1 + len(names)
        self.counts = sum(1 << (1 + k) for k, name in enumerate(names) if "top" in name)
        each = self.reduction == 0
        self.loss = student.new_empty((self.rows,) if each else (), dtype=self.real)
        self.terms = student.new_empty((self.columns,), dtype=self.real)
        self.values = student.new_empty((self.rows * self.columns,), dtype=self.real)
        self.scratch = student.new_empty((3,), dtype=torch.float64)
        self.counter = counter(student)
        self.gradients = [
            x.new_empty(x.shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
            for x in (self.students if self.with_gradient else [])
        ]

    def whole(self, *others: Tensor) -> int:
        """The power of 2, at most 16, that divides C and the strides: the widest load."""
        matrices = [*self.students, *others]
        if self.kind == 2 and self.target is not None:
            matrices.append(self.target)
        return math.gcd(16, self.classes, *[x.stride(0) for x in matrices])

    def mean(self, counted: bool) -> int:
        """See `batch.row_scale`. counted: a pass before has left the count of the rows."""
        if self.reduction != 1:
            return 0
        if self.denominator is not None:
            return 1
        if self.kind != 1:
            return 2
        return 3 if self.rows <= COUNTED_BY_EACH and not counted else 4

    def params(self) -> tuple[float, ...]:
        """float64 as two of float32 each: Triton takes numbers as float32 alone."""
        if not self.wide:
            return tuple(self.numbers)
        high = [ctypes.c_float(x).value for x in self.numbers]
        return (*high, *[x - h for x, h in zip(self.numbers, high, strict=True)])

    def real_type(self):
        return tl.float64 if self.wide else tl.float32

    def shape(self, inputs: int) -> tuple[int, bool, int]:
        return shape(self.classes, inputs + (self.kind == 2), self.wide)

    def target_stride(self, whole: int) -> int:
        if self.target is None:
            return 0
        return self.target.stride(0) // (whole if self.kind == 2 else 1)

    def upstream_stride(self) -> int:
        return 0 if self.upstream is None or self.upstream.dim() == 0 else self.upstream.stride(0)

    def ending(self, counted: bool, block: int) -> tuple:
        """The constants of the end of every loss's rows; block: classes of a tile."""
        width = power_of_two(self.columns)
        return (
            self.mean(counted),
            self.reduction,
            self.columns,
            width,
            self.counts,
            max(block // width, 1),
            self.with_gradient,
        )

    def launch(self, kernel, args: tuple, constants: tuple, warps: int, programs: int = 0) -> None:
        launch(kernel, programs or self.rows, args, constants, warps, self.students[0])

    def result(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self.loss, self.terms, self.gradients


def refuse(what: str) -> None:
    raise RuntimeError(f"backend='triton': {what}; use backend='reference'")


def check_counts(call: Call, students: range, teachers: range) -> None:
    """The schema says nothing of how many there are; those who call the op themselves may err."""
    if len(call.students) not in students or len(call.teachers) not in teachers:
        raise ValueError(
            f"{call.op.name} does not take {len(call.students)} students and "
            f"{len(call.teachers)} teachers"
        )
    if call.op.needs_target and call.target is None:
        raise ValueError(f"{call.op.name} needs a target")
    if max(len(call.students) - 1, len(call.teachers)) > MOST:
        refuse(f"{call.op.name} takes at most {MOST} teachers or SL-Ts")


def strides(whole: int, matrices: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x.stride(0) // whole for x in matrices)
