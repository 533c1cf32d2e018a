"""Training: `Recipe.load` reads a recipe and `train` runs it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe.load import Recipe
    from .training.start import train
    from .training.stop import Stopped

__all__ = ["Recipe", "Stopped", "train"]


def __getattr__(name: str) -> Any:
    # On first use: torchvision and DALI take seconds, and the command line should answer at once.
    if name == "Recipe":
        from .recipe.load import Recipe

        return Recipe
    if name == "train":
        from .training.start import train

        return train
    if name == "Stopped":
        from .training.stop import Stopped

        return Stopped
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
