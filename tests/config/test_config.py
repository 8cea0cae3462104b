"""Recipes: what is accepted, what is refused, and in which words."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.cli import main
from diffalign.config import (
    Recipe,
    build_recipe,
    check_given_once,
    dump,
    load_build,
    load_evaluation,
    load_recipe,
    load_reward_recipe,
    parse_yaml,
)
from diffalign.errors import ConfigError, UserError
from diffalign.sampling.latents import Sampler

RECIPE = """
output_dir: runs/x
model: {pretrained_model_name_or_path: assets/tiny-sdxl, lora: {rank: 8}}
data: {path: pairs.parquet}
objective: {kind: dpo, beta: 2000, link: {kind: logistic, smoothing: 0.1}}
train: {learning_rate: 1e-5, max_train_steps: 10}
evaluate: {prompts: prompts.txt}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def refusal(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_component_is_its_own_config(path):
    recipe = load_recipe(path, ["objective.beta=5e3", "model.lora=null"])
    assert recipe.objective.beta == 5000 and recipe.objective.link.smoothing == 0.1
    assert recipe.model.lora is None and recipe.train.learning_rate == 1e-5


def test_a_written_tree_reads_back(path):
    for override in ("objective.link.kind=logistic", "objective={kind: mapo}", "objective={kind: sft}", "model.lora=null",
                     "objective={kind: regularized, sft: 0.5, objective: {kind: dpo, beta: 10}}",
                     "likelihood={weighting: {kind: elbo}, times: {kind: discrete, timesteps: [249, 499]}, draws: 2}"):
        recipe = load_recipe(path, [override])
        assert build_recipe(parse_yaml(dump(recipe), "dump")) == recipe


@pytest.mark.parametrize("override, words", [
    ("objective.beta=-1", "objective.beta: must be above 0, got -1"),
    ("objective.beta=0", "objective.beta: must be above 0"),
    ("objective.link.smothing=0.1", 'objective.link.smothing: unknown option for Logistic. Did you mean "smoothing"?'),
    ("objective.kind=dbo", 'objective.kind: no objective called \'dbo\'. Did you mean "dpo"?'),
    ("train.learnin_rate=1", 'train.learnin_rate: unknown option for TrainSpec. Did you mean "learning_rate"?'),
    ("train.learning_rate='1e-5'", "train.learning_rate: expected float, got the text"),
    ("train.max_train_steps=1.5", "train.max_train_steps: "),
    ("train.max_train_steps=true", "train.max_train_steps: expected int"),
    ("train.cpu=on", "train.cpu: expected bool"),
    ("train.max_train_steps=0", "train.max_train_steps: must be at least 1"),
    ("seed=12:30", "seed: "), ("seed=0o17", "seed: "),
    ("train.learning_rate=.nan", "train.learning_rate: "), ("train.learning_rate=.inf", "train.learning_rate: "),
    ("train.mixed_precision=bf32", "train.mixed_precision: "),
    ("data.ties=keep", "data.ties: "),
    ("likelihood.times={kind: discrete, timesteps: [249, '499']}", "likelihood.times.timesteps.1: expected int, got the text"),
    ("likelihood.times={kind: discrete, timesteps: [true]}", "likelihood.times.timesteps.0: expected int, got True"),
    ("evaluate={prompts: p.txt, strengths: [0.5, nan]}", "evaluate.strengths.1: expected float, got the text"),
    ("objective=3", "objective: expected a kind"),
    ("train.report_to=wandb", "train.report_to: expected a list, such as report_to=[wandb], got 'wandb'"),
    ("model.lora.target_modules=to_q", "model.lora.target_modules: expected a list, such as target_modules=[to_q]"),
    ("nonsense", "'nonsense': an override is key=value"), (".seed=1", "'.seed=1': an override is key=value"),
    ("train..cpu=true", "'train..cpu=true': an override is key=value"),
    ("data.path.x=1", "data.path: "),
    ("objective.link.smoothing=0.7", "objective.link.smoothing: must be at least 0 and below 0.5"),
    ("output_dr=runs/y", 'output_dr: unknown option for Recipe. Did you mean "output_dir"?'),
])
def test_refusals_name_the_path(path, override, words):
    assert words in refusal(path, override)


def test_an_option_given_twice_on_the_command_line_is_refused(path, capsys):
    """An unquoted {0..2} reaches us as three options, of which the last would win without a word. In Python it does."""
    def said(*words):
        assert main([*map(str, words)]) == 2
        return capsys.readouterr().err

    error = said("train", path, *(f"data.path=pairs-{i}.tar" for i in range(3)))
    assert error.startswith("diffalign: data.path: is given twice, the second time as 'data.path=pairs-1.tar'")
    assert "quotes" in error
    assert "train.cpu: is given twice" in said("plan", path, "train.cpu=true", "seed=1", " train.cpu =true")
    assert "objective.beta: is given before 'objective={kind: mapo}', which replaces it; give objective first" in said(
        "check", path, "objective.beta=5", "objective={kind: mapo}")
    assert "data: is given twice" in said("score", "scenes", "pairs.parquet", "data=others.parquet")
    check_given_once(["objective={kind: dpo, beta: 5}", "objective.beta=6", "rewards.scenes.a=1"], ["rewards", "data"])
    assert load_recipe(path, ["objective={kind: dpo, beta: 5}", "objective.beta=6", "objective.beta=7"]).objective.beta == 7


def test_a_tilde_is_the_home_folder(path, monkeypatch):
    """The shell leaves it alone behind data.path= and in a file; a folder called ~ is what nobody wants to remove."""
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(path, ["output_dir=~/runs", "data.path=~/a.parquet", "data.cache_dir=a/~/b"])
    assert (recipe.output_dir, recipe.data.path, recipe.data.cache_dir) == ("/home/me/runs", "/home/me/a.parquet", "a/~/b")


@pytest.mark.parametrize("load, recipe, owner", [
    (load_recipe, "build/tiny.yaml", "build"), (load_evaluation, "build/tiny.yaml", "build"),
    (load_recipe, "rewards/tiny.yaml", "train-reward"), (load_recipe, "text/rewriter_tiny.yaml", "prompts"),
    (load_build, "quickstart.yaml", "train"), (load_reward_recipe, "tiny/dpo.yaml", "train")])
def test_a_recipe_of_another_command_is_named(load, recipe, owner):
    with pytest.raises(ConfigError, match=rf"unknown option for \w+\. .*`diffalign {owner}`"):
        load(f"configs/{recipe}")


def test_options_that_do_not_fit_together(path):
    assert refusal(path, "data.layout=unpaired").startswith("data.layout:")
    assert refusal(path, "data.layout=pickapic", "objective.labels=dcg").startswith("data.layout:")


@pytest.mark.parametrize("place, overrides", [
    ("likelihood.weighting: MaPO", ["objective=mapo", "likelihood.weighting=elbo"]),
    ("likelihood.weighting: SFT", ["objective={kind: regularized, objective: sft}", "likelihood.weighting=min_snr"]),
    ("reference.kind: MaPO", ["objective=mapo", "reference=moving"]),
    ("reference.kind: Diffusion-DPO", ["objective.reference_free=true", "reference=past"]),
    ("reference.kind: past", ["reference=past", "model.lora=null"]),
    ("data.caption_dropout:", ["source={kind: online, reward: scenes}", "data.caption_dropout=0.1"])])
def test_options_without_effect_are_refused(path, place, overrides):
    assert refusal(path, *overrides).startswith(place)


def test_options_that_look_alike_and_have_one(path):
    for overrides in (["objective={kind: regularized, objective: mapo, origin: 1}", "likelihood.weighting=elbo"],
                      ["objective=kto", "likelihood.weighting=elbo"], ["objective=mapo", "likelihood.times=geometric"],
                      ["objective=mapo", "reference=past", "source=semi_policy"],
                      ["source=semi_policy", "data.caption_dropout=0.1"]):
        load_recipe(path, overrides)


def test_betas_are_told_in_one_unit(path):
    """diffusion_kto.md 2c: KTO's beta acts per sample like a DPO beta of twice its size: 5000 is kappa 5000."""
    from diffalign.run.words import betas
    for objective, words in (("{kind: dpo, beta: 5000}", "factor 1/2) = kappa 2500 "),
                             ("{kind: kto, beta: 5000}", "factor 1) = kappa 5000 "),
                             ("{kind: regularized, objective: {kind: kto, beta: 1000}}", "factor 1) = kappa 1000 ")):
        line, = betas(load_recipe(path, [f"objective={objective}"]), 16384)
        assert words in line
    assert not betas(load_recipe(path, ["objective=mapo"]), 16384)


def test_missing_options_and_files(path, tmp_path):
    path.write_text("output_dir: x\n")
    assert refusal(path) == "model: is missing"
    assert 'Did you mean' in refusal(tmp_path / "recipes.yaml")
    assert "no such recipe" in refusal(tmp_path / "nothing_like_it")


@pytest.mark.parametrize("text", [
    "a: &x 1\nb: *x\n", "a: 1\na: 2\n", "!!python/object/apply:os.system ['true']\n", "- 1\n- 2\n", "a: [\n", "\x00", "",
    "a: " + "[" * 5000, "? [1, 2]\n: 3\n", "<<: {a: 1}\n", "a: !!binary zzz\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n", "x" * 2_000_000,
])
def test_hostile_yaml_is_refused(path, text):
    path.write_text(text)
    refusal(path)


def test_typos_find_their_key(path):
    """One-edit typos of every option of every section: the right suggestion in at least 95 %."""
    rng, right, total = random.Random(0), 0, 0
    for section, cls in (("train", "TrainSpec"), ("data", "DataSpec"), ("model", "ModelSpec"), ("evaluate", "EvaluateSpec")):
        spec = type(getattr(load_recipe(path), section))
        assert spec.__name__ == cls
        names = [f.name for f in dataclasses.fields(spec) if len(f.name) > 3]
        for name in names:
            i = rng.randrange(len(name))
            typo = rng.choice([name[:i] + name[i + 1:], name[:i] + "q" + name[i:], name[:i] + "q" + name[i + 1:]])
            if typo in names:
                continue
            total += 1
            right += f'Did you mean "{name}"?' in refusal(path, f"{section}.{typo}=1")
    assert total > 50 and right / total >= 0.95


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_recipes_never_trace(data):
    """A recipe or one line; nothing else."""
    text = data.draw(st.sampled_from([RECIPE]))
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(text)))
        spice = st.sampled_from(["{", "}", "[", ":", "- ", "\n", "null", "1e999", "~", "!!", "&a", "*a"])
        piece = data.draw(st.one_of(st.text(max_size=3), spice))
        text = text[:i] + piece + text[i + data.draw(st.integers(0, 3)):]
    try:
        tree = parse_yaml(text, "mutant")
        assert isinstance(build_recipe(tree) if isinstance(tree, dict) else None, Recipe | None)
    except UserError as error:
        assert str(error)


def test_options_complete_the_fields_own_default(path):
    """The sampler of ``stepwise`` is ancestral unless said otherwise, however little is said of it."""
    step = ["source={kind: stepwise, judge: {kind: latent, path: reward}}", "likelihood=transitions"]
    assert load_recipe(path, [*step, "source.sampler.steps=10"]).source.sampler == Sampler(solver="ancestral", steps=10)
    assert load_recipe(path, [*step, "source.sampler={solver: lcm}"]).source.sampler == Sampler(solver="lcm")
    assert "ddim is deterministic" in refusal(path, *step, "source.sampler.solver=ddim")
    assert load_recipe(path, ["source={kind: semi_policy, sampler: {steps: 10}}"]).source.sampler == Sampler(steps=10)
