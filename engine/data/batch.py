"""The one thing that a loader hands to the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one step with their labels and their names.

    Evaluation pads its last batch to the constant size by repeating the first image of the set:
    rows at `valid` and beyond do not count. `valid` may be 0 on the last ranks of the last step.
    """

    images: Tensor  # (B, 3, H, W) uint8, stored channels last; on the CPU or the run's GPU
    target: Tensor  # (B,) int64
    index: Tensor  # (B,) int64, row of the manifest
    valid: int
    answers: tuple[Tensor, ...] = ()  # of a recorded teacher, each with a row for each image
