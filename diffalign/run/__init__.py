"""A recipe in, files out: what the command line does, one file a command. Each returns what it found as a plain dict."""

from .arena import arena
from .build import build
from .evaluate import evaluate, grid
from .plan import plan
from .prepare import check, encode
from .prompts import prompts
from .rich import rich
from .score import score
from .train import train
from .train_reward import train_reward
from .words import LORA_FILE

__all__ = ["LORA_FILE", "arena", "build", "check", "encode", "evaluate", "grid", "plan", "prompts", "rich", "score", "train",
           "train_reward"]
