"""Where a loader decodes and resizes, and why: what `data.decode` comes to on this machine."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ...recipe.data import Data

Mode = Literal["cpu", "hybrid", "gpu"]
MEANS: dict[Mode, str] = {
    "cpu": "DALI on the CPU, the crop alone",
    "hybrid": "DALI on the CPU, the crop alone, resized on the GPU",
    "gpu": "DALI on the GPU, the crop alone",
}


class Decoding(NamedTuple):
    """A mode of loader dali, and a few words on what it does and who chose it."""

    mode: Mode
    text: str


def decoding(data: Data, device: torch.device) -> Decoding:
    """What `data.decode` is for loader dali in a run on `device`.

    "auto" is cpu: without a GPU there is no other, and with one the others are not measured.
    ValueError for hybrid or gpu without a CUDA device.
    """
    there = device.type == "cuda"
    if data.decode == "auto":
        why = "hybrid and gpu are not measured yet" if there else "the run is on the CPU"
        return Decoding("cpu", f"{MEANS['cpu']} (data.decode=auto: {why})")
    if data.decode != "cpu" and not there:
        raise ValueError(
            f"data.decode={data.decode} works on a CUDA device and this run is on the CPU; set "
            "data.decode=auto or cpu, or run.device=cuda on a machine with a GPU"
        )
    return Decoding(data.decode, f"{MEANS[data.decode]} (data.decode={data.decode})")


def without_dali(data: Data, kind: str) -> str:
    """Why a loader that knows the CPU alone decodes there, to stand behind what it does."""
    if data.decode == "cpu":
        return "(data.decode=cpu)"
    return f"(data.decode=auto: loader {kind} is on the CPU)"


def check_loader(data: Data, kind: str) -> None:
    """ValueError where loader `kind`, which data.loader is here, cannot decode as asked."""
    if data.decode in ("hybrid", "gpu") and kind != "dali":
        is_kind = f"{data.loader} is {kind} here" if data.loader == "auto" else kind
        raise ValueError(
            f"data.decode={data.decode} is done by loader dali, and data.loader={is_kind}; install "
            "NVIDIA DALI (pip install nvidia-dali-cuda130) with data.loader=dali, or set "
            "data.decode=auto"
        )
