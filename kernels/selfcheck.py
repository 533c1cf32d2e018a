"""Whether a device computes what the reference does: a few rows of every loss, compared there."""

import torch
from torch import Tensor

from .bench.peers import CASES, Case

SHAPES = ((9, 1000), (5, 1001), (3, 21841))  # rows of a warp, odd ones, long ones
# USKD's ranks are steps: sums that are rounded apart may put two classes the other way round.
LOOSE = {"uskd+ce": 1e-2}


def gradients(case: Case, xs: list[Tensor], backend: str) -> list[Tensor]:
    assert case.fused is not None
    loss = case.fused(*xs, backend=backend)
    assert isinstance(loss, Tensor)
    return [loss.detach(), *torch.autograd.grad(loss, xs[: case.trained])]


def difference(case: Case, rows: int, classes: int, backend: str, device: str) -> float:
    """The largest difference of loss and gradients from the reference's, over their largest."""
    xs = case.arguments(rows, classes, torch.float32, device)
    pairs = zip(gradients(case, xs, backend), gradients(case, xs, "reference"), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def disagreements(backend: str, device: str) -> list[str]:
    """One line a loss and shape at which `backend` differs from the reference, or cannot run."""
    found = []
    for name, case in CASES.items():
        if case.fused is None:
            continue
        for rows, classes in SHAPES:
            if name == "uskd+ce" and classes > 4096:  # longer than it sorts
                continue
            try:
                apart = difference(case, rows, classes, backend, device)
            except RuntimeError as error:
                found.append(f"{name} ({rows}, {classes}): {error}")
                continue
            if not apart <= LOOSE.get(name, 1e-4):
                found.append(f"{name} ({rows}, {classes}): apart by {apart:.1e}")
    return found
