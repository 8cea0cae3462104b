"""SFT and DPO through TRL on the tiny language model: what is learned, what is the reference, what is left behind."""

import json
import math
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import ConfigError, DataError
from diffalign.language import tuning
from diffalign.language.rewriter import Writer
from diffalign.language.spec import DpoSpec, Lora, Tuning

from .toy import REWRITER, rewriter, users

QUICK = {"batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, "warmup": 0.0}
ROWS = [{"prompt": row["prompt"], "completion": row["meaning"]} for row in users(8)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["meaning"], "rejected": row["prompt"]} for row in users(8)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is sent or fetched: no telemetry, no model."""
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def losses(facts: dict) -> list[float]:
    return [entry["loss"] for entry in facts["log"] if "loss" in entry]


def test_sft_learns_and_merges(tmp_path):
    source = rewriter()
    facts = tuning.sft(source, ROWS, Tuning(epochs=3, learning_rate=5e-3, **QUICK), tmp_path, seed=0, cpu=True)
    assert facts["rows"] == 8 and facts["steps"] == 6
    assert losses(facts)[-1] < losses(facts)[0]
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    merged, before = load_file(tmp_path / "model" / "model.safetensors"), load_file(f"{REWRITER}/model.safetensors")
    assert merged.keys() == before.keys()  # no adapter is left: stock transformers reads it
    changed = {name for name in merged if not torch.equal(merged[name], before[name].float())}
    assert changed and all("_proj" in name for name in changed)


def test_the_loss_is_of_the_answer_alone(tmp_path):
    """The first loss is the mean over the answer's tokens and the end, by hand."""
    source, rows = rewriter(), ROWS[:1]
    facts = tuning.sft(source, rows, Tuning(epochs=1, **QUICK), tmp_path, seed=0, cpu=True)
    tokenizer, model = source.tokenizer(), source.model()
    ids = [tokenizer.apply_chat_template(source.messages(rows[0]["prompt"], answer), add_generation_prompt=answer is None,
                                         return_dict=True)["input_ids"] for answer in (None, rows[0]["completion"])]
    assert ids[1][:len(ids[0])] == ids[0] and ids[1].count(tokenizer.bos_token_id) == 1
    assert ids[1][-1] == tokenizer.eos_token_id
    with torch.no_grad():
        logs = model(torch.tensor([ids[1]])).logits.log_softmax(-1)[0]
    by_hand = -sum(logs[place - 1, ids[1][place]].item() for place in range(len(ids[0]), len(ids[1])))
    assert losses(facts)[0] == pytest.approx(by_hand / (len(ids[1]) - len(ids[0])), abs=1e-4)


def test_dpo_starts_at_ln_2_against_the_stage_before(tmp_path):
    """On a merged SFT model, whose reference is itself and not the model before SFT."""
    source = rewriter()
    tuning.sft(source, ROWS, Tuning(epochs=3, learning_rate=5e-3, **QUICK), tmp_path / "sft", seed=0, cpu=True)
    after = replace(source, pretrained_model_name_or_path=str(tmp_path / "sft" / "model"))
    facts = tuning.dpo(after, PAIRS, DpoSpec(epochs=3, learning_rate=5e-3, **QUICK), tmp_path / "dpo", seed=0, cpu=True)
    assert losses(facts)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(facts)[-1] < 0.95 * math.log(2)
    assert facts["log"][-2]["rewards/margins"] > 0


# First losses where policy and reference are one, beta 0.1; exo_pair by hand, e = 0.1: 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1)
@pytest.mark.parametrize("names, weights, smoothing, first", [
    (("sigmoid",), None, 0.0, math.log(2)), (("hinge",), None, 0.0, 1.0), (("ipo",), None, 0.0, 25.0),
    (("robust",), None, 0.1, math.log(2)), (("apo_zero",), None, 0.0, 1.0), (("sppo_hard",), None, 0.0, 50.0),
    (("exo_pair",), None, 0.1, 0.5108), (("sigmoid", "bco_pair"), (0.8, 0.2), 0.0, 0.8 * math.log(2) + 0.4 * math.log(2))])
def test_losses_of_trl_where_they_start(tmp_path, names, weights, smoothing, first):
    spec = DpoSpec(epochs=0.5, loss_type=names, loss_weights=weights, label_smoothing=smoothing, **QUICK)
    facts = tuning.dpo(rewriter(), PAIRS, spec, tmp_path, seed=0, cpu=True)
    assert losses(facts)[0] == pytest.approx(first, abs=2e-3)


@pytest.mark.parametrize("names", [("sigmoid",), ("hinge", "sft")])
def test_label_smoothing_that_trl_would_ignore_is_refused(names):
    """trl_reuse.md trap 2: the run would be plain DPO, without a word."""
    with pytest.raises(ValueError, match="label_smoothing is ignored by TRL's .*robust"):
        DpoSpec(loss_type=names, label_smoothing=0.1)
    assert DpoSpec(loss_type=(*names, "robust"), label_smoothing=0.1).label_smoothing == 0.1


def test_a_killed_run_goes_on_from_the_last_checkpoint(tmp_path):
    spec = Tuning(epochs=4, learning_rate=5e-3, checkpointing_steps=3, **QUICK)
    whole = tuning.sft(rewriter(), ROWS, spec, tmp_path / "whole", seed=0, cpu=True)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole" / "checkpoints", killed / "checkpoints")
    (killed / "checkpoints" / "checkpoint-8" / "trainer_state.json").unlink()  # as if it had died while it wrote that one
    assert json.loads((killed / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
    rest = tuning.sft(rewriter(), ROWS, spec, killed, seed=0, cpu=True)
    assert rest["steps"] == whole["steps"] == 8
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_the_pad_token_of_the_model_is_its_own_again(tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(REWRITER, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        tree = json.loads((folder / name).read_text())
        tree.pop("pad_token_id", None), tree.pop("pad_token", None)
        (folder / name).write_text(json.dumps(tree))
    tuning.sft(rewriter(folder), ROWS[:4], Tuning(epochs=1, **QUICK), tmp_path / "out", seed=0, cpu=True)
    after = rewriter(tmp_path / "out" / "model")
    assert after.model().config.pad_token_id is None and after.model().generation_config.pad_token_id is None
    assert Writer(after).best(["a red box on blue", "ring"])


def test_user_errors(tmp_path):
    with pytest.raises(ConfigError, match="lora.target_modules: .* has no layer called c_attn"):
        tuning.sft(rewriter(), ROWS, Tuning(lora=Lora(target_modules=("c_attn",)), **QUICK), tmp_path, seed=0, cpu=True)
    with pytest.raises(ConfigError, match="dpo.loss_type: TRL refuses it"):
        tuning.dpo(rewriter(), PAIRS, DpoSpec(loss_type=("simpo",), **QUICK), tmp_path, seed=0, cpu=True)
    with pytest.raises(DataError, match="begin token <bos> stands more than once"):
        tuning.sft(rewriter(), [{"prompt": "<bos> a box", "completion": "a"}], Tuning(**QUICK), tmp_path, seed=0, cpu=True)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(ConfigError, match=r'pip install "diffalign\[text\]"'):
        tuning.trl()


def test_the_fields_that_are_set_exist():
    """A library of another version that renames an option must not be found out after an hour of drawing."""
    library = tuning.trl()
    for config in (library.SFTConfig, library.DPOConfig):
        assert {*tuning._common(Tuning(), __import__("pathlib").Path("x"), 0, True)} <= {*config.__dataclass_fields__}
