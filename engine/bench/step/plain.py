"""The peer: distillation as most repositories write it, in plain eager PyTorch.

float32 or autocast, torch's own losses, a wait for the running loss and accuracy in each step,
images from a DataLoader with workers. It imports nothing of kdfuse: networks come as modules.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Settings:
    """What a repository's configuration file says."""

    temperature: float = 4.0
    ce_weight: float = 1.0
    kd_weight: float = 0.0  # of T^2 KL(teacher || student)
    fused_ce_weight: float = 0.0  # cross-entropy beside the SL-Ts, of the student
    fused_kd_weight: float = 0.0  # KD from the mean of the SL-Ts' logits
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    bf16: bool = False  # autocast to bfloat16


class Images(Dataset):
    """uint8 images as floats of 0..1, as ToTensor makes them, with their labels."""

    def __init__(self, images: Tensor, target: Tensor) -> None:
        self.images, self.target = images, target  # (M, 3, H, W) uint8, (M,) int64

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.images[row].float().div(255), int(self.target[row])


def in_memory(
    images: Tensor, target: Tensor, batch: int, workers: int, pin: bool
) -> DataLoader[Any]:
    """Batches of these images without end, in order."""
    endless: Iterator[int] = itertools.cycle(range(len(target)))
    return DataLoader(
        Images(images, target),
        batch,
        sampler=endless,  # an epoch's end would stop the workers
        num_workers=workers,
        pin_memory=pin,
    )


class Batches:
    """The batches of a loader, and the time that was spent waiting for them."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.waited = loader, 0.0  # seconds
        self._running: Iterator[list[Tensor]] | None = None

    def take(self) -> list[Tensor]:
        """The next images (N, 3, H, W) float32 of 0..1, and their labels (N,)."""
        asked = time.perf_counter()
        if self._running is None:
            self._running = iter(self.loader)
        found = next(self._running)
        self.waited += time.perf_counter() - asked
        return found

    def close(self) -> None:
        """Ends the workers."""
        self._running = None


class Loop:
    """Trains a student, and SL-Ts beside it, under a teacher where there is one; or asks the
    teacher alone, without a student."""

    def __init__(
        self,
        student: nn.Module | None,
        teacher: nn.Module | None,
        slts: Sequence[nn.Module],
        batches: Batches,
        device: torch.device,
        settings: Settings,
    ) -> None:
        self.device, self.batches, self.settings = device, batches, settings
        self.teacher = None if teacher is None else teacher.to(device).eval()
        self.trained = [net.to(device).train() for net in (student, *slts) if net is not None]
        self.optimizers = [
            torch.optim.SGD(
                network.parameters(),
                lr=settings.lr,
                momentum=settings.momentum,
                nesterov=settings.nesterov,
                weight_decay=settings.weight_decay,
            )
            for network in self.trained
        ]
        self.mean = torch.tensor(settings.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(settings.std, device=device).view(3, 1, 1)
        self.seen = self.right = 0
        self.losses = self.loss = 0.0  # their sum over the images, and the last step's
        self.spent = 0.0  # seconds in steps

    def __call__(self) -> None:
        """The next batch."""
        began = time.perf_counter()
        images, target = (x.to(self.device, non_blocking=True) for x in self.batches.take())
        images = (images - self.mean) / self.std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            if self.trained:
                logits = self.train(images, target)
            else:
                assert self.teacher is not None
                with torch.no_grad():
                    logits = self.teacher(images)
        self.right += int((logits.argmax(1) == target).sum().item())
        self.seen += len(target)
        self.losses += self.loss * len(target)
        self.spent += time.perf_counter() - began

    def train(self, images: Tensor, target: Tensor) -> Tensor:
        """One step of all networks; the student's logits."""
        given = None
        if self.teacher is not None:
            with torch.no_grad():
                given = self.teacher(images)
        student, *slts = [network(images) for network in self.trained]
        loss = self.taught(student, given, target)
        for logits in slts:
            loss = loss + self.taught(logits, given, target)
        if slts:
            fused = torch.stack(slts).mean(0).detach()
            loss = loss + self.settings.fused_ce_weight * nn.CrossEntropyLoss()(student, target)
            loss = loss + self.settings.fused_kd_weight * self.kd(student, fused)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss = loss.item()
        return student

    def taught(self, logits: Tensor, given: Tensor | None, target: Tensor) -> Tensor:
        """What a network learns from the labels, and from the teacher if there is one."""
        loss = self.settings.ce_weight * nn.CrossEntropyLoss()(logits, target)
        return loss if given is None else loss + self.settings.kd_weight * self.kd(logits, given)

    def kd(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = self.settings.temperature
        kl = nn.KLDivLoss(reduction="batchmean")
        return kl((student / t).log_softmax(1), (teacher / t).softmax(1)) * t**2
