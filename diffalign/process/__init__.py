"""Forward processes (Gaussian, masking; the delay of codec tokens), parameterizations, times, noise plans and solver steps."""

from .delay import Delay
from .gaussian import Process, RectifiedFlow, Trigonometric, VariancePreserving
from .masked import Masking
from .noise import CURRENT, Independent, Inverted, NoisePlan, ReNoised, Shared, candidate_keys, draw_keys
from .parameterization import X0, Eps, Parameterization, V, Velocity
from .sequences import Antithetic, LowDiscrepancy, Random, Sequence, Stratified
from .times import Discrete, Geometric, LogitNormal, Mixture, Times, Uniform

NOISES = {"shared": Shared, "independent": Independent, "inverted": Inverted, "renoised": ReNoised}
TIMES = {"uniform": Uniform, "logit_normal": LogitNormal, "mixture": Mixture, "geometric": Geometric, "discrete": Discrete}
SEQUENCES = {"random": Random, "stratified": Stratified, "antithetic": Antithetic, "low_discrepancy": LowDiscrepancy}

__all__ = ["CURRENT", "NOISES", "SEQUENCES", "TIMES", "Antithetic", "Delay", "Discrete", "Eps", "Geometric", "Independent",
           "Inverted", "LogitNormal", "LowDiscrepancy", "Masking", "Mixture", "NoisePlan", "Parameterization", "Process",
           "Random", "ReNoised", "RectifiedFlow", "Sequence", "Shared", "Stratified", "Times", "Trigonometric",
           "Uniform", "V", "VariancePreserving", "Velocity", "X0", "candidate_keys", "draw_keys"]
