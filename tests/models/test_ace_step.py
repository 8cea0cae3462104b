"""ACE-Step: one step and a whole clip of the stock pipeline, lyrics and lengths, padding, LoRA and what is refused."""

import json

import numpy as np
import pytest
import torch

from diffalign.data.sound import read_sounds
from diffalign.errors import DataError, ModelError
from diffalign.models.base import enable_gradient_checkpointing
from diffalign.models.load import is_distilled, load_denoiser, load_encoders, load_pipeline, model_identity, save_pipeline
from diffalign.models.lora import load as load_lora
from diffalign.process import RectifiedFlow, Velocity
from diffalign.sampling.sound import clips, longest, rate_of
from diffalign.types import Cond
from tests.models.sounds import moved_lora, rows_of, spec_of, tone
from tests.models.tiny_ace_step import CHANNELS, HOP, RATE, make

FRAMES = 33  # 2.06 s, of which it is told 2; an odd number: the transformer fills up its patches of two


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ace") / "pipeline"
    return make(folder), folder, load_encoders(spec_of(folder)), load_denoiser(spec_of(folder))


def cond_of(encoders, *captions, frames=FRAMES):
    """As batches bring it. captions: (caption, notes)."""
    told = [encoders.adapter.told(encoders, caption, notes, frames * HOP) for caption, notes in captions]
    silence = torch.from_numpy(encoders.adapter.beside(encoders, frames * HOP)["silence"]).repeat(len(told), 1, 1)

    def padded(arrays):
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in arrays], batch_first=True)

    return Cond(tokens=padded([tokens for tokens, _ in told]),
                extra={"attended": padded([extra["attended"] for _, extra in told]), "silence": silence})


def drawn(pipe, caption, steps, guidance, latents, **options):
    return pipe(caption, audio_duration=latents.shape[1] * HOP / RATE, num_inference_steps=steps, guidance_scale=guidance,
                latents=latents.clone(), output_type="latent", **options).audios


def test_one_step_equals_the_pipelines(made):
    pipe, _, encoders, denoiser = made
    seen = {}
    handle = pipe.transformer.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs, out=out[0]),
                                                    with_kwargs=True)
    notes = {"lyrics": "c d", "vocal_language": "de", "bpm": 9, "keyscale": "a", "timesignature": "4"}
    drawn(pipe, "a b", 3, 1.0, torch.randn(1, FRAMES, CHANNELS), **notes)
    handle.remove()
    with torch.no_grad():
        ours = denoiser(seen["hidden_states"], seen["timestep"], cond_of(encoders, ("a b", notes)))
        others = [denoiser(seen["hidden_states"], seen["timestep"], cond_of(encoders, (caption, changed)))
                  for caption, changed in (("a", notes), *(("a b", {**notes, **change}) for change in (
                      {"lyrics": "d c"}, {"vocal_language": "en"}, {"bpm": 8}, {"keyscale": "b"}, {"timesignature": "3"})))]
    assert torch.allclose(ours, seen["out"], atol=1e-5)
    assert not any(torch.allclose(ours, other, atol=1e-4) for other in others)  # all of it is heard


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_a_whole_clip_equals_the_pipelines(made, guidance):
    """The null condition: one learned vector for every token, and diffusers' projected guidance."""
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    pipe, _, encoders, denoiser = made
    noise = torch.randn(1, FRAMES, CHANNELS, generator=torch.Generator().manual_seed(1))
    theirs = drawn(pipe, "a b", 4, guidance, noise)
    cond, x, momentum = cond_of(encoders, ("a b", {})), noise, MomentumBuffer(momentum=-0.75)
    nothing = pipe.condition_encoder.null_condition_emb.expand_as(cond.tokens)
    times = torch.linspace(1, 0, 5)
    times = 3 * times / (1 + 2 * times)  # the pipeline's shift
    with torch.no_grad():
        for t, following in zip(times[:-1], times[1:], strict=True):
            raw = denoiser(x, t[None], cond)
            if guidance != 1:
                null = denoiser(x, t[None], Cond(tokens=nothing, extra=cond.extra))
                raw = normalized_guidance(raw, null, guidance - 1, momentum, eta=0.0, norm_threshold=2.5,
                                          use_original_formulation=True, norm_dim=(1,))
            x = x + (following - t) * raw
    assert torch.allclose(x, theirs, atol=1e-4)


def test_the_process_is_the_pipelines(made):
    """x_t = (1 - t) x0 + t noise and the velocity noise - x0: x_t - t v = x0, as its last step uses."""
    _, _, _, denoiser = made
    assert isinstance(denoiser.process, RectifiedFlow) and isinstance(denoiser.param, Velocity)
    x0, noise = torch.randn(2, 2, FRAMES, CHANNELS).unbind(0)
    t = torch.tensor([0.3, 0.8])
    noised = denoiser.process.noise(x0, t, noise)
    v = denoiser.param.target(noised)
    assert torch.equal(denoiser.process.timestep(t), t) and torch.allclose(v, noise - x0)
    assert torch.allclose(noised.xt - t.view(-1, 1, 1) * v, x0, atol=1e-6)


def test_padding_is_not_heard(made):
    """The stock transformer hears it: in a batch a short caption would be another one."""
    pipe, _, encoders, denoiser = made
    rows = (("a b c d a b", {"lyrics": "c d c d"}), ("d", {}))
    xt, t, cond = torch.randn(2, FRAMES, CHANNELS), torch.tensor([0.4, 0.7]), cond_of(encoders, *rows)
    assert cond.extra["attended"].sum(1).tolist() != [cond.tokens.shape[1]] * 2
    with torch.no_grad():
        alone = [denoiser(xt[i:i + 1], t[i:i + 1], cond_of(encoders, row)) for i, row in enumerate(rows)]
        batch = denoiser(xt, t, cond)
        context = torch.cat([cond.extra["silence"], torch.ones_like(cond.extra["silence"])], -1)
        stock = pipe.transformer(hidden_states=xt, timestep=t, timestep_r=t, encoder_hidden_states=cond.tokens,
                                 context_latents=context, return_dict=False)[0]
    assert torch.allclose(batch, torch.cat(alone), atol=1e-5)
    assert torch.allclose(batch[0], stock[0], atol=1e-5) and not torch.allclose(batch[1], stock[1], atol=1e-4)


def test_gradient_checkpointing_changes_nothing(made):
    _, folder, encoders, _ = made
    xt, t = torch.randn(2, FRAMES, CHANNELS), torch.tensor([0.4, 0.7])
    cond, found = cond_of(encoders, ("a b c d", {"lyrics": "c"}), ("d", {})), []
    for checkpointed in (None, False, True):
        denoiser = load_denoiser(spec_of(folder))
        if checkpointed is not None:
            enable_gradient_checkpointing(denoiser, selective=checkpointed)
        raw = denoiser(xt, t, cond)
        raw.square().sum().backward()
        found.append([raw.detach(), *(p.grad for p in denoiser.module.parameters())])
    for other in found[1:]:
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found[0], other, strict=True))
    assert all(grad.abs().sum() > 0 for grad in found[0][1:])  # every weight has an effect, so all train


def test_a_lora_trains_and_is_read_by_the_pipeline(made, tmp_path):
    _, folder, encoders, _ = made
    xt, t, cond = torch.randn(1, FRAMES, CHANNELS), torch.tensor([0.4]), cond_of(encoders, ("a", {}))
    bank, ours = moved_lora(folder, (xt, t, cond))
    bank.save(tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = load_pipeline(spec_of(folder))
    load_lora(pipe, tmp_path / "pytorch_lora_weights.safetensors")
    silence = cond.extra["silence"]
    with torch.no_grad():
        theirs = pipe.transformer(hidden_states=xt, timestep=t, timestep_r=t, encoder_hidden_states=cond.tokens,
                                  context_latents=torch.cat([silence, torch.ones_like(silence)], -1), return_dict=False)[0]
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_a_full_fine_tune_becomes_a_whole_pipeline(made, tmp_path):
    from diffusers import AceStepPipeline

    pipe, folder, _, _ = made
    saved = save_pipeline(spec_of(folder), load_denoiser(spec_of(folder)), tmp_path / "saved")
    ours, theirs = (json.loads((where / "model_index.json").read_text()) for where in (saved, folder))
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}
    stock = AceStepPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, FRAMES, CHANNELS)
    assert torch.allclose(drawn(stock, "a b", 2, 7.0, noise), drawn(pipe, "a b", 2, 7.0, noise), atol=1e-5)
    assert len(model_identity(spec_of(saved))) == 64


def test_turbo_counts_as_distilled(made, tmp_path):
    make(tmp_path / "turbo", is_turbo=True)
    assert is_distilled(spec_of(tmp_path / "turbo")) and not is_distilled(spec_of(made[1]))


def test_clips_are_the_pipelines_own(made):
    pipe, folder, _, _ = made
    ours, notes = load_pipeline(spec_of(folder)), [{"lyrics": "c"}, {"lyrics": "d"}]
    waves = clips(ours, ["a b", "a b"], [3, 3], seconds=0.75, num_inference_steps=2, notes=notes, progress=None)
    assert waves.shape == (2, 2, 48) and rate_of(ours) == RATE and longest(ours) == 15_000 / 16
    theirs = pipe("a b", audio_duration=0.75, num_inference_steps=2, generator=[torch.Generator().manual_seed(3)], lyrics="d")
    assert torch.allclose(waves[1], theirs.audios[0], atol=1e-5) and not torch.allclose(waves[0], waves[1], atol=1e-4)


# Data.


def wave(seconds, level=0.5, rate=RATE):
    return tone(int(seconds * rate), rate, level)


def test_rows_with_lyrics_and_of_several_lengths(made, tmp_path):
    """A bucket for each length; in one, conditions are filled up to the longest. 0.74 s are 12 latents, as 0.75 s are."""
    _, _, encoders, _ = made
    spec = rows_of(tmp_path, (wave(0.75), wave(0.74), {"lyrics": "c d c", "bpm": 9}),
                   (wave(0.75), wave(0.75), {"lyrics": None}), (wave(1.5), wave(1.5), {}))
    sounds = read_sounds(spec, encoders)
    assert [list(members) for members in sounds.members] == [[0, 1], [2]] and sounds.elements == 12 * CHANNELS
    batch = sounds(np.array([0, 1]), np.array([0, 0]))
    assert batch.x0.shape == (2, 2, 12, CHANNELS) and batch.cond.extra["silence"].shape == (2, 2, 12, CHANNELS)
    here = encoders.adapter.told(encoders, "a b", {"lyrics": "c d c", "bpm": 9}, 48)
    none = encoders.adapter.told(encoders, "a b", {}, 48)
    assert torch.equal(batch.cond.tokens[0], torch.from_numpy(here[0])) and len(none[0]) == len(here[0]) - 3
    assert batch.cond.extra["attended"].sum(-1).tolist() == [[len(here[0])] * 2, [len(none[0])] * 2]
    assert torch.equal(batch.cond.tokens[1, :len(none[0])], torch.from_numpy(none[0]))
    assert sounds(np.array([2]), np.array([0])).x0.shape == (1, 2, 24, CHANNELS)
    assert sounds._groups[0].told["silence"] is sounds._groups[1].told["silence"]  # held once
    samples = np.round(0.5 * np.sin(np.arange(48)) * 32767) / 32768
    with torch.no_grad():
        posterior = encoders.pipe.vae.encode(torch.from_numpy(samples).float().expand(1, 2, -1)).latent_dist
    assert ((batch.x0[1, 0].T - posterior.mean[0]).abs() < 6 * posterior.std[0]).all()


def test_lyrics_are_a_part_of_the_identity(made, tmp_path):
    one, other, again = (read_sounds(rows_of(tmp_path / str(i), (wave(0.5), wave(0.5), {"lyrics": words})), made[2])
                         for i, words in enumerate(("c", "d", "c")))
    assert one.identity == again.identity != other.identity


@pytest.mark.parametrize(("row", "message"), [
    ((wave(0.75), wave(0.5), {}), "line 1: its clips last 0.50 s and 0.75 s, and clips of one length are compared"),
    ((wave(0.5), wave(0.5, rate=50), {}), "line 1, rejected .*has 50 Hz, and the codec reads 64 Hz"),
    ((wave(0.5), wave(0.5, level=0.0), {}), "line 1, rejected .*is silent"),
    ((wave(0.5), wave(0.5, level=4.0), {}), "line 1, rejected .*is clipped"),
    ((wave(940), wave(940), {}), "line 1, chosen .*lasts 940.00 s, and the model makes 937.50 s at most"),
    ((wave(0.5), wave(0.5), {"lyrics": ["c"]}), "line 1: lyrics: text is needed, got list"),
    ((wave(0.5), wave(0.5), {"bpm": 9.5}), "line 1: bpm: a whole number is needed, got 9.5"),
    ((wave(0.5), wave(0.5), {"lyrics": "c " * 2100}), "line 1: the text of the lyrics has 21.. tokens, and .* reads 2048"),
    ((wave(0.5), wave(0.5), {"prompt": "c " * 300}), "line 1: the prompt, .* has 330 tokens, and the pipeline reads 256"),
])
def test_rows_that_are_refused(made, tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_sounds(rows_of(tmp_path, row), made[2])


@pytest.mark.parametrize(("part", "change", "message"), [
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is not a flow-matching one"),
    ("transformer/config.json", {"in_channels": 8}, "takes 8 channels, not latents, source, mask of 4"),
])
def test_other_models_are_refused(made, tmp_path, part, change, message):
    for file in made[1].iterdir():
        (tmp_path / file.name).symlink_to(file)
    folder = (tmp_path / part).parent
    folder.unlink()
    folder.mkdir()
    (tmp_path / part).write_text(json.dumps(json.loads((made[1] / part).read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load_denoiser(spec_of(tmp_path))
