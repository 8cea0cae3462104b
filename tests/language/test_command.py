"""``diffalign prompts evolve|train|rewrite`` from end to end, and what it says to bad input."""

import json
import shutil
from importlib import import_module

import pytest

from diffalign import cli, run
from diffalign.config import load_prompts
from diffalign.errors import ConfigError, DataError, ModelError

from .toy import REWRITER, ROOT, Stub, rewriter, task

RECIPE = str(ROOT / "configs" / "text" / "rewriter_tiny.yaml")


@pytest.fixture
def stub(monkeypatch):
    made = Stub()
    made.put_into(monkeypatch.setattr)
    return made


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder where all three were done, and what they returned and said."""
    folder, said, stub = tmp_path_factory.mktemp("rewriter"), [], Stub()
    with pytest.MonkeyPatch.context() as patch:
        stub.put_into(patch.setattr)
        facts = {action: run.prompts(task(folder, action, f"inputs={folder / 'heldout.jsonl'}"), printer=said.append)
                 for action in ("evolve", "train", "rewrite")}
    return folder, facts, said


def test_a_prompt_may_hold_what_other_files_end_lines_with(tmp_path):
    """U+2028, U+0085 and the like stand as they are in JSON, whose lines end with a newline alone."""
    module = import_module("diffalign.run.prompts")
    written = [{"prompt": "a\u2028b\x85c\x1cd", "text": "e"}, {"prompt": "f", "text": "g\u2029"}]
    module._write_rows(tmp_path / "rows.jsonl", written)
    assert module._read_rows(tmp_path / "rows.jsonl") == written


def test_the_whole_way(trained):
    folder, facts, said = trained
    out = folder / "out"
    assert facts["evolve"]["prompts"] == 8
    texts = rows(out / "evolve" / "texts.jsonl")
    assert len(texts) == 8 and all({"prompt", "meaning", "own", "texts"} <= row.keys() for row in texts)
    targets = rows(out / "evolve" / "sft.jsonl")
    assert facts["evolve"]["targets"] == len(targets) > 0 and all(row["score"] > row["own_score"] for row in targets)
    pairs = rows(out / "dpo-1" / "candidates" / "pairs.jsonl")
    told = {row["prompt"] for row in rows(folder / "users.jsonl")[8:]}
    assert pairs and {row["prompt"] for row in pairs} <= told  # DPO's prompts are not SFT's
    assert all(row["chosen_score"] > row["rejected_score"] for row in pairs)
    assert (out / "dpo-1" / "model" / "model.safetensors").is_file() and (out / "rewriter.json").is_file()
    assert [row["prompt"] for row in rows(out / "rewritten.jsonl")] == [r["prompt"] for r in rows(folder / "heldout.jsonl")]
    measured = facts["rewrite"]["measured"]
    assert [*measured] == ["untrained", "sft", "dpo-1"] and measured["sft"]["prompts"] == 6
    assert any("dpo-1: judge" in line for line in said)


def test_the_reported_scores_are_those_of_the_pictures(trained):
    """measured.jsonl against the checker, by hand: the stand-in draws what a text says, the judge reads the meaning."""
    folder, facts, _ = trained
    table = rows(folder / "out" / "measured.jsonl")
    measured, user = facts["rewrite"]["measured"], [row["user"][0] for row in table]
    for name in ("untrained", "sft", "dpo-1"):
        assert measured[name]["aligned_score"] == pytest.approx(sum(row[name]["scores"][0] for row in table) / len(table))
        assert measured[name]["base_score"] == pytest.approx(sum(user) / len(user))


def test_again_does_nothing_twice(trained, stub):
    folder, facts, _ = trained
    model = folder / "out" / "dpo-1" / "model" / "model.safetensors"
    before, said = model.stat().st_mtime_ns, []
    assert run.prompts(task(folder, "evolve"), printer=said.append) == facts["evolve"]
    run.prompts(task(folder, "train"), printer=said.append)
    assert stub.drawn == [] and model.stat().st_mtime_ns == before


def test_another_recipe_does_not_go_on(trained, stub):
    folder, _, _ = trained
    with pytest.raises(ConfigError, match="seeds: is 2, but what is there was begun with 1"):
        run.prompts(task(folder, "evolve", "seeds=2"))
    with pytest.raises(ConfigError, match="options.learning_rate: is 0.5, but what is there was begun with 0.001"):
        run.prompts(task(folder, "train", "sft.learning_rate=0.5"))


def test_thresholds_may_change_without_drawing_again(trained, stub, tmp_path):
    folder, facts, _ = trained
    shutil.copytree(folder, tmp_path / "copy")
    strict = run.prompts(task(tmp_path / "copy", "evolve", "evolve.score.above={checker: 1.0}"))
    assert stub.drawn == [] and strict["targets"] == 0 < facts["evolve"]["targets"]


def test_a_killed_training_goes_on(trained, stub):
    """The stage's mark and model are gone, its checkpoints are not: the same model comes out."""
    folder, _, _ = trained
    stage = folder / "out" / "sft"
    before = (stage / "model" / "model.safetensors").read_bytes()
    (stage / "stage.json").unlink()
    shutil.rmtree(stage / "model")
    run.prompts(task(folder, "train"))
    assert (stage / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("action, overrides, error, match", [
    ("evolve", ["prompts=nowhere.txt"], DataError, "prompts: cannot read nowhere.txt"),
    ("evolve", ["evolve.prompts=16"], ConfigError, "evolve.prompts: 16 of 16 prompts leave none for DPO"),
    ("evolve", ["rewriter.pretrained_model_name_or_path=" + str(ROOT / "assets" / "tiny-clip")], ModelError,
     "no causal language model"),
    ("evolve", ["generator.pretrained_model_name_or_path=" + REWRITER], ModelError, "generator: .*not a diffusers pipeline"),
    ("train", [], DataError, "run `diffalign prompts evolve` with the same recipe first"),
    ("rewrite", [], DataError, "holds no trained rewriter"),
    ("rewrite", ["measure=null"], ConfigError, "inputs: is missing")])
def test_bad_input(stub, tmp_path, action, overrides, error, match):
    with pytest.raises(error, match=match):
        run.prompts(task(tmp_path, action, *overrides))


@pytest.mark.parametrize("overrides, match", [
    (["rewards={}"], "rewards: is empty"), (["seeds=0"], "seeds: must be above 0"),
    (["dpo.candidates=1"], "candidates: must be"),
    (["evolve.score={weights: {beauty: 1}}"], "evolve.score names the reward 'beauty'"),
    (["dpo.loss_weights=[1.0, 2.0]"], "loss_weights: must be as many as loss_type"),
    (["rewriter.temperature=0"], "temperature: must be above 0"), (["evolve.proposer=oracle"], "no proposer called 'oracle'")])
def test_bad_options(overrides, match):
    with pytest.raises(ConfigError, match=match):
        load_prompts("evolve", RECIPE, overrides)


def test_held_out_prompts_are_not_learned_from(stub, tmp_path):
    with pytest.raises(DataError, match="6 of the prompts in .*, which is to measure what is learned"):
        run.prompts(task(tmp_path, "evolve", f"prompts={tmp_path / 'heldout.jsonl'}", "evolve.prompts=4"))


def test_a_folder_with_code_or_without_a_template(tmp_path):
    folder = tmp_path / "code"
    shutil.copytree(REWRITER, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(ModelError, match="auto_map, code that comes with the model"):
        rewriter(folder).check()
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        rewriter(folder).check()


def test_a_prompt_longer_than_the_model(tmp_path):
    from diffalign.language.rewriter import Writer

    with pytest.raises(DataError, match="has 83 tokens with the instruction, and the language model reads 64"):
        Writer(rewriter()).best(["a red ring", "red " * 80])


def test_the_command_line(capsys):
    assert cli.main(["prompts", "evolv", RECIPE]) == 2
    assert capsys.readouterr().err == ('diffalign: prompts: no action called \'evolv\'. Did you mean "evolve"? '
                                       "Known: evolve, train, rewrite.\n")
