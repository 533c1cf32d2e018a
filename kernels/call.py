"""The path that every call of a loss takes: checks, then the way to its backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import backends
from .checks import check_denominator, check_logits, check_target
from .namespace import COMPILED, TRITON
from .op import (
    REDUCTIONS,
    Loss,
    Op,
    Options,
    compiled_op,
    named,
    run_fused,
    run_reference,
)
from .parts import ClassPart
from .sharded import call as sharded
from .teachers import Teacher, check_teachers


def run(
    op: Op,
    students: Sequence[Any],  # tensors; the first may be a ClassPart
    teachers: Sequence[Teacher],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> Loss:
    """Checks a call, takes it to its backend, and names the terms."""
    if options.reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}, got {options.reduction!r}"
        )
    if options.denominator is not None and options.reduction != "mean":
        raise ValueError(f"denominator goes with reduction='mean', not {options.reduction!r}")
    if not isinstance(options.ignore_index, int):
        raise TypeError(f"ignore_index must be a class index, got {options.ignore_index!r}")
    if isinstance(student := students[0], ClassPart):
        return sharded.run(op, student, students[1:], teachers, target, params, options)
    if hasattr(student, "device_mesh"):
        from .sharded import dtensor  # whoever has no DTensor does not pay for their module

        return dtensor.run(op, students, teachers, target, params, options, run)
    check_logits("student", students[0])
    for k, x in enumerate(students[1:]):
        check_logits(f"slts[{k}]" if op.name == "slkd" else "weak", x, students[0])
    check_teachers(op.name, op.sparse, teachers, students[0])
    if target is not None or op.needs_target:
        check_target(target, students[0], op.labels > 0, op.name)
    if options.denominator is not None:
        check_denominator(options.denominator, hidden=backends.is_tracing())

    backend = backends.choose(options.backend, students[0], op.name)
    if backend == "reference":
        loss, terms = run_reference(op, students, teachers, target, params, options)
        return named(op, len(students), loss, terms, target, options)
    call = compiled_op(TRITON if backend == "triton" else COMPILED, op.name)
    if backend == "cpu" and not backends.is_tracing():
        try:
            loss, terms = run_fused(call, students, teachers, target, params, options)
        except RuntimeError as error:  # all that a compiled op can raise
            said = str(error).split("\n", 1)[0]
            if not said.startswith("kdfuse: "):
                raise
            raise ValueError(said) from None
    else:
        loss, terms = run_fused(call, students, teachers, target, params, options)
    return named(op, len(students), loss, terms, target, options)
