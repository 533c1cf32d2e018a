"""Contrastive representation distillation (Tian et al. 2020), with a memory of all images."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Size, Tensor, nn

from .method import Networks, Outputs, Terms
from .parts.feature import FeatureMethod

EPS = 1e-7  # of the released code, beside the noise's probability
PIECE = 2**26  # elements of the largest temporary tensor: 256 MiB


class CRD(FeatureMethod):
    """CE + feature_weight * the contrast of student and teacher, each against the other's memory.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020. Both networks'
    pooled features are embedded (linear, then of length 1; both embeddings are trained). With the
    memory M of the other network's embeddings, an anchor e scores exp(<M_i, e> / t) / Z with its
    own image and with K images of other classes, and noise contrastive estimation makes the loss
    of the scores (`contrast`). Z is the number of images times the mean score of the first batch.
    Defaults are those of the released code; "CRD + KD" is kd_weight = 1.

    The K images are drawn independently and uniformly, as the paper's estimate has it (the released
    code draws without replacement). Each process draws for its own images; the memories and Z take
    the images of all processes and are the same everywhere. They are part of each checkpoint: two
    memories of images x `dimensions` float32 numbers.
    """

    name: Literal["crd"] = "crd"
    default_taps: ClassVar[str] = "pooled"

    feature_weight: float = Field(0.8, ge=0, description="weight of the contrast")
    negatives: int = Field(16384, ge=1, description="K, images of other classes for each image")
    contrast_temperature: float = Field(0.07, gt=0, description="t of the scores")
    momentum: float = Field(
        0.5, ge=0, lt=1, description="what a memory keeps of an image's last embedding"
    )
    dimensions: int = Field(128, ge=1, description="of the embeddings")

    @property
    def takes_repeats(self) -> bool:
        return False  # a memory's row is written once a step

    @property
    def gathers(self) -> bool:
        return True  # its memory has the rows of all

    def head(self, networks: Networks) -> Memory:
        assert networks.labels is not None
        shapes = [list(networks.shapes[role].values()) for role in ("student", "teacher")]
        if len(shapes[0]) != 1:
            raise ValueError(
                f"method crd reads one point of each network, got {len(shapes[0])}; name one with "
                "method.student_taps and method.teacher_taps"
            )
        if networks.labels.min() == networks.labels.max():
            raise ValueError(
                "method crd contrasts each image with those of other classes, and the training "
                "set has images of one class only; take another method"
            )
        return Memory(
            shapes[0][0],
            shapes[1][0],
            networks.labels,
            self.negatives,
            self.dimensions,
            self.contrast_temperature,
            self.momentum,
        )

    def features(self, out: Outputs, target: Tensor) -> Terms:
        return {"crd": out.head["contrast"]}


class Memory(nn.Module):
    """Embeddings of both networks, and what they were for each image of the training set."""

    student_memory: Tensor  # (images, dimensions) float32
    teacher_memory: Tensor
    normalizers: Tensor  # (2,) float32: Z of the student's and the teacher's scores; 0: none yet
    order: Tensor  # (images,) int64: the images, class by class
    starts: Tensor  # (classes,) int64: where a class begins in `order`
    counts: Tensor  # (classes,) int64: its images
    labels: Tensor  # (images,) int64

    def __init__(
        self,
        student: Size,
        teacher: Size,
        labels: Tensor,
        negatives: int,
        dimensions: int,
        temperature: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self._marked: tuple[Tensor, ...] = ()
        self.embed_student = nn.Linear(student.numel(), dimensions)
        self.embed_teacher = nn.Linear(teacher.numel(), dimensions)
        bound = math.sqrt(3 / dimensions)  # rows of length about 1
        for name in ("student_memory", "teacher_memory"):
            start = torch.empty(len(labels), dimensions).uniform_(-bound, bound)
            self.register_buffer(name, start)
        self.register_buffer("normalizers", torch.zeros(2))
        counts = labels.bincount()
        for name, value in {
            "labels": labels,
            "order": labels.argsort(stable=True),
            "starts": counts.cumsum(0) - counts,
            "counts": counts,
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        (student,), (teacher,) = out.student_taps.values(), out.teacher_taps.values()
        with torch.autocast(student.device.type, enabled=False):
            return {"contrast": self.contrast(student.float(), teacher.float(), index)}

    def contrast(self, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        """The loss of pooled features (N, ...) of the images `index` (N,); 0-dim."""
        student = F.normalize(self.embed_student(student.flatten(1)))
        teacher = F.normalize(self.embed_teacher(teacher.flatten(1)))
        rows = torch.cat([index[:, None], self.draw(index)], 1)
        sides = [(student, self.teacher_memory), (teacher, self.student_memory)]
        scores = [
            (scores_of(anchors.detach(), memory, rows) / self.temperature).exp()
            for anchors, memory in sides
        ]
        normalizers = self.normalized(torch.stack([score.mean() for score in scores]))
        noise = self.negatives / len(self.labels)
        total = student.new_zeros(())
        for (anchors, memory), score, z in zip(sides, scores, normalizers, strict=True):
            value, slope = nce(score / z, noise)
            gradient = weighted_sum(slope / self.temperature, memory, rows)
            # The value is a constant; its gradient is known already, while the memory, which is
            # overwritten below, still is what the scores were made from.
            total = total + value + ((anchors - anchors.detach()) * gradient).sum()
        if self.training:
            self.remember(student.detach(), teacher.detach(), index)
        return total

    @torch.no_grad()
    def draw(self, index: Tensor) -> Tensor:
        """(N, K) images of other classes than those of the images `index` (N,)."""
        label = self.labels[index][:, None]
        start, count = self.starts[label], self.counts[label]
        shape = (len(index), self.negatives)
        # In float64: float32 has too few numbers to be fair to a million images.
        uniform = torch.rand(shape, dtype=torch.float64, device=index.device)
        place = (uniform * (len(self.order) - count)).long()
        return self.order[place + count * (place >= start)]

    @torch.no_grad()
    def normalized(self, means: Tensor) -> Tensor:
        """Z of both sides (2,): what it has been since the first batch, whose are `means`."""
        first = of_all_processes(means[None]).mean(0) * len(self.labels)
        found = torch.where(self.normalizers > 0, self.normalizers, first)
        if self.training:
            self.normalizers.copy_(found)
        return found

    @torch.no_grad()
    def remember(self, student: Tensor, teacher: Tensor, index: Tensor) -> None:
        """Move the images' rows of the memories towards their embeddings, (N, dimensions) each."""
        index = of_all_processes(index)
        for memory, made in (
            (self.student_memory, of_all_processes(student)),
            (self.teacher_memory, of_all_processes(teacher)),
        ):
            row = self.momentum * memory[index] + (1 - self.momentum) * made
            memory.index_copy_(0, index, F.normalize(row))

    def mark(self, images: Tensor, target: Tensor, index: Tensor) -> None:
        """Keep the rows that a step on this batch will move, in all processes, and Z."""
        index = of_all_processes(index)
        z = self.normalizers.clone()
        self._marked = index, z, self.student_memory[index], self.teacher_memory[index]

    def undo(self, bad: Tensor) -> None:
        """Put back what `mark` kept where `bad` (0-dim, bool) is true."""
        index, z, student, teacher = self._marked
        for memory, rows in ((self.student_memory, student), (self.teacher_memory, teacher)):
            memory.index_copy_(0, index, torch.where(bad, rows, memory[index]))
        torch.where(bad, z, self.normalizers, out=self.normalizers)


def nce(scores: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """-mean_b [ log(P+ / (P+ + m)) + sum_K log(noise / (P- + m)) ], m = noise + 1e-7; 0-dim.

    `scores` (N, 1 + K) hold P+ first; noise is K over the number of images. The second result,
    (N, 1 + K), is the gradient for the scores' logarithms.
    """
    positive, negative = scores[:, :1], scores[:, 1:]
    m = noise + EPS
    value = (m / positive).log1p().sum() + ((negative + EPS) / noise).log1p().sum()
    slope = torch.cat([-m / (positive + m), negative / (negative + m)], 1)
    return value / len(scores), slope / len(scores)


@torch.no_grad()
def scores_of(anchors: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """<memory[rows[b, k]], anchors[b]> for anchors (N, D) and rows (N, 1 + K); (N, 1 + K)."""
    parts = []
    for anchor, row in pieces(anchors, rows, memory):
        if whole_is_cheaper(memory, rows):
            parts.append((anchor @ memory.T).gather(1, row))
        else:
            parts.append(torch.bmm(memory[row], anchor[:, :, None])[:, :, 0])
    return torch.cat(parts)


@torch.no_grad()
def weighted_sum(weights: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """sum_k weights[b, k] memory[rows[b, k]] for weights and rows (N, 1 + K); (N, D)."""
    parts = []
    for weight, row in pieces(weights, rows, memory):
        if whole_is_cheaper(memory, rows):
            # In one dimension: a GPU adds in the same order in every run.
            place = row + len(memory) * torch.arange(len(row), device=row.device)[:, None]
            spread = weight.new_zeros(len(row) * len(memory))
            spread.scatter_add_(0, place.flatten(), weight.flatten())
            parts.append(spread.view(len(row), -1) @ memory)
        else:
            parts.append(torch.bmm(weight[:, None], memory[row])[:, 0])
    return torch.cat(parts)


def whole_is_cheaper(memory: Tensor, rows: Tensor) -> bool:
    """Whether to multiply with all of the memory rather than gather the rows that are needed.

    Gathering moves each number of a row three times through memory, a product of matrices none;
    where the two meet was estimated from the speeds of a GPU.
    """
    return len(memory) <= 64 * rows.shape[1]


def pieces(values: Tensor, rows: Tensor, memory: Tensor) -> zip[tuple[Tensor, Tensor]]:
    """`values` and `rows` cut along the batch, so that no temporary is larger than PIECE."""
    images, dimensions = memory.shape
    each = images if whole_is_cheaper(memory, rows) else rows.shape[1] * dimensions
    step = max(1, PIECE // each)
    return zip(values.split(step), rows.split(step), strict=True)


def of_all_processes(x: Tensor) -> Tensor:
    """`x` of every process, in order of rank, along the first dimension; without a gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    everyone = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone
