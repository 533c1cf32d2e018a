"""torchvision's Faster R-CNN by name, with random weights or those of a file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from ..models.weights import Difference, compare, read_weights
from .distiller import DetectionDistiller
from .recipe import CocoData, DetectionRecipe, Detector, Student

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
NAMES = tuple(f"torchvision:fasterrcnn_{resnet}_fpn" for resnet in RESNETS)
POOLED = 7  # side of a RoI's features
CLASSES = "roi_heads.box_predictor.cls_score.bias"


def create(detector: Detector, data: CocoData, categories: int) -> FasterRCNN:
    """The detector `detector.name` for so many categories beside the background.

    Its weights are random, or those of `checkpoint`, or of `backbone` in the ResNet alone: a
    file, a checkpoint folder or a run. Its BatchNorm is frozen: statistics and factors stay as
    they are loaded. Raises ValueError for a name that is not one of NAMES and for weights that do
    not fit, FileNotFoundError where there are none.
    """
    if detector.name not in NAMES:
        near = difflib.get_close_matches(detector.name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"name: {detector.name!r} is no known detector{hint} Known: {', '.join(NAMES)}"
        )
    resnet = detector.name.removeprefix("torchvision:fasterrcnn_").removesuffix("_fpn")
    student = detector if isinstance(detector, Student) else None
    trained = student.trained_stages if student else 0
    backbone = resnet_fpn_backbone(backbone_name=resnet, weights=None, trainable_layers=trained)
    options: dict[str, Any] = {}
    if student:
        options = {
            "rpn_post_nms_top_n_train": student.proposals,
            "box_batch_size_per_image": student.rois,
        }
    model = FasterRCNN(
        backbone,
        min_size=data.min_size,
        max_size=data.max_size,
        box_head=TwoMLPHead(backbone.out_channels * POOLED**2, detector.hidden),
        box_predictor=FastRCNNPredictor(detector.hidden, categories + 1),
        **options,
    )
    if detector.checkpoint is not None:
        _take(model, detector.checkpoint, f"{detector.name} with {categories} categories")
    if student and student.backbone is not None:
        _take(backbone.body, student.backbone, f"the {resnet} of {detector.name}", ("fc.",))
    return model


def build(recipe: DetectionRecipe, categories: int, device: torch.device) -> DetectionDistiller:
    """The detectors that a recipe trains and needs, ready to be trained, on `device`.

    The caller seeds their random weights first. Raises what `create` does.
    """
    run, data = recipe.run, recipe.data
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    student = create(recipe.student, data, categories)
    teacher = create(recipe.teacher, data, categories) if recipe.teacher else None
    for network in (student, teacher):
        if network is not None:
            network.to(device).to(memory_format=layout)
    made = DetectionDistiller(
        recipe.method, student, teacher, amp=run.amp == "bf16", ema=recipe.optim.ema
    )
    if run.compile:
        made.prepare(run.compiled)
    return made


def kept(recipe: DetectionRecipe, categories: int, device: torch.device) -> DetectionDistiller:
    """What a run's checkpoints hold of its detectors, to be loaded and evaluated.

    All weights come from a checkpoint: the files that the student started from may be gone.
    """
    spec = recipe.student.model_copy(update={"checkpoint": None, "backbone": None})
    student = create(spec, recipe.data, categories).to(device)
    amp = recipe.run.amp == "bf16"
    return DetectionDistiller(recipe.method, student, amp=amp, ema=recipe.optim.ema)


def check_frozen(student: Student) -> None:
    """ValueError where parts of the student would stay as random as they are made."""
    started = student.checkpoint is not None or student.backbone is not None
    if not started and student.trained_stages < 5:
        raise ValueError(
            f"student.trained_stages: {student.trained_stages} freezes parts of the ResNet, whose "
            "weights are random; give student.backbone=FILE of ImageNet's weights, or "
            "student.trained_stages=5"
        )


def _take(model: nn.Module, path: Path, name: str, left_out: tuple[str, ...] = ()) -> None:
    """Copy the weights at `path` but those with a prefix in `left_out`. Raises ValueError."""
    weights = {
        key: value
        for key, value in read_weights(path).items()
        # Frozen BatchNorm counts no steps; a trained one's file does.
        if not key.startswith(left_out) and not key.endswith(".num_batches_tracked")
    }
    difference = compare(weights, model)
    if difference:
        raise ValueError(f"checkpoint {path}: does not fit {name}: {_why(difference)}")
    model.load_state_dict(weights)


def _why(found: Difference) -> str:
    if CLASSES in found.shapes:
        ((rows,), _) = found.shapes[CLASSES]
        return (
            f"it has {rows - 1} categories beside the background (90: torchvision's own "
            "files, which count the gaps in COCO's ids); train one on this data with a recipe of "
            "method baseline"
        )
    shapes = [f"{key} is {a}, needs {b}" for key, (a, b) in found.shapes.items()]
    parts = {"missing": found.missing, "unexpected": found.unexpected, "other shape": shapes}
    return "; ".join(
        f"{len(keys)} {kind}, the first: {keys[0]}" for kind, keys in parts.items() if keys
    )
