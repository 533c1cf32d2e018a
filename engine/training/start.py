"""Training whatever a recipe is of."""

from __future__ import annotations

from pathlib import Path

from ..recipe.load import DetectionRecipe, Recipe


def train(
    recipe: Recipe | DetectionRecipe, out: str | Path | None = None, resume: bool = False
) -> Path:
    """Train a classifier or a detector, as `loop.train` or `detection.loop.train` does."""
    if isinstance(recipe, DetectionRecipe):
        from ..detection.loop import train as detect

        return detect(recipe, out, resume)
    from .loop import train as classify

    return classify(recipe, out, resume)
