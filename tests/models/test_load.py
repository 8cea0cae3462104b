"""Folders that cannot be used: one clear line each, before anything heavy is loaded; what a loaded one says of itself."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from diffalign.errors import ModelError
from diffalign.models import ModelSpec, encoder_facts, load_denoiser, load_encoders, load_pipeline, model_identity
from diffalign.models import load as loading

from . import tiny


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders("sdxl"), tmp_path / "model")


@pytest.fixture
def nothing_loads(monkeypatch):
    """Any attempt to read weights fails the test: refusals come first."""
    import diffusers

    def forbidden(*args, **kwargs):
        raise AssertionError("weights were loaded before the check")

    for owner in (diffusers.DiffusionPipeline, diffusers.ModelMixin):
        monkeypatch.setattr(owner, "from_pretrained", forbidden)


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def refused(path, *words, load=load_denoiser, **fields):
    with pytest.raises(ModelError) as caught:
        load(tiny.spec(path, **fields))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message
    return message


before_loading = pytest.mark.usefixtures("nothing_loads")


@before_loading
@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "missing", "a/b/c", "~nosuchuser/x/y", "own er/name"])
def test_missing_folder(name):
    refused(name, name, "no such folder")


@before_loading
def test_single_file(tmp_path):
    (tmp_path / "sdxl.safetensors").write_bytes(b"x")
    refused(tmp_path / "sdxl.safetensors", "single file", "from_single_file")


@before_loading
def test_not_a_pipeline(tmp_path, folder):
    refused(tmp_path, "not a diffusers pipeline", "model_index.json")
    refused(folder / "unet", "not a diffusers pipeline")
    (folder / "model_index.json").unlink()
    refused(folder, "not a diffusers pipeline", "save_pretrained")


@before_loading
@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe", ""])
def test_broken_index(folder, text):
    (folder / "model_index.json").write_bytes(text.encode("latin-1"))
    refused(folder, "model_index.json", "JSON")


class Canary:
    """A pickle that would leave a file behind if anybody opened it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@before_loading
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickle_weights_are_not_opened(folder, tmp_path, name):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    refused(folder, "pickle", name, "safe_serialization=True")
    assert not (tmp_path / "canary").exists()


@before_loading
def test_pickle_called_safetensors(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    refused(folder, "unet/diffusion_pytorch_model.safetensors", "not a complete safetensors file")
    assert not (tmp_path / "canary").exists()


@before_loading
def test_truncated_weights(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "vae/", "not a complete safetensors file", load=load_encoders)
    refused(folder, "vae/", load=load_pipeline)


@before_loading
def test_no_weights_and_wrong_variant(folder):
    refused(folder, "variant fp16", "it has: none", "model.variant", variant="fp16")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, "unet/ holds no weights")


@before_loading
@pytest.mark.parametrize("changes", [
    {"_class_name": ["my_pipeline", "MyPipeline"]}, {"unet": ["my_unet", "UNet2DConditionModel"]},
    {"text_encoder": ["my_encoder", "CLIPTextModel"]}, {"extra": ["os", "system"]}])
def test_code_that_comes_with_the_model(folder, tmp_path, changes):
    for name in ("my_pipeline", "unet/my_unet", "text_encoder/my_encoder"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    edit(folder / "model_index.json", **changes)
    refused(folder, "code")
    assert not (tmp_path / "canary").exists()


@before_loading
@pytest.mark.parametrize("file", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_auto_map(folder, file):
    edit(folder / file, auto_map={"AutoModel": "my.Model"})
    refused(folder, "auto_map", file, load=load_encoders)


@before_loading
@pytest.mark.parametrize("changes, words", [
    ({"_class_name": "FluxPipeline"}, ("FluxPipeline", "StableDiffusionXLPipeline")),
    ({"unet": ["diffusers", "UNet3DConditionModel"]}, ("unsupported denoiser", "UNet3DConditionModel")),
    ({"unet": [None, None]}, ("unsupported denoiser", "absent"))])
def test_unsupported_pipelines(folder, changes, words):
    edit(folder / "model_index.json", **changes)
    refused(folder, *words)


@before_loading
@pytest.mark.parametrize("file, changes, word", [
    ("unet/config.json", {"in_channels": 9}, "inpainting"), ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond"),
    ("unet/config.json", {"addition_embed_type": None}, "text_time"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler")])
def test_unsupported_denoisers(folder, file, changes, word):
    edit(folder / file, **changes)
    refused(folder, "unsupported denoiser", word)


@before_loading
def test_missing_parts(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    refused(folder, "scheduler/scheduler_config.json", "missing")
    shutil.rmtree(folder / "unet")
    refused(folder, "unet/config.json", "missing")


def test_weights_of_another_configuration(folder):
    edit(folder / "unet" / "config.json", cross_attention_dim=24)
    refused(folder, "cannot be loaded")
    edit(folder / "unet" / "config.json", cross_attention_dim=20, class_embed_type=None, time_embedding_act_fn="silu",
         resnet_time_scale_shift="default", encoder_hid_dim=20)
    refused(folder, "lacks", "encoder_hid_proj", "do not belong")


@pytest.mark.parametrize("revision", [None, "0" * 40])
def test_hub_id_without_a_network(monkeypatch, tmp_path, revision):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("some-owner/some-model", "some-owner/some-model", "no such folder here", "hub", revision=revision)
    assert revision is None or revision in message


def test_hub_id_is_downloaded_once_checked(monkeypatch, folder):
    """The index first, then safetensors of the wanted variant and small files; never a pickle or a Python file."""
    asked = []

    def download(name, revision, patterns):
        asked.append((name, revision, patterns))
        return folder

    monkeypatch.setattr(loading, "download", download)
    load_denoiser(ModelSpec(pretrained_model_name_or_path="owner/name", revision="abc"))
    assert [a[:2] for a in asked] == [("owner/name", "abc")] * 2
    assert asked[0][2] == ["model_index.json"]
    patterns = asked[1][2]
    assert "unet/*model.safetensors" in patterns and "tokenizer_2/*.txt" in patterns
    assert not any(p.endswith((".bin", ".py", "*")) for p in patterns)
    edit(folder / "model_index.json", _class_name=["x", "y"])
    asked.clear()
    refused("owner/name", "custom pipeline")
    assert len(asked) == 1


def test_a_repository_that_holds_no_pipeline(monkeypatch, tmp_path):
    """The hub's client names a folder that it has not made where no file matches."""
    monkeypatch.setattr(loading, "download", lambda *_: tmp_path / "nothing")
    refused("owner/no-pipeline", "no model_index.json", "whole pipeline")


def test_the_hub_is_asked_once_in_a_process(monkeypatch, folder):
    """For the index and for the rest, whoever looks at the model how often; a refusal is not remembered."""
    import huggingface_hub

    asked = []

    def snapshot(name, **options):
        asked.append(options["allow_patterns"])
        if len(asked) == 1:
            raise OSError("busy")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    refused("owner/asked-once", "busy")
    for _ in range(3):
        load_denoiser(ModelSpec(pretrained_model_name_or_path="owner/asked-once"))
    assert asked[0] == asked[1] == ["model_index.json"] and len(asked) == 3


def test_identity_is_of_the_denoiser(folder, tmp_path):
    spec = tiny.spec(folder)
    before = model_identity(spec)
    assert load_denoiser(spec).identity == before and len(before) == 64
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert model_identity(tiny.spec(tmp_path / "elsewhere")) == before
    edit(folder / "vae" / "config.json", scaling_factor=1.0)
    assert model_identity(spec) == before
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert model_identity(spec) != before


def test_identities_of_the_encoders(folder):
    spec = tiny.spec(folder)
    before = load_encoders(spec).identity
    edit(folder / "vae" / "config.json", scaling_factor=1.0)
    after = load_encoders(spec).identity
    assert after["vae"] != before["vae"] and after["text"] == before["text"]
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    last = load_encoders(spec).identity
    assert last["text"] != before["text"] and last["vae"] == after["vae"]


@before_loading
def test_facts_need_no_loading(folders):
    facts = encoder_facts(tiny.spec(folders("sd3")))
    assert (facts.family, facts.spatial_factor, facts.latent_channels, facts.default_resolution) == ("sd3", 2, 8, 16)
    assert set(facts.identity) == {"vae", "text"}


def test_facts_are_those_of_the_loaded_encoders(folder):
    loaded, facts = load_encoders(tiny.spec(folder)), encoder_facts(tiny.spec(folder))
    assert vars(facts).items() <= vars(loaded).items()


def test_another_vae(folder, folders):
    own = load_encoders(tiny.spec(folder))
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    for path in (folder, folder / "vae"):
        other = load_encoders(tiny.spec(folders("sdxl"), pretrained_vae_model_name_or_path=str(path)))
        assert other.pipe.vae.config.scaling_factor == 0.5
        assert other.identity["vae"] != own.identity["vae"] and other.identity["text"] == own.identity["text"]
    refused(folders("sdxl"), "AutoencoderKL", load=load_encoders, pretrained_vae_model_name_or_path=str(folder / "unet"))


def test_encoders_need_no_denoiser_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert load_encoders(tiny.spec(folder)).family == "sdxl"
    refused(folder, "holds no weights", load=load_pipeline)


def test_denoiser_needs_nothing_else(folder):
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / part)
    assert load_denoiser(tiny.spec(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_variant(folder):
    pipe = load_pipeline(tiny.spec(folder))
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, variant="fp16")
    refused(folder, "it has: fp16")
    spec = tiny.spec(folder, variant="fp16")
    assert load_denoiser(spec).family == "sdxl" and load_encoders(spec).identity["vae"]
    assert load_pipeline(spec).unet is not None


def test_zero_terminal_snr_stays_finite(folder):
    edit(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    process = load_denoiser(tiny.spec(folder)).process
    noised = process.noise(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.ones(1, 4, 8, 8))
    assert torch.isfinite(noised.log_snr).all() and noised.alpha < 1e-3
