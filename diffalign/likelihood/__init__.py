"""Likelihood estimators and their weightings."""

from .denoising import DenoisingELBO, implied_nats
from .transitions import Transitions
from .weighting import ELBO, HighNoise, MinSNR, Simple, Weighting

Likelihood = DenoisingELBO | Transitions
ESTIMATORS = {"denoising": DenoisingELBO, "transitions": Transitions}
WEIGHTINGS = {"simple": Simple, "elbo": ELBO, "min_snr": MinSNR, "high_noise": HighNoise}

__all__ = ["ELBO", "ESTIMATORS", "WEIGHTINGS", "DenoisingELBO", "HighNoise", "Likelihood", "MinSNR", "Simple", "Transitions",
           "Weighting", "implied_nats"]
