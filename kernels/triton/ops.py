"""The ops in Triton under the namespace kdfuse_triton, with the schema of the compiled ones.

Launches: one for KD, DKD, NKD and SLKD, two for tf-NKD and USKD, whose batch mean comes first; and
one of a single program that counts the labels, for a mean over more than COUNTED_BY_EACH of them.
Nothing waits for the device.
"""

from functools import partial

import torch
from torch import Tensor

from ..namespace import TRITON
from ..op import Op
from .batch import count_rows
from .call import Call, check_counts, refuse, strides
from .lang import INTERPRETED
from .launch import power_of_two, ranking_shape
from .self_taught import scores
from .slkd import slkd_rows
from .taught import taught_rows
from .tf_nkd import tf_nkd_rows
from .uskd import LONGEST, uskd_rows

_LIBRARY = torch.library.Library(TRITON, "DEF")
SCHEMA = (
    "(Tensor[] students, Tensor[] teachers, Tensor[] indices, Tensor[] masses, Tensor? target, "
    "Tensor? denominator, float? divisor, Tensor? upstream, float[] params, int reduction, "
    "int ignore_index, "
    "bool with_gradient) -> (Tensor loss, Tensor terms, Tensor[] gradients)"
)


def count(call: Call) -> None:
    args = (call.target, call.scratch, call.target_stride(1), call.rows, call.ignore)
    call.launch(count_rows, args, (), 8, programs=1)


def run_taught(call: Call, indices: list[Tensor], masses: list[Tensor]) -> None:
    op = call.op
    check_counts(call, range(1, 2), range(1, 2 if op.teacher_weights is None else 99))
    listed = tuple(x.shape[1] if x.dim() == 2 else 0 for x in indices) or (0,) * len(call.teachers)
    dense = [x for x, k in zip(call.teachers, listed, strict=True) if not k]
    whole = call.whole(*dense)
    if call.mean(False) == 4:
        count(call)
    apart = 1 if call.numbers[0] != 1 else 2
    at_one = 0 if not call.kind else 2 if op.student_at_1 else apart
    block, one, warps = call.shape(1 + len(call.teachers))
    steps = [
        *strides(whole, call.students),
        *[x.stride(0) // (1 if k else whole) for x, k in zip(call.teachers, listed, strict=True)],
    ]
    none = [None] * len(call.teachers)
    index = [x if k else None for x, k in zip(indices, listed, strict=False)] or none
    mass = [x if k and x.numel() else None for x, k in zip(masses, listed, strict=False)] or none
    steps += [0 if x is None else x.stride(0) for x in (*index, *mass)]
    args = (
        call.students[0],
        tuple(call.teachers),
        call.gradients[0] if call.with_gradient else None,
        call.target,
        call.denominator,
        call.upstream,
        tuple(index),
        tuple(mass),
        call.values,
        call.loss,
        call.terms,
        call.counter,
        call.scratch,
        call.params(),
        tuple(steps),
        call.rows,
        call.classes // whole,
        call.target_stride(whole),
        call.upstream_stride(),
        call.ignore,
    )
    constants = (
        op.coefficients,
        whole,
        call.real_type(),
        call.kind,
        listed,
        tuple(power_of_two(k) for k in listed),
        at_one,
        (op.entropy, apart if op.teacher_at_1 else 0, op.student_at_1),
        *call.ending(False, block),
        block,
        one,
    )
    call.launch(taught_rows, args, constants, warps)


def score(call: Call, whole: int, squared: bool) -> Tensor:
    """The label scores of the rows, (N, 2); their means and the count go into the scratch."""
    scored = call.values.new_empty((call.rows * 2,))
    block, one, warps = call.shape(1)
    student = call.students[0]
    args = (
        student,
        call.target,
        scored,
        call.scratch,
        call.counter,
        call.rows,
        call.classes // whole,
        call.target_stride(whole),
        student.stride(0) // whole,
        call.ignore,
    )
    constants = (squared, whole, call.real_type(), call.kind, block, one)
    call.launch(scores, args, constants, warps)
    return scored


def run_tf_nkd(call: Call) -> None:
    check_counts(call, range(1, 2), range(1))
    whole = call.whole()
    scored = score(call, whole, squared=False)
    block, one, warps = call.shape(1)
    args = (
        call.students[0],
        call.gradients[0] if call.with_gradient else None,
        call.target,
        call.denominator,
        call.upstream,
        scored,
        call.scratch,
        call.values,
        call.loss,
        call.terms,
        call.counter,
        call.params(),
        call.rows,
        call.classes // whole,
        call.target_stride(whole),
        *strides(whole, call.students),
        call.upstream_stride(),
        call.ignore,
    )
    constants = (
        call.op.coefficients,
        whole,
        call.real_type(),
        call.kind,
        *call.ending(True, block),
    )
    call.launch(tf_nkd_rows, args, (*constants, block, one), warps)


def run_uskd(call: Call) -> None:
    check_counts(call, range(2, 3), range(1))
    if call.classes > LONGEST:
        refuse(f"uskd ranks rows of at most {LONGEST} classes, got {call.classes}")
    whole = call.whole()
    scored = score(call, whole, squared=True)
    block, warps = ranking_shape(call.classes)
    args = (
        *call.students,
        tuple(call.gradients) if call.with_gradient else None,
        call.target,
        call.denominator,
        call.upstream,
        scored,
        call.scratch,
        call.values,
        call.loss,
        call.terms,
        call.counter,
        call.params(),
        call.rows,
        call.classes // whole,
        call.target_stride(whole),
        *strides(whole, call.students),
        call.upstream_stride(),
        call.ignore,
    )
    paper = call.numbers[3] != 0
    constants = (
        call.op.coefficients,
        paper,
        whole,
        call.real_type(),
        call.kind,
        *call.ending(True, block),
    )
    call.launch(uskd_rows, args, (*constants, block), warps)


def run_slkd(call: Call) -> None:
    check_counts(call, range(2, 99), range(1, 2))
    whole = call.whole(*call.teachers)
    if call.mean(False) == 4:
        count(call)
    # The fused teacher is one input more.
    block, one, warps = call.shape(len(call.students) + 2)
    args = (
        tuple(call.students),
        call.teachers[0],
        tuple(call.gradients) if call.with_gradient else None,
        call.target,
        call.denominator,
        call.upstream,
        call.values,
        call.loss,
        call.terms,
        call.counter,
        call.scratch,
        call.params(),
        strides(whole, (*call.students, *call.teachers)),
        call.rows,
        call.classes // whole,
        call.target_stride(whole),
        call.upstream_stride(),
        call.ignore,
    )
    pulled, at_one = call.numbers[6] == 0, 2 if call.numbers[0] == 1 else 1
    constants = (call.op.coefficients, pulled, whole, call.real_type(), call.kind, at_one)
    call.launch(slkd_rows, args, (*constants, *call.ending(False, block), block, one), warps)


def run_op(
    op: Op,
    students: list[Tensor],
    teachers: list[Tensor],
    indices: list[Tensor],
    masses: list[Tensor],
    target: Tensor | None,
    denominator: Tensor | None,
    divisor: float | None,
    upstream: Tensor | None,
    params: list[float],
    reduction: int,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The op itself, see `SCHEMA`."""
    if divisor is not None:  # filled on the device: Triton takes numbers as float32 alone
        denominator = students[0].new_full((), divisor, dtype=torch.float64)
    call = Call(
        op,
        students,
        teachers,
        target,
        denominator,
        upstream,
        params,
        reduction,
        ignore_index,
        with_gradient,
    )
    if call.rows == 0:
        return call.loss.zero_(), call.terms.zero_(), call.gradients
    if not op.own_rows:
        run_taught(call, indices, masses)
    elif indices or masses:
        raise ValueError(f"{op.name} takes whole teacher logits only")
    else:
        OTHERS[op.name](call)
    return call.result()


OTHERS = {"tf_nkd": run_tf_nkd, "uskd": run_uskd, "slkd": run_slkd}


def define(op: Op) -> None:
    """Registers torch.ops.kdfuse_triton.<op>, for CPU tensors where Triton interprets."""
    _LIBRARY.define(op.name + SCHEMA)
    _LIBRARY.impl(op.name, partial(run_op, op), "CPU" if INTERPRETED else "CUDA")
