"""Rewards that ``diffalign train-reward`` trained: a folder with config.json and model.safetensors, on a CLIP backbone.

config.json names the backbone (with the hash of its weights), the head and its options, and the users of a pluralistic head.
model.safetensors holds the head ("head.*") and, where the features were trained, the trained layers whole ("backbone.*"): LoRA
matrices merged into them, so that the mean of two such files is the mean of two rewards' weights (WARM).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError, ResourceError
from ..models.folder import read_json
from ..models.load import loading
from .average import CONFIG, WEIGHTS, save_weights
from .backbone import Backbone, check_backbone, load_backbone
from .heads import BradleyTerry, Head
from .pal import PalAngle, PalDistance, fit_user
from .preprocess import score_batches
from .step_aware import TimeConditioning
from .towers import ClipSource, distinct_features
from .weights import on_device, sha256, shapes, tensors

FORMAT = 1
HEADS: dict[str, type] = {"bradley_terry": BradleyTerry, "pal_angle": PalAngle, "pal_distance": PalDistance}


@dataclass(frozen=True, kw_only=True)
class TrainedHead:
    """A loaded reward: its backbone, its head and the row of each user."""

    backbone: Backbone
    head: nn.Module
    users: dict[str, int]

    def rows(self, users: Sequence[str | None]) -> Tensor:
        """[N] int64: each user's row, -1 for one that training did not see."""
        found = [self.users.get(str(user), -1) if user is not None else -1 for user in users]
        return torch.tensor(found, dtype=torch.int64, device=self.backbone.device)


@dataclass(frozen=True, kw_only=True)
class _Learned:
    """path: the folder. backbone: where its CLIP lies here, where that is another place than the one it was trained with; its
    weights must be the same. device: None is CUDA where there is one.
    """

    path: str
    backbone: str | None = None
    batch_size: int = 16
    device: str | None = None

    def __post_init__(self):
        if not self.path.strip():
            raise ValueError("path must name the folder of a trained reward, got nothing")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    differentiable = True
    step_aware = False

    def check(self) -> None:
        """Raises ModelError unless the folder is whole and its backbone is the one it was trained on; nothing is loaded."""
        source, facts = self._source, self._facts
        if self.step_aware != facts.get("step_aware", False):
            kind = "learned" if self.step_aware else "step_aware"
            raise ModelError(f"{self.path}: is {'no' if self.step_aware else 'a'} reward that reads the noise level; read it "
                             f"with the reward kind {kind}")
        check_backbone(source)
        if facts["backbone_sha256"] != sha256(source.files):
            raise ModelError(f"{self.path}: was trained on other weights than those of {source.model}; give the right CLIP "
                             "with the option backbone")
        _check_head(self._head_options, facts, shapes([Path(self.path) / WEIGHTS]), source.width, self.path)

    def identity(self) -> dict[str, Any]:
        """JSON-ready: hashes of the head and of its backbone, and the scale."""
        return {"sha256": sha256([Path(self.path) / WEIGHTS]), "backbone": self._source.model,
                "backbone_sha256": self._facts["backbone_sha256"], "head": self._facts["head"], "scale": "log odds"}

    @cached_property
    def _facts(self) -> dict:
        return read_facts(Path(self.path))

    @cached_property
    def _head_options(self) -> Head:
        return head_of(self._facts, self.path)

    @cached_property
    def _source(self) -> ClipSource:
        if self.backbone is not None:
            return ClipSource(model=self.backbone)
        return ClipSource(model=self._facts["backbone"], revision=self._facts.get("backbone_revision"))

    @cached_property
    def trained(self) -> TrainedHead:
        """Everything, loaded, float32, frozen."""
        self.check()
        file = Path(self.path) / WEIGHTS
        backbone = load_backbone(self._source, on_device(self.device), tensors(file, "backbone."), step_aware=self.step_aware)
        users = self._facts["users"]
        head = self._head_options.make(backbone.width, 0.0, users)
        with loading(self.path):
            head.load_state_dict(tensors(file, "head."))
            if backbone.time is not None:
                backbone.time.load_state_dict(tensors(file, "time."))
        head = head.to(backbone.device).eval().requires_grad_(False)
        return TrainedHead(backbone=backbone, head=head, users={user: row for row, user in enumerate(users)})

    def _score(self, images: Any, prompts: Sequence[str], weights: Tensor | None, levels: Sequence[float] = ()) -> Tensor:
        """weights [N, K] of the pictures' users, or None. levels: N, of a step-aware reward."""
        trained, backbone = self.trained, self.trained.backbone
        texts = distinct_features(backbone.texts, prompts, self.batch_size)

        def score(pictures: Tensor, rows: Sequence[tuple[str, Tensor | None, float | None]]) -> Tensor:
            text = torch.stack([texts[prompt] for prompt, _, _ in rows])
            user = None if weights is None else torch.stack([weight for _, weight, _ in rows])
            t = torch.tensor([level for _, _, level in rows]) if levels else None
            return trained.head(backbone.images(pictures, t), text, user)

        each = [None] * len(prompts) if weights is None else list(weights)
        rows = list(zip(prompts, each, levels or [None] * len(prompts), strict=True))
        return score_batches(score, backbone.preprocess, list(images), rows, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Learned(_Learned):
    """A Bradley-Terry reward trained on preferences, in log odds: sigmoid(a - b) is the probability that a is preferred.

    Only scores of the same prompt are comparable: training never sets one prompt's level against another's.
    """

    name = "learned"

    def __call__(self, images: Any, prompts: Sequence[str]) -> Tensor:
        """[N] float32, NaN where a picture cannot be decoded, with gradient to float tensors that ask for it."""
        return self._score(images, prompts, None)

    @cached_property
    def _head_options(self) -> Head:
        found = head_of(self._facts, self.path)
        if found.pluralistic:
            raise ModelError(f"{self.path}: is a pluralistic reward; read it with the reward kind pal")
        return found


@dataclass(frozen=True, kw_only=True)
class StepAware(Learned):
    """SPO's judge (arXiv 2406.04314): a Bradley-Terry reward of the picture that a denoiser predicts at the level ``t``.

    ``train-reward`` makes one where the recipe has ``steps``. In a rollout (``source.judge.kind=predicted_image``) the level
    is the child's own; elsewhere it is a column.
    """

    step_aware = True
    columns = ("t",)
    name = "step_aware"

    def __call__(self, images: Any, prompts: Sequence[str], t: Sequence[float] = ()) -> Tensor:
        """[N] float32 in log odds. t: N noise levels in (0, 1]."""
        if len(t) != len(prompts):
            raise ValueError(f"{len(t)} noise levels for {len(prompts)} prompts: pass one a picture")
        return self._score(images, prompts, None, list(t))


@dataclass(frozen=True, kw_only=True)
class Pal(_Learned):
    """A pluralistic reward (arXiv 2406.08469): one user's taste, a given mixture, each row's own user, or everybody's mean.

    user: one that training saw. weights: K numbers that sum to 1, as ``fit_user`` finds them for a new user. by_row: read each
    picture's user from the column "user"; a user that training did not see gets the mean. None of them: the mean.
    """

    user: str | None = None
    weights: tuple[float, ...] = ()
    by_row: bool = False
    name = "pal"

    def __post_init__(self):
        super().__post_init__()
        if (self.user is not None) + bool(self.weights) + self.by_row > 1:
            raise ValueError("user, weights and by_row exclude each other; give one of them, or none for the users' mean")
        if self.weights and (min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-4):
            raise ValueError(f"weights must be at least 0 and sum to 1, got {list(self.weights)}")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("user",) if self.by_row else ()

    def __call__(self, images: Any, prompts: Sequence[str], user: Sequence[str | None] = ()) -> Tensor:
        """[N] float32. user: with ``by_row`` the N users' names, None for nobody in particular."""
        if self.by_row and len(user) != len(prompts):
            raise ValueError(f"{len(user)} users for {len(prompts)} prompts: pass one user per picture")
        return self._score(images, prompts, self._weights(len(prompts), user))

    def fit_user(self, first: Sequence[Any], second: Sequence[Any], prompts: Sequence[str],
                 target: Sequence[float]) -> tuple[float, ...]:
        """A new user's ``weights``, K numbers, from a few pairs of pictures; target: 1 where the first is preferred, 0 where
        the second is, 0.5 for a tie. Nothing else of the reward changes.
        """
        backbone = self.trained.backbone
        sides = [backbone.images(torch.stack([backbone.preprocess(image) for image in side])) for side in (first, second)]
        labels = torch.tensor(list(target), dtype=torch.float32, device=backbone.device)
        found = fit_user(self.trained.head, *sides, backbone.texts(list(prompts)), labels, loss=self._head_options.loss)
        return tuple(found.tolist())

    def check(self) -> None:
        super().check()
        if self.user is not None and self.user not in self._facts["users"]:
            raise ConfigError(f"user: {self.path} has not seen {self.user!r}; it knows {len(self._facts['users'])} users. "
                              "fit_user finds the weights of a new one")
        if self.weights and len(self.weights) != self._head_options.prototypes:
            raise ConfigError(f"weights: {self.path} has {self._head_options.prototypes} prototypes, got {len(self.weights)} "
                              "weights")

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "user": self.user, "weights": list(self.weights), "by_row": self.by_row}

    def _weights(self, count: int, users: Sequence[str | None]) -> Tensor:
        """[N, K]."""
        head, trained = self.trained.head, self.trained
        if self.weights:
            return torch.tensor(self.weights, device=trained.backbone.device).expand(count, -1)
        return head.user_weights(trained.rows(users if self.by_row else [self.user] * count))

    @cached_property
    def _head_options(self) -> Head:
        found = head_of(self._facts, self.path)
        if not found.pluralistic:
            raise ModelError(f"{self.path}: is a reward of one taste; read it with the reward kind learned")
        return found


def save_reward(folder: Path, *, head: Head, module: nn.Module, changed: dict[str, Tensor], users: Sequence[str],
                source: ClipSource, init: str, time: TimeConditioning | None = None) -> None:
    """config.json and model.safetensors, each whole or absent. changed: trained layers by the CLIPModel's names. init: hash of
    all weights before the first step, which averaging compares. time: of a step-aware reward. Raises ResourceError.
    """
    weights = {f"head.{name}": value for name, value in module.state_dict().items()}
    weights |= {f"backbone.{name}": value for name, value in changed.items()}
    weights |= {} if time is None else {f"time.{name}": value for name, value in time.state_dict().items()}
    save_weights(weights, folder / WEIGHTS, {"init": init})  # one key: their order is not kept
    facts = {"format": FORMAT, "backbone": source.model, "backbone_revision": source.revision,
             "backbone_sha256": sha256(source.files), "head": {"kind": kind_of(head), **asdict(head)}, "users": list(users),
             "step_aware": time is not None}
    aside = folder / f".{CONFIG}.tmp"
    try:
        aside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(folder / CONFIG)
    except OSError as error:
        raise ResourceError(f"cannot write {folder / CONFIG}: {error.strerror or error}") from None


def kind_of(head: Head) -> str:
    return next(kind for kind, cls in HEADS.items() if type(head) is cls)


def read_facts(folder: Path) -> dict:
    """config.json of a trained reward. Raises ModelError for anything else."""
    if not folder.is_dir():
        raise ModelError(f"path: there is no folder {folder}; diffalign train-reward writes one")
    facts = read_json(folder / CONFIG, str(folder))
    if facts.get("format") != FORMAT:
        raise ModelError(f"{folder}: config.json is of format {facts.get('format')!r}, this version reads {FORMAT}")
    kinds = {"backbone": str, "backbone_sha256": str, "head": dict, "users": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    if wrong or not all(isinstance(user, str) for user in facts["users"]):
        raise ModelError(f"{folder}: config.json has no valid {(wrong or ['users'])[0]}, so it is no trained reward")
    return facts


def head_of(facts: dict, where: str) -> Head:
    options = dict(facts["head"])
    kind = options.pop("kind", None)
    if kind not in HEADS:
        raise ModelError(f"{where}: config.json names a head {kind!r}; known are {', '.join(HEADS)}")
    try:
        return HEADS[kind](**options)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: config.json has a head that cannot be made ({error})") from None


def _check_head(head: Head, facts: dict, found: dict[str, tuple], width: int, where: str) -> None:
    """Names and shapes of the head's tensors, from the file's header."""
    with torch.device("meta"):
        wanted = head.make(width, 0.0, facts["users"]).state_dict()
    own = {name.removeprefix("head."): shape for name, shape in found.items() if name.startswith("head.")}
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    different = sorted(name for name in own.keys() | expected.keys() if own.get(name) != expected.get(name))
    if different:
        raise ModelError(f"{where}: {WEIGHTS} does not fit config.json: {different[0]} is {own.get(different[0])}, expected "
                         f"{expected.get(different[0])}")
