"""Where a loader decodes and resizes, and why: what `data.decode` comes to on this machine."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ...recipe.data import DECODED_BY, Data

Mode = Literal["cpu", "hybrid", "gpu"]
MEANS: dict[str, dict[Mode, str]] = {  # by loader
    "dali": {
        "cpu": "DALI on the CPU, the crop alone",
        "hybrid": "DALI on the CPU, the crop alone, resized on the GPU",
        "gpu": "DALI on the GPU, the crop alone",
    },
    "torchvision": {
        "cpu": "PIL, whole image",
        "gpu": "nvJPEG on the GPU, whole image, resized there; what it does not take, PIL",
    },
    "resident": {"cpu": "PIL once, whole image"},
    "items": {"cpu": "the data set's own tensors"},
}


class Decoding(NamedTuple):
    """A mode of a loader, and a few words on what it does and who chose it."""

    mode: Mode
    text: str


def decoding(data: Data, kind: str, device: torch.device) -> Decoding:
    """What `data.decode` is for loader `kind` in a run on `device`.

    "auto" is cpu: without a GPU there is no other, and with one the others are not measured.
    """
    means = MEANS[kind]
    if data.decode != "auto":
        return Decoding(data.decode, f"{means[data.decode]} (data.decode={data.decode})")
    others = [mode for mode in means if mode != "cpu"]
    if not others:
        why = f"loader {kind} is on the CPU"
    elif device.type != "cuda":
        why = "the run is on the CPU"
    else:
        why = f"{' and '.join(others)} {'are' if len(others) > 1 else 'is'} not measured yet"
    return Decoding("cpu", f"{means['cpu']} (data.decode=auto: {why})")


def check_loader(data: Data, kind: str, device: torch.device) -> None:
    """ValueError where loader `kind`, which data.loader is here, cannot decode as asked."""
    if data.decode in ("auto", "cpu"):
        return
    loaders = DECODED_BY[data.decode]
    if kind not in loaders:
        is_kind = f"{data.loader} is {kind} here" if data.loader == "auto" else kind
        raise ValueError(
            f"data.decode={data.decode} is done by loader {' or '.join(loaders)}, and data.loader="
            f"{is_kind}; set data.loader={' or '.join(loaders)} (DALI: pip install "
            "nvidia-dali-cuda130), or data.decode=auto"
        )
    if device.type != "cuda":
        raise ValueError(
            f"data.decode={data.decode} works on a CUDA device and this run is on the CPU; set "
            "data.decode=auto or cpu, or run.device=cuda on a machine with a GPU"
        )
    if kind == "torchvision":
        unused = data.unused("loader torchvision", "data", "hw_decoder_load")
        if unused:  # with loader auto, which the recipe cannot know
            raise ValueError(unused[0])
