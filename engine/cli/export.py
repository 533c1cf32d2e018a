"""What a run keeps, as one file that needs nothing of kdfuse to classify images or find objects."""

from __future__ import annotations

import importlib
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.durable import whole_file
from ..data.loaders.ondevice import Normalise
from ..models import fold_dirac
from ..recipe.load import DetectionRecipe, Recipe
from ..run.disk import FULL, shortage
from ..run.past import any_recipe_of, checkpoints_of
from ..training.build import build
from ..training.networks import Distiller

SUFFIXES = (".pt2", ".onnx", ".pt")


class Classifier(nn.Module):
    """uint8 images (N, 3, H, W), RGB, 0 to 255, to logits (N, classes)."""

    def __init__(self, inputs: Normalise, network: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.inputs(images))


def export(run: str | Path, out: str | Path, which: str = "best", network: str = "student") -> Path:
    """Write a network of a run to `out` and return its path. A file that is there already stays
    until the new one is on the disk and could be read again.

    By the suffix: .pt2 is a program of torch.export, with facts beside it as the extra file
    "kdfuse.json"; .onnx is an ONNX model; both take uint8 images of any number and normalise them
    themselves. .pt holds the weights under "model", as published teachers do. SimKD's student
    comes with projector and reused classifier; Dirac layers are plain convolutions in the first
    two. `which` is "best" or "last"; `network` "student", "ema", "slt0", ... or one of those with
    the name of a learner before it ("small_student"). A detector is written as .onnx, for one uint8
    image (3, H, W) of any size, or as .pt. Raises ValueError, OSError for a file that cannot be
    written, or CheckpointError (a RuntimeError) when there is no checkpoint to use.
    """
    run, out = Path(run), Path(out)
    if out.is_dir():
        raise IsADirectoryError(f"out = {out}: a folder; name a file, as {out / 'student.pt2'}")
    if out.suffix not in SUFFIXES:
        raise ValueError(f"out = {out}: write one of {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out = {out}: there is no folder {out.parent}; make it first")
    if which not in ("best", "last"):
        raise ValueError(f"which = {which!r}: best or last")
    recipe = any_recipe_of(run)
    held = checkpoints_of(run)
    if which not in held:
        raise ValueError(f"which = {which!r}: {run} was not evaluated yet; take last")
    weights, facts = held[which]
    if isinstance(recipe, DetectionRecipe):
        from ..detection.export import exported  # no other run needs what it imports

        data = exported(recipe, weights, facts, network, out)
    else:
        data = _classifier(recipe.without_files(), weights, facts, network, out)
    _write(out, data)
    return out


def _classifier(
    recipe: Recipe, weights: dict[str, Any], facts: dict[str, Any], network: str, out: Path
) -> bytes:
    classes, size = facts["classes"], recipe.data.size
    distiller = build(recipe, classes, torch.device("cpu"))
    distiller.load(weights)
    networks = distiller.evaluated()
    if network not in networks:
        raise ValueError(f"network = {network!r}: this run has {', '.join(networks)}")
    chosen, inputs = networks[network]
    if out.suffix == ".pt":
        return _weights(chosen, distiller, network, out)
    normalise = distiller.inputs[inputs]
    assert isinstance(normalise, Normalise)
    model = Classifier(normalise, fold_dirac(chosen)).eval()
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    about = {
        "recipe": recipe.name,
        "network": network,
        "step": facts["step"],
        "results": facts["results"],
        "classes": classes,
        "size": size,
    }
    return (_onnx if out.suffix == ".onnx" else _program)(model, images, about, out)


def _program(model: nn.Module, images: Tensor, about: dict[str, Any], out: Path) -> bytes:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
    extra = {"kdfuse.json": json.dumps(about)}
    with warnings.catch_warnings():
        # It looks whether a weight is part of another one's storage, and warns of none.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(program, data := io.BytesIO(), extra_files=extra)
    return data.getvalue()


def _onnx(model: nn.Module, images: Tensor, about: dict[str, Any], out: Path) -> bytes:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"out = {out}: ONNX needs {package} ({error}): pip install onnx onnxscript, or "
                "write a .pt2 file"
            ) from error
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.model.metadata_props["kdfuse"] = json.dumps(about)
    return program.model_proto.SerializeToString()


def _weights(chosen: nn.Module, distiller: Distiller, network: str, out: Path) -> bytes:
    learners = distiller.learners.values()
    plain = [learner for learner in learners if not learner.method.deploys_head]
    known = [slt for learner in learners for slt in learner.slts]
    known += [learner.student for learner in plain]
    known += [learner.average.module for learner in plain if learner.average is not None]
    if not any(chosen is module for module in known):
        raise ValueError(
            f"out = {out}: {network} is more than the network of one name (projector, reused "
            "classifier); write a .pt2 file, or name it as run:FOLDER in a recipe"
        )
    torch.save({"model": chosen.state_dict()}, data := io.BytesIO())
    return data.getvalue()


def _write(out: Path, data: bytes) -> None:
    # torch.export wants the suffix .pt2 of the unfinished file, too.
    unfinished = out.with_name(f".{os.getpid()}-{out.name}")
    try:
        with whole_file(out, unfinished) as file:
            file.write(data)
            file.flush()
            _read_again(unfinished, out)
    except OSError as error:
        why = error.strerror
        if error.errno in FULL:
            why = f"{why}; it takes {shortage(out.parent, len(data))}"
        raise OSError(error.errno, why, str(out)) from error


def _read_again(unfinished: Path, out: Path) -> None:
    try:
        READ[out.suffix](unfinished)
    except Exception as error:
        raise ValueError(f"out = {out}: the file cannot be read again: {error}") from error


def _read_onnx(path: Path) -> None:
    import onnx  # what wrote it needs it, too

    onnx.checker.check_model(str(path))


READ: dict[str, Callable[[Path], object]] = {
    ".pt2": torch.export.load,
    ".onnx": _read_onnx,
    ".pt": lambda path: torch.load(path, weights_only=True),
}
