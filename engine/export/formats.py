"""The forms in which a classifier is written, and how each is read and run again."""

from __future__ import annotations

import copy
import importlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loaders.ondevice import Normalise
from ..models import fold_dirac
from .chosen import Chosen
from .layouts import Twin

PROGRAMS, WEIGHTS = (".pt2", ".onnx"), (".pt", ".safetensors")
SUFFIXES = (*PROGRAMS, *WEIGHTS)
BATCH = {0: torch.export.Dim("batch")}  # the axis of images that may have any size

# uint8 images (N, 3, H, W) on the CPU to logits (N, classes), float32.
Runner = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """uint8 images (N, 3, H, W), RGB, 0 to 255, to logits (N, classes)."""

    def __init__(self, inputs: Normalise, network: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.inputs(images))


def check_packages(out: Path, runs: bool) -> None:
    """Raise ValueError, with the cure, unless the packages are there that write `out` and, where
    it is to be run, run it."""
    needed = {".onnx": ("onnx", "onnxscript"), ".safetensors": ("safetensors",)}
    for package in needed.get(out.suffix, ()):
        _needs(out, package, f"pip install {' '.join(needed[out.suffix])}")
    if out.suffix == ".onnx" and runs:
        _needs(out, "onnxruntime", "pip install onnxruntime, or --check 0 to write it without")


def _needs(out: Path, package: str, cure: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"out = {out}: needs {package} ({error}): {cure}") from error


def program(chosen: Chosen, about: dict[str, Any], suffix: str) -> bytes:
    """A .pt2 of torch.export, or an ONNX model, for uint8 images of any number; `about` in it."""
    model = Classifier(chosen.normalise, fold_dirac(chosen.network)).eval()
    images = torch.zeros(2, 3, *[chosen.recipe.data.size] * 2, dtype=torch.uint8)
    return (_onnx if suffix == ".onnx" else _pt2)(model, images, json.dumps(about))


def _pt2(model: nn.Module, images: Tensor, about: str) -> bytes:
    made = torch.export.export(model, (images,), dynamic_shapes={"images": BATCH})
    with warnings.catch_warnings():
        # It looks whether a weight is part of another one's storage, and warns of none.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(made, data := io.BytesIO(), extra_files={"kdfuse.json": about})
    return data.getvalue()


def _onnx(model: nn.Module, images: Tensor, about: str) -> bytes:
    made = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": BATCH},
    )
    assert made is not None
    made.model.metadata_props["kdfuse"] = about
    return made.model_proto.SerializeToString()


def weights(held: Mapping[str, Tensor], suffix: str, layout: str | None) -> bytes:
    """A state dict: .safetensors, or .pt, there under "model" unless it is in a library's layout,
    whose `load_state_dict` wants it bare."""
    if suffix == ".safetensors":
        from safetensors.torch import save

        # It takes neither other memory formats nor two names of one storage.
        plain = {key: tensor.detach().clone().contiguous() for key, tensor in held.items()}
        return save(plain, metadata={"format": "pt"})
    torch.save(dict(held) if layout else {"model": dict(held)}, data := io.BytesIO())
    return data.getvalue()


def read(path: Path) -> Any:
    """What is in a file of SUFFIXES. Raises whatever its library does for one that is damaged."""
    return READ[path.suffix](path)


def _read_onnx(path: Path) -> Path:
    import onnx  # what wrote it needs it, too

    onnx.checker.check_model(str(path))
    return path


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


READ: dict[str, Callable[[Path], Any]] = {
    ".pt2": torch.export.load,
    ".onnx": _read_onnx,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".safetensors": _read_safetensors,
}


def runner(suffix: str, held: Any, chosen: Chosen, twin: Twin | None) -> Runner:
    """What was read, to be run on images; weights in `twin`, or in a network like the chosen."""
    if suffix == ".pt2":
        return held.module()
    if suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(held, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    network = copy.deepcopy(chosen.network) if twin is None else twin.make(chosen.classes)
    network.load_state_dict(held.get("model", held))
    return Classifier(chosen.normalise, network.eval())
