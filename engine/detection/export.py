"""A trained detector as one file: an ONNX model, or its weights."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .networks import CLASSES, kept
from .recipe import DetectionRecipe

OUTPUTS = ("boxes", "labels", "scores")
OPSET = 18


class Found(nn.Module):
    """A uint8 image (3, H, W), RGB, to n boxes (n, 4) in its pixels, labels (n,), scores (n,)."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.detector([image.float() / 255])
        return tuple(found[name] for name in OUTPUTS)


def exported(
    recipe: DetectionRecipe,
    weights: dict[str, Any],
    facts: dict[str, Any],
    network: str,  # student, ema
    out: Path,
) -> bytes:
    """What is to stand in `out` of a detector of a run's checkpoint: .onnx, or .pt, its weights
    under "model".

    Raises ValueError for another suffix and for a network that the run does not have.
    """
    if out.suffix == ".pt2":
        raise ValueError(
            f"out = {out}: torch.export cannot follow a detector, whose work depends on how many "
            "boxes it finds; write an .onnx or a .pt file"
        )
    if out.suffix not in (".onnx", ".pt"):
        raise ValueError(f"out = {out}: a detector is written as .onnx or .pt")
    categories = len(weights["student"][CLASSES]) - 1
    distiller = kept(recipe, categories, torch.device("cpu"))
    distiller.load(weights)
    detectors = distiller.evaluated()
    if network not in detectors:
        raise ValueError(f"network = {network!r}: this run has {', '.join(detectors)}")
    detector = detectors[network]
    if out.suffix == ".pt":
        torch.save({"model": detector.state_dict()}, data := io.BytesIO())
        return data.getvalue()
    about = {"recipe": recipe.name, "network": network} | {k: facts[k] for k in ("step", "results")}
    return _onnx(Found(detector).eval(), recipe.data.min_size, about, out)


def _onnx(model: nn.Module, side: int, about: dict[str, Any], out: Path) -> bytes:
    try:
        import onnx
    except ImportError as error:
        raise ValueError(f"out = {out}: needs onnx ({error}): pip install onnx") from error
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    axes = {"image": {1: "height", 2: "width"}} | {name: {0: "found"} for name in OUTPUTS}
    data: Any = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that traces is the one that can write these operations.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (image,),
            data,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes=axes,
        )
    made = onnx.load_model_from_string(data.getvalue())
    made.metadata_props.add(key="kdfuse", value=json.dumps(about))
    return made.SerializeToString()
