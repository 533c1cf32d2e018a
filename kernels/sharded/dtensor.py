"""Losses of DTensors: what the whole tensors would give, as every process of the mesh gets it.

The logits of a call have one mesh and the same placements. A mesh dimension may be Replicate(),
Shard(1) (classes: the path of a `ClassPart`) or Shard(0) (rows: each process takes its own, and one
all-reduce of the sums and counts makes the mean over all rows, not DDP's mean of means); at most
one of each kind of Shard. The target is a DTensor with the rows' placement, replicated elsewhere,
or a plain tensor with this process's rows.

The loss is a DTensor, Replicate() on all dimensions, or Shard(0) along the rows' dimension for
reduction="none"; the terms are plain 0-dim tensors, the same on every process. The gradients have
the logits' placements.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard

from ..checks import check_denominator
from ..op import Loss, Op, Options
from ..parts import ClassPart

# Their target's weight is a mean over the batch, which the rows of one process do not make.
OF_THE_BATCH = ("tf_nkd", "uskd")


def run(
    op: Op,
    students: Sequence[Any],
    teachers: Sequence[Any],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
    run_local: Callable[..., Loss],
) -> Loss:
    """The loss of DTensors, and the terms where the options ask for them.

    run_local: the same for the tensors of one process, or a ClassPart of them.

    Raises:
        ValueError: other placements, or placements that differ; uskd_loss with Shard(1), and
            tf_nkd_loss and uskd_loss with Shard(0).
        TypeError: logits of which some are DTensors.
    """
    mesh, placements = students[0].device_mesh, students[0].placements
    columns, rows = kinds(placements)
    if rows is not None and op.name in OF_THE_BATCH:
        raise ValueError(
            f"{op.name}_loss takes a mean over the batch and does not take Shard(0) logits; "
            "redistribute them to Replicate() or Shard(1), or pass their to_local() for a mean "
            "over each process's own rows"
        )
    for x in (*students[1:], *teachers):
        check_like("every set of logits", x, mesh, placements)
    local: list[Any] = [x.to_local() for x in students]
    if columns is not None:
        local[0] = part_of(students[0], local[0], mesh, columns)
    if isinstance(options.denominator, DTensor):
        options = options._replace(denominator=options.denominator.full_tensor())
    given = (local, [x.to_local() for x in teachers], local_target(target, mesh, rows), params)
    if rows is not None:
        return over_rows(op, given, options, mesh, rows, students[0].shape[0], run_local)
    result = run_local(op, *given, options)
    loss, terms = result if isinstance(result, tuple) else (result, None)
    loss = DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return loss if terms is None else (loss, terms)


def kinds(placements: Sequence[Placement]) -> tuple[int | None, int | None]:
    """The mesh dimensions along which the classes and the rows are spread."""
    found: dict[int, int] = {}
    for k, placement in enumerate(placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard or placement.dim not in (0, 1) or placement.dim in found:
            raise ValueError(
                f"student has placements {tuple(placements)}; the losses take Replicate(), one "
                "Shard(0) and one Shard(1); redistribute the logits"
            )
        found[placement.dim] = k
    return found.get(1), found.get(0)


def check_like(name: str, x: Any, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    if not isinstance(x, DTensor):
        raise TypeError(
            f"{name} must be a DTensor as the student is, got {type(x).__name__}; "
            "use distribute_tensor or DTensor.from_local"
        )
    if x.device_mesh != mesh or tuple(x.placements) != tuple(placements):
        raise ValueError(
            f"{name} must have the student's mesh and placements {tuple(placements)}, got "
            f"{tuple(x.placements)}; redistribute it"
        )


def part_of(student: DTensor, local: Tensor, mesh: DeviceMesh, columns: int) -> ClassPart:
    """This process's classes; the chunks of Shard have one size but for the last ones."""
    classes = student.shape[1]
    chunk = -(-classes // mesh.size(columns))
    first = min(chunk * mesh.get_local_rank(columns), classes)
    return ClassPart(local, first, classes, mesh.get_group(columns))


def local_target(target: Tensor | None, mesh: DeviceMesh, rows: int | None) -> Tensor | None:
    if not isinstance(target, DTensor):
        return target
    wanted = [Shard(0) if k == rows else Replicate() for k in range(mesh.ndim)]
    check_like("target", target, mesh, wanted)
    return target.to_local()


class AddUp(torch.autograd.Function):
    """The sum over a group, of which every process differentiates its own summand."""

    @staticmethod
    def forward(ctx, summand, group):
        total = summand.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


def over_rows(
    op: Op,
    given: tuple[Any, ...],
    options: Options,
    mesh: DeviceMesh,
    rows: int,
    count: int,
    run_local: Callable[..., Loss],
) -> Loss:
    """The loss of all rows from those of each process, in one all-reduce."""
    whole, denominator = options.reduction, options.denominator
    if denominator is not None:
        check_denominator(denominator, hidden=False)
    each = "none" if whole == "none" else "sum"
    inner = options._replace(reduction=each, denominator=None, return_terms=True)
    students, teachers, target, params = given
    loss, terms = run_local(op, students, teachers, target, params, inner)
    own = terms["rows"]
    sums = {n: v if counts(n) else v * own.clamp(min=1) for n, v in terms.items()}
    summands = torch.stack([loss.detach().sum() if whole == "none" else loss, *sums.values()])
    total, *added = AddUp.apply(summands, mesh.get_group(rows)).unbind()
    sums = {n: v.detach() for n, v in zip(sums, added, strict=True)}
    valid = sums["rows"].clamp(min=1)
    terms = {n: v if counts(n) else v / valid for n, v in sums.items()}
    placements: list[Placement] = [Replicate()] * mesh.ndim
    if whole == "none":
        placements[rows] = Shard(0)
        shape = torch.Size([count])
        made = DTensor.from_local(loss, mesh, placements, run_check=False, shape=shape, stride=(1,))
    else:
        if whole == "mean":
            divisor = valid if denominator is None else denominator
            total = total / (
                divisor.to(total).reshape(()) if isinstance(divisor, Tensor) else divisor
            )
        made = DTensor.from_local(total, mesh, placements, run_check=False)
    return (made, terms) if options.return_terms else made


def counts(term: str) -> bool:
    """Whether a term counts rows rather than average over them."""
    return "top" in term or term == "rows"
