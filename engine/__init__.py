"""Training: `Recipe.load` reads a recipe and `train` runs it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe.load import Recipe
    from .training.start import train

__all__ = ["Recipe", "train"]


def __getattr__(name: str) -> Any:
    # On first use: torchvision and DALI take seconds, and the command line should answer at once.
    if name == "Recipe":
        from .recipe.load import Recipe

        return Recipe
    if name == "train":
        from .training.start import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
