"""Pictures from stock pipelines, and grids to look at them."""

from .generate import generate, picture_seed
from .grid import grid, save_grid

__all__ = ["generate", "grid", "picture_seed", "save_grid"]
