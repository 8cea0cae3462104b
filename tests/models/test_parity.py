"""Our conditioning and prediction are the stock pipeline's: one step, and a whole picture from the same noise."""

from __future__ import annotations

import pytest
import torch

from . import tiny

CASES = [("sd", {}), ("sd", {"prediction": "v_prediction"}), ("sdxl", {}), ("sdxl", {"prediction": "v_prediction"}),
         ("sd3", {}), ("sd3", {"t5": False})]


@pytest.fixture(params=CASES, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
def case(request, folders):
    family, options = request.param
    spec = tiny.spec(folders(family, **options))
    return tiny.load_pipeline(spec), tiny.load_encoders(spec), tiny.load_denoiser(spec)


def test_one_step_equals_the_pipelines(case):
    pipe, encoders, denoiser = case
    seen = {}

    def watch(module, args, kwargs, output):
        seen.update(kwargs, output=output[0])
        for name, value in zip(("sample", "timestep"), args, strict=False):
            seen[name] = value

    handle = getattr(pipe, denoiser.component).register_forward_hook(watch, with_kwargs=True)
    latents = tiny.noise(encoders)
    pipe(tiny.PROMPT, latents=latents, num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    handle.remove()

    xt = seen["hidden_states"] if denoiser.family == "sd3" else seen["sample"]
    t = tiny.time_of(denoiser, seen["timestep"].reshape(-1)[:1]).float().expand(2)
    cond = tiny.cond_of(encoders, tiny.PROMPT)
    torch.testing.assert_close(cond.tokens, seen["encoder_hidden_states"], atol=1e-5, rtol=0)
    if denoiser.family == "sdxl":
        assert torch.equal(cond.extra["time_ids"], seen["added_cond_kwargs"]["time_ids"])
        torch.testing.assert_close(cond.pooled, seen["added_cond_kwargs"]["text_embeds"], atol=1e-5, rtol=0)
    with torch.no_grad():
        raw = denoiser(xt, t, cond)
    assert raw.shape == xt.shape
    assert (raw - seen["output"]).abs().max() < 1e-5
    assert raw.std() > 0.05 and (raw[0] - raw[1]).abs().max() > 1e-3   # the prompt matters, so equality says something


def test_a_sampled_picture_equals_the_pipelines(case):
    pipe, encoders, denoiser = case
    latents = tiny.noise(encoders)
    theirs = pipe(tiny.PROMPT, latents=latents, num_inference_steps=4, guidance_scale=5.0, output_type="pt").images
    drawn = tiny.sample(denoiser, tiny.cond_of(encoders, tiny.PROMPT), pipe.scheduler, latents)
    ours = (encoders.decode(drawn) / 2 + 0.5).clamp(0, 1)
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.01


def test_unconditional_is_the_pipelines(folders):
    tokens, pooled = tiny.load_encoders(tiny.spec(folders("sdxl"))).unconditional()
    assert tokens.shape == (1, 12, 20) and not tokens.any() and not pooled.any()   # force_zeros_for_empty_prompt
    encoders = tiny.load_encoders(tiny.spec(folders("sd")))
    assert torch.equal(encoders.unconditional()[0], encoders.encode_prompts([""])[0])


def test_sd_pooled_is_the_state_at_the_prompts_end(folders):
    """What the pipeline's denoiser does not read, a latent reward model does: tokens[end], after the last layer norm."""
    encoders = tiny.load_encoders(tiny.spec(folders("sd")))
    prompts = [tiny.PROMPT, "", "abc"]
    tokens, pooled = encoders.encode_prompts(prompts)
    lengths = [len(encoders.pipe.tokenizer(prompt).input_ids) for prompt in prompts]   # with both ends
    torch.testing.assert_close(pooled, tokens[torch.arange(3), torch.tensor(lengths) - 1])


def test_sdxl_tokens_are_both_penultimate_states(folders):
    """tokens = hidden_states[-2] of both encoders side by side (8 + 12), pooled = the second's projection."""
    encoders = tiny.load_encoders(tiny.spec(folders("sdxl")))
    tokens, pooled = encoders.encode_prompts([tiny.PROMPT])
    pipe = encoders.pipe
    with torch.no_grad():
        outs = [model(tok(tiny.PROMPT, padding="max_length", max_length=12, return_tensors="pt").input_ids,
                      output_hidden_states=True)
                for model, tok in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))]
    torch.testing.assert_close(tokens, torch.cat([o.hidden_states[-2] for o in outs], -1))
    torch.testing.assert_close(pooled, outs[1].text_embeds)


def test_order_of_sdxl_time_ids(folders):
    """Original height and width, crop top and left, target height and width: the order that Cond.extra documents."""
    pipe, seen = tiny.load_pipeline(tiny.spec(folders("sdxl"))), {}
    pipe.unet.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs["added_cond_kwargs"]), with_kwargs=True)
    pipe(tiny.PROMPT, num_inference_steps=1, guidance_scale=1.0, output_type="latent", original_size=(20, 18),
         crops_coords_top_left=(3, 5), target_size=(16, 14))
    assert seen["time_ids"].tolist() == [[20, 18, 3, 5, 16, 14]]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_encoding_many_prompts_equals_one_by_one(folders, family):
    encoders = tiny.load_encoders(tiny.spec(folders(family)))
    prompts = ["a red ring", "ring", "a a a a a a a a a a a a a a a"]
    together = encoders.encode_prompts(prompts)
    for i, prompt in enumerate(prompts):
        for many, one in zip(together, encoders.encode_prompts([prompt]), strict=True):
            if many is not None:
                torch.testing.assert_close(many[i], one[0], atol=1e-6, rtol=1e-5)


def test_latents_have_the_pipelines_scale(folders):
    """SD3's tiny VAE: shift 0.1, scale 0.3, so mean = (x - 0.1) * 0.3 and std = 0.3 * posterior std; decode undoes it."""
    encoders = tiny.load_encoders(tiny.spec(folders("sd3")))
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = encoders.encode_images(pixels)
    with torch.no_grad():
        posterior = encoders.pipe.vae.encode(pixels).latent_dist
        decoded = encoders.pipe.vae.decode(posterior.mean, return_dict=False)[0]
    assert mean.shape == (2, 8, 8, 12) and (encoders.spatial_factor, encoders.latent_channels) == (2, 8)
    torch.testing.assert_close(mean, (posterior.mean - 0.1) * 0.3)
    torch.testing.assert_close(std, posterior.std * 0.3)
    torch.testing.assert_close(encoders.decode(mean), decoded.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_sizes_come_from_the_folder(folders):
    encoders = tiny.load_encoders(tiny.spec(folders("sdxl")))
    assert (encoders.family, encoders.default_resolution, encoders.spatial_factor) == ("sdxl", 16, 2)
    assert all(p.dtype == torch.float32 for p in encoders.pipe.text_encoder.parameters())


def test_text_encoders_load_in_float32_whatever_is_stored(folders, tmp_path):
    pipe = tiny.load_pipeline(tiny.spec(folders("sdxl")))
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    encoders = tiny.load_encoders(tiny.spec(tmp_path / "half"))
    for part in (encoders.pipe.text_encoder, encoders.pipe.text_encoder_2, encoders.pipe.vae):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert encoders.encode_prompts(["a"])[0].dtype == torch.float32
