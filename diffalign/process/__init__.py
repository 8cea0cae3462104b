"""Forward processes, parameterizations, times and noise plans."""

from .gaussian import Process, RectifiedFlow, VariancePreserving
from .noise import Independent, NoisePlan, Shared
from .parameterization import X0, Eps, Parameterization, V, Velocity
from .times import Discrete, LogitNormal, Times, Uniform

NOISES = {"shared": Shared, "independent": Independent}
TIMES = {"uniform": Uniform, "logit_normal": LogitNormal, "discrete": Discrete}

__all__ = ["NOISES", "TIMES", "Discrete", "Eps", "Independent", "LogitNormal", "NoisePlan", "Parameterization", "Process",
           "RectifiedFlow", "Shared", "Times", "Uniform", "V", "VariancePreserving", "Velocity", "X0"]
