"""Tap points of networks whose stem and stages end in a ReLU."""

from __future__ import annotations


def relu_points(stem: str, *stages: str) -> dict[str, str]:
    """Outputs ("stem", "stage1", ...) and inputs ("stem.pre", ...) of the ReLUs at these paths."""
    names = ["stem", *(f"stage{i}" for i in range(1, len(stages) + 1))]
    points = {}
    for name, path in zip(names, (stem, *stages), strict=True):
        points[name] = path
        points[f"{name}.pre"] = f"{path}:in"
    return points
