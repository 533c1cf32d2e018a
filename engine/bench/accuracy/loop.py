"""The peer: a training loop as distillation repositories have it, with their losses.

Eager float32, a teacher's pass in each step, the losses in separate PyTorch calls, and meters that
wait for the device in each step. It imports nothing of kdfuse: networks come as modules, batches
as iterables of images (N, 3, H, W) of floats and labels (N,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # of an epoch, 0-based
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of student, teacher (N, C) and labels (N,)


@dataclass(frozen=True)
class KD:
    """Hinton et al. 2015: weighted cross-entropy, and KL of both softened outputs times T^2."""

    temperature: float
    ce_weight: float
    kd_weight: float

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        t = self.temperature
        logged, given = F.log_softmax(student / t, dim=1), F.softmax(teacher / t, dim=1)
        kl = F.kl_div(logged, given, reduction="none").sum(1).mean() * t**2
        return self.ce_weight * F.cross_entropy(student, target) + self.kd_weight * kl


@dataclass(frozen=True)
class DKD:
    """Zhao et al. 2022: KL of the target's probability against the rest, and KL among the rest, for
    which the target's logit is lowered by 1000."""

    temperature: float
    ce_weight: float
    alpha: float
    beta: float

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        t = self.temperature
        own = F.one_hot(target, student.shape[1]).bool()
        both = [self.binary(F.softmax(z / t, dim=1), own) for z in (student, teacher)]
        target_part = F.kl_div(both[0].log(), both[1], reduction="sum") * t**2 / len(target)
        rest = [z / t - 1000.0 * own for z in (student, teacher)]
        others = F.kl_div(F.log_softmax(rest[0], dim=1), F.softmax(rest[1], dim=1), reduction="sum")
        ce = F.cross_entropy(student, target)
        decoupled = self.alpha * target_part + self.beta * others * t**2 / len(target)
        return self.ce_weight * ce + decoupled

    def binary(self, probabilities: Tensor, own: Tensor) -> Tensor:
        """The target's probability, and that of all others."""
        mine = (probabilities * own).sum(1, keepdim=True)
        return torch.cat([mine, (probabilities * ~own).sum(1, keepdim=True)], dim=1)


def train(
    student: nn.Module,
    teacher: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    epochs: int,
    rate: Callable[[int, int], float],  # of a step of an epoch, both 0-based
) -> None:
    """Train the student; the teacher is in evaluation mode."""
    device = next(student.parameters()).device
    teacher.eval()
    for epoch in range(epochs):
        student.train()
        losses, top1, top5, seen = 0.0, 0.0, 0.0, 0
        for step, (images, target) in enumerate(batches(epoch)):
            images, target = images.to(device), target.to(device)
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch, step)
            with torch.no_grad():
                given = teacher(images)
            logits = student(images)
            found = loss(logits, given, target)
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            seen += len(target)
            losses += found.item() * len(target)
            first, fifth = right(logits, target)
            top1, top5 = top1 + first, top5 + fifth
        print(
            f"epoch {epoch + 1}/{epochs}  loss {losses / seen:.4g}  top1 {100 * top1 / seen:.2f}  "
            f"top5 {100 * top5 / seen:.2f}",
            flush=True,
        )


def right(logits: Tensor, target: Tensor) -> tuple[float, float]:
    """How many labels are the first, and among the first five."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
    return found[:, :1].sum().item(), found.sum().item()


def top1(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percent of the labels that the network has first."""
    device = next(network.parameters()).device
    network.eval()
    hits, seen = 0.0, 0
    with torch.no_grad():
        for images, target in batches:
            hits += right(network(images.to(device)), target.to(device))[0]
            seen += len(target)
    return 100 * hits / seen
