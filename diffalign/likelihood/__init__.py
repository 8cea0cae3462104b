"""Likelihood estimators and their weightings."""

from .denoising import DenoisingELBO, implied_nats
from .weighting import ELBO, HighNoise, MinSNR, Simple, Weighting

ESTIMATORS = {"denoising": DenoisingELBO}
WEIGHTINGS = {"simple": Simple, "elbo": ELBO, "min_snr": MinSNR, "high_noise": HighNoise}

__all__ = ["ELBO", "ESTIMATORS", "WEIGHTINGS", "DenoisingELBO", "HighNoise", "MinSNR", "Simple", "Weighting", "implied_nats"]
