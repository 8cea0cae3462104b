"""Every shipped recipe builds, begins with its command, and pins what it downloads."""

import re
from pathlib import Path

import pytest

from diffalign.config import load_build, load_prompts, load_recipe, load_reward_recipe
from diffalign.evaluate.cost import groups_per_step

ROOT = Path(__file__).parents[2]
BUILDS = sorted((ROOT / "configs" / "build").glob("*.yaml"))
REWARDS = sorted((ROOT / "configs" / "rewards").glob("*.yaml"))
REWRITERS = sorted((ROOT / "configs" / "text").glob("rewriter*.yaml"))
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))   # accelerate's own
RECIPES = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*BUILDS, *REWARDS, *REWRITERS, *LAUNCHES})


def test_the_promised_recipes_are_there():
    names = {str(path.relative_to(ROOT / "configs")) for path in RECIPES}
    assert {"quickstart.yaml", "sd35/dpo_lora.yaml", "text/tiny_vrpo.yaml", "text/llada_vrpo.yaml"} <= names
    sd15 = ("dpo", "dpo_lora", "mapo", "timestep_aware", "smpo", "inpo", "kto", "seppo", "lrm", "lpo", "spo")
    sdxl = ("dpo", "dpo_lora", "mapo", "mapo_aaai", "mapo_style", "mapo_safety", "timestep_aware", "smpo", "inpo", "rankdpo",
            "lrm", "lpo", "spo")
    assert {*(f"sd15/{name}.yaml" for name in sd15), *(f"sdxl/{name}.yaml" for name in sdxl)} <= names


@pytest.mark.parametrize("name, processes, pairs", [
    ("sd15/dpo", 16, 2048), ("sdxl/dpo", 16, 2048),
    ("sd15/smpo", 8, 1024), ("sdxl/smpo", 8, 1024), ("sd15/inpo", 8, 1024), ("sdxl/inpo", 8, 1024), ("sdxl/rankdpo", 8, 1024),
    ("sd15/seppo", 8, 2048), ("sd15/kto", 4, 4), ("sdxl/mapo_aaai", 8, 2048), ("sdxl/mapo_style", 4, 128),
    ("sdxl/mapo_safety", 4, 128), ("sd15/timestep_aware", 16, 2048), ("sdxl/timestep_aware", 16, 2048),
    ("text/llada_vrpo", 8, 64)])
def test_the_command_gives_the_published_batch(name, processes, pairs):
    path = ROOT / "configs" / f"{name}.yaml"
    assert f"--num_processes {processes} " in path.read_text().splitlines()[0]
    assert processes * groups_per_step(load_recipe(path)) == pairs


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_recipe(path):
    recipe = load_recipe(path)
    text = path.read_text()
    command = text.splitlines()[0]
    assert command.startswith("# ") and str(path.relative_to(ROOT)) in text.split("output_dir")[0]
    assert len(text.splitlines()) <= 45
    name = recipe.model.pretrained_model_name_or_path
    if "/" in name and not (ROOT / name).exists():  # a bare name is a folder of the user's
        assert re.fullmatch(r"[0-9a-f]{40}", recipe.model.revision or ""), "a hub id is pinned to a commit"


@pytest.mark.parametrize("path", BUILDS, ids=lambda p: p.name)
def test_build_recipe(path):
    spec, text = load_build(path), path.read_text()
    assert text.startswith(f"# diffalign build {path.relative_to(ROOT)}") and len(text.splitlines()) <= 45
    assert (ROOT / spec.prompts).is_file()
    for model in spec.models.values():
        name = model.pretrained_model_name_or_path
        assert (ROOT / name).exists() or re.fullmatch(r"[0-9a-f]{40}", model.revision or ""), "a hub id is pinned to a commit"


@pytest.mark.parametrize("path", REWRITERS, ids=lambda p: p.name)
def test_rewriter_recipe(path):
    spec, text = load_prompts("train", path).spec, path.read_text()
    assert text.startswith(f"# diffalign prompts evolve {path.relative_to(ROOT)}") and len(text.splitlines()) <= 60
    for model in (spec.rewriter, spec.generator):
        name = model.pretrained_model_name_or_path
        assert (ROOT / name).exists() or re.fullmatch(r"[0-9a-f]{40}", model.revision or ""), "a hub id is pinned to a commit"


@pytest.mark.parametrize("path", REWARDS, ids=lambda p: p.name)
def test_reward_recipe(path):
    recipe, text = load_reward_recipe(path), path.read_text()
    assert text.startswith(f"# diffalign train-reward {path.relative_to(ROOT)}") and len(text.splitlines()) <= 45
    local = (ROOT / recipe.backbone).exists() or recipe.backbone.startswith("runs/")   # made by the user
    assert local or re.fullmatch(r"[0-9a-f]{40}", recipe.backbone_revision or "")


# beta, learning rate, steps, warm-up, optimizer and scheduler, by the cards' sections on hyper-parameters
WARM = "constant_with_warmup"
AS_PUBLISHED = {
    "sd15/dpo": (5000, 1e-8 * 2048, 2000, 500, "adamw", WARM),
    "sdxl/dpo": (5000, 1e-8 * 2048, 2000, 200, "adafactor", WARM),
    "sd15/dpo_lora": (2 * 2500, 1e-5, 10_000, 0, "adamw", WARM),  # diffusers' beta has no factor 1/2
    "sd15/inpo": (2000, 1e-8 * 1024, 400, 200, "adamw", WARM),
    "sdxl/inpo": (5000, 1e-8 * 1024, 400, 200, "adafactor", WARM),
    "sd15/smpo": (2000, 1e-8 * 1024, 200, 100, "adamw", WARM),
    "sdxl/smpo": (5000, 1e-8 * 1024, 200, 100, "adafactor", WARM),
    "sd15/kto": (5000, 1e-7, 10_000, 1000, "adamw", WARM),
    "sd15/timestep_aware": (5000, 1e-8 * 2048, 2000, 500, "adamw", WARM),
    "sd15/mapo": (0.1, 1e-5, 2000, 0, "adamw", "constant"),
    "sdxl/mapo": (0.1, 1e-5, 2000, 0, "adamw", "constant"),
    "sdxl/mapo_aaai": (8, 1e-7, 2000, 0, "adamw_8bit", "cosine"),
    "sdxl/mapo_style": (64, 1e-7, 500, 0, "adamw_8bit", "cosine"),
    "sdxl/mapo_safety": (64, 1e-7, 200, 0, "adamw_8bit", "cosine"),
    "text/llada_vrpo": (0.2, 5e-7, 5469, 15, "adamw", "cosine"),  # 350,000 pairs / 64
    "music/audioldm2_dpo": (2000, 9.6e-7, 1174, 200, "adamw", "linear"),
    "music/ace_step_dpo": (2000, 1e-5, 2000, 100, "adamw", WARM),
}


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_numbers_as_published(name):
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    objective, train = recipe.objective, recipe.train
    beta, rate, *rest = AS_PUBLISHED[name]
    assert getattr(objective, "objective", objective).beta == beta and train.learning_rate == pytest.approx(rate)
    assert [train.max_train_steps, train.lr_warmup_steps, train.optimizer, train.lr_scheduler] == rest
    late = 0.95 if name in ("text/llada_vrpo", "music/ace_step_dpo") else 0.999
    assert (train.adam_weight_decay, train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.01, 0.9, late, 1e-8)
    assert train.max_grad_norm == 1.0


def test_parts_as_published():
    """What makes a method that method, by its card's section 5."""
    recipes = {name: load_recipe(ROOT / "configs" / f"{name}.yaml") for name in (
        "sd15/inpo", "sdxl/inpo", "sd15/smpo", "sdxl/smpo", "sd15/kto", "sd15/timestep_aware", "sdxl/timestep_aware",
        "sd15/seppo", "sdxl/rankdpo", "sd15/mapo", "text/llada_vrpo")}
    for base, steps in (("sd15", 5), ("sdxl", 10)):
        inpo, smpo = recipes[f"{base}/inpo"], recipes[f"{base}/smpo"]
        assert (inpo.likelihood.noise.steps, inpo.likelihood.noise.eta) == (10, 0.1)
        assert (smpo.likelihood.noise.steps, smpo.objective.labels.kappa) == (steps, 10)
        assert smpo.objective.labels.temperature == pytest.approx(0.28201571106910706 - 0.11543526500463486, abs=1e-4)
        assert inpo.data.caption_dropout == smpo.data.caption_dropout == 0.2
    kto = recipes["sd15/kto"].objective
    assert (kto.desirable / 2, kto.undesirable / 2) == (0.8, 0.2) and kto.utility == "sigmoid" and kto.baseline
    for base, gate in (("sd15", 0.005), ("sdxl", 0.002)):
        aware = recipes[f"{base}/timestep_aware"]
        assert (aware.likelihood.times.ratio, aware.likelihood.weighting.strength) == (0.9, 1.0)
        assert (aware.reference.every, aware.reference.gate, aware.reference.mix) == (32, gate, 1.0)
    seppo = recipes["sd15/seppo"]
    assert (seppo.reference.every, seppo.reference.keep, seppo.reference.pick) == (30, 7, "uniform")
    assert seppo.objective.flip == "sign" and seppo.train.max_train_steps == 7 * 30
    rank = recipes["sdxl/rankdpo"]
    assert rank.train.max_train_steps == 400 and type(rank.objective.labels).__name__ == "DCG"
    assert type(rank.objective.pairs).__name__ == "AllPairs"
    assert (recipes["sd15/mapo"].objective.snr, recipes["sd15/mapo"].objective.horizon) == (0.5, 1000)
    vrpo = recipes["text/llada_vrpo"]
    assert (vrpo.likelihood.draws, vrpo.likelihood.masks_per_time, vrpo.likelihood.form) == (8, 1, "count")
    assert vrpo.objective.sft == 0.05


@pytest.mark.parametrize("base, rank, lr, low, high, prompts", [
    ("sd15", 4, 6e-5, 0.35, 0.5, 5), ("sdxl", 64, 1e-5, 0.45, 0.6, 4)])
def test_lpo_as_released(base, rank, lr, low, high, prompts):
    """lpo_lrm.md section 5: K 4, eta 1, guidance 5, 20 steps from 951 to 1, beta 500, clip 0.1; 5 epochs of 4,000 prompts."""
    recipe = load_recipe(ROOT / "configs" / base / "lpo.yaml")
    source, sampler, train = recipe.source, recipe.source.sampler, recipe.train
    assert (recipe.model.lora.rank, train.learning_rate, train.train_batch_size) == (rank, lr, prompts)
    assert (source.threshold.low, source.threshold.high, source.candidates, source.continuation) == (low, high, 4, "random")
    assert (sampler.eta, sampler.guidance_scale) == (1.0, 5.0) and sampler.timesteps == (*range(951, 0, -50), 0)
    assert len(source.forks()) == 20   # every step, the last from 1 to 0
    assert (recipe.objective.beta, recipe.objective.clip) == (500, 0.1)
    assert train.max_train_steps / source.updates * 4 * prompts == 5 * 4000
    assert source.judge.path == f"runs/{base}-lrm/latent_reward" and source.judge.time == "own"


@pytest.mark.parametrize("base, steps, warmup, pairs", [("sd15", 4000, 500, 128), ("sdxl", 8000, 1000, 32)])
def test_lrm_as_released(base, steps, warmup, pairs):
    recipe = load_recipe(ROOT / "configs" / base / "lrm.yaml")
    train, scores = recipe.train, recipe.likelihood
    assert (train.max_train_steps, train.lr_warmup_steps, 8 * groups_per_step(recipe)) == (steps, warmup, pairs)
    assert (train.learning_rate, train.adam_weight_decay, train.max_grad_norm, recipe.objective.beta) == (1e-5, 0.3, 1.0, 1)
    assert sorted(scores.times.timesteps) == list(range(1, 952, 50)) and scores.guidance_scale == 7.5
    assert recipe.data.ties == "soft" and recipe.model.lora is None and (scores.text_projection is None) == (base == "sdxl")


@pytest.mark.parametrize("base, rank, lr, children, block, gap, pairs, forks", [
    ("sd15", 4, 6e-5, 4, 1, 0.3, 40, 16), ("sdxl", 64, 1e-5, 2, 4, 0.4, 16, 4)])
def test_spo_as_released(base, rank, lr, children, block, gap, pairs, forks):
    """spo.md section 5: comparisons from timestep 751 on, beta 10, clip 0.1, eta 1, guidance 5, 10 epochs of 4,000 prompts."""
    recipe = load_recipe(ROOT / "configs" / base / "spo.yaml")
    source, sampler, train = recipe.source, recipe.source.sampler, recipe.train
    assert (recipe.model.lora.rank, train.learning_rate, 4 * groups_per_step(recipe)) == (rank, lr, pairs)
    assert (source.candidates, source.block, source.threshold.gap, source.continuation) == (children, block, gap, "random")
    assert len(source.forks()) == forks and sampler.timesteps[source.forks()[0]] == 751
    assert (sampler.eta, sampler.guidance_scale) == (1.0, 5.0) and sampler.timesteps == (*range(951, 0, -50), 0)
    assert (recipe.objective.beta, recipe.objective.clip) == (10, 0.1)
    assert train.max_train_steps / source.updates * pairs == 10 * 4000
    assert source.judge.reward.path == f"runs/{base}-spm/reward"


@pytest.mark.parametrize("base, lr, steps", [("sd15", 3e-6, 8000), ("sdxl", 1e-6, 7000)])
def test_spm_as_released(base, lr, steps):
    """spo.md 2a: all weights of a PickScore, weight decay 0.3, 500 steps of warm-up, guidance 5, ties one half."""
    recipe = load_reward_recipe(ROOT / "configs" / "rewards" / f"{base}_spm.yaml")
    assert (recipe.features, recipe.learning_rate, recipe.weight_decay, recipe.batch_size) == ("whole", lr, 0.3, 64)
    assert recipe.warmup_share == pytest.approx(500 / steps, rel=1e-3) and recipe.steps.guidance_scale == 5.0
    assert recipe.data.ties == "soft" and recipe.balance == "prompts" and recipe.head.hidden == 0
