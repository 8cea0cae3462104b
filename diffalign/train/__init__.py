"""Training: the loop and what makes it reliable. Knows protocols, never a concrete model, method or data set."""

from .feed import Source
from .guard import Preempted, TrainingError
from .hooks import Hook
from .launch import make_accelerator
from .sharding import is_asked as is_sharding_asked
from .spec import TrainSpec
from .state import Finding, RunState, Summary
from .trainer import Bank, Monitor, fit

__all__ = ["Bank", "Finding", "Hook", "Monitor", "Preempted", "RunState", "Source", "Summary", "TrainSpec", "TrainingError",
           "fit", "is_sharding_asked", "make_accelerator"]
