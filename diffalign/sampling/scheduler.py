"""The stepper that pictures are drawn with, by its diffusers class name.

A few-step model needs the sampler and the timesteps that it was distilled for: re-noising (``LCMScheduler``) or
``EulerAncestralDiscreteScheduler`` at 999, 749, 499, 249, say, where the pipeline's own takes its four elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from .. import _compat  # noqa: F401  (before diffusers)
from ..errors import ConfigError

STEP = {"self", "model_output", "timestep", "sample"}  # what every pipeline hands to a scheduler's step


def make_scheduler(config: Mapping[str, Any], name: str | None = None, spacing: str | None = None,
                   num_inference_steps: int | None = None):
    """A diffusers scheduler for the noise schedule of ``config`` (a scheduler_config.json).

    name: class name in diffusers; None keeps the config's. spacing: "trailing" puts n steps at T-1, T-1-T/n, ..., which begins
    in pure noise and is what few-step models are distilled for; "leading" and "linspace" are diffusers' others; None keeps the
    scheduler's own. num_inference_steps: tried out where given.

    Raises ConfigError: an unknown name, one for another kind of model, a spacing or a number of steps it does not know.
    """
    own = config.get("_class_name", "DDPMScheduler")
    kind = _kind(_class(own))
    cls = _class(name or own, kind)
    if _kind(cls) != kind:
        raise ConfigError(f"evaluate.scheduler: {cls.__name__} is not for this model, whose own is {own}")
    known = signature(cls.__init__).parameters
    if config.get("prediction_type", "epsilon") != "epsilon" and "prediction_type" not in known:
        raise ConfigError(f"evaluate.scheduler: {cls.__name__} knows no {config['prediction_type']}, as this model predicts")
    try:
        scheduler = cls.from_config(dict(config), **_spaced(cls, known, config, spacing))
        if num_inference_steps is not None:
            scheduler.set_timesteps(num_inference_steps)
    except (ValueError, TypeError, NotImplementedError, IndexError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"evaluate.scheduler: {cls.__name__} cannot be used so ({reason})") from error
    return scheduler


def _spaced(cls: type, known: Mapping[str, Parameter], config: Mapping[str, Any], spacing: str | None) -> dict[str, Any]:
    if spacing is None:
        return {}
    if "original_inference_steps" in known:
        # LCM and TCD ignore timestep_spacing: they thin out a trailing grid of so many steps, by default 50, whose rounding
        # gives 999, 759, 499, 259. A grid of all timesteps gives 999, 749, 499, 249.
        if spacing == "trailing":
            return {"original_inference_steps": config.get("num_train_timesteps", 1000)}
        raise ConfigError(f"evaluate.timestep_spacing: {cls.__name__} knows trailing only; leave it null for its own grid")
    if "timestep_spacing" not in known:
        raise ConfigError(f"evaluate.timestep_spacing: {cls.__name__} has no spacing to choose; leave it null")
    return {"timestep_spacing": spacing}


def _class(name: str, kind: str | None = None) -> type:
    """The scheduler class of that name; for an unknown name, the nearest of the same ``kind`` is told."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    names = [known for known in dir(diffusers) if known.endswith("Scheduler")]
    if name not in names:
        usable = {known.lower(): known for known in names if kind in (None, _kind(getattr(diffusers, known)))}
        near = difflib.get_close_matches(name.lower(), usable, n=1, cutoff=0.0)[0]
        raise ConfigError(f'evaluate.scheduler: diffusers has no scheduler "{name}". Did you mean "{usable[near]}"?')
    cls = getattr(diffusers, name)
    if not issubclass(cls, SchedulerMixin):  # diffusers puts a stand-in where a package is missing
        raise ConfigError(f"evaluate.scheduler: {name} needs a package that is not installed here")
    return cls


def _kind(cls: type) -> str:
    """Schedulers of one kind can stand in for one another in a stock text-to-image pipeline; "other" is for none."""
    if not all(callable(vars(cls).get(name)) for name in ("step", "set_timesteps")) or "Inverse" in cls.__name__:
        return "other"
    arguments = signature(cls.step).parameters.values()
    needed = {p.name for p in arguments if p.default is Parameter.empty and p.kind is not Parameter.VAR_KEYWORD}
    if needed - STEP:
        return "other"
    if "beta_start" in signature(cls.__init__).parameters:
        return "ddpm"
    return "flow" if cls.__name__.startswith("FlowMatch") else "other"
