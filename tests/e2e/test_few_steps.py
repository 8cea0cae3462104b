"""The four-step version of the embedded model, as a user of few-step LoRAs meets it."""

import json
from functools import cache

import pytest
import torch
from safetensors import safe_open

from diffalign.cli import main
from diffalign.models import ModelSpec, load_denoiser, load_pipeline
from diffalign.rewards.scenes import SceneChecker, is_held_out, parse
from diffalign.sampling.generate import generate, picture_seed
from diffalign.sampling.scheduler import make_scheduler

from .conftest import DATA, MODEL

FEW = MODEL.parent / "tiny-sdxl-lcm"
PLAIN = ModelSpec(pretrained_model_name_or_path=str(MODEL))
FUSED = ModelSpec(pretrained_model_name_or_path=str(MODEL), fuse_lora=str(FEW))
FOUR = {"scheduler": "LCMScheduler", "timestep_spacing": "trailing", "num_inference_steps": 4, "guidance_scale": 1.0}


def test_the_file_is_a_small_stock_lora():
    file = FEW / "pytorch_lora_weights.safetensors"
    assert file.stat().st_size < 700_000
    with safe_open(file, framework="pt") as handle:
        assert {handle.get_tensor(name).dtype for name in handle.keys()} == {torch.float16}
        assert handle.metadata()["timesteps"] == "999 749 499 249"
    stock = load_pipeline(PLAIN)
    stock.load_lora_weights(FEW)
    stock.fuse_lora()
    stock.unload_lora_weights()
    theirs, ours = stock.unet.state_dict(), load_denoiser(FUSED).module.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.fixture(scope="module")
def scores():
    """scores(spec) -> the checker's [96], four steps on held-out prompts, 24 of each kind."""
    texts = (DATA / "heldout_prompts.txt").read_text().splitlines()[:96]
    assert all(is_held_out(parse(text)) for text in texts)

    @cache
    def draw(spec: ModelSpec, scheduler: str = FOUR["scheduler"]):
        pipe = load_pipeline(spec)
        own = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
        pipe.scheduler = make_scheduler(own, scheduler, FOUR["timestep_spacing"])
        pictures = generate(pipe, texts, [picture_seed(0, text, 0) for text in texts], batch_size=32,
                            num_inference_steps=4, guidance_scale=1.0, progress=None)
        return SceneChecker()(pictures, texts)

    return draw


def test_four_steps_are_enough_for_the_student_alone(scores):
    """Margins are half of what was found. The teacher's own sampler, in four steps from pure noise, is further behind."""
    student = scores(FUSED).mean()
    assert student > 0.9
    assert student - scores(PLAIN).mean() > 0.03
    assert student - scores(PLAIN, "EulerDiscreteScheduler").mean() > 0.07


@pytest.fixture
def few(small, tmp_path):
    """few(**model) -> a recipe on the fused base that draws in four steps."""
    def recipe(train=None, **model):
        return small(tmp_path, model={"fuse_lora": str(FEW), **model}, data={"validation": None},
                     train={"max_train_steps": 2, **(train or {})}, evaluate=FOUR)

    return recipe


def reported(tmp_path):
    return json.loads((tmp_path / "run" / "report.json").read_text())


def test_a_lora_on_the_few_step_model(few, tmp_path, capsys, scores):
    """The base of the comparison is the fused model, and a run knows what it was trained on."""
    file = few()
    assert main(["train", str(file)]) == 0 and main(["evaluate", str(file)]) == 0
    report = reported(tmp_path)
    texts = [row["prompt"] for row in report["comparison"]["prompts"]]
    expected = scores(FUSED)[: len(texts)]  # the same seeds, in batches of another size
    found = torch.tensor([row["base"][0] for row in report["comparison"]["prompts"]])
    assert torch.allclose(found, expected)
    assert report["fuse_lora"] == str(FEW) and "tiny-sdxl-lcm" in report["title"]
    assert report["comparison"]["sampling"]["scheduler"] == "LCMScheduler"
    assert 'load_lora_weights("path/to/tiny-sdxl-lcm")' in (tmp_path / "run" / "README.md").read_text()
    with safe_open(tmp_path / "run" / "pytorch_lora_weights.safetensors", framework="pt") as handle:
        assert handle.metadata()["fuse_lora"] == str(FEW)
    capsys.readouterr()
    assert main(["evaluate", str(file), "model.fuse_lora=null"]) == 2
    assert "is not what" in capsys.readouterr().err


def test_a_full_fine_tune_is_fused_once(few, tmp_path):
    """Without a step worth the name, the saved pipeline draws what the fused base draws."""
    file = few(train={"learning_rate": 1e-7, "max_train_steps": 1, "checkpointing_steps": 10}, lora=None)
    assert main(["train", str(file)]) == 0 and main(["evaluate", str(file)]) == 0
    report = reported(tmp_path)
    rows = report["comparison"]["prompts"]
    assert sum(row["base"] != row["aligned"] for row in rows) <= 1  # a pixel may tip a score, a second fusing tips them all
    assert all(abs(row["shift"]) < 0.02 for row in report["alarm"]["statistics"])
    assert (tmp_path / "run" / "grid.png").exists()
