"""The path that every loss takes: checks, torch.library registration, and one autograd Function.

N rows, C classes. An op has `students` (logits that get a gradient), `teachers` (that do not), an
optional target and a list of numbers, its `params`; the compiled ops share the one schema.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, reference
from .checks import check_denominator, check_logits, check_range, check_target, check_teacher

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# rows(students, teachers, labels, params) -> (N,) loss, and (N,) values of the terms by name.
Rows = Callable[
    [Sequence[Tensor], Sequence[Tensor], reference.Labels | None, Sequence[float]],
    tuple[Tensor, dict[str, Tensor]],
]


@dataclass(frozen=True)
class Op:
    """One loss: its reference, and what the compiled op of the same name reports."""

    name: str
    rows: Rows
    terms: Callable[[int], tuple[str, ...]]  # of the number of students
    labels: int = 1  # labels taken from class probabilities; 0: only class indices
    needs_target: bool = True


@dataclass(frozen=True)
class Options:
    """The keywords that all losses share; see any loss's docstring."""

    reduction: str = "mean"
    ignore_index: int = -100
    denominator: Tensor | float | None = None
    return_terms: bool = False
    backend: str | None = None
    stored_gradient: bool = True


Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


def run(
    op: Op,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> Loss:
    """Checks a call, takes it to its backend, and names the terms."""
    check_logits("student", students[0])
    for x in students[1:]:
        check_logits("every SL-T and weak head", x, students[0])
    for x in teachers:
        check_teacher("teacher", x, students[0])
    if target is not None or op.needs_target:
        check_target(target, students[0], op.labels > 0, op.name)
    if options.reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}, got {options.reduction!r}"
        )
    if options.denominator is not None and options.reduction != "mean":
        raise ValueError(f"denominator goes with reduction='mean', not {options.reduction!r}")
    if options.denominator is not None:
        check_denominator(options.denominator, hidden=backends.is_tracing())

    if backends.choose(options.backend, students[0]) == "reference":
        loss, terms = run_reference(op, students, teachers, target, params, options)
    else:
        loss, terms = run_fused(op, students, teachers, target, params, options)
    if not options.return_terms:
        return loss
    names = (*op.terms(len(students)), "rows")
    kept = {n: terms[k] for k, n in enumerate(names) if target is not None or n in ("kd", "rows")}
    return loss, kept


def run_reference(
    op: Op,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The plain-PyTorch form: the loss, and the terms followed by the count of valid rows."""
    dtype = torch.float32
    for x in (*students, *teachers):
        dtype = torch.promote_types(dtype, x.dtype)
    zs, ts = [x.to(dtype) for x in students], [x.to(dtype) for x in teachers]
    labels = None
    valid = torch.ones_like(zs[0][:, 0], dtype=torch.bool)
    if target is not None:
        if target.dim() == 1 and not backends.is_tracing():
            check_range(target, zs[0].shape[1], options.ignore_index)
        labels = reference.labels(target, options.ignore_index, dtype, max(op.labels, 1))
        valid = labels.valid
        # An ignored row may hold anything; 0 * NaN must not reach its gradient.
        zs = [torch.where(valid[:, None], x, 0.0) for x in zs]
        ts = [torch.where(valid[:, None], x, 0.0) for x in ts]
    losses, terms = op.rows(zs, ts, labels, params)
    losses = torch.where(valid, losses, 0.0)
    count = valid.sum()
    divisor = count.clamp(min=1).to(dtype)
    values = [
        torch.where(valid, v, 0.0).sum() / (1 if "top" in name else divisor)
        for name, v in terms.items()
    ]
    report = torch.stack([*values, count.to(dtype)]).detach()
    if options.reduction == "none":
        return losses, report
    total = losses.sum()
    if options.reduction == "sum":
        return total, report
    if options.denominator is not None:
        divisor = torch.as_tensor(options.denominator, dtype=dtype, device=total.device)
    return total / divisor.reshape(()), report


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def run_fused(
    op: Op,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """One pass over the logits: the loss, the terms and, where wanted, the gradients."""
    students = [unit_stride(x) for x in students]
    teachers = [unit_stride(x) for x in teachers]
    if target is not None and target.dim() == 2:
        target = unit_stride(target)
        wide = torch.float64 in [x.dtype for x in (*students, *teachers)]
        if target.dtype == torch.float64 and not wide:
            target = target.float()
    denominator = options.denominator
    if isinstance(denominator, Tensor):
        denominator = denominator.to(students[0].device, torch.float64)
    elif denominator is not None:  # filled on the device: a copy from the host would wait for it
        denominator = torch.full((), denominator, dtype=torch.float64, device=students[0].device)
    call = getattr(torch.ops.kdfuse, op.name).default
    static = (list(params), REDUCTIONS[options.reduction], options.ignore_index)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in students)):
        loss, terms, _ = call(students, teachers, [], [], target, denominator, None, *static, False)
        return loss, terms
    return Fused.apply(
        call,
        static,
        options.stored_gradient,
        len(students),
        target,
        denominator,
        *students,
        *teachers,
    )


class Fused(torch.autograd.Function):
    """A loss whose gradients are stored in the forward pass, or made in the backward pass."""

    @staticmethod
    def forward(ctx, call, static, stored, count, target, denominator, *logits):
        students, teachers = list(logits[:count]), list(logits[count:])
        loss, terms, gradients = call(
            students, teachers, [], [], target, denominator, None, *static, stored
        )
        ctx.call, ctx.static, ctx.stored, ctx.count = call, static, stored, count
        ctx.types = [x.dtype for x in students]
        ctx.inputs = len(logits)
        if stored:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(target, denominator, *logits)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, upstream, _):
        refuse_second_derivative()
        if ctx.stored:
            gradients = [
                scaled(g, upstream, t) for g, t in zip(ctx.saved_tensors, ctx.types, strict=True)
            ]
        else:
            target, denominator, *logits = ctx.saved_tensors
            students, teachers = logits[: ctx.count], logits[ctx.count :]
            _, _, made = ctx.call(
                students, teachers, [], [], target, denominator, upstream, *ctx.static, True
            )
            gradients = [g.to(t) for g, t in zip(made, ctx.types, strict=True)]
        return (None,) * 6 + tuple(gradients) + (None,) * (ctx.inputs - ctx.count)


def refuse_second_derivative(wanted: bool = False) -> None:
    """In a backward pass: the gradient is a constant, its own derivative would be silently 0."""
    if wanted or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        raise RuntimeError(
            "the fused losses have no second derivative; "
            "use backend='reference' for create_graph=True"
        )


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored gradient (N, C) times the upstream one, a scalar or (N,)."""
    on_host = upstream.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and upstream.dim() == 0 and upstream.item() == 1:
        return gradient.to(dtype)
    factor = upstream if upstream.dim() == 0 else upstream[:, None]
    return (gradient * factor.to(gradient.dtype)).to(dtype)


def register(op: Op) -> None:
    """Shapes for tracing, and the gradient for those who call torch.ops.kdfuse.<op> themselves."""
    name = f"kdfuse::{op.name}"

    def shapes(
        students,
        teachers,
        indices,
        masses,
        target,
        denominator,
        upstream,
        params,
        reduction,
        ignore_index,
        with_gradient,
    ):
        student = students[0]
        wide = any(x.dtype == torch.float64 for x in (*students, *teachers))
        real = torch.float64 if wide else torch.float32
        loss = student.new_empty(student.shape[:1] if reduction == 0 else (), dtype=real)
        terms = student.new_empty((len(op.terms(len(students))) + 1,), dtype=real)
        if not with_gradient:
            return loss, terms, []
        types = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in students]
        return (
            loss,
            terms,
            [x.new_empty(x.shape, dtype=t) for x, t in zip(students, types, strict=True)],
        )

    def setup(ctx, inputs, output):
        students, teachers, _, _, target, denominator, _, *static, _ = inputs
        ctx.static, ctx.counts = static, (len(students), len(teachers))
        ctx.save_for_backward(target, denominator, *students, *teachers)
        ctx.set_materialize_grads(False)

    def backward(ctx, upstream, _terms, of_gradients):
        refuse_second_derivative(wanted=any(g is not None for g in of_gradients or []))
        if upstream is None:  # the terms are constants
            return [None] * ctx.counts[0], [None] * ctx.counts[1], [], [], *[None] * 7
        target, denominator, *logits = ctx.saved_tensors
        count, others = ctx.counts
        call = getattr(torch.ops.kdfuse, op.name).default
        made = call(
            logits[:count], logits[count:], [], [], target, denominator, upstream, *ctx.static, True
        )[2]
        gradients = [g.to(x.dtype) for g, x in zip(made, logits, strict=False)]
        return gradients, [None] * others, [], [], None, None, None, None, None, None, None

    torch.library.register_fake(name, shapes)
    torch.library.register_autograd(name, backward, setup_context=setup)


class LossModule(nn.Module):
    """A loss with its settings kept; `forward` takes what is left of the function's arguments."""

    function: Callable[..., Any]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        allowed = inspect.signature(type(self).function).parameters
        for name in settings:
            if name not in allowed or allowed[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                known = [n for n, p in allowed.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
                raise TypeError(
                    f"{type(self).__name__} has no setting {name!r}; it has {', '.join(known)}"
                )
        self.settings = settings

    def forward(self, *logits: Any, **more: Any) -> Loss:
        return type(self).function(*logits, **{**self.settings, **more})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
