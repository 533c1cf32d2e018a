"""What networks predict beside their teacher, as they learn (SLKD, figures 2 and 4).

Measured where accuracy is, on the same logits: sums on the device, read once an evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.batch import Batch
from .networks import Distiller, prefix
from .ranks import Group

ROOM = 256 << 20  # bytes, as float32, that the teacher's kept answers may have


class Trajectories:
    """Divergence, entropy and agreement of a run's networks over its validation set.

    The set comes in the same order each time, so that the teacher runs over it once: its logits are
    kept on the host, each batch's as it came.
    """

    def __init__(self, distiller: Distiller) -> None:
        """Of a distiller with a teacher."""
        self._distiller = distiller
        self._kept: list[Tensor] = []  # the teacher's logits, (valid, C) each
        self._batches = 0  # seen since the last `read`
        self._names: list[str] = []
        self._sums = torch.zeros(0)

    def keep(self, batch: Batch, logits: dict[str, Tensor]) -> None:
        """Take the logits of "teacher" for the next batch of the set."""
        made = logits["teacher"]
        held = torch.empty(made.shape, dtype=made.dtype, pin_memory=made.is_cuda)
        self._kept.append(held.copy_(made, non_blocking=True))

    def add(self, batch: Batch, logits: dict[str, Tensor]) -> None:
        """Count what the networks of `Distiller.evaluated` gave for the next batch, (valid, C)."""
        if self._batches == len(self._kept):
            teacher, made = self._distiller.teacher, self._distiller.predict
            assert teacher is not None
            self.keep(batch, {"teacher": made(teacher, "teacher", batch.images)[: batch.valid]})
        # On the stream of the copy to the host, which is behind it.
        kept = self._kept[self._batches].to(batch.images.device, non_blocking=True)
        self._batches += 1
        found = self._of_rows({"teacher": kept, **logits})
        values = torch.stack([rows.double() for rows in found.values()]).sum(1)
        if not self._names:
            self._names, self._sums = list(found), torch.zeros_like(values)
        self._sums += values

    def read(self, group: Group) -> dict[str, float]:
        """Means over the rows of all processes, to be begun anew: divergences and entropies in
        nats, agreement in percent."""
        sums = dict(zip(self._names, group.sum(self._sums).tolist(), strict=True))
        self._batches, self._names = 0, []
        rows = sums.pop("rows")
        return {n: (100 if n.startswith("agreement") else 1) * v / rows for n, v in sums.items()}

    def _of_rows(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """By name a number for each row: KL(P || Q) as kl_P_to_Q, at the temperature of a method
        that has one as softened_kl_P_to_Q, entropies, and whether the largest logit is that of the
        teacher."""
        one = {name: value.float().log_softmax(1) for name, value in logits.items()}
        found = {"rows": torch.ones_like(one["teacher"][:, 0])}
        for learner_name, learner in self._distiller.learners.items():
            own = prefix(learner_name)
            student = f"{own}student"
            slts = [f"{own}slt{i}" for i in range(len(learner.slts))]
            averages = [f"{own}ema"] if learner.average is not None else []
            pairs = [("teacher", name) for name in (student, *slts, *averages)]
            pairs += [(slt, student) for slt in slts]
            temperature = getattr(learner.method, "temperature", 1.0)  # not all methods have one
            found |= {f"kl_{p}_to_{q}": divergence(one[p], one[q]) for p, q in pairs}
            if temperature != 1:
                names = ("teacher", student, *slts, *averages)
                soft = {n: (logits[n].float() / temperature).log_softmax(1) for n in names}
                found |= {f"softened_kl_{p}_to_{q}": divergence(soft[p], soft[q]) for p, q in pairs}
        found |= {f"entropy_{name}": entropy(value) for name, value in one.items()}
        told = one.pop("teacher").argmax(1)
        return found | {f"agreement_{n}": value.argmax(1) == told for n, value in one.items()}


def trajectories_of(distiller: Distiller, logits: int, group: Group) -> Trajectories | None:
    """Those of a run whose teacher gives so many logits for the validation set; None without a
    teacher that runs, and, which is printed, for too many or a teacher that changes."""
    if distiller.teacher is None:
        return None
    why = ""
    if distiller.trains_teacher:
        why = "the method changes its BatchNorm statistics"
    elif (size := 4 * logits) > ROOM:
        why = f"its answers would take {size >> 20} MiB, above {ROOM >> 20}"
    if why and group.first:
        print(f"the networks are not compared with the teacher in evaluation: {why}", flush=True)
    return None if why else Trajectories(distiller)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) of each row, nats: (N,) of log-probabilities (N, C). What P rules out adds 0."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(1)


def entropy(p: Tensor) -> Tensor:
    """The entropy of each row, nats: (N,) of log-probabilities (N, C)."""
    return -torch.where(p > -torch.inf, p.exp() * p, 0.0).sum(1)
