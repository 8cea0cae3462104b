"""Likelihood estimators and their weightings."""

from .denoising import DenoisingELBO, implied_nats
from .weighting import ELBO, MinSNR, Simple, Weighting

ESTIMATORS = {"denoising": DenoisingELBO}
WEIGHTINGS = {"simple": Simple, "elbo": ELBO, "min_snr": MinSNR}

__all__ = ["ELBO", "ESTIMATORS", "WEIGHTINGS", "DenoisingELBO", "MinSNR", "Simple", "Weighting", "implied_nats"]
