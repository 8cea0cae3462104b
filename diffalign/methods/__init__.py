"""Methods: what the training loop runs."""

from .base import Context, Method
from .preference import Preference

__all__ = ["Context", "Method", "Preference"]
