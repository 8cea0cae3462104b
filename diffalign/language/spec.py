"""What a recipe says about prompt rewriters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..building.spec import LARGEST, Drawer, check_names
from ..rewards import Reward
from .propose import OwnWords, Proposer
from .rewriter import Rewriter
from .select import Pairs, Score

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's losses that read label_smoothing; the others take no notice


def _positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value <= LARGEST:
            raise ValueError(f"{name} must be above 0 and at most {LARGEST:,}, got {value}")


@dataclass(frozen=True, kw_only=True)
class EvolveSpec:
    """Reward-guided evolution of prompts. proposer: what writes new ones. prompts: how many of the recipe's, from the
    front; the later ones are DPO's. rounds: at most. proposals: new texts a round. parents: the best so far that the
    proposer is shown. score: how several rewards become one number, and what a text must reach to be learned.
    """

    prompts: int
    proposer: Proposer = OwnWords()
    rounds: int = 4
    proposals: int = 3
    parents: int = 3
    score: Score = Score()

    def __post_init__(self):
        _positive(self, "prompts", "rounds", "proposals")
        if self.parents < 0:
            raise ValueError(f"parents must not be negative, got {self.parents}")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank updates by PEFT. alpha: null takes the rank. target_modules: layers whose names end so."""

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self):
        _positive(self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What TRL's trainers are told. batch_size: rows a device and forward pass. warmup: share of the steps. max_length: tokens
    of prompt and answer, beyond which a row is cut. checkpointing_steps: a killed run goes on from the last one.
    """

    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch_size: int = 4
    gradient_accumulation_steps: int = 8
    warmup: float = 0.1
    lr_scheduler: str = "linear"
    max_length: int = 1024
    lora: Lora = Lora()
    gradient_checkpointing: bool = False
    precision: Literal["no", "bf16"] = "no"
    checkpointing_steps: int = 100
    logging_steps: int = 10

    def __post_init__(self):
        _positive(self, "epochs", "learning_rate", "batch_size", "gradient_accumulation_steps", "max_length",
                  "checkpointing_steps", "logging_steps")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be at least 0 and below 1, got {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class DpoSpec(Tuning):
    """rounds of: the rewriter's own candidates, drawn and scored, as pairs; then DPO with the last model as reference.

    candidates: sampled a prompt. pairs: which of them are compared. beta, loss_type, loss_weights: TRL's; several losses are
    added, such as [sigmoid, bco_pair, sft] by [0.8, 0.2, 1.0] (mixed preference optimisation, arXiv 2411.10442).
    label_smoothing: share of wrong labels, for robust, exo_pair and AOT; sigmoid would ignore it, so there is no cDPO.
    """

    rounds: int = 2
    candidates: int = 5
    pairs: Pairs = Pairs()
    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "candidates", "beta")
        if self.rounds < 0:
            raise ValueError(f"rounds must not be negative, got {self.rounds}")
        if self.candidates < 2:
            raise ValueError("candidates must be at least 2: one has nothing to be compared with")
        if not self.loss_type or self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights must be as many as loss_type: {len(self.loss_type)}")
        if self.label_smoothing and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(f"label_smoothing is ignored by TRL's {', '.join(self.loss_type)}; set it to 0, or take one of "
                             f"{', '.join(SMOOTHED)}")


@dataclass(frozen=True, kw_only=True)
class GrpoSpec(Tuning):
    """Online tuning by a reward. generations: answers to a prompt that are compared; batch_size *
    gradient_accumulation_steps * processes is a multiple of it. beta: weight of the KL to the reference (TRL's default, none).
    """

    generations: int = 8
    beta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.generations < 2:
            raise ValueError("generations must be at least 2: one has nothing to be compared with")
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")


@dataclass(frozen=True, kw_only=True)
class MeasureSpec:
    """Rewritten prompts against the users' own, with the same seeds: prompts nobody learned from, and a judge that no
    choice was made by. seeds: pictures a prompt.
    """

    prompts: str
    judge: Reward
    seeds: int = 1
    max_prompts: int | None = None

    def __post_init__(self):
        _positive(self, "seeds", "max_prompts")


@dataclass(frozen=True, kw_only=True)
class RewriterSpec:
    """A prompt rewriter: evolve a pool, train on it, rewrite.

    rewriter: the language model to begin with. generator: the frozen pipeline it writes for. rewards: what scores the
    pictures, by name, always against what the user asked for. prompts: users' prompts, the first ``evolve.prompts`` for the
    pool and SFT, all others for DPO; a column ``meaning`` says what the pictures are scored against where the prompt itself
    cannot be. seeds: pictures a text, the same seeds for all texts of a prompt, whose mean score counts. inputs: what
    ``prompts rewrite`` rewrites. overwrite: what was begun with another recipe is removed. cpu: leave the GPU alone.
    """

    output_dir: str
    rewriter: Rewriter
    generator: Drawer
    rewards: dict[str, Reward]
    prompts: str
    evolve: EvolveSpec
    sft: Tuning = Tuning()
    dpo: DpoSpec = DpoSpec()
    seed: int = 0
    seeds: int = 1
    inputs: str | None = None
    measure: MeasureSpec | None = None
    overwrite: bool = False
    cpu: bool = False

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty; give a folder for the rewriter's files")
        check_names("rewards", self.rewards, "reward")
        _positive(self, "seeds")
        for where, names in (("evolve.score", self.evolve.score.names), ("dpo.pairs.score", self.dpo.pairs.score.names)):
            lost = sorted(names - self.rewards.keys())
            if lost:
                raise ValueError(f"{where} names the reward '{lost[0]}', which is not among rewards: "
                                 f"{', '.join(self.rewards)}")
