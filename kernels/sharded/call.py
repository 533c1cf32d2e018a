"""Losses of logits whose classes are spread over the processes of a group (tensor parallelism).

Two passes over a process's own classes with one collective between them: the statistics of a row
are a few sums that merge (`merge`), its gradient needs only what all parts merged into. One
collective is enough because each sum travels with the peak that it is relative to, where the usual
vocabulary-parallel loss reduces the peaks first and the sums after; and an all-gather, because
these statistics do not add. It moves 8 W S bytes a row: 18 numbers for one teacher, which is
1.2 KB a row on eight processes, however many classes there are. Where the gradient is stored, the
part is read twice and the gradient written once: 2K + 3 elements a logit for K teachers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..checks import check_denominator, check_range
from ..namespace import COMPILED
from ..op import (
    REDUCTIONS,
    Loss,
    Op,
    Options,
    cast,
    compiled_op,
    denominator_of,
    named,
    refuse_second_derivative,
    scaled,
    unit_stride,
)
from ..parts import ClassPart
from ..sparse import SparseTeacher
from ..teachers import Teacher
from . import rows
from .merge import Layout, layout, merge


def run(
    op: Op,
    part: ClassPart,
    slts: Sequence[Tensor],
    teachers: Sequence[Teacher],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> Loss:
    """The loss of the whole rows, the same on every process of the group; see `ClassPart`."""
    check(op, part, slts, target, params, options)
    students = [unit_stride(x) for x in (part.logits, *slts)]
    whole = [unit_stride(teacher_part(x, part)) for x in teachers]
    stats, grad = passes(op, chosen(options.backend, part.logits))
    where = (part.first_class, part.classes)
    at = layout(op, len(students), len(whole), list(params))
    held = part.logits.shape[1]
    if held:
        logits = ([x.detach() for x in students], whole)
        packed = stats(*logits, target, *where, list(params), options.ignore_index)
    else:
        packed = nothing(at, part.logits)
    first = torch.full_like(packed[:, :1], part.first_class)
    gathered = gather(torch.cat([packed, first], 1), part.group)
    check_parts(gathered[..., -1], gathered[..., 1], part)
    merged = merge(gathered[..., :-1], at)

    denominator, divisor = denominator_of(options.denominator, part.logits.device)
    if divisor is not None:  # filled on the device: a copy from the host would wait for it
        denominator = torch.full((), divisor, dtype=torch.float64, device=part.logits.device)
    static = (list(params), REDUCTIONS[options.reduction], options.ignore_index)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in students)
    call = partial(with_no_class if not held else with_classes, grad, where, static)
    if wanted:
        stored, count = options.stored_gradient, len(students)
        inputs = (target, merged, denominator, *students, *whole)
        loss, terms = Split.apply(call, stored, count, *inputs)
    else:
        loss, terms, _ = call(students, whole, target, merged, denominator, None, False)
    return named(op, len(students), loss, terms, target, options)


def check(
    op: Op,
    part: ClassPart,
    slts: Sequence[Tensor],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> None:
    """What all processes see alike, so that none is left waiting for another that refuses."""
    if op.from_stats is None:
        raise ValueError(
            f"{op.name}_loss ranks all classes of a row and cannot take a ClassPart; gather the "
            "logits, or use a loss that does not rank"
        )
    for name, x in [("student", part.logits), *(("every SL-T", x) for x in slts)]:
        check_part(name, x, part.logits)
    first, held = part.first_class, part.logits.shape[1]
    if part.classes < 2 or first < 0 or first + held > part.classes:
        raise ValueError(
            f"ClassPart of {held} classes from first_class={first} on is not within "
            f"classes={part.classes}"
        )
    if op.rest_weight is not None and part.classes == 2 and params[op.rest_weight]:
        raise ValueError(f"classes=2 leaves {op.name}_loss a single class beside the label")
    if target is not None or op.needs_target:
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor, got {type(target).__name__}")
        if target.dtype != torch.int64 or target.shape != part.logits.shape[:1]:
            raise ValueError(
                f"target of a ClassPart must be int64 class indices of shape "
                f"({part.logits.shape[0]},), got {target.dtype} {tuple(target.shape)}"
            )
        if target.device != part.logits.device:
            raise ValueError(
                f"target is on {target.device}, the student on {part.logits.device}; "
                "move one of them"
            )
        if not backends.is_tracing():
            check_range(target, part.classes, options.ignore_index)
    if options.denominator is not None:
        check_denominator(options.denominator, hidden=backends.is_tracing())


def teacher_part(x: Teacher, part: ClassPart) -> Tensor:
    if isinstance(x, SparseTeacher):
        raise TypeError(
            "a ClassPart takes its teachers as parts of whole logits, got a SparseTeacher; pass "
            f"those columns of teacher.dense(classes={part.classes}, temperature=...)"
        )
    check_part("teacher", x, part.logits)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher requires grad, but gets none from this loss; pass teacher.detach()"
        )
    return x


def check_part(name: str, x: Any, student: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be this process's part of the logits as a tensor, got {type(x).__name__}"
        )
    if not x.is_floating_point() or x.dim() != 2:
        raise ValueError(
            f"{name} must be floating logits of shape (N, C_part), got {x.dtype} {tuple(x.shape)}"
        )
    if x.shape != student.shape or x.device != student.device:
        raise ValueError(
            f"{name} must have the shape {tuple(student.shape)} and the device {student.device} "
            f"of the student's part, got {tuple(x.shape)} on {x.device}"
        )


def check_parts(first: Tensor, size: Tensor, part: ClassPart) -> None:
    """That the parts hold every class once: a process or an offset left out is silently wrong.

    first, size: (W, N) first class and number of classes of each part.
    """
    empty = size == 0
    first, order = torch.where(empty, part.classes, first).sort(dim=0, stable=True)
    sizes = size.gather(0, order)
    side_by_side = (first == sizes.cumsum(0) - sizes) | empty.gather(0, order)
    whole = side_by_side.all() & (sizes.sum(0) == part.classes).all()
    if size.device.type != "cpu" or backends.is_tracing():
        torch._assert_async(whole, "kdfuse: the parts do not hold every class once")
    elif not whole:
        parts = [f"[{int(f)}, {int(f + s)})" for f, s in zip(first[:, 0], sizes[:, 0], strict=True)]
        raise ValueError(
            f"the parts of this group hold the classes {', '.join(parts)}, which is not each of "
            f"ClassPart.classes={part.classes} once; look at first_class and classes"
        )


def chosen(backend: str | None, student: Tensor) -> str:
    """ "cpu" or "reference": there are no fused kernels for parts on a GPU."""
    if backend is None:
        usable = student.device.type == "cpu" and backends.compiled()[0] is not None
        return "cpu" if usable else "reference"
    if backend not in ("cpu", "reference"):
        raise ValueError(
            f"backend={backend!r} has no kernels for a ClassPart; use backend=None or 'reference'"
        )
    return backends.choose(backend, student)


def passes(op: Op, backend: str) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """The two functions of a loss, by the schema of the compiled ops."""
    if backend == "reference":
        return partial(rows.stats, op), partial(rows.grad_from_stats, op)
    return (
        compiled_op(COMPILED, f"{op.name}_stats"),
        compiled_op(COMPILED, f"{op.name}_grad_from_stats"),
    )


def nothing(at: Layout, like: Tensor) -> Tensor:
    """The statistics of a part without classes."""
    packed = torch.full((like.shape[0], at.width), -torch.inf, device=like.device).double()
    head, sets, pairs, ranks = at.views(packed)
    head[..., 0], head[..., 1] = -1, 0
    sets[..., 1:3] = 0
    pairs.zero_()
    ranks[..., -1] = 0
    return packed


def gather(packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(W, N, S) from each process's (N, S)."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return packed[None]
    world = dist.get_world_size(group)
    every = packed.new_empty((world * packed.shape[0], packed.shape[1]))
    dist.all_gather_into_tensor(every, packed, group=group)
    return every.unflatten(0, (world, packed.shape[0]))


def with_classes(
    grad, where, static, students, teachers, target, merged, denominator, upstream, with_gradient
):
    given = (merged, denominator, upstream)
    return grad(students, teachers, target, *where, *given, *static, with_gradient)


def with_no_class(
    grad, where, static, students, teachers, target, merged, denominator, upstream, with_gradient
):
    """The loss of a process that holds no class: any row of one class will do for its logits."""

    def padded(logits):
        return [x.new_zeros((x.shape[0], 1)) for x in logits]

    given = (merged, denominator, upstream)
    inputs = (padded(students), padded(teachers), target, 0, where[1], *given)
    loss, terms, _ = grad(*inputs, *static, False)
    return loss, terms, [torch.empty_like(x) for x in students] if with_gradient else []


class Split(torch.autograd.Function):
    """The second pass; its gradients are stored, or made in the backward pass."""

    @staticmethod
    def forward(ctx, call, stored, count, target, merged, denominator, *logits):
        students, teachers = list(logits[:count]), list(logits[count:])
        given = (target, merged, denominator)
        loss, terms, gradients = call(students, teachers, *given, None, stored)
        ctx.call, ctx.stored, ctx.count = call, stored, count
        ctx.types = [x.dtype for x in students]
        ctx.teachers = len(teachers)
        ctx.save_for_backward(*(gradients if stored else (*given, *logits)))
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, upstream, _):
        refuse_second_derivative()
        if ctx.stored:
            made = scaled(ctx.saved_tensors, upstream)
        else:
            target, merged, denominator, *logits = ctx.saved_tensors
            lists = (logits[: ctx.count], logits[ctx.count :])
            _, _, made = ctx.call(*lists, target, merged, denominator, upstream, True)
        return (None,) * 6 + cast(made, ctx.types) + (None,) * ctx.teachers


def register(op: Op) -> None:
    """Shapes for tracing of the compiled ops of a loss, and plain PyTorch for them on a GPU."""

    def shape_of_stats(students, teachers, target, first, classes, params, ignore_index):
        width = layout(op, len(students), len(teachers), params).width
        return students[0].new_empty((students[0].shape[0], width), dtype=torch.float64)

    def shapes(
        students,
        teachers,
        target,
        first,
        classes,
        stats,
        denominator,
        upstream,
        params,
        reduction,
        ignore_index,
        with_gradient,
    ):
        student, real = students[0], rows.working_type([*students, *teachers])
        loss = student.new_empty(student.shape[:1] if reduction == 0 else (), dtype=real)
        terms = student.new_empty((len(op.terms(len(students))) + 1,), dtype=real)
        if not with_gradient:
            return loss, terms, []
        types = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in students]
        made = [x.new_empty(x.shape, dtype=t) for x, t in zip(students, types, strict=True)]
        return loss, terms, made

    own, grad = (f"{COMPILED}::{op.name}_{step}" for step in ("stats", "grad_from_stats"))
    torch.library.register_fake(own, shape_of_stats)
    torch.library.register_fake(grad, shapes)
    torch.library.impl(own, "CUDA", partial(rows.stats, op))
    torch.library.impl(grad, "CUDA", partial(rows.grad_from_stats, op))
