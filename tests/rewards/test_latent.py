"""Latent reward models as rewards of pictures, and as judges of a rollout's steps."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config import as_tree, load_reward
from diffalign.data.judges import LatentJudge
from diffalign.errors import ModelError
from diffalign.models import load_denoiser, load_encoders
from diffalign.models.latent_reward import from_denoiser, load_scorer
from diffalign.rewards import check, identity, judged
from diffalign.rewards.latent import Latent
from diffalign.types import Cond

from ..models import tiny

PROMPTS = ["a red ring", "a blue square", "", "a red ring"]


def picture(seed, size=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def made(request, tmp_path_factory):
    """(family, pipeline's spec, folder of a latent reward model)."""
    where = tmp_path_factory.mktemp(request.param)
    spec = tiny.spec(tiny.make(request.param, where), lora=None)
    model = from_denoiser(load_denoiser(spec), spec, seed=1)
    model.module.visual.weight.data *= 50   # scores far apart
    model.module.save_pretrained(where / "latent_reward")
    return request.param, spec, where / "latent_reward"


def by_hand(made, images, prompts, t, draw=0):
    """Encode, noise with the one noise that all pictures get, score; one picture at a time."""
    from diffalign import rng

    family, spec, folder = made
    scorer, encoders, scores = load_scorer(folder), load_encoders(spec), []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        x0, _ = encoders.encode_images(pixels)
        noise = rng.normal(0, "latent_reward", torch.tensor([[draw]]), tuple(x0.shape[1:]))
        noised = scorer.process.noise(x0, torch.tensor([t]), noise)
        tokens, pooled = encoders.encode_prompts([prompt])
        with torch.no_grad():
            scores.append(scorer(noised.xt, noised.t, Cond(tokens=tokens, pooled=pooled)))
    return torch.cat(scores)


def test_the_score_of_a_picture(made):
    images = [picture(i) for i in range(4)]
    for t in (0.0, 0.2, 1.0):
        expected = by_hand(made, images, PROMPTS, t)
        found = Latent(path=str(made[2]), t=t, device="cpu", batch_size=3)(images, PROMPTS)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert expected.std() > 1e-3
    several = Latent(path=str(made[2]), draws=2, device="cpu")(images, PROMPTS)
    mean = (by_hand(made, images, PROMPTS, 0.2) + by_hand(made, images, PROMPTS, 0.2, draw=1)) / 2
    torch.testing.assert_close(several, mean, atol=2e-5, rtol=0)


def test_alone_or_in_a_batch_and_nan_for_what_cannot_be_read(made):
    reward, images = Latent(path=str(made[2]), device="cpu"), [picture(i) for i in range(4)]
    together = judged(reward, images, PROMPTS)
    alone = torch.cat([judged(reward, [image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    assert torch.equal(judged(reward, images, PROMPTS), together)

    class Broken(Image.Image):
        def convert(self, *_):
            raise OSError("truncated")

    assert judged(reward, [images[0], Broken()], PROMPTS[:2]).isnan().tolist() == [False, True]
    large = picture(7, 40)   # cut to the base's own size
    assert judged(reward, [large, large], ["a red ring"] * 2).isfinite().all()


def test_gradients_reach_the_pixels(made):
    reward = Latent(path=str(made[2]), device="cpu", t=0.3)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward([image], ["a red ring"]).sum().backward()
    slope, step = image.grad.clone(), 3e-3
    assert slope.abs().sum() > 0
    with torch.no_grad():
        along = slope / slope.norm()
        up, down = (reward([(image + s * along)], ["a red ring"]) for s in (step, -step))
    assert ((up - down) / (2 * step)).item() == pytest.approx(float(slope.norm()), rel=0.1)
    assert all(p.grad is None for p in reward._model._scorer.module.parameters())


def test_identity_and_recipe(made):
    family, spec, folder = made
    reward = load_reward({"kind": "latent", "path": str(folder), "t": 0.1})
    check(reward)
    facts = identity(reward)
    assert facts["name"] == "latent" and facts["t"] == 0.1 and len(facts["weights"]) == 64
    json.dumps(facts)
    assert as_tree(reward)["kind"] == "latent"
    with pytest.raises(ValueError, match="t must"):
        Latent(path="x", t=1.5)


def test_encoders_that_are_gone_or_others(made, tmp_path):
    family, spec, folder = made
    tree = json.loads((folder / "config.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "config.json").write_text(json.dumps({**tree, "model": {"pretrained_model_name_or_path": "/no/such"}}))
    with pytest.raises(ModelError, match="option model"):
        check(Latent(path=str(moved)))
    check(Latent(path=str(moved), model=spec.pretrained_model_name_or_path))
    (moved / "config.json").write_text(json.dumps({**tree, "text": "0" * 64}))
    with pytest.raises(ModelError, match="other text encoders"):
        check(Latent(path=str(moved)))
    (moved / "config.json").write_text(json.dumps({**tree, "vae": "0" * 64}))
    with pytest.raises(ModelError, match="another VAE"):
        Latent(path=str(moved), device="cpu")([picture(0)], ["a red ring"])


def test_the_judge_reads_latents_as_they_are(made):
    """No prediction, no decoder; scores at the level it is told; batches change nothing."""
    family, spec, folder = made
    scorer, encoders = load_scorer(folder), load_encoders(spec)
    shape = (5, scorer.module.facts.latent_channels, 8, 8)
    x, t, prompts = torch.randn(shape, generator=torch.Generator().manual_seed(2)), torch.full((5,), 0.4), ["a red ring"] * 5

    def decode(_):
        raise AssertionError("a judge of latents decodes nothing")

    judge = LatentJudge(path=str(folder), device="cpu", batch_size=2)
    found = judge(x, t, None, prompts, decode)
    tokens, pooled = encoders.encode_prompts(prompts)
    with torch.no_grad():
        expected = scorer(x, t, Cond(tokens=tokens, pooled=pooled))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert not judge.predicts and not found.requires_grad and judge(x, t + 0.2, None, prompts, decode).ne(found).all()
    x[1] = torch.nan
    assert judge(x, t, None, prompts, decode).isnan().tolist() == [False, True, False, False, False]
    judge.check_for(spec)
    assert len(judge.identity()) == 64


def test_the_judge_of_another_base(made, tmp_path):
    family, spec, folder = made
    other = "sd3" if family != "sd3" else "sd"
    with pytest.raises(ModelError, match="latent_channels"):
        LatentJudge(path=str(folder)).check_for(tiny.spec(tiny.make(other, tmp_path)))
    with pytest.raises(ModelError, match="no such folder"):
        replace(LatentJudge(path=str(folder)), path=str(tmp_path / "nothing")).check_for(spec)
