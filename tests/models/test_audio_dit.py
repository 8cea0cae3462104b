"""Stable Audio: one step and a whole clip of the stock pipeline, its schedule, its latents, LoRA and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

from diffalign.data.audio import write_wav
from diffalign.data.sound import read_sounds
from diffalign.errors import DataError, ModelError
from diffalign.models.load import load_denoiser, load_encoders, model_identity, save_pipeline
from diffalign.models.weights import WeightBank
from diffalign.process import Trigonometric, V
from diffalign.types import Cond
from tests.models.sounds import moved_lora, pair_of, read_by_peft, spec_of, tone
from tests.models.tiny_audio import FRAMES, HOP, RATE, make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio") / "pipeline"
    return make(folder), folder, load_encoders(spec_of(folder)), load_denoiser(spec_of(folder))


def cond_of(encoders, prompt, seconds):
    with torch.no_grad():
        durations = torch.cat(encoders.pipe.encode_duration(0.0, seconds, "cpu", False, 1), 1)
    return Cond(tokens=encoders.encode_prompts([prompt])[0], extra={"durations": durations})


def drawn(pipe, prompt, seconds, steps, guidance, latents):
    return pipe(prompt, audio_end_in_s=seconds, num_inference_steps=steps, guidance_scale=guidance, latents=latents.clone(),
                output_type="latent").audios


def test_one_step_equals_the_pipelines(made):
    pipe, _, encoders, denoiser = made
    seen = {}
    handle = pipe.transformer.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs, args=args, out=out[0]),
                                                    with_kwargs=True)
    drawn(pipe, "a b", 0.5, 1, 1.0, torch.randn(1, 4, FRAMES))
    handle.remove()
    xt, t = seen["args"]
    with torch.no_grad():
        ours = denoiser(xt, t, cond_of(encoders, "a b", 0.5))
        other = denoiser(xt, t, cond_of(encoders, "c", 0.25))
    assert torch.allclose(ours, seen["out"], atol=1e-5)
    assert not torch.allclose(ours, other, atol=1e-3)  # prompt and seconds matter, so equality says something


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_whole_clip_equals_the_pipelines(made, guidance):
    """The null condition: zeros for text and seconds in the cross-attention, the true seconds in front of the latents."""
    pipe, _, encoders, denoiser = made
    noise = torch.randn(1, 4, FRAMES, generator=torch.Generator().manual_seed(1))
    theirs = drawn(pipe, "a b", 0.5, 3, guidance, noise)
    cond, scheduler = cond_of(encoders, "a b", 0.5), pipe.scheduler
    scheduler.set_timesteps(3)
    x = noise * scheduler.init_noise_sigma
    durations, rotary = cond.extra["durations"].flatten(1)[:, None], denoiser.rotary(FRAMES + 1, x.device)
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            raw = denoiser(scaled, t[None], cond)
            if guidance != 1:
                null = denoiser.module(scaled, t[None], encoder_hidden_states=torch.zeros(1, 6 + 2, 8), return_dict=False,
                                       rotary_embedding=rotary, global_hidden_states=durations)[0]
                raw = null + guidance * (raw - null)
            x = scheduler.step(raw, t, x).prev_sample
    assert torch.allclose(x, theirs, atol=1e-4)
    assert torch.allclose(encoders.pipe.vae.decode(x).sample, pipe.vae.decode(theirs).sample, atol=1e-4)


def test_the_schedule_is_the_released_solvers():
    """Its noise level is tan(pi t / 2): input, time and x0 by its own formulas. It needs torchsde to be imported."""
    pytest.importorskip("torchsde")
    from diffusers import CosineDPMSolverMultistepScheduler

    scheduler, process = CosineDPMSolverMultistepScheduler(), Trigonometric()
    x0, eps, raw = torch.randn(3, 1, 4, 5).unbind(0)
    for level in (0.3, 1.0, 7.0, 500.0):
        sigma = torch.tensor([level])
        t = 2 / math.pi * torch.atan(sigma)
        noised = process.noise(x0, t, eps)
        assert torch.allclose(process.timestep(t), scheduler.precondition_noise(sigma), atol=1e-6)
        assert torch.allclose(noised.xt, scheduler.precondition_inputs(x0 + sigma * eps, sigma), atol=2e-3)
        theirs = scheduler.precondition_outputs(x0 + sigma * eps, raw, sigma)
        assert torch.allclose(V().to_x0(raw, noised), theirs, atol=5e-3)


def test_the_process_by_hand():
    """t = 1/3: angle 30 degrees, alpha .8660, sigma .5, v = .866 eps - .5 x0; W = pi / sin(60 degrees) = 3.6276."""
    process = Trigonometric()
    noised = process.noise(torch.tensor([[2.0]]), torch.tensor([1 / 3]), torch.tensor([[1.0]]))
    assert noised.alpha.item() == pytest.approx(0.86603, abs=1e-4) and noised.sigma.item() == pytest.approx(0.5, abs=1e-4)
    assert V().target(noised).item() == pytest.approx(0.86603 - 1.0, abs=1e-4)
    assert process.elbo_weight(torch.tensor([1 / 3])).item() == pytest.approx(3.6276, abs=1e-3)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    log_snr = [process.noise(torch.zeros(2, 1), t + step, torch.zeros(2, 1)).log_snr for step in (-1e-3, 1e-3)]
    slope = (log_snr[1] - log_snr[0]) / 2e-3
    assert torch.allclose(-slope / 2, process.elbo_weight(t), rtol=1e-3)


def test_a_lora_trains_and_is_read_by_peft(made, tmp_path):
    _, folder, encoders, _ = made
    inputs = torch.randn(1, 4, FRAMES), torch.tensor([0.4]), cond_of(encoders, "a", 0.5)
    bank, ours = moved_lora(folder, inputs)
    assert torch.allclose(read_by_peft(bank, folder, tmp_path, inputs), ours, atol=1e-5)


def test_all_weights_but_the_frequencies_train(made):
    bank = WeightBank.build(load_denoiser(spec_of(made[1])), None, reads=("policy", "reference"), seed=0)
    assert not any(name.startswith("time_proj") for name in bank.trainable())
    assert len(bank.trainable()) > 20 and len(model_identity(spec_of(made[1]))) == 64


def test_a_full_fine_tune_becomes_a_whole_pipeline(made, tmp_path):
    _, folder, _, denoiser = made
    saved = save_pipeline(spec_of(folder), denoiser, tmp_path / "saved")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        ours, theirs = (json.loads((where / name).read_text()) for where in (saved, folder))
        assert {k: v for k, v in ours.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}
    assert model_identity(spec_of(saved)) and load_encoders(spec_of(saved)).pipe.projection_model is not None


# Data.


def wave(seconds, level=0.5, rate=RATE):
    return tone(int(seconds * rate), rate, level)


def test_a_clip_is_its_latent_and_its_seconds(made, tmp_path):
    _, _, encoders, _ = made
    sounds = read_sounds(pair_of(tmp_path, chosen=wave(0.75), rejected=wave(0.5)), encoders)
    batch = sounds(np.array([0]), np.array([0]))
    assert batch.x0.shape == (1, 2, 4, FRAMES) and batch.cond.tokens.shape == (1, 6, 8) and sounds.elements == 4 * FRAMES
    again, later = sounds(np.array([0]), np.array([0])), sounds(np.array([0]), np.array([1]))
    assert torch.equal(batch.x0, again.x0) and not torch.equal(batch.x0, later.x0)  # a fresh draw of the posterior
    for i, seconds in enumerate((0.75, 0.5)):
        assert torch.allclose(batch.cond.extra["durations"][0, i], cond_of(encoders, "a", seconds).extra["durations"][0])
    samples = np.round(0.5 * np.sin(np.arange(FRAMES * HOP)) * 32767) / 32768
    pixels = torch.from_numpy(samples).float().expand(1, 2, -1)
    mean, std = encoders.encode_images(pixels)
    assert ((batch.x0[0, 0] - mean[0]).abs() < 6 * std[0]).all()


def test_the_seconds_are_a_part_of_the_identity(made, tmp_path):
    """A clip with silence behind it has the latent of the clip alone, but the model is told other seconds: other data, so a
    checkpoint of one must not go on with the other."""
    def read(name, silence):
        clip = np.append(0.5 * np.sin(np.arange(int(0.5 * RATE))), np.zeros(silence))
        return read_sounds(pair_of(tmp_path / name, chosen=wave(0.75), rejected=write_wav(clip, RATE)), made[2])

    short, longer = read("short", 0), read("longer", 8)
    one, other = (sounds(np.array([0]), np.array([0])) for sounds in (short, longer))
    assert torch.equal(one.x0, other.x0) and not torch.equal(one.cond.extra["durations"], other.cond.extra["durations"])
    assert short.identity != longer.identity and short.identity == read("again", 0).identity


@pytest.mark.parametrize(("data", "message"), [
    (wave(1.0), "lasts 1.00 s, and the model makes 0.75 s at most"),
    (wave(0.5, rate=50), "has 50 Hz, and the codec reads 64 Hz"),
    (wave(0.5, level=0.0), "is silent"),
    (wave(0.5, level=4.0), "is clipped"),
    (b"RIFF", "not a WAV file"),
])
def test_clips_that_are_refused(made, tmp_path, data, message):
    with pytest.raises(DataError, match=f"line 1.*rejected.*{message}"):
        read_sounds(pair_of(tmp_path, chosen=wave(0.5), rejected=data), made[2])


def test_another_schedule_is_refused(made, tmp_path):
    for file in made[1].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "scheduler").unlink()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    with pytest.raises(ModelError, match="supported is the cosine v-prediction one"):
        load_denoiser(spec_of(tmp_path))
