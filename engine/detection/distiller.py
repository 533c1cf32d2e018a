"""A step's forward pass: the student's own losses, and its logits beside the teacher's.

The student is in the module tree; the teacher is not, so that no state dict, no train() and no
optimiser ever reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import fastrcnn_loss

from ..training.networks import digest
from .method import Baseline, Distillation, Terms

Features = Mapping[str, Tensor]  # levels of the pyramid, each (N, channels, H, W)
Sizes = list[tuple[int, int]]  # of the N images within their padded batch: height, width


class DetectionDistiller(nn.Module):
    """A student with the method's frozen teacher: what is wrapped for many processes."""

    def __init__(
        self,
        method: Baseline | Distillation,
        student: FasterRCNN,
        teacher: FasterRCNN | None = None,
    ) -> None:
        """`teacher` is frozen here; a method that uses one must have it."""
        super().__init__()
        self.method = method
        self.student = student
        self.teacher_digest: str | None = None
        # In a tuple, the teacher is no part of the module tree.
        self._teachers: tuple[FasterRCNN, ...] = ()
        if teacher is not None:
            self._teachers = (teacher.eval().requires_grad_(False),)
            self.teacher_digest = digest([teacher])

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Terms:
        """The loss, under "loss", and its 0-dim parts, detached.

        `images` are float32 (3, H, W) in 0..1, `targets` hold boxes (k, 4) and labels (k,). The
        student's four losses are those that torchvision's detector gives in training.
        """
        batch, resized = self.student.transform(images, targets)
        assert resized is not None
        features = self.student.backbone(batch.tensors)
        proposals, found = self.student.rpn(batch, features, resized)
        heads: Any = self.student.roi_heads
        rois, _, labels, offsets = heads.select_training_samples(proposals, resized)
        logits, boxes = scores(self.student, features, rois, batch.image_sizes)
        classifier, regression = fastrcnn_loss(logits, boxes, labels, offsets)
        losses = {
            "classifier": classifier,
            "box": regression,
            "objectness": found["loss_objectness"],
            "rpn_box": found["loss_rpn_box_reg"],
        }
        loss = torch.stack(list(losses.values())).sum()
        terms = {name: value.detach() for name, value in losses.items()}
        if isinstance(self.method, Distillation):
            taught = self.teach(batch.tensors, rois, batch.image_sizes)
            distilled, own = self.method.loss(logits, taught, torch.cat(labels))
            loss = loss + self.method.weight * distilled
            terms |= {"distillation": distilled.detach(), **own}
        return {"loss": loss, **terms, "rows": loss.new_tensor(float(len(logits)))}

    @torch.no_grad()
    def teach(self, images: Tensor, rois: list[Tensor], sizes: Sizes) -> Tensor:
        """The teacher's logits (R, C + 1) for the student's RoIs, on the teacher's features."""
        (teacher,) = self._teachers
        return scores(teacher, teacher.backbone(images), rois, sizes)[0]


def scores(
    detector: FasterRCNN, features: Features, rois: list[Tensor], sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Class logits (R, C + 1) and box offsets (R, 4 (C + 1)) of the box head for all RoIs."""
    heads: Any = detector.roi_heads
    pooled = heads.box_roi_pool(features, rois, sizes)
    return heads.box_predictor(heads.box_head(pooled))
