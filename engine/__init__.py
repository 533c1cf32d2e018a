"""Training: `Recipe.load` reads a recipe and `train` runs it; `distill` takes objects instead,
`session` gives the parts to a loop of one's own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe.load import Recipe
    from .training.distill import distill
    from .training.session import session
    from .training.start import train
    from .training.stop import Stopped

__all__ = ["Recipe", "Stopped", "distill", "session", "train"]


def __getattr__(name: str) -> Any:
    # On first use: torchvision and DALI take seconds, and the command line should answer at once.
    if name == "Recipe":
        from .recipe.load import Recipe

        return Recipe
    if name == "distill":
        from .training.distill import distill

        return distill
    if name == "session":
        from .training.session import session

        return session
    if name == "train":
        from .training.start import train

        return train
    if name == "Stopped":
        from .training.stop import Stopped

        return Stopped
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
