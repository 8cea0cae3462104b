"""Likelihood estimators, their weightings, and scores in their place."""

from .codes import CodeLikelihood
from .denoising import DenoisingELBO, implied_nats
from .masked import MaskedELBO
from .scores import LatentScores
from .transitions import Transitions
from .weighting import ELBO, HighNoise, MinSNR, Simple, Weighting

Likelihood = DenoisingELBO | Transitions | LatentScores | MaskedELBO | CodeLikelihood
ESTIMATORS = {"denoising": DenoisingELBO, "transitions": Transitions, "latent_reward": LatentScores,
              "masked": MaskedELBO, "codes": CodeLikelihood}
WEIGHTINGS = {"simple": Simple, "elbo": ELBO, "min_snr": MinSNR, "high_noise": HighNoise}

__all__ = ["ELBO", "ESTIMATORS", "WEIGHTINGS", "CodeLikelihood", "DenoisingELBO", "HighNoise", "LatentScores", "Likelihood",
           "MaskedELBO", "MinSNR", "Simple", "Transitions", "Weighting", "implied_nats"]
