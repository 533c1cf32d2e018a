"""Training: `Recipe.load` reads a recipe and `train` runs it."""

from .recipe import Recipe
from .train import train

__all__ = ["Recipe", "train"]
