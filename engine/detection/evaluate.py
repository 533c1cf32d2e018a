"""COCO's box AP of the student of a run, as pycocotools computes it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import closing, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from ..run.past import checkpoints_of
from ..training.process import settings
from ..training.ranks import Group, join
from ..training.speed import settled
from .coco import Coco, read_coco
from .distiller import DetectionDistiller
from .loader import Loader, Sample
from .networks import kept
from .recipe import DetectionRecipe

STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def check_pycocotools() -> None:
    """ModuleNotFoundError, a message for the user, where it is not installed."""
    if find_spec("pycocotools") is None:
        raise MissingPycocotools(
            "data.val: evaluation needs pycocotools: pip install 'kdfuse[detection]', or "
            "set data.val=false to train without"
        )


class MissingPycocotools(ModuleNotFoundError):
    """Evaluation was asked for on a machine without pycocotools."""


def measure(
    distiller: DetectionDistiller, coco: Coco, loader: Loader, group: Group
) -> dict[str, float]:
    """`box_ap` of the student, and of its average as ema_ap and so on."""
    found: dict[str, float] = {}
    for name, detector in distiller.evaluated().items():
        own = box_ap(distiller, detector, coco, loader.every(), group)
        found |= {k if name == "student" else f"{name}_{k}": v for k, v in own.items()}
    return found


def box_ap(
    distiller: DetectionDistiller,
    detector: FasterRCNN,
    coco: Coco,
    batches: Iterable[list[Sample]],
    group: Group,
) -> dict[str, float]:
    """Percent, over all processes' images: AP at IoU .5:.95, .5 and .75, and by size of object.

    A size that no object of the set has is left out. Leaves the detector in evaluation mode.
    """
    detector.eval()
    own: list[dict[str, Any]] = []
    for batch in batches:
        images = [sample.on(group.device)[0] for sample in batch]
        for sample, found in zip(batch, distiller.predict(detector, images), strict=True):
            own += detections(coco, sample.row, found)
    every = [one for part in group.all(own) for one in part]
    # The others wait in this call until the first has computed.
    return group.all(compute(coco, every) if group.first else None)[0]


def detections(coco: Coco, row: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The boxes found in image `row`, as COCO's results are written."""
    ids = list(coco.categories)
    left, top, right, bottom = found["boxes"].double().cpu().unbind(1)
    boxes = torch.stack([left, top, right - left, bottom - top], 1).tolist()
    labels, marks = found["labels"].tolist(), found["scores"].tolist()
    return [
        {"image_id": int(coco.ids[row]), "category_id": ids[k - 1], "bbox": box, "score": score}
        for box, k, score in zip(boxes, labels, marks, strict=True)
    ]


def compute(coco: Coco, found: list[dict[str, Any]]) -> dict[str, float]:
    """What `box_ap` gives for the boxes found in all images."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:  # pycocotools cannot read an empty list
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(coco.annotations))
        run = COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    values = zip(STATS, run.stats.tolist(), strict=False)
    return {name: 100 * value for name, value in values if value >= 0}  # -1: no object


def evaluate(run: Path, recipe: DetectionRecipe) -> dict[str, dict[str, float]]:
    """Evaluate the last and the best checkpoint of a run's folder again, and print the results.

    {"last": {...}, "best": {...}}, each as `measure` gives it, with the checkpoint's step. Raises
    CheckpointError (a RuntimeError) when there is no checkpoint to use, and what training raises
    for the validation set.
    """
    check_pycocotools()
    results = {}
    group = join(recipe.run.device)
    recipe = settled(recipe, group.device)
    with settings(recipe.run):
        coco = read_coco(recipe.data.root, "val")
        distiller = kept(recipe, len(coco.categories), group.device)
        batch = group.share(recipe.run.eval_batch, "run.eval_batch")
        loader = Loader(coco, recipe.data, batch, seed=0, rank=group.rank, world=group.world)
        with closing(loader):
            for name, (weights, facts) in checkpoints_of(run).items():
                distiller.load(weights)
                found = measure(distiller, coco, loader, group)
                results[name] = {"step": facts["step"], **found}
                if group.first:
                    words = ", ".join(f"{k} {v:.2f}" for k, v in found.items())
                    print(f"{name} (step {facts['step']}): {words}", flush=True)
    return results
