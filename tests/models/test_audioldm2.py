"""AudioLDM 2: one step and a whole clip of the stock pipeline, its two texts, its front end, LoRA and what is refused."""

import json

import numpy as np
import pytest
import torch

from diffalign.data.sound import read_sounds
from diffalign.errors import DataError, ModelError
from diffalign.models.audio_unet import AudioLDM2, log_mel
from diffalign.models.base import enable_gradient_checkpointing
from diffalign.models.load import load_denoiser, load_encoders, load_pipeline, model_identity, save_pipeline
from diffalign.process import Eps, VariancePreserving
from diffalign.sampling.sound import clips, longest, rate_of
from diffalign.types import Cond
from tests.models.sounds import moved_lora, pair_of, read_by_peft, spec_of, tone
from tests.models.tiny_audioldm2 import CHANNELS, FRAMES, HOP, MELS, RATE, make

SHAPE = (CHANNELS, FRAMES, MELS // 4)
FULL = FRAMES * 4 * HOP  # samples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm2") / "pipeline"
    return make(folder), folder, load_encoders(spec_of(folder)), load_denoiser(spec_of(folder))


def cond_of(encoders, *prompts):
    """As batches bring it: shorter texts filled up with zeros."""
    told = [encoders.adapter.told(encoders, prompt, {}, FULL) for prompt in prompts]
    states = [torch.from_numpy(extra["t5"]) for _, extra in told]
    masks = [torch.from_numpy(extra["attended"]) for _, extra in told]
    pad = torch.nn.utils.rnn.pad_sequence
    return Cond(tokens=torch.stack([torch.from_numpy(tokens) for tokens, _ in told]),
                extra={"t5": pad(states, batch_first=True), "attended": pad(masks, batch_first=True)})


def drawn(pipe, prompt, steps, guidance, latents):
    return pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, latents=latents.clone(),
                output_type="latent").audios


def test_one_step_equals_the_pipelines(made):
    pipe, _, encoders, denoiser = made
    seen = {}
    handle = pipe.unet.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs, args=args, out=out[0]),
                                             with_kwargs=True)
    drawn(pipe, "a b", 1, 1.0, torch.randn(1, *SHAPE))
    handle.remove()
    xt, index = seen["args"]
    t = (index.float()[None] + 1) / 1000
    with torch.no_grad():
        ours, other = denoiser(xt, t, cond_of(encoders, "a b")), denoiser(xt, t, cond_of(encoders, "c"))
        pair = denoiser(xt.repeat(2, 1, 1, 1), t.repeat(2), cond_of(encoders, "a b", "c"))
    assert torch.allclose(ours, seen["out"], atol=1e-5)
    assert torch.allclose(pair, torch.cat([ours, other]), atol=1e-5)  # each as if it were alone, whatever the padding
    assert not torch.allclose(ours, other, atol=1e-3)
    for name in ("t5", "tokens"):  # both texts are heard
        cond = cond_of(encoders, "a b")
        half = (Cond(tokens=cond.tokens * 0, extra=cond.extra) if name == "tokens"
                else Cond(tokens=cond.tokens, extra={**cond.extra, "t5": cond.extra["t5"] * 0}))
        with torch.no_grad():
            assert not torch.allclose(denoiser(xt, t, half), ours, atol=1e-4)


def test_gpt2_is_asked_one_prompt_at_a_time(made):
    """Of a batch it would see the longest prompt's padding in front of its own positions."""
    pipe, _, encoders, _ = made
    alone, batch = pipe.encode_prompt(["c"], "cpu", 1, False)[2], pipe.encode_prompt(["a b d", "c"], "cpu", 1, False)[2]
    assert not torch.allclose(alone[0], batch[1], atol=1e-2)
    assert torch.allclose(cond_of(encoders, "a b d", "c").tokens[1], alone[0], atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_whole_clip_equals_the_pipelines(made, guidance):
    """The null condition: the empty caption, in T5 filled up to the caption's length and masked."""
    pipe, _, encoders, denoiser = made
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    theirs = drawn(pipe, "a b", 3, guidance, noise)
    cond, null, scheduler = cond_of(encoders, "a b"), cond_of(encoders, ""), pipe.scheduler
    scheduler.set_timesteps(3)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        t5, attended, generated = pipe.encode_prompt(["a b"], "cpu", 1, True)
        stock = Cond(tokens=generated[:1], extra={"t5": t5[:1], "attended": attended[:1]})
        for index in scheduler.timesteps:
            t = (index.float()[None] + 1) / 1000
            raw = denoiser(x, t, cond)
            if guidance != 1:
                nothing = denoiser(x, t, stock)
                raw = nothing + guidance * (raw - nothing)
            x = scheduler.step(raw, index, x).prev_sample
        assert torch.allclose(x, theirs, atol=1e-4)
        # the empty caption by itself differs in GPT-2's positions alone, since it is shorter
        assert torch.allclose(null.extra["t5"], t5[:1, :null.extra["t5"].shape[1]], atol=1e-5)
        mel = encoders.decode(x)  # what the vocoder hears, cut to [-1, 1] for pictures only
        assert torch.allclose(mel, pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample.clamp(-1, 1), atol=1e-4)


def test_the_schedule_is_the_pipelines(made):
    pipe, _, _, denoiser = made
    assert isinstance(denoiser.process, VariancePreserving) and isinstance(denoiser.param, Eps)
    x0, noise = torch.randn(2, 1, *SHAPE).unbind(0)
    for index in (0, 500, 999):
        noised = denoiser.process.noise(x0, torch.tensor([(index + 1) / 1000]), noise)
        assert torch.allclose(noised.xt, pipe.scheduler.add_noise(x0, noise, torch.tensor([index])), atol=1e-5)
        assert denoiser.process.timestep(noised.t).item() == index


# Front end.


def test_the_spectrogram_is_the_training_codes():
    """As AudioLDM's released training code writes it: torch.stft over mirrored ends, Slaney bins, log from 1e-5 on."""
    from transformers.audio_utils import mel_filter_bank

    wave = np.random.default_rng(0).normal(0.2, 0.1, 16 * HOP).astype(np.float32)
    ours = log_mel(wave, HOP, 64)
    normal = torch.from_numpy(wave - wave.mean())
    normal = 0.5 * normal / normal.abs().max()
    edges = torch.nn.functional.pad(normal[None], (432, 432), mode="reflect")
    power = torch.stft(edges, 1024, hop_length=160, win_length=1024, window=torch.hann_window(1024), center=False,
                       return_complex=True).abs()
    bins = torch.from_numpy(mel_filter_bank(513, 64, 0, 8000, 16000, norm="slaney", mel_scale="slaney")).float()
    theirs = torch.log(torch.clamp(bins.T @ power[0], min=1e-5)).T
    assert ours.shape == (16, 64) and np.allclose(ours, theirs, atol=1e-3)
    assert np.allclose(log_mel(0.1 * wave, HOP, 64), ours, atol=1e-3)  # loudness is normalised away


def test_the_silence_behind_a_clip_is_silence():
    """Filled up after it was brought to mean 0: an offset in the file is gone, and does not sound on in the rest."""
    noise = np.random.default_rng(0).normal(0, 0.1, 8 * HOP)
    filled = log_mel(np.concatenate([noise + 0.2, np.zeros(24 * HOP)]), HOP, 64)
    assert np.allclose(filled[12:], np.log(1e-5))  # 4 frames on, no window of 1024 samples reaches back
    assert np.allclose(filled, log_mel(np.concatenate([noise, np.zeros(24 * HOP)]), HOP, 64))
    assert np.allclose(filled[:4], log_mel(noise + 0.2, HOP, 64)[:4])


def test_a_tone_lies_in_its_own_bin():
    """Slaney's scale: linear below 1 kHz, 15 mels there; log above. 64 bins to 8 kHz = 45.25 mels: one each .696 mels.
    500 Hz is 7.5 mels, so bin 7.5/.696 - 1 = 9.8: the 10th, counted from 0."""
    tone = np.sin(2 * np.pi * 500 * np.arange(64 * HOP) / RATE)
    assert (log_mel(tone, HOP, 64)[8:-8].argmax(1) == 10).all()


# Training.


def test_a_lora_trains_and_is_read_by_peft(made, tmp_path):
    _, folder, encoders, _ = made
    inputs = torch.randn(1, *SHAPE), torch.tensor([0.4]), cond_of(encoders, "a")
    bank, ours = moved_lora(folder, inputs)
    assert torch.allclose(read_by_peft(bank, folder, tmp_path, inputs), ours, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(made):
    """diffusers' own mixes up the arguments of the attention layers and fails."""
    _, folder, encoders, _ = made
    xt, t, cond = torch.randn(2, *SHAPE), torch.tensor([0.4, 0.4]), cond_of(encoders, "a b d", "c")
    found = []
    for checkpointed in (None, False, True):
        denoiser = load_denoiser(spec_of(folder))
        if checkpointed is not None:
            enable_gradient_checkpointing(denoiser, selective=checkpointed)
        denoiser.module.train()
        raw = denoiser(xt, t, cond)
        raw.square().sum().backward()
        found.append([raw.detach(), *(p.grad for p in denoiser.module.parameters())])
    for other in found[1:]:
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found[0], other, strict=True))
    assert all(p.abs().sum() > 0 for p in found[0][1:])  # every weight has an effect, so all train
    with pytest.raises(RuntimeError, match="must match the size"):
        stock = load_denoiser(spec_of(folder))
        stock.module.enable_gradient_checkpointing()
        stock.module.train()
        stock(xt, t, cond)


def test_a_full_fine_tune_becomes_a_whole_pipeline(made, tmp_path):
    from diffusers import AudioLDM2Pipeline

    pipe, folder, _, _ = made
    denoiser = load_denoiser(spec_of(folder))
    saved = save_pipeline(spec_of(folder), denoiser, tmp_path / "saved")
    ours, theirs = (json.loads((where / "model_index.json").read_text()) for where in (saved, folder))
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}
    stock = AudioLDM2Pipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *SHAPE)
    assert torch.allclose(drawn(stock, "a b", 2, 3.5, noise), drawn(pipe, "a b", 2, 3.5, noise), atol=1e-5)
    assert model_identity(spec_of(saved)) and stock.feature_extractor is not None


def test_clips_are_the_pipelines_own(made):
    pipe, folder, _, _ = made
    ours = load_pipeline(spec_of(folder))
    waves = clips(ours, ["a b", "c"], [3, 4], num_inference_steps=2, progress=None)
    assert waves.shape == (2, 1, FULL) and rate_of(ours) == RATE and longest(ours) == FULL / RATE
    theirs = pipe("c", num_inference_steps=2, generator=[torch.Generator().manual_seed(4)]).audios
    assert np.allclose(waves[1], theirs, atol=1e-5)
    assert clips(ours, ["c"], [4], seconds=0.1, num_inference_steps=2, progress=None).shape == (1, 1, 1600)


# Data.


def wave(samples, level=0.5, rate=RATE):
    return tone(samples, rate, level)


def test_a_clip_is_the_latent_of_its_spectrogram(made, tmp_path):
    _, _, encoders, _ = made
    sounds = read_sounds(pair_of(tmp_path, chosen=wave(FULL), rejected=wave(2000)), encoders)
    batch = sounds(np.array([0]), np.array([0]))
    assert batch.x0.shape == (1, 2, *SHAPE) and sounds.elements == CHANNELS * FRAMES * MELS // 4
    assert batch.cond.tokens.shape == (1, 4, 8) and batch.cond.extra["t5"].shape == (1, 2, 3, 12)
    assert batch.cond.extra["attended"].tolist() == [[[1, 1, 1]] * 2]
    samples = np.round(0.5 * np.sin(np.arange(FULL)) * 32767).astype(np.float32) / 32768
    mel = torch.from_numpy(log_mel(samples, HOP, MELS))[None, None]
    with torch.no_grad():
        mean = encoders.pipe.vae.encode(mel).latent_dist.mean * 0.5  # its scaling factor
        std = encoders.pipe.vae.encode(mel).latent_dist.std * 0.5
    assert ((batch.x0[0, 0] - mean[0]).abs() < 6 * std[0]).all()


@pytest.mark.parametrize(("data", "message"), [
    (wave(FULL + 1), "lasts 0.16 s, and the model makes 0.16 s at most"),
    (wave(2000, rate=44_100), "has 44100 Hz, and the codec reads 16000 Hz"),
    (wave(2000, level=0.0), "is silent"),
    (wave(2000, level=4.0), "is clipped"),
])
def test_clips_that_are_refused(made, tmp_path, data, message):
    with pytest.raises(DataError, match=f"line 1.*rejected.*{message}"):
        read_sounds(pair_of(tmp_path, chosen=wave(2000), rejected=data), made[2])


def test_a_prompt_that_the_pipeline_would_cut_is_refused(made, tmp_path):
    spec = pair_of(tmp_path, chosen=wave(2000), rejected=wave(2000, level=0.1))
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace("a b", "a b c d a b"))
    with pytest.raises(DataError, match="line 1: the prompt has .* tokens, and the model's text encoder reads"):
        read_sounds(spec, made[2])


def test_another_rate_and_another_denoiser_are_refused(made, tmp_path):
    for part in made[1].iterdir():
        (tmp_path / part.name).symlink_to(part)
    for part, change in (("vocoder", {"sampling_rate": 48_000}), ("unet", {"class_embed_type": "timestep"})):
        config = json.loads((made[1] / part / "config.json").read_text())
        (tmp_path / part).unlink()
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config | change))
        for weights in made[1].glob(f"{part}/*.safetensors"):
            (tmp_path / part / weights.name).symlink_to(weights)
        if part == "vocoder":
            with pytest.raises(ModelError, match="makes 48000 Hz, and its front end is known for 16000 Hz only"):
                read_sounds(pair_of(tmp_path / "rows", chosen=wave(9), rejected=wave(9)), load_encoders(spec_of(tmp_path)))
    with pytest.raises(ModelError, match="class_embed_type='timestep'"):
        load_denoiser(spec_of(tmp_path))


def test_speech_is_refused(made):
    from types import SimpleNamespace

    class VitsModel:
        pass

    with pytest.raises(ModelError, match="reads its second text by a VitsModel"):
        AudioLDM2.clips(SimpleNamespace(vocoder=made[0].vocoder, text_encoder_2=VitsModel()))
