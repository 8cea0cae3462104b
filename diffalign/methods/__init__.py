"""Methods: what the training loop runs."""

from .base import Context, Method
from .preference import Preference
from .probe import Probe

__all__ = ["Context", "Method", "Preference", "Probe"]
