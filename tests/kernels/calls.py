"""How the tests call each loss of the table: data, settings, the call itself and its judgement.

A case holds what a loss takes. `close_to_truth` compares with the oracle in float64, and allows
what the arithmetic of the loss's type may lose (see `rounding`).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import kdfuse
from kdfuse.kernels import call as front
from kdfuse.kernels.table import LOSSES, OPS

# Of one student under teachers; `CALLS` says how each of the others is called.
TAUGHT = tuple(name for name, op in OPS.items() if not op.own_rows)


def taught(name: str) -> Callable[..., Any]:
    loss, several = LOSSES[name], OPS[name].teacher_weights is not None
    return lambda s, t, y, **more: loss(s[0], t if several else t[0], y, **more)


CALLS = {
    **{name: taught(name) for name in TAUGHT},
    "tf_nkd": lambda s, t, y, **more: kdfuse.tf_nkd_loss(s[0], y, **more),
    "uskd": lambda s, t, y, **more: kdfuse.uskd_loss(s[0], s[1], y, **more),
    "slkd": lambda s, t, y, **more: kdfuse.slkd_loss(s[0], t[0], s[1:], y, **more),
}
NAMES = tuple(CALLS)
WITH_TEACHER = (*TAUGHT, "slkd")
WITH_PROBABILITIES = tuple(name for name in NAMES if OPS[name].labels)
WITH_TOP_K = tuple(name for name in NAMES if OPS[name].sparse)
IN_PARTS = tuple(name for name in NAMES if OPS[name].from_stats)
WEIGHTS = "kd_weight alpha beta gamma weight ce_weight fused_ce_weight fused_kd_weight".split()


def settings_of(name: str) -> list[str]:
    """The keywords of a loss."""
    return list(inspect.signature(LOSSES[name]).parameters)


def weights_of(name: str) -> list[str]:
    return [key for key in settings_of(name) if key in (*WEIGHTS, "mu")]


def every_term(name: str) -> dict[str, Any]:
    """Settings of a loss under teachers under which all terms take part, of different weight."""
    return {"temperature": 4.0, **dict(zip(weights_of(name), (0.9, 0.3, 0.7), strict=False))}


def with_switch(name: str, on: bool) -> dict[str, bool]:
    """The one switch of a loss with a temperature: whether T^2 multiplies, or a row's weight."""
    return {"weighted" if "weighted" in settings_of(name) else "t_squared": on}


# Of the losses with a temperature those that T^2 may multiply.
SCALED = tuple(name for name in WITH_TEACHER if "t_squared" in settings_of(name))


# Settings under which every term of a loss takes part, all of different weight.
FULL = {
    **{name: every_term(name) for name in TAUGHT},
    "dkd": {"temperature": 4.0, "alpha": 0.7, "beta": 3.0, "ce_weight": 0.3},
    "nkd": {"temperature": 2.0, "gamma": 1.5, "ce_weight": 0.3},
    "tf_nkd": {"weight": 0.7, "ce_weight": 0.3},
    "uskd": {"alpha": 0.7, "beta": 0.2, "mu": 0.1, "ce_weight": 0.3},
    "slkd": {
        "temperature": 4.0,
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "fused_ce_weight": 0.5,
        "fused_kd_weight": 0.8,
        "fusion": [0.25, 0.75],
        "detach_slts": False,
    },
}
# What leaves the teacher out.
NO_TEACHER = {
    "kd": {"kd_weight": 0.0},
    "wttm": {"kd_weight": 0.0},
    "dkd": {"alpha": 0.0, "beta": 0.0},
    "slkd": {"kd_weight": 0.0, "fused_kd_weight": 0.0},
}
# Where C == 2 leaves a part of the loss without a meaning: that part off.
PAIR = {"dkd": {"beta": 0.0}, "nkd": {"gamma": 0.0}, "uskd": {"beta": 0.0}}
# float16 has no logits of 1e4 with a useful fraction, but holds them.
BITS = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


@dataclass
class Case:
    students: list[Tensor]
    teachers: list[Tensor]
    target: Tensor | None


def make(name: str, n: int, c: int, *, seed: int = 0, teachers: int = 1, slts: int = 2) -> Case:
    """float64 logits that float16 and bfloat16 hold exactly, and labels at both ends."""
    random = np.random.default_rng(seed)

    def logits(spread):
        x = random.normal(0, spread, (n, c))
        return torch.from_numpy(np.round(x * 16) / 16).to(torch.bfloat16).double()

    target = torch.from_numpy(random.integers(0, c, n))
    target[:1], target[1:2] = 0, c - 1
    count = {"uskd": 2, "slkd": 1 + slts}.get(name, 1)
    students = [logits(2.0) for _ in range(count)]
    if name == "uskd":
        # A rank is a step: these keys stand apart by more than any type's rounding (see `ranked`).
        students = list(ranked(random, n, c))
    count = 1 if name in WITH_TEACHER else 0
    count = count if OPS[name].teacher_weights is None else teachers
    return Case(students, [logits(3.0) for _ in range(count)], target)


def ranked(random: np.random.Generator, n: int, c: int) -> tuple[Tensor, Tensor]:
    """Student and weak logits in the same random order, evenly spaced: the rank is beyond doubt.

    Up to 257 classes the values are exact in bfloat16 as well.
    """
    place = np.stack([random.permutation(c) for _ in range(n)]) if n else np.zeros((0, c))
    z = torch.from_numpy((place - c // 2) * 2.0 ** (-4 if c <= 257 else -np.ceil(np.log2(c / 16))))
    return z, z / 2


def cast(case: Case, dtype: torch.dtype, teacher: torch.dtype | None = None) -> Case:
    teachers = [x.to(teacher or dtype) for x in case.teachers]
    return Case([x.to(dtype) for x in case.students], teachers, case.target)


def probabilities(n: int, c: int, seed: int = 0) -> Tensor:
    """(N, C) float64 class probabilities of mixup: two classes a row, one in the first row."""
    random = np.random.default_rng(seed)
    soft = np.zeros((n, c))
    for i in range(n):
        first, second = random.choice(c, 2, replace=False)
        share = 1.0 if i == 0 else random.integers(33, 64) / 64
        soft[i, first], soft[i, second] = share, 1 - share
    return torch.from_numpy(soft)


def call(name: str, case: Case, **settings):
    return CALLS[name](case.students, case.teachers, case.target, **settings)


def arguments(name: str, case: Case, *, backend: str = "cpu", **settings) -> tuple:
    """What the public function hands to the compiled op: students, teachers, target, params."""
    caught = []

    def catch(op, students, teachers, target, params, options):
        caught.append((list(students), list(teachers), target, list(params)))
        return torch.zeros(()), torch.zeros(64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, "run_fused", catch)
        call(name, case, backend=backend, **settings)
    return caught[0]


def params_of(name: str) -> list[float]:
    """What the op gets of `FULL`."""
    return arguments(name, make(name, 2, 9), **FULL[name])[3]


def truth(name: str, case: Case, **settings) -> oracle.Rows:
    def numbers(x):
        return x.detach().double().numpy()

    students, teachers = [numbers(x) for x in case.students], [numbers(x) for x in case.teachers]
    target = case.target
    if target is not None:
        target = numbers(target) if target.is_floating_point() else target.numpy()
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return oracle.ORACLE[name](students, teachers, target, **settings)


def loss_and_gradients(name: str, case: Case, upstream: Tensor | None = None, **settings):
    """The loss and the students' gradients; `upstream` is what autograd brings to the loss."""
    students = [x.detach().requires_grad_() for x in case.students]
    loss = call(name, Case(students, case.teachers, case.target), **settings)
    if upstream is None:
        upstream = torch.ones_like(loss)
    return loss.detach(), list(torch.autograd.grad(loss, students, upstream.to(loss.dtype)))


def ulp(x: float, dtype: torch.dtype) -> float:
    return 2.0 ** (np.floor(np.log2(max(x, torch.finfo(dtype).tiny))) - BITS[dtype])


def spread(x: Tensor) -> float:
    """How far the finite logits of a row lie apart at most."""
    kept = x.detach().double()
    kept = kept[kept.isfinite().any(1)]
    if not kept.numel():
        return 0.0
    high = kept.where(kept.isfinite(), -torch.inf).amax(1)
    return (high - kept.where(kept.isfinite(), torch.inf).amin(1)).max().item()


def rounding(case: Case, true: oracle.Rows, *, temperature=1.0, t_squared=True, **settings):
    """What float32 may lose of a row's loss, and of a gradient as a share of its largest entry.

    A loss is a sum of weighted differences of logits and log-sum-exps, each of them no larger than
    the logits' spread and ln C, and each right to a few eps of that size. A probability is an
    exponential over a sum of C of them: a few eps, and as many times ln C as the sum has levels.
    A few is 4. Measured at every SIMD level, without oneDNN's and PyTorch's vector code and with
    it, over all that `check` is used for: at most 1.2 in the compiled ops, 2.0 in the reference.
    """
    few, eps = 4, torch.finfo(torch.float32).eps
    apart = max(spread(x) for x in (*case.students, *case.teachers))
    levels = np.log(case.students[0].shape[1])
    scaled = apart / temperature + levels
    at_t = (temperature**2 if t_squared and true.weight is None else 1.0) * scaled
    weight = max(1.0, sum(abs(settings.get(key, 0.0)) for key in WEIGHTS))
    if true.weight is None:
        return few * eps * weight * (at_t + apart + levels), few * eps * (1 + levels)
    # A weight of the row's own is an exponential: it multiplies with the error of its exponent.
    weight *= max(1.0, np.nan_to_num(true.weight).max(initial=0.0)) * (1 + scaled)
    return few * eps * weight * (at_t + apart + levels), few * eps * (1 + levels + scaled)


def close_to_truth(got: Tensor, true: np.ndarray, what: str, lost: float) -> None:
    """max |got - true| <= lost + an ulp of the largest true value; float64: 1e-12 of the largest.

    Infinities and NaN must stand in the same places.
    """
    values = got.double().numpy()
    finite = np.isfinite(true)
    assert np.array_equal(values[~finite], true[~finite], equal_nan=True), f"{what}: inf or NaN"
    assert np.isfinite(values[finite]).all(), f"{what}: not finite where the truth is"
    if not finite.any():
        return
    error = np.abs(values[finite] - true[finite]).max()
    largest = np.abs(true[finite]).max()
    if got.dtype == torch.float64:
        allowed = 1e-12 * max(largest, 1.0)
    else:
        allowed = lost + ulp(largest, got.dtype)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} at {largest:.3g}"


def loss_type(*inputs: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in inputs else torch.float32


def compare(
    name: str,
    case: Case,
    upstream: Tensor,
    loss: Tensor,
    gradients: list[Tensor],
    *,
    cancels: bool = False,
    **settings,
) -> None:
    """Losses of all rows, and gradients under `upstream` (N,), against the oracle.

    `cancels`: probabilities may come so close to each other that a gradient, which is their
    difference, is small beside what they lose; it is held to their size, that of the weights.
    """
    true = truth(name, case, **settings)
    of_loss, of_gradient = rounding(case, true, **settings)
    size = sum(abs(settings.get(key, 0.0)) for key in WEIGHTS) if cancels else 0.0
    most = upstream.abs().numpy().max(initial=0.0)  # there may be no rows
    size *= max(1.0, settings.get("temperature", 1.0)) * most
    if true.weight is not None:
        size *= max(1.0, true.weight.max(initial=0.0))
    close_to_truth(loss, true.loss, f"{name} loss", of_loss)
    for k, (g, x) in enumerate(zip(gradients, case.students, strict=True)):
        assert g.dtype == x.dtype and g.shape == x.shape
        weighted = upstream.double().numpy()[:, None] * true.gradients[k]
        largest = np.abs(weighted[np.isfinite(weighted)]).max(initial=size)
        close_to_truth(g, weighted, f"{name} gradient {k}", of_gradient * largest)


def check(
    name: str, case: Case, *, backend: str, seed: int = 0, cancels: bool = False, **settings
) -> None:
    """Rows and gradients of a call under random upstream gradients, against the oracle.

    `cancels` as for `compare`.
    """
    students = case.students
    # Powers of two scale without rounding: a stored bfloat16 gradient is rounded once.
    choices = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 4.0], dtype=torch.float64)
    if all(x.dtype in (torch.float32, torch.float64) for x in students):
        choices = torch.linspace(-3, 2, 16, dtype=torch.float64)
    random = np.random.default_rng(seed)
    upstream = choices[torch.from_numpy(random.integers(0, len(choices), len(students[0])))]
    loss, gradients = loss_and_gradients(
        name, case, upstream, reduction="none", backend=backend, **settings
    )
    assert loss.dtype == loss_type(*(x.dtype for x in (*students, *case.teachers)))
    settings.pop("stored_gradient", None)
    compare(name, case, upstream, loss, gradients, cancels=cancels, **settings)
