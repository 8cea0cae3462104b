"""Likelihood estimators, their weightings, and scores in their place."""

from .denoising import DenoisingELBO, implied_nats
from .scores import LatentScores
from .transitions import Transitions
from .weighting import ELBO, HighNoise, MinSNR, Simple, Weighting

Likelihood = DenoisingELBO | Transitions | LatentScores
ESTIMATORS = {"denoising": DenoisingELBO, "transitions": Transitions, "latent_reward": LatentScores}
WEIGHTINGS = {"simple": Simple, "elbo": ELBO, "min_snr": MinSNR, "high_noise": HighNoise}

__all__ = ["ELBO", "ESTIMATORS", "WEIGHTINGS", "DenoisingELBO", "HighNoise", "LatentScores", "Likelihood", "MinSNR", "Simple",
           "Transitions", "Weighting", "implied_nats"]
