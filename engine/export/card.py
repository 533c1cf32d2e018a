"""The model card beside an exported file: what it is, how good, how to use it, what made it.

Markdown behind a header that Hugging Face's hub reads. It is the same whenever it is written, and
names no folder of the machine.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from ... import __version__
from ..data.manifest import Manifest
from ..run.imports import imports_of
from .check import Checked
from .chosen import Chosen
from .formats import PROGRAMS
from .layouts import Twin
from .loading import loading

LICENCE = "not set: yours to choose, see Licence below"
# A path, whole or as the value of a word of trained_with, maybe of a name run:FOLDER.
PATH = re.compile(r"((?:[\w.]+=)?(?:run:)?)(/.*)")


def card_of(out: Path) -> Path:
    """Where the card of an exported file stands."""
    return out.with_name(f"{out.name}.md")


def card(
    chosen: Chosen, out: Path, twin: Twin | None, images: Manifest | None, checked: Checked | None
) -> str:
    """The card of the file `out`. `images` and `checked` are None where it was not run."""
    recipe = without_folders(chosen.past.recipe)
    spec = without_folders(chosen.spec.name)
    names = None if images is None else images.classes
    return "\n".join(
        [
            "---",
            f"license: unknown  # {LICENCE}",
            yaml.safe_dump(_header(chosen, out, twin, recipe, checked), sort_keys=False) + "---",
            f"\n# {recipe['name']}: {chosen.name}\n",
            _what(chosen, recipe, spec, out, twin),
            "\n## Accuracy\n",
            *_accuracy(chosen, checked),
            "\n## Images\n",
            *_images(chosen, out),
            "\n## Classes\n",
            _classes(chosen, names),
            "\n## Use\n",
            loading(chosen, spec, out, twin, list(imports_of(chosen.recipe))),
            "\n## Recipe\n",
            f"Seed {recipe['run']['seed']}, epochs {recipe['run']['epochs']}; of whole paths the "
            "last name is left:\n",
            f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```",
            "\n## Made with\n",
            *_versions(chosen, out),
            "\n## Licence\n",
            "kdfuse sets no licence for these weights. Whoever publishes them chooses one, in view "
            "of the terms of the training images and, where there was one, of the teacher.\n",
        ]
    )


def without_folders(value: Any) -> Any:
    """Plain values with absolute paths cut down to their last name."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    if isinstance(value, str) and (found := PATH.fullmatch(value)):
        return found[1] + PurePath(found[2]).name
    return value


def _header(
    chosen: Chosen, out: Path, twin: Twin | None, recipe: dict[str, Any], checked: Checked | None
) -> dict[str, Any]:
    data = recipe["data"]
    own = data["source"] not in ("folder", "tar")
    dataset = data["source"] if own else PurePath(data["root"]).name
    library = {".pt2": "pytorch", ".onnx": "onnx"}.get(out.suffix, "kdfuse")
    found: dict[str, Any] = {
        "library_name": twin.library if twin else library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "kdfuse"],
        "datasets": [dataset],
        "metrics": ["accuracy"],
    }
    top1 = chosen.evaluation.get(chosen.top1_key, checked and checked.top1)
    if top1 is not None:
        metric = {"type": "accuracy", "name": "top-1, percent", "value": round(top1, 4)}
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset, "split": "validation"},
            "metrics": [metric],
        }
        found["model-index"] = [{"name": recipe["name"], "results": [result]}]
    return found


def _what(chosen: Chosen, recipe: dict[str, Any], spec: str, out: Path, twin: Twin | None) -> str:
    text = f"{spec}, {chosen.classes} classes, trained with the method {recipe['method']['name']}"
    if recipe["teacher"]:
        text += f" from the teacher {recipe['teacher']['name']}"
        start = next(iter(chosen.past.of_kind("start")), {})
        if start.get("teacher_top1") is not None:
            text += f" (top-1 {start['teacher_top1']:.2f} on the same validation images)"
    if not chosen.alone:
        text += ", with what the method adds to the network that is kept"
    form = {".pt2": "a program of torch.export", ".onnx": "an ONNX model"}
    kind = form.get(out.suffix, f"weights under the names of {twin.library if twin else 'kdfuse'}")
    return f"{text}. The file `{out.name}` is {kind}."


def _accuracy(chosen: Chosen, checked: Checked | None) -> list[str]:
    past, key = chosen.past, chosen.top1_key
    lines = [f"Top-1, percent of the validation images of the run{_state(chosen)}:\n"]
    for name, record in (("last epoch", past.last), ("best epoch of the student", past.best)):
        if record is not None and key in record:
            lines.append(f"- {name} ({record['epoch']:g}): {record[key]:.2f}")
    here = chosen.evaluation.get(key)
    said = "not evaluated there" if here is None else f"{here:.2f}"
    lines.append(f"- these weights ({chosen.which}, step {chosen.facts['step']}): {said}")
    told = "it was not run on images" if checked is None else str(checked)
    return [*lines, f"- this file: {told}"]


def _state(chosen: Chosen) -> str:
    return "" if chosen.past.finished else f", which is {chosen.past.state}"


def _images(chosen: Chosen, out: Path) -> list[str]:
    facts, side = chosen.preprocessing, chosen.recipe.data.size
    first = (
        f"the short side is resized to {facts['resize']} pixels, then the centre of {side} x "
        f"{side} is cropped"
        if facts["resize"]
        else f"the whole image is resized to {side} x {side}"
    )
    norm = f"(pixels / 255 - mean) / std, mean {facts['mean']}, std {facts['std']}"
    last = (
        f"The file takes uint8 pixels (N, 3, {side}, {side}) of any N and normalises them: {norm}."
        if out.suffix in PROGRAMS
        else f"The network takes float32 (N, 3, {side}, {side}): {norm}."
    )
    return [f"RGB; {first} ({facts['interpolation']}).", last]


def _classes(chosen: Chosen, names: list[str] | None) -> str:
    if names is None:
        return f"{chosen.classes}; their names were not at hand."
    return f"In the order of the logits:\n\n```json\n{json.dumps(names)}\n```"


def _versions(chosen: Chosen, out: Path) -> list[str]:
    was = chosen.past.environment
    trained = {name: was.get(name) for name in ("kdfuse", "commit", "python", "torch")}
    trained |= was.get("packages") or {}
    here = {"kdfuse": __version__, "torch": torch.__version__}
    if out.suffix == ".onnx":
        here["onnx"] = version("onnx")
    return [f"- {what}: {_said(facts)}" for what, facts in (("run", trained), ("export", here))]


def _said(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value)
