"""What a reward is, and the one place where pictures are converted for rewards (clips: ``sound.py``)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, DataError, ResourceError, RewardError, UserError

UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for a truncated or broken file


class Reward(Protocol):
    """images: N pictures, prompts: N texts -> [N] float32, higher is better. A frozen dataclass whose fields are its options.

    subject: "pictures", which may be left out, or "clips": then images are N ``types.Sound``s.
    NaN means "could not score", never 0. No side effects: the same picture has the same score, alone or in a batch.
    differentiable: whether gradients reach the pictures when they are float tensors [3, H, W] in [0, 1]. columns: names of
    what it reads besides picture and prompt, handed over as keyword lists of N values (a user's name, say).

    Making one is cheap; weights are loaded when it is first called. Two methods may be left out: ``check()`` raises a
    UserError for what is wrong with its options without loading weights, ``identity()`` gives JSON-ready facts that pin its
    numbers (model, revision, hash of the weights, scale).
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool]
    columns: ClassVar[tuple[str, ...]] = ()
    subject: ClassVar[str] = "pictures"

    def __call__(self, images: Any, prompts: Sequence[str], **columns: Sequence) -> Tensor: ...


def judged(reward: Reward, images: Sequence[Any], prompts: Sequence[str],
           columns: Mapping[str, Sequence] | None = None) -> Tensor:
    """The reward's scores as everything else reads them: [N] float32 on the CPU, without gradient, infinities as NaN.

    columns: further columns of the pictures' rows; the reward is given those it names. Raises DataError when one is missing,
    RewardError when the reward fails or breaks its promise of one number per picture, ResourceError when memory is full.
    """
    missing = [name for name in columns_of(reward) if name not in (columns or {})]
    if missing:
        raise DataError(f'reward "{reward.name}" reads a column "{missing[0]}" beside picture and prompt, and there is none')
    with torch.no_grad():
        scores = asked(reward, images, prompts, {name: columns[name] for name in columns_of(reward)}).detach().cpu()
    return torch.where(scores.isfinite(), scores, torch.nan)


def asked(reward: Reward, images: Sequence[Any], prompts: Sequence[str], columns: Mapping[str, Sequence]) -> Tensor:
    """The reward's scores as it gave them, [N] float32, with gradient if there is one. Raises as ``judged`` does."""
    subject = subject_of(reward)
    with _named(reward, f"failed on {len(prompts)} {subject}"):
        scores = reward(images, prompts, **columns)
    with _named(reward, f"must give one number per {subject.removesuffix('s')}"):
        scores = torch.as_tensor(scores).float()
    if scores.shape != (len(prompts),):
        raise RewardError(f'reward "{reward.name}" gave scores of shape {tuple(scores.shape)} for {len(prompts)} {subject}; '
                          f"it must give one number per {subject.removesuffix('s')}")
    return scores


@contextmanager
def _named(reward: Reward, what: str) -> Iterator[None]:
    """A reward is often a stranger's, and may fail in any way; ``SystemExit`` would even pass for success."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise ResourceError(f'reward "{reward.name}": out of memory; lower its batch_size') from error
        reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
        raise RewardError(f'reward "{reward.name}" {what} ({type(error).__name__}: {reason}); mend it, --debug shows where it '
                          "happened") from error


def columns_of(reward: Reward) -> tuple[str, ...]:
    return tuple(getattr(reward, "columns", ()))


def subject_of(reward: Reward) -> str:
    """What it scores: "pictures" or "clips"."""
    return getattr(reward, "subject", "pictures")


def check(reward: Reward, subject: str = "pictures") -> None:
    """Raises a UserError for what is wrong with a reward's options, as far as can be told without loading weights, and for
    one that scores something else than ``subject``.
    """
    if subject_of(reward) != subject:
        raise ConfigError(f'reward "{reward.name}" scores {subject_of(reward)}, and here are {subject}; choose a reward of '
                          f"{subject}")
    if hasattr(reward, "check"):
        with _named(reward, "failed in its check()"):
            reward.check()


def identity(reward: Reward) -> dict[str, Any]:
    """JSON-ready facts that pin the reward's numbers; at least its name."""
    with _named(reward, "failed in its identity()"):
        return {"name": reward.name, **(reward.identity() if hasattr(reward, "identity") else {})}


def unlike(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where it is ``taken``: two rewards of one kind would lose one's figures."""
    return next(other for other in (name, *(f"{name} {n}" for n in range(2, 1000))) if other not in taken)


def pixels(image: Any) -> Tensor:
    """One picture -> [3, H, W] float32 in [0, 1]. Gradients are kept when it is a float tensor.

    Accepts a PIL image, a uint8 array or tensor ([H, W, 3] or [3, H, W]) or a float tensor [3, H, W] in [0, 1].
    """
    if isinstance(image, Tensor) and image.is_floating_point():
        return image.float()
    array = _bytes(image)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float() / 255


def as_pil(image: Any) -> Image.Image:
    """One picture as RGB PIL, from anything that ``pixels`` accepts. A float value of 0.5 becomes 128 (rounded half up)."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor) and image.is_floating_point():
        image = (image.detach().float().clamp(0, 1) * 255 + 0.5).byte().cpu()
    return Image.fromarray(_bytes(image))


def _bytes(image: Any) -> np.ndarray:
    """uint8 [H, W, 3]."""
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise TypeError(f"a picture is PIL, uint8 [H, W, 3] or [3, H, W], or float [3, H, W]; not {array.dtype} {array.shape}")
    return array if array.shape[-1] == 3 else array.transpose(1, 2, 0)


def score_each(one, images: Iterable[Any], prompts: Sequence[str]) -> Tensor:
    """[N] float32: ``one(image)`` for each picture, NaN where a picture cannot be decoded."""
    images = list(images)
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: pass one prompt per picture")
    scores = [_or_nan(one, image) for image in images]
    return torch.stack(scores) if scores else torch.zeros(0)


def _or_nan(one, image: Any) -> Tensor:
    try:
        return torch.as_tensor(one(image), dtype=torch.float32)
    except UNREADABLE:
        return torch.tensor(torch.nan)
