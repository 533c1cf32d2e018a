"""The lines that load an exported file, for its model card: they run where the file lies."""

from __future__ import annotations

import json
from pathlib import Path

from .chosen import Chosen
from .layouts import Twin


def loading(chosen: Chosen, spec: str, out: Path, twin: Twin | None, imports: list[str]) -> str:
    """A block of Python that ends with logits of an image; words where no name makes the network.

    `imports` are the modules that register what the run uses.
    """
    side, name, classes = chosen.recipe.data.size, json.dumps(out.name), chosen.classes
    if out.suffix == ".onnx":
        lines = [
            "import numpy as np",
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({name})",
            f"images = np.zeros((1, 3, {side}, {side}), np.uint8)",
            '(logits,) = session.run(None, {"images": images})',
        ]
        return _block(lines)
    images = f"images = torch.zeros(1, 3, {side}, {side}, dtype=torch.uint8)"
    if out.suffix == ".pt2":
        lines = ["import torch", "", f"network = torch.export.load({name}).module()", images]
        return _block([*lines, "logits = network(images)"])
    if twin is None and chosen.spec.kept is not None:
        return f"The weights are those of the network that {spec} kept, under its names."
    packed = out.suffix == ".safetensors"
    load = f"load_file({name})" if packed else f"torch.load({name}, weights_only=True)"
    module, make = _maker(spec, classes, twin)
    takes_file = twin.library == "timm" if twin else not packed
    given = "checkpoint_path" if twin else "checkpoint"
    registering = [] if twin else [f"import {own}" for own in imports]
    lines = [*registering, "import torch", module]
    if packed and not takes_file:
        lines.append("from safetensors.torch import load_file")
    if takes_file:
        lines += ["", f"network = {make}, {given}={name})"]
    else:
        lines += ["", f"network = {make})", f"network.load_state_dict({load})"]
    statistics = [chosen.preprocessing["mean"], chosen.preprocessing["std"]]
    lines.append(f"mean, std = torch.tensor({statistics}).view(2, 3, 1, 1)")
    return _block([*lines, images, "logits = network.eval()((images / 255 - mean) / std)"])


def _maker(spec: str, classes: int, twin: Twin | None) -> tuple[str, str]:
    """An import, and the call that makes the network, without its end."""
    if twin is None:
        return "from kdfuse.engine.models import create", f'create("{spec}", {classes}'
    if twin.library == "torchvision":
        made = f'torchvision.models.get_model("{twin.name}", num_classes={classes}'
        return "import torchvision", made
    options = "".join(f', {key}="{value}"' for key, value in twin.options.items())
    made = f'timm.create_model("{twin.name}", num_classes={classes}{options}'
    return "import timm", made


def _block(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
