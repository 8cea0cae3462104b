"""What the processes of ``ranks`` have imported before they are forked: the libraries of a run of the embedded model.

Each run ends with a collection of garbage, which would look through all of their million objects; frozen, they are skipped.
"""

import gc  # noqa: I001  (_compat before diffusers)

from diffalign import _compat, cli, config, run  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import scipy.optimize  # noqa: F401
import scipy.stats  # noqa: F401
from accelerate import Accelerator  # noqa: F401
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
from diffusers.optimization import get_scheduler  # noqa: F401
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

gc.freeze()
