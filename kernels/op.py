"""What all losses share: their reference form, torch.library registration, one autograd Function.

N rows, C classes. An op has `students` (logits that get a gradient), `teachers` (that do not), an
optional target and a list of numbers, its `params`; the compiled ops share the one schema. There a
teacher is (N, C) logits, or (N, k) values beside an entry of `indices` and of `masses`; these lists
are empty where all teachers are whole, and hold an empty tensor for what a teacher does not have.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, reference
from .checks import check_range
from .namespace import COMPILED
from .teachers import Teacher, lists_of, logits_of, whole_logits

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# rows(students, teachers, labels, params) -> (N,) loss, and (N,) values of the terms by name.
Rows = Callable[
    [Sequence[Tensor], Sequence[Tensor], reference.Labels | None, Sequence[float]],
    tuple[Tensor, dict[str, Tensor]],
]


@dataclass(frozen=True)
class Op:
    """One loss: its forms in Python, and what the compiled op of the same name takes and reports.

    The facts of a loss of one student under teachers are those of its header, csrc/losses/.
    """

    name: str
    rows: Rows  # in plain PyTorch
    terms: Callable[[int], tuple[str, ...]]  # of the number of students
    coefficients: Callable[..., Any]  # in Triton
    from_stats: Callable[..., Any] | None  # of rows in parts (sharded/); None: it needs whole rows
    own_rows: bool = False  # not one student under teachers: it has row passes of its own
    labels: int = 1  # labels taken from class probabilities; 0: only class indices
    needs_target: bool = True
    sparse: bool = False  # takes SparseTeacher; params[0] is then the temperature
    # Places in params:
    temperature: int | None = 0  # None: there is no temperature
    teacher_weights: int | None = None  # the first weight of any number of teachers; None: one
    fusion: int | None = None  # the first weight of the SL-Ts in the fused teacher
    rest_weight: int | None = None  # a weight that C = 2 leaves without a meaning
    # Of a student under teachers:
    student_at_1: bool = False  # compared at T = 1, not at T, with the teacher at T
    teacher_at_1: bool = False  # the teacher's softmax at T = 1 is read too
    entropy: bool = True  # the teacher's exponents are part of the sum over both


class Options(NamedTuple):
    """The keywords that all losses share; see any loss's docstring."""

    reduction: str = "mean"
    ignore_index: int = -100
    denominator: Tensor | float | None = None
    return_terms: bool = False
    backend: str | None = None
    stored_gradient: bool = True


Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


def named(
    op: Op, students: int, loss: Tensor, terms: Tensor, target: Tensor | None, options: Options
) -> Loss:
    """What a public loss returns; without a target there are no terms of the label."""
    if not options.return_terms:
        return loss
    names = (*op.terms(students), "rows")
    kept = {n: terms[k] for k, n in enumerate(names) if target is not None or n in ("kd", "rows")}
    return loss, kept


def run_reference(
    op: Op,
    students: Sequence[Tensor],
    teachers: Sequence[Teacher],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The plain-PyTorch form: the loss, and the terms followed by the count of valid rows."""
    dtype = torch.float32
    for x in (*students, *map(logits_of, teachers)):
        dtype = torch.promote_types(dtype, x.dtype)
    zs = [x.to(dtype) for x in students]
    labels = None
    valid = torch.ones_like(zs[0][:, 0], dtype=torch.bool)
    if target is not None:
        if target.dim() == 1 and not backends.is_tracing():
            check_range(target, zs[0].shape[1], options.ignore_index)
        labels = reference.labels(target, options.ignore_index, dtype, max(op.labels, 1))
        valid = labels.valid
    ts = whole_logits(teachers, valid, zs[0].shape[1], params[0], dtype)
    if labels is not None:
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


def compiled_op(namespace: str, name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, namespace), name).default


def below_autograd(call: Callable[..., Any], *args: Any) -> Any:
    """An op's result without its own way through autograd, in Python: `Fused` has the gradient."""
    if torch.compiler.is_compiling():  # the guard cannot be traced
        return call(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return call(*args)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def run_fused(
    call: Callable[..., Any],  # a compiled op
    students: Sequence[Tensor],
    teachers: Sequence[Teacher],
    target: Tensor | None,
    params: Sequence[float],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """One pass over the logits: the loss, the terms and, where wanted, the gradients."""
    students = [unit_stride(x) for x in students]
    values = [unit_stride(logits_of(x)) for x in teachers]
    indices, masses = lists_of(teachers, students[0])
    if target is not None and target.dim() == 2:
        target = unit_stride(target)
        wide = torch.float64 in [x.dtype for x in (*students, *values)]
        if target.dtype == torch.float64 and not wide:
            target = target.float()
    denominator, divisor = denominator_of(options.denominator, students[0].device)
    static = (list(params), REDUCTIONS[options.reduction], options.ignore_index)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in students)):
        lists = (students, values, indices, masses)
        given = (*lists, target, denominator, divisor, None)
        loss, terms, _ = below_autograd(call, *given, *static, False)
        return loss, terms
    return Fused.apply(
        call,
        static,
        options.stored_gradient,
        (len(students), len(values), len(indices)),
        target,
        denominator,
        divisor,
        *students,
        *values,
        *indices,
        *masses,
    )


class Fused(torch.autograd.Function):
    """A loss whose gradients are stored in the forward pass, or made in the backward pass."""

    @staticmethod
    def forward(ctx, call, static, stored, counts, target, denominator, divisor, *inputs):
        lists = split(inputs, counts)
        given = (*lists, target, denominator, divisor, None)
        loss, terms, gradients = below_autograd(call, *given, *static, stored)
        ctx.call, ctx.static, ctx.stored, ctx.counts = call, static, stored, counts
        ctx.divisor = divisor
        ctx.set_materialize_grads(False)  # of the terms: a kernel that fills zeros
        ctx.types = [x.dtype for x in lists[0]]
        ctx.others = len(inputs) - counts[0]
        if stored:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(target, denominator, *inputs)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, upstream, _):
        refuse_second_derivative()
        if upstream is None:
            return (None,) * (7 + len(ctx.types) + ctx.others)
        if ctx.stored and backends.scales_on_gpu(upstream):
            gradients = scaled_on_gpu(ctx.saved_tensors, upstream, ctx.types)
        elif ctx.stored:
            gradients = scaled(ctx.saved_tensors, upstream)
        else:
            target, denominator, *inputs = ctx.saved_tensors
            lists = split(inputs, ctx.counts)
            given = (*lists, target, denominator, ctx.divisor, upstream)
            _, _, gradients = below_autograd(ctx.call, *given, *ctx.static, True)
        return (None,) * 7 + cast(gradients, ctx.types) + (None,) * ctx.others


def split(inputs: Sequence[Tensor], counts: tuple[int, int, int]) -> list[Sequence[Tensor]]:
    """Students, teachers, indices and masses of an op; of the last two there are as many."""
    a, b, c = counts
    return [inputs[:a], inputs[a : a + b], inputs[a + b : a + b + c], inputs[a + b + c :]]


def refuse_second_derivative(wanted: bool = False) -> None:
    """In a backward pass: the gradient is a constant, its own derivative would be silently 0."""
    if wanted or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        raise RuntimeError(
            "the fused losses have no second derivative; "
            "use backend='reference' for create_graph=True"
        )


def denominator_of(given: Tensor | float | None, at: torch.device) -> tuple[Tensor | None, Any]:
    """A tensor on the device, or a number: what is known here goes along with the launch."""
    if not isinstance(given, Tensor):
        return None, given
    if given.device != at and given.device.type == "cpu" and not backends.is_tracing():
        return None, given.item()
    whole = given.device == at and given.dtype in (torch.float32, torch.float64)
    return (given if whole else given.to(at, torch.float64)), None


def scaled_on_gpu(
    gradients: Sequence[Tensor], upstream: Tensor, types: Sequence[torch.dtype]
) -> Sequence[Tensor]:
    """The stored gradients times the upstream one, in place: a factor of 1 costs no traffic.

    Where the graph is retained another backward may follow, so that a copy is scaled. float32
    gradients of float16 students are rounded in the same pass.
    """
    if all(t == torch.float16 for t in types):
        return compiled_op(COMPILED, "scale_to_half")(gradients, upstream)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradients = [g.clone() for g in gradients]
    compiled_op(COMPILED, "scale_")(gradients, upstream)
    return gradients


def scaled(gradients: Sequence[Tensor], upstream: Tensor) -> Sequence[Tensor]:
    """The stored gradients (N, C) times the upstream one, a scalar or (N,)."""
    on_host = upstream.is_cpu and not torch.compiler.is_compiling()
    if on_host and upstream.dim() == 0 and upstream.item() == 1:
        # Where the graph is retained another backward may follow whatever becomes of these.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        return [g.clone() for g in gradients] if kept else gradients
    factor = upstream if upstream.dim() == 0 else upstream[:, None]
    return [g * factor.to(g.dtype) for g in gradients]


def cast(gradients: Sequence[Tensor], types: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """`to` alone would take longer to find that there is nothing to do."""
    pairs = zip(gradients, types, strict=True)
    return tuple([g if g.dtype == t else g.to(t) for g, t in pairs])


def register(op: Op, namespace: str) -> None:
    """Shapes for tracing, and the gradient for those who call torch.ops.<namespace>.<op>."""
    name = f"{namespace}::{op.name}"

    def shapes(
        students,
        teachers,
        indices,
        masses,
        target,
        denominator,
        divisor,
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
        students, teachers, indices, masses, target, denominator, divisor, _, *static, _ = inputs
        ctx.divisor, ctx.static = divisor, static
        ctx.counts = (len(students), len(teachers), len(indices))
        ctx.save_for_backward(target, denominator, *students, *teachers, *indices, *masses)
        ctx.set_materialize_grads(False)

    def backward(ctx, upstream, _terms, of_gradients):
        refuse_second_derivative(wanted=any(g is not None for g in of_gradients or []))
        counts = ctx.counts
        nothing = [[None] * k for k in (counts[0], counts[1], counts[2], counts[2])]
        if upstream is None:  # the terms are constants
            return *nothing, *[None] * 8
        target, denominator, *given = ctx.saved_tensors
        lists = split(given, counts)
        call = compiled_op(namespace, op.name)
        given = (*lists, target, denominator, ctx.divisor, upstream)
        made = call(*given, *ctx.static, True)[2]
        gradients = [g.to(x.dtype) for g, x in zip(made, lists[0], strict=True)]
        return gradients, *nothing[1:], *[None] * 8

    torch.library.register_fake(name, shapes)
    torch.library.register_autograd(name, backward, setup_context=setup)


def register_scale() -> None:
    torch.library.register_fake(f"{COMPILED}::scale_", lambda gradients, factor: None)
    torch.library.register_fake(
        f"{COMPILED}::scale_to_half", lambda gradients, factor: [g.half() for g in gradients]
    )


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
