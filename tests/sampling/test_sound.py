"""Clips from stock audio pipelines: a function of caption and seed alone, with the weights of a run, and what is refused."""

import pytest
import torch

from diffalign.errors import ConfigError, ModelError
from diffalign.models.load import load_denoiser, load_pipeline
from diffalign.models.lora import adapter_layers, adapters_off, load
from diffalign.models.spec import LoRA, ModelSpec
from diffalign.models.weights import WeightBank
from diffalign.sampling.sound import clips, longest, rate_of
from tests.models import tiny_audio

CAPTIONS, SEEDS = ["a b", "c"], [3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torchsde")  # the solver of Stable Audio
    folder = tmp_path_factory.mktemp("sound") / "pipeline"
    tiny_audio.make(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(ModelSpec(pretrained_model_name_or_path=str(folder)))


def draw(pipe, captions=CAPTIONS, seeds=SEEDS, **options):
    return clips(pipe, captions, seeds, **{"seconds": 0.5, "num_inference_steps": 2, "progress": None, **options})


def test_clips_are_the_pipelines_own(pipe):
    waves, count = draw(pipe), []
    assert waves.shape == (2, 2, 32) and rate_of(pipe) == 64 and longest(pipe) == 0.75
    theirs = pipe("c", audio_end_in_s=0.5, num_inference_steps=2, guidance_scale=7.0,
                  generator=[torch.Generator().manual_seed(4)])
    assert torch.equal(waves[1], theirs.audios[0])
    again = draw(pipe, CAPTIONS[::-1], SEEDS[::-1], drawn=count.append)
    assert torch.equal(again.flip(0), waves) and count == [1, 1]  # neither place nor company matters
    assert not torch.allclose(draw(pipe, ["c"], [5])[0], waves[1], atol=1e-3)
    assert not torch.allclose(draw(pipe, ["c"], [4], guidance_scale=1.0)[0], waves[1], atol=1e-4)
    assert draw(pipe, ["c"], [4], seconds=None).shape == (1, 2, 48)


def test_the_weights_of_a_run(folder, tmp_path):
    """A LoRA of peft's files goes onto the pipeline; switched off, the base is there again."""
    spec = ModelSpec(pretrained_model_name_or_path=str(folder))
    bank = WeightBank.build(load_denoiser(spec), LoRA(rank=2), reads=("policy",), seed=0)
    with torch.no_grad():
        for p in bank.trainable().values():
            p.add_(0.2)
    bank.save(tmp_path, {})
    pipe = load_pipeline(spec)
    before = draw(pipe)
    load(pipe, tmp_path / "adapter_model.safetensors", "entrant_0")
    after = draw(pipe)
    assert not torch.allclose(after, before, atol=1e-3)
    pipe.transformer = bank.denoiser.module
    assert torch.allclose(draw(pipe), after, atol=1e-5)
    with adapters_off(adapter_layers(pipe.transformer)):
        assert torch.allclose(draw(pipe), before, atol=1e-5)


def test_a_lora_of_another_model_is_one_line(folder, tmp_path):
    spec = ModelSpec(pretrained_model_name_or_path=str(folder))
    WeightBank.build(load_denoiser(spec), LoRA(rank=2), reads=("policy",), seed=0).save(tmp_path, {})
    pipe = load_pipeline(spec)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    with pytest.raises(ModelError, match="does not fit this model") as caught:
        load(pipe, tmp_path / "adapter_model.safetensors")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_refused(pipe):
    with pytest.raises(ConfigError, match="makes clips of up to 0.75 s, got 2"):
        draw(pipe, seconds=2.0)
    with pytest.raises(ValueError, match="2 captions for 1 seeds"):
        draw(pipe, seeds=[1])
    broken = {name: x.clone() for name, x in pipe.vae.state_dict().items()}
    with torch.no_grad():
        next(pipe.vae.parameters()).fill_(float("nan"))
        for p in pipe.vae.parameters():
            p.mul_(float("nan"))
    with pytest.raises(ModelError, match='the clip of "c" .seed 4. holds NaN'):
        draw(pipe, ["c"], [4])
    pipe.vae.load_state_dict(broken)
