"""The losses as they are usually written in eager PyTorch: what the benchmarks measure against.

N rows, C classes; y: (N,) int64. Not the specification (that is each op's reference): these have
no guards for -inf, no ignore_index and no terms, and are as quick as plain PyTorch makes them.

The byte model of a case is the least that a loss and its gradients can move, in elements a logit of
the logits' own type: every set of logits is read once, and every gradient is written once, with no
second read in the backward pass. Where a batch mean weights the rows (tf_nkd, uskd) the logits are
read once more, since the mean must be known before the first gradient is. What belongs to a row
(labels, statistics, losses) is left out: it is less than one element in C. A top-k teacher's k
values and int64 classes a row are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dkd import dkd_loss
from ..kd import kd_loss
from ..nkd import nkd_loss
from ..op import Loss
from ..slkd import slkd_loss
from ..sparse import SparseTeacher
from ..table import LOSSES, OPS
from ..tf_nkd import tf_nkd_loss
from ..uskd import uskd_loss


def distill(z: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_p = F.log_softmax(z / temperature, dim=1)
    q = F.softmax(t / temperature, dim=1)
    return F.kl_div(log_p, q, reduction="batchmean") * temperature**2


def kd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return 0.9 * distill(z, t, 4.0) + 0.1 * F.cross_entropy(z, y)


def dkd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    temperature = 4.0
    mine = torch.zeros_like(z).scatter_(1, y[:, None], 1).bool()
    p, q = F.softmax(z / temperature, dim=1), F.softmax(t / temperature, dim=1)
    pair_p = torch.cat([(p * mine).sum(1, keepdim=True), (p * ~mine).sum(1, keepdim=True)], dim=1)
    pair_q = torch.cat([(q * mine).sum(1, keepdim=True), (q * ~mine).sum(1, keepdim=True)], dim=1)
    target = F.kl_div(pair_p.log(), pair_q, reduction="batchmean") * temperature**2
    far = 1000.0 * mine
    rest_p = F.log_softmax(z / temperature - far, dim=1)
    rest_q = F.softmax(t / temperature - far, dim=1)
    rest = F.kl_div(rest_p, rest_q, reduction="batchmean") * temperature**2
    return target + 8.0 * rest + F.cross_entropy(z, y)


def nkd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    classes = z.shape[1]
    other = torch.ones_like(z, dtype=torch.bool).scatter_(1, y[:, None], False)
    log_s, v = F.log_softmax(z, dim=1), F.softmax(t, dim=1)
    target = -(v.gather(1, y[:, None]) * log_s.gather(1, y[:, None])).mean()
    log_rest = F.log_softmax(z[other].view(-1, classes - 1), dim=1)
    v_rest = F.softmax(t[other].view(-1, classes - 1), dim=1)
    return target - 1.5 * (v_rest * log_rest).sum(1).mean() + F.cross_entropy(z, y)


def tf_nkd(z: Tensor, y: Tensor) -> Tensor:
    log_s = F.log_softmax(z, dim=1).gather(1, y[:, None])
    s = log_s.detach().exp()
    return F.cross_entropy(z, y) - ((s + 1 - s.mean()) * log_s).mean()


def uskd(z: Tensor, weak: Tensor, y: Tensor) -> Tensor:
    classes = z.shape[1]
    mine = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[:, None], True)
    log_s = F.log_softmax(z, dim=1)
    with torch.no_grad():
        w, log_own = F.softmax(weak, dim=1), log_s.detach()
        keys = w / (1 - w.gather(1, y[:, None]) + 1e-6)
        keys = keys + log_own / (1 - log_own.gather(1, y[:, None]) + 1e-6)
        rank = keys.argsort(dim=1, descending=True).argsort(dim=1)
        ranked = (1.0 / (rank + 1).to(z.dtype)).masked_fill(mine, 0)
        ranked = (ranked / ranked.sum(1, keepdim=True))[~mine].view(-1, classes - 1)
        s = log_own.gather(1, y[:, None]).exp() ** 2
    log_rest = F.log_softmax(z[~mine].view(-1, classes - 1), dim=1)
    target = -((s + 1 - s.mean()) * log_s.gather(1, y[:, None])).mean()
    weak_ce = F.cross_entropy(weak, y, label_smoothing=0.1)
    others = -(ranked * log_rest).sum(1).mean()
    return target + 0.1 * others + 0.005 * weak_ce + F.cross_entropy(z, y)


def slkd(z: Tensor, s1: Tensor, s2: Tensor, t: Tensor, y: Tensor) -> Tensor:
    fused = 0.5 * s1.detach() + 0.5 * s2.detach()
    student = 1.1 * F.cross_entropy(z, y) + 0.9 * distill(z, t, 4.0) + distill(z, fused, 4.0)
    slts = sum(0.1 * F.cross_entropy(s, y) + 0.9 * distill(s, t, 4.0) for s in (s1, s2))
    return student + slts


def top_k(z: Tensor, values: Tensor, indices: Tensor, mass: Tensor, y: Tensor) -> Tensor:
    """From a cache of teacher logits, made whole again: what is left out shares its mass."""
    rest = (mass / (z.shape[1] - values.shape[1])).to(z.dtype)
    q = rest[:, None].repeat(1, z.shape[1])
    q = q.scatter(1, indices, F.softmax(values / 4.0, dim=1) * (1 - mass[:, None]).to(z.dtype))
    return F.kl_div(F.log_softmax(z / 4.0, dim=1), q, reduction="batchmean") * 16.0


def jsd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    log_s, log_v = F.log_softmax(z, dim=1), F.log_softmax(t, dim=1)
    middle = (0.5 * log_s.exp() + 0.5 * log_v.exp()).log()
    to_student = F.kl_div(middle, log_s, reduction="batchmean", log_target=True)
    to_teacher = F.kl_div(middle, log_v, reduction="batchmean", log_target=True)
    return 0.5 * to_student + 0.5 * to_teacher


@dataclass(frozen=True)
class Case:
    """One benchmark: the fused call, its eager form on the same arguments, and its traffic."""

    fused: Callable[..., Loss] | None  # None: kdfuse has no such loss; peers among themselves
    eager: Callable[..., Any]  # the loss
    trained: int  # sets of logits with a gradient
    frozen: int  # sets of logits without
    elements: int  # read or written a logit, forward and backward together: the byte model
    traffic: str  # the byte model in words
    listed: int = 0  # k of a top-k teacher, after the logits: (N, k) values, classes; (N,) mass

    def model_bytes(self, rows: int, classes: int, dtype: torch.dtype) -> int:
        listed = min(self.listed, classes - 1) * (dtype.itemsize + torch.int64.itemsize)
        return rows * (self.elements * classes * dtype.itemsize + listed)

    def arguments(
        self, rows: int, classes: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> list[Tensor]:
        """Logits as peaked as networks make them, the first `trained` with grad, and labels."""
        source = torch.Generator(device).manual_seed(seed)
        logits = [
            (3.0 * torch.randn(rows, classes, generator=source, device=device)).to(dtype)
            for _ in range(self.trained + self.frozen)
        ]
        logits = [x.requires_grad_() if k < self.trained else x for k, x in enumerate(logits)]
        if self.listed:
            whole = (3.0 * torch.randn(rows, classes, generator=source, device=device)).to(dtype)
            kept = SparseTeacher.top_k(whole, min(self.listed, classes - 1), temperature=4.0)
            assert kept.mass is not None
            logits += [kept.values, kept.indices, kept.mass]
        return [*logits, torch.randint(classes, (rows,), generator=source, device=device)]


PAIR = "reads the student and the teacher, writes the gradient"
CASES: dict[str, Case] = {
    "kd+ce": Case(
        lambda z, t, y, **k: kd_loss(z, t, y, kd_weight=0.9, ce_weight=0.1, **k), kd, 1, 1, 3, PAIR
    ),
    "dkd+ce": Case(lambda z, t, y, **k: dkd_loss(z, t, y, ce_weight=1.0, **k), dkd, 1, 1, 3, PAIR),
    "slkd2": Case(
        lambda z, a, b, t, y, **k: slkd_loss(z, t, [a, b], y, **k),
        slkd,
        3,
        1,
        7,
        "reads the student, two SL-Ts and the teacher, writes three gradients",
    ),
    "kd": Case(
        lambda z, t, y, **k: kd_loss(z, t, **k), lambda z, t, y: distill(z, t, 4.0), 1, 1, 3, PAIR
    ),
    "nkd+ce": Case(lambda z, t, y, **k: nkd_loss(z, t, y, ce_weight=1.0, **k), nkd, 1, 1, 3, PAIR),
    "tf_nkd+ce": Case(
        lambda z, y, **k: tf_nkd_loss(z, y, ce_weight=1.0, **k),
        tf_nkd,
        1,
        0,
        3,
        "reads the student twice, writes the gradient",
    ),
    "uskd+ce": Case(
        lambda z, w, y, **k: uskd_loss(z, w, y, ce_weight=1.0, **k),
        uskd,
        2,
        0,
        6,
        "reads the student and the weak head twice, writes two gradients; the sort is not counted",
    ),
    "kd_top64": Case(
        lambda z, v, i, m, y, **k: kd_loss(z, SparseTeacher(v, i, m), **k),
        top_k,
        1,
        0,
        2,
        "reads the student and the listed logits and classes, writes the gradient",
        listed=64,
    ),
    "ce": Case(None, F.cross_entropy, 1, 0, 2, "reads the logits, writes the gradient"),
    "jsd": Case(None, jsd, 1, 1, 3, PAIR),
}
# A loss under a teacher that has no eager form above is measured beside its own reference.
for _name in (name for name, op in OPS.items() if not op.own_rows):
    _fused = partial(LOSSES[_name], ce_weight=1.0)
    _plain = partial(_fused, backend="reference")
    CASES.setdefault(f"{_name}+ce", Case(_fused, _plain, 1, 1, 3, PAIR))
