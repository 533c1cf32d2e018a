"""A step's forward pass: the student's own losses, and its logits beside the teacher's.

The student is in the module tree; the teacher is not, so that no state dict, no train() and no
optimiser ever reaches it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import fastrcnn_loss

from ..training.compiled import compile_all
from ..training.ema import EMA
from ..training.frozen import digest
from .method import Baseline, Distillation, Terms

Features = Mapping[str, Tensor]  # levels of the pyramid, each (N, channels, H, W)
Sizes = list[tuple[int, int]]  # of the N images within their padded batch: height, width


class DetectionDistiller(nn.Module):
    """A student with the method's frozen teacher: what is wrapped for many processes.

    The student's average, where there is one, is not in the module tree: it has no gradients.
    """

    def __init__(
        self,
        method: Baseline | Distillation,
        student: FasterRCNN,
        teacher: FasterRCNN | None = None,
        *,
        amp: bool = False,
        ema: float | None = None,
    ) -> None:
        """`teacher` is frozen here; a method that uses one must have it. `amp`: bfloat16."""
        super().__init__()
        self.method = method
        self.student = student
        self.amp = amp
        self.teacher_digest: str | None = None
        # In a tuple, the teacher is no part of the module tree.
        self._teachers: tuple[FasterRCNN, ...] = ()
        if teacher is not None:
            self._teachers = (teacher.eval().requires_grad_(False),)
            self.teacher_digest = digest([teacher])
        self._average: tuple[EMA, ...] = () if ema is None else (EMA(student, ema),)

    def prepare(self, compile: Collection[str]) -> None:
        """Compile what has the same work for all images: the ResNets with their pyramids.

        Those of the roles "student" and "teacher" that are asked for. What follows them depends on
        how many boxes there are. Batches differ in size, so that the graphs are made for any.
        """
        named = {"student": self.student} | dict(zip(["teacher"], self._teachers, strict=False))
        chosen = {name: d.backbone for name, d in named.items() if name in compile}
        compile_all(chosen, dynamic=True)

    def forward(
        self, now: Mapping[str, Tensor], images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[Tensor, Terms]:
        """The loss (0-dim) and its 0-dim parts, detached.

        `images` are float32 (3, H, W) in 0..1, `targets` hold boxes (k, 4) and labels (k,). The
        student's four losses are those that torchvision's detector gives in training.
        """
        batch, resized = self.student.transform(images, targets)
        assert resized is not None
        with torch.autocast(batch.tensors.device.type, torch.bfloat16, enabled=self.amp):
            features = self.student.backbone(batch.tensors)
            proposals, found = self.student.rpn(batch, features, resized)
            heads: Any = self.student.roi_heads
            rois, _, labels, offsets = heads.select_training_samples(proposals, resized)
            logits, boxes = scores(self.student, features, rois, batch.image_sizes)
            classifier, regression = fastrcnn_loss(logits, boxes, labels, offsets)
            taught = self.teach(batch.tensors, rois, batch.image_sizes)
        losses = {
            "classifier": classifier,
            "box": regression,
            "objectness": found["loss_objectness"],
            "rpn_box": found["loss_rpn_box_reg"],
        }
        loss = torch.stack(list(losses.values())).sum()
        terms = {name: value.detach() for name, value in losses.items()}
        if isinstance(self.method, Distillation):
            assert taught is not None
            distilled, own = self.method.loss(logits, taught, torch.cat(labels))
            loss = loss + self.method.weight * distilled
            terms |= {"distillation": distilled.detach(), **own}
        rows = loss.new_tensor(float(len(logits)))
        return loss, {"loss": loss.detach(), **terms, "rows": rows}

    @torch.no_grad()
    def teach(self, images: Tensor, rois: list[Tensor], sizes: Sizes) -> Tensor | None:
        """The teacher's logits (R, C + 1) for the student's RoIs, on the teacher's features."""
        for teacher in self._teachers:
            return scores(teacher, teacher.backbone(images), rois, sizes)[0]
        return None

    @torch.no_grad()
    def predict(self, detector: FasterRCNN, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, labels and scores in each image, as torchvision's detector gives them."""
        with torch.autocast(images[0].device.type, torch.bfloat16, enabled=self.amp):
            return detector(images)

    def evaluated(self) -> dict[str, FasterRCNN]:
        """The detectors that are evaluated, by the name in logs."""
        found = {"student": self.student}
        for average in self._average:
            found["ema"] = cast(FasterRCNN, average.module)
        return found

    def trained(self) -> dict[str, list[nn.Module]]:
        """The modules of each optimiser, by its name in checkpoints."""
        return {"student": [self.student]}

    def averages(self) -> list[EMA]:
        """The student's average, if there is one."""
        return list(self._average)

    def update_averages(self, share: Tensor) -> None:
        """Take a share (0-dim) of the student's weights into its average, if there is one."""
        for average in self._average:
            average.update(self.student, share)

    def weights(self, whole: bool) -> dict[str, Any]:
        """What a checkpoint holds; `whole` or not, there is nothing but what is kept."""
        held = {"student": self.student.state_dict()}
        for average in self._average:
            held["ema"] = average.state_dict()
        return held

    def load(self, held: Mapping[str, Any]) -> None:
        """Take the weights of everything that is trained from what a checkpoint holds."""
        self.student.load_state_dict(held["student"])
        for average in self._average:
            average.load_state_dict(held["ema"])


def scores(
    detector: FasterRCNN, features: Features, rois: list[Tensor], sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Class logits (R, C + 1) and box offsets (R, 4 (C + 1)) of the box head for all RoIs."""
    heads: Any = detector.roi_heads
    pooled = heads.box_roi_pool(features, rois, sizes)
    return heads.box_predictor(heads.box_head(pooled))
