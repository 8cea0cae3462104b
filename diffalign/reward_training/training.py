"""Training a reward on preferences: features of a CLIP, a head, a pairwise loss. A plain loop, minutes long, no resume.

Every random choice is keyed (order of the pairs by epoch, the prompts set apart, the head's and the LoRA's start), so the same
recipe gives the same reward. The files appear at the end, each whole or absent.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import rng
from ..data.columns import Tally, has_validation, nothing_left
from ..data.spec import DataSpec
from ..errors import ConfigError, DataError, ModelError, ResourceError
from ..evaluate.files import clean, write_json
from ..models.load import encoder_facts
from ..rewards.backbone import Backbone, check_backbone, load_backbone
from ..rewards.base import Reward, check, judged, unlike
from ..rewards.heads import LOSSES
from ..rewards.learned import save_reward
from ..rewards.towers import ClipSource
from ..rewards.weights import on_device, sha256
from .accuracy import accuracy, calibration, ordered
from .pairs import Pairs, balanced, decoded, read_pairs, set_apart
from .predicted import Predicted
from .spec import RewardRecipe

Printer = Callable[[str], None]
FOLDER, REPORT = "reward", "reward.json"


def check_recipe(recipe: RewardRecipe) -> None:
    """Raises a UserError for what is wrong before anything is loaded or read."""
    on_device(recipe.device)
    check_backbone(_source(recipe))
    if recipe.steps is not None:
        encoder_facts(recipe.steps.model)
    for reward in recipe.compare:
        check(reward)
    if recipe.data.layout in ("prompts", "unpaired"):
        raise ConfigError(f"data.layout: '{recipe.data.layout}' compares no pictures; give pairs or ranked groups")
    if not has_validation(recipe.data):
        raise ConfigError("data.validation: a reward's accuracy is measured on pairs it has not seen; set data.validation to "
                          "a second data set, or data.validation_share to a share of the prompts")


def train_reward(recipe: RewardRecipe, printer: Printer = print) -> dict:
    """Train, measure, save; the contents of reward.json. Raises UserError for whatever the user can mend."""
    began = time.monotonic()
    check_recipe(recipe)
    torch.manual_seed(recipe.seed)
    source = _source(recipe)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.integer(recipe.seed, "reward_time"))
            backbone = load_backbone(source, on_device(recipe.device), step_aware=recipe.steps is not None)
        trainer = Trainer(recipe, backbone, printer)
        trainer.fit()
        report = trainer.report(seconds=time.monotonic() - began)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"not enough memory on {on_device(recipe.device)} ({str(error).splitlines()[0]}); lower "
                            "batch_size or encode_batch_size") from None
    folder = Path(recipe.output_dir) / FOLDER
    save_reward(folder, head=recipe.head, module=trainer.head, changed=trainer.changed(), users=trainer.users, source=source,
                init=trainer.init, time=backbone.time)
    write_json(folder / REPORT, report)
    printer(report["sentence"])
    return report


def _source(recipe: RewardRecipe) -> ClipSource:
    return ClipSource(model=recipe.backbone, revision=recipe.backbone_revision)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """loss: mean over the training pairs, nats. stop_loss, stop_accuracy: of the prompts set apart, None without them."""

    number: int
    loss: float
    stop_loss: float | None
    stop_accuracy: float | None


class Trainer:
    """One training. head: the module; epochs: what was seen; init: hash of all weights before the first step."""

    def __init__(self, recipe: RewardRecipe, backbone: Backbone, printer: Printer):
        self.recipe, self.backbone, self.printer = recipe, backbone, printer
        self.tally, self.held_tally = Tally(), Tally()
        pairs = read_pairs(recipe.data, self.tally, part="train", seed=recipe.seed)
        self.held = read_pairs(replace(recipe.data, ties="soft"), self.held_tally, part="validation", seed=recipe.seed)
        self.users = self._users(pairs)
        self.features = _features(recipe, backbone)
        pairs = self._readable(self.features.add("train", pairs, recipe, self.tally), pairs, "train")
        self.held = self._readable(self.features.add("held", self.held, recipe, self.held_tally), self.held, "validation")
        self.train, self.stop = set_apart(pairs, recipe.stop_share if recipe.patience else 0.0, recipe.seed)
        if not len(self.train):
            raise DataError(f"stop_share: {recipe.stop_share} leaves no pair to train on; lower it")
        if not (self.train.target != 0.5).any():
            raise DataError(f"{recipe.data.path}: every training pair is a tie, so there is nothing to learn")
        self.head = self._start()
        self.init = self._hash()
        self.lora = attach_lora(backbone, recipe) if recipe.features == "lora" else []
        if recipe.features == "whole":
            backbone.clip.requires_grad_(True)
        if backbone.time is not None:
            backbone.time.requires_grad_(True)
        self.epochs: list[Epoch] = []

    def fit(self) -> None:
        """All epochs, or until the loss on the prompts set apart stops falling; then the best epoch's weights."""
        recipe, optimizer = self.recipe, self._optimizer()
        steps = -(-len(self.train) // recipe.batch_size) * recipe.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, recipe.warmup_share))
        weights = torch.from_numpy(self._pair_weights()).float().to(self.backbone.device)
        best, best_loss, since = self._state(), float("inf"), 0
        for number in range(1, recipe.epochs + 1):
            loss = self._epoch(number, optimizer, schedule, weights)
            epoch = self._validate(number, loss)
            self.epochs.append(epoch)
            self.printer(_line(epoch, recipe.epochs))
            if epoch.stop_loss is None or epoch.stop_loss < best_loss:
                best, best_loss, since = self._state(), epoch.stop_loss if epoch.stop_loss is not None else loss, 0
            else:
                since += 1
            if recipe.patience and since >= recipe.patience:
                break
        self._restore(best)

    def margins(self, pairs: Pairs, part: str) -> np.ndarray:
        """Score of the first minus of the second picture, [P] float64, in log odds."""
        with torch.no_grad():
            margins = [self._margin(pairs, part, rows, 0)
                       for rows in _chunks(np.arange(len(pairs)), self.recipe.encode_batch_size)]
        return torch.cat(margins).double().cpu().numpy() if margins else np.zeros(0)

    def changed(self) -> dict[str, Tensor]:
        """The backbone's layers that training changed, whole, by the CLIPModel's names; call once, after training."""
        if self.recipe.features == "whole":
            return {name: value.detach().clone() for name, value in self.backbone.clip.state_dict().items()}
        return {f"{name}.weight": merged(layer) for name, layer in self.lora}

    def report(self, *, seconds: float) -> dict:
        """What reward.json holds."""
        margins = self.margins(self.held, "held")
        if not (self.held.target != 0.5).any():
            where = self.recipe.data.validation or self.recipe.data.path
            raise DataError(f"{where}: every held-out pair is a tie, so there is no accuracy to measure")
        groups = self._groups()
        found = accuracy(margins, self.held.target, groups, seed=self.recipe.seed)
        believed = calibration(margins, self.held.target)
        facts = {"accuracy": asdict(found), "calibration": asdict(believed), "note": _note(believed),
                 "unit": "user" if self.recipe.head.pluralistic else "prompt",
                 "ties": {"handling": "labelled ties are left out of the accuracy; equal scores count one half",
                          "training": self.train.ties, "dropped": self.tally.ties if self.recipe.data.ties == "drop" else 0},
                 "compare": self._others(groups),
                 "pairs": {"train": len(self.train), "stop": len(self.stop), "held_out": len(self.held)},
                 "bad_rows": self.tally.bad_rows + self.held_tally.bad_rows, "users": len(self.users),
                 "epochs": [asdict(epoch) for epoch in self.epochs], "init": self.init,
                 "backbone": {"model": self.recipe.backbone, "revision": self.recipe.backbone_revision,
                              "sha256": sha256(_source(self.recipe).files)},
                 "device": str(self.backbone.device), "seconds": round(seconds, 1)}
        if self.recipe.head.pluralistic:
            facts["unseen_users"] = len({user for user in self.held.users if user not in set(self.users)})
        return clean({"sentence": _sentence(facts), **facts})

    def _users(self, pairs: Pairs) -> list[str]:
        if not self.recipe.head.pluralistic and self.recipe.balance != "users":
            return []
        lacking = sum(user is None for user in pairs.users)
        if lacking:
            raise DataError(f"{self.recipe.data.path}: {lacking} of {len(pairs)} pairs name no user (column user_id or "
                            "user), which this head or balance=users needs")
        return sorted(set(pairs.users)) if self.recipe.head.pluralistic else []

    def _readable(self, good: np.ndarray, pairs: Pairs, part: str) -> Pairs:
        """Without the pairs of a picture that could not be decoded."""
        kept = pairs.take(good[pairs.first] & good[pairs.second])
        if not len(kept):
            raise nothing_left(self.recipe.data, self.tally if part == "train" else self.held_tally, part)
        return kept

    def _start(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.integer(self.recipe.head.init_seed, "reward_head"))
            head = self.recipe.head.make(self.backbone.width, float(self.backbone.clip.logit_scale), self.users)
        return head.to(self.backbone.device)

    def _hash(self) -> str:
        total = hashlib.sha256(sha256(_source(self.recipe).files).encode())
        for name, value in sorted(self.head.state_dict().items()):
            total.update(name.encode() + value.cpu().numpy().tobytes())
        return total.hexdigest()

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        fast = [p for name, p in self.head.named_parameters() if name in ("user_logits", "points")]
        slow = [p for name, p in self.head.named_parameters() if name not in ("user_logits", "points")]
        groups = [{"params": [*slow, *self._towers()], "lr": recipe.learning_rate}]
        if fast:  # a user's weights are choices, which decay would pull to the even mixture
            groups.append({"params": fast, "lr": recipe.head.user_learning_rate, "weight_decay": 0.0})
        if self.lora:
            updates = [parameter for _, layer in self.lora for parameter in lora_parameters(layer)]
            groups.append({"params": updates, "lr": recipe.lora.learning_rate})
        return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)

    def _trained(self) -> list[nn.Parameter]:
        return [*self.head.parameters(), *self._towers(), *(p for _, layer in self.lora for p in lora_parameters(layer))]

    def _towers(self) -> list[nn.Parameter]:
        """The backbone's parameters that are trained as they are."""
        time = [] if self.backbone.time is None else list(self.backbone.time.parameters())
        return [*time, *(self.backbone.clip.parameters() if self.recipe.features == "whole" else ())]

    def _state(self) -> list[Tensor]:
        return copy.deepcopy([parameter.detach() for parameter in self._trained()])

    @torch.no_grad()
    def _restore(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self._trained(), state, strict=True):
            parameter.copy_(value)

    def _pair_weights(self) -> np.ndarray:
        """[P], mean 1."""
        pairs = self.train
        if self.recipe.balance == "users":
            return balanced(pairs.users)
        return balanced(pairs.prompt, pairs.weight) if self.recipe.balance == "prompts" else np.ones(len(pairs))

    def _epoch(self, number: int, optimizer, schedule, weights: Tensor) -> float:
        order = rng.permutation(len(self.train), self.recipe.seed, "reward_order", number)
        target = torch.from_numpy(self.train.target).float().to(self.backbone.device)
        loss_of, total = LOSSES[getattr(self.recipe.head, "loss", "logistic")], 0.0
        for rows in _chunks(order, self.recipe.batch_size):
            index = torch.from_numpy(rows).to(self.backbone.device)
            losses = loss_of(self._margin(self.train, "train", rows, number), target[index])
            loss = (weights[index] * losses).mean()
            if not loss.isfinite():
                raise ModelError(f"epoch {number}: the loss is not finite; lower learning_rate, {self.recipe.learning_rate:g}")
            penalty = self.head.penalty() if self.recipe.head.pluralistic else 0.0
            optimizer.zero_grad()
            (loss + penalty).backward()
            nn.utils.clip_grad_norm_(self._trained(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        return total / len(order)

    def _margin(self, pairs: Pairs, part: str, rows: np.ndarray, visit: int) -> Tensor:
        """[B], with gradient where it is on. visit: 1 and on in training; 0 is how pairs are measured."""
        first, second, text = self.features(part, pairs, rows, visit)
        user = None
        if self.recipe.head.pluralistic:
            seen = {name: row for row, name in enumerate(self.users)}
            user = self.head.user_weights(torch.tensor([seen.get(pairs.users[i], -1) for i in rows], device=text.device))
        return self.head(first, text, user) - self.head(second, text, user)

    def _validate(self, number: int, loss: float) -> Epoch:
        if not len(self.stop) or not (self.stop.target != 0.5).any():
            return Epoch(number=number, loss=loss, stop_loss=None, stop_accuracy=None)
        margins = self.margins(self.stop, "train")
        losses = LOSSES["logistic"](torch.from_numpy(margins), torch.from_numpy(self.stop.target))
        decided = self.stop.target != 0.5
        right = ordered(margins[decided], self.stop.target[decided])
        return Epoch(number=number, loss=loss, stop_loss=float(losses.mean()), stop_accuracy=float(right.mean()))

    def _groups(self) -> list:
        """What the interval resamples: users for a pluralistic head, else prompts."""
        if self.recipe.head.pluralistic:
            return [str(user) for user in self.held.users]
        return self.held.prompt.tolist()

    def _others(self, groups: list) -> dict[str, dict]:
        """Other rewards' agreement with the labels of the same pairs."""
        found: dict[str, dict] = {}
        for reward in self.recipe.compare:
            margins = margins_of(reward, self.held, self.recipe.data, self.recipe.encode_batch_size)
            found[unlike(reward.name, found)] = asdict(accuracy(margins, self.held.target, groups, seed=self.recipe.seed))
        return found


def margins_of(reward: Reward, pairs: Pairs, spec: DataSpec, batch_size: int = 64) -> np.ndarray:
    """Any reward's score of the first minus of the second picture, [P] float64; NaN where one could not be scored."""
    margins = np.zeros(len(pairs))
    for rows in _chunks(np.arange(len(pairs)), batch_size):
        sides = []
        for side in (pairs.first, pairs.second):
            images = list(decoded([pairs.pictures[i] for i in side[rows]], spec, Tally()))
            columns = {"user": [pairs.users[i] for i in rows]}
            sides.append(judged(reward, images, [pairs.prompts[i] for i in pairs.prompt[rows]], columns))
        margins[rows] = (sides[0] - sides[1]).numpy()
    return margins


class Frozen:
    """Features of every picture and prompt, encoded once, by part."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.parts = backbone, {}

    @torch.no_grad()
    def add(self, part: str, pairs: Pairs, recipe: RewardRecipe, tally: Tally) -> np.ndarray:
        """Encode; which pictures could be read, [pictures] bool."""
        rows, good = [], np.ones(len(pairs.pictures), bool)
        for numbers in _chunks(np.arange(len(pairs.pictures)), recipe.encode_batch_size):
            images = list(decoded([pairs.pictures[i] for i in numbers], recipe.data, tally))
            good[numbers] = [image is not None for image in images]
            features = torch.zeros(len(images), self.backbone.width, device=self.backbone.device)
            ready = [self.backbone.preprocess(image) for image in images if image is not None]
            if ready:
                features[torch.from_numpy(good[numbers])] = self.backbone.images(torch.stack(ready))
            rows.append(features)
        texts = [self.backbone.texts(chunk) for chunk in _chunks(pairs.prompts, recipe.encode_batch_size)]
        self.parts[part] = torch.cat(rows), torch.cat(texts)
        return good

    def __call__(self, part: str, pairs: Pairs, rows: np.ndarray, visit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features of both pictures and the prompt of the pairs ``rows``, [B, D] each. visit: keys what is random."""
        images, texts = self.parts[part]
        return images[pairs.first[rows]], images[pairs.second[rows]], texts[pairs.prompt[rows]]


class Live:
    """Features of the backbone as it is now, with gradient to its LoRA: pictures are decoded anew in every epoch."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.spec = backbone, None

    def add(self, part: str, pairs: Pairs, recipe: RewardRecipe, tally: Tally) -> np.ndarray:
        """Decode everything once, so that a broken picture is known before training."""
        self.spec = recipe.data
        return np.array([image is not None for image in decoded(pairs.pictures, recipe.data, tally)], bool)

    def __call__(self, part: str, pairs: Pairs, rows: np.ndarray, visit: int) -> tuple[Tensor, Tensor, Tensor]:
        numbers, place = np.unique(np.concatenate([pairs.first[rows], pairs.second[rows]]), return_inverse=True)
        images = decoded([pairs.pictures[i] for i in numbers], self.spec, Tally())
        features = self.backbone.images(torch.stack([self.backbone.preprocess(image) for image in images]))
        return features[place[: len(rows)]], features[place[len(rows) :]], self._texts(pairs, rows)

    def _texts(self, pairs: Pairs, rows: np.ndarray) -> Tensor:
        prompts, which = np.unique(pairs.prompt[rows], return_inverse=True)
        return self.backbone.texts([pairs.prompts[i] for i in prompts])[which]


class Noisy(Live):
    """The same of what a denoiser predicts from the noised pictures; level and noise belong to (pair, visit)."""

    def __init__(self, backbone: Backbone, predicted: Predicted, seed: int):
        super().__init__(backbone)
        self.predicted, self.seed = predicted, seed

    def __call__(self, part: str, pairs: Pairs, rows: np.ndarray, visit: int) -> tuple[Tensor, Tensor, Tensor]:
        sides = [list(decoded([pairs.pictures[i] for i in side[rows]], self.spec, Tally()))
                 for side in (pairs.first, pairs.second)]
        x0 = [self.predicted.latents(torch.stack([self.predicted.fit.unit(image) for image in side])) for side in sides]
        key = torch.from_numpy(np.stack([pairs.first[rows], pairs.second[rows], np.full(len(rows), visit)], 1))
        t = rng.uniform(self.seed, "reward_level", key)
        noise = rng.normal(self.seed, "reward_noise", key, tuple(x0[0].shape[1:]))
        noised = self.predicted.noised(torch.cat(x0), t.repeat(2), noise.repeat(2, 1, 1, 1))
        pictures = self.predicted(noised, 2 * [pairs.prompts[i] for i in pairs.prompt[rows]])
        ready = torch.stack([self.backbone.preprocess(picture) for picture in pictures])
        return *self.backbone.images(ready, noised.t).chunk(2), self._texts(pairs, rows)


def _features(recipe: RewardRecipe, backbone: Backbone) -> Frozen | Live:
    if recipe.features == "frozen":
        return Frozen(backbone)
    if recipe.steps is None:
        return Live(backbone)
    return Noisy(backbone, Predicted(recipe.steps.model, recipe.steps.guidance_scale, backbone.device), recipe.seed)


def attach_lora(backbone: Backbone, recipe: RewardRecipe) -> list[tuple[str, nn.Module]]:
    """Adapters on the backbone's layers, starting as no change: (name in the CLIPModel, layer). Raises ConfigError."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    lora = recipe.lora
    config = LoraConfig(r=lora.rank, lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
                        target_modules=list(lora.target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.integer(recipe.seed, "reward_lora"))
        try:
            inject_adapter_in_model(config, backbone.clip)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules: {list(lora.target_modules)} cannot carry a LoRA here "
                              f"({str(error).splitlines()[0]})") from None
    backbone.to(backbone.device)
    return [(name, layer) for name, layer in backbone.clip.named_modules() if isinstance(layer, LoraLayer)]


def lora_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" in name]


@torch.no_grad()
def merged(layer: nn.Module) -> Tensor:
    """The layer's whole weight with its update, a copy."""
    return (layer.base_layer.weight + layer.get_delta_weight("default")).clone()


def _rate(step: int, steps: int, warmup_share: float) -> float:
    """Share of the learning rate: a linear rise, then a linear fall to zero."""
    warmup = max(1, round(warmup_share * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def _chunks(rows, size: int) -> Iterator:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _line(epoch: Epoch, epochs: int) -> str:
    apart = "" if epoch.stop_loss is None else f", set apart {epoch.stop_loss:.4f} ({100 * epoch.stop_accuracy:.1f}% right)"
    return f"epoch {epoch.number}/{epochs}: loss {epoch.loss:.4f}{apart}"


def _sentence(facts: dict) -> str:
    found = facts["accuracy"]
    return (f"Held out, {100 * found['value']:.1f}% of {found['pairs']} pairs are ordered as labelled (95% interval "
            f"{100 * found['low']:.1f} to {100 * found['high']:.1f}, over {found['prompts']} {facts['unit']}s).")


def _note(believed) -> str:
    return (f"The held-out pairs' probabilities are {100 * believed.error:.1f} points from their outcomes (expected "
            f"calibration error, {len(believed.bins)} bins of equal size); log loss {believed.log_loss:.3f} nats, a coin's is "
            "0.693. They hold for pictures like those of the training set.")
