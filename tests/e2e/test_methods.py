"""What has a state of its own continues exactly: moving references, past checkpoints, running means, samples of the model."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from diffalign.cli import main

from .. import ranks
from .test_main_job import apart, lora, metrics

DPO = {"kind": "dpo", "beta": 500}
WITH_STATE = {
    "gated": {"reference": {"kind": "moving", "every": 1, "gate": 0.5}},
    "soft": {"reference": {"kind": "moving", "every": 2, "mix": 0.5, "origin_share": 0.5}},
    "seppo": {"objective": {**DPO, "flip": "sign"}, "reference": {"kind": "past", "every": 1, "keep": 3},
              "source": {"kind": "semi_policy", "sampler": {"steps": 2}}},
    "online": {"source": {"kind": "online", "reward": "brightness", "k": 3, "sampler": {"steps": 2, "guidance_scale": 2.0}}},
    "kto": {"objective": {"kind": "kto", "beta": 500}},
    "bco": {"objective": {**DPO, "link": "bco", "centre": True}},
    "beta_dpo": {"objective": {**DPO, "dynamic": 0.6}},
    "inpo": {"likelihood": {"noise": {"kind": "inverted", "steps": 2, "eta": 0.1}, "sequence": "low_discrepancy"}},
    "full": {"reference": {"kind": "moving", "every": 1}, "lora": None},
}


def recipe(small, folder, with_lora=True, reference=None, source=None, likelihood=None, **sections):
    """``small`` only knows sections that the base recipe has."""
    import yaml
    file = small(folder, data={"validation": None}, evaluate=None, **sections)
    tree = yaml.safe_load(file.read_text())
    given = {"reference": reference, "source": source, "likelihood": likelihood}
    tree |= {name: value for name, value in given.items() if value}
    if not with_lora:
        tree["model"]["lora"] = None
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.mark.parametrize("name", WITH_STATE)
def test_resume_is_exact(small, tmp_path, name):
    """Four steps; then the last checkpoint and all that follows is taken away, and steps 3 and 4 run again."""
    sections = dict(WITH_STATE[name])
    file = recipe(small, tmp_path, with_lora=sections.pop("lora", True), **sections)
    assert main(["train", str(file)]) == 0
    run = tmp_path / "run"
    before, log = load_file(run / "checkpoint-4" / "weights.safetensors"), metrics(tmp_path)
    shutil.rmtree(run / "checkpoint-4")
    assert main(["train", str(file)]) == 0
    after = load_file(run / "checkpoint-4" / "weights.safetensors")
    assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)
    assert metrics(tmp_path) == log and [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]


def test_winners_alone_are_enough_for_seppo(small, tmp_path):
    """Unpaired data: the liked pictures are the winners; nothing else is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml
    sections = dict(WITH_STATE["seppo"])
    file = recipe(small, tmp_path, **sections)
    tree = yaml.safe_load(file.read_text())
    table = pq.read_table(tree["data"]["path"]).slice(0, 8)
    winner = [row["jpg_0"] if row["label_0"] > 0.5 else row["jpg_1"] for row in table.to_pylist()]
    pq.write_table(pa.table({"image": winner, "label": [1] * 7 + [0], "prompt": table["caption"]}), tmp_path / "liked.parquet")
    assert main(["train", str(file), f"data.path={tmp_path}/liked.parquet", "train.max_train_steps=2"]) == 0
    assert "flipped" in metrics(tmp_path)[-1] or any("flipped" in line for line in metrics(tmp_path))


def facts(small, tmp_path, *overrides, lora=True, reference=None, **sections):
    """train.json of a run with held-out data."""
    import yaml
    file = small(tmp_path, evaluate=None, **sections)
    tree = yaml.safe_load(file.read_text()) | ({"reference": reference} if reference else {})
    if not lora:
        tree["model"]["lora"] = None
    file.write_text(yaml.safe_dump(tree))
    assert main(["train", str(file), *overrides]) == 0
    return json.loads((tmp_path / "run" / "train.json").read_text())


def test_before_is_the_base_and_no_reference_that_has_moved(small, tmp_path):
    """A full fine-tune whose reference is the last policy: against that, training would have changed nothing."""
    moved = facts(small, tmp_path, lora=False, reference={"kind": "moving", "every": 1})["heldout"]
    (tmp_path / "frozen").mkdir()
    frozen = facts(small, tmp_path / "frozen", lora=False)["heldout"]
    base, = {run["likelihood_accuracy"]["before"]["value"] for run in (moved, frozen)}
    assert moved["before"] == base and moved["margin"] != 0
    assert moved["after"] == moved["likelihood_accuracy"]["after"]["value"] and "no fixed reference" in moved["of"]


def test_single_pictures_have_no_held_out_pairs(small, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml
    table = pq.read_table(yaml.safe_load(small(tmp_path).read_text())["data"]["path"]).slice(0, 12)
    pq.write_table(pa.table({"image": [row["jpg_0"] for row in table.to_pylist()], "label": [1, 0] * 6,
                             "prompt": table["caption"]}), tmp_path / "liked.parquet")
    data = {"path": str(tmp_path / "liked.parquet"), "validation": str(tmp_path / "liked.parquet")}
    found = facts(small, tmp_path, "train.validation_steps=1", "train.max_train_steps=2", data=data,
                  objective={"kind": "kto", "beta": 500})
    assert found["heldout"] is None and found["step"] == 2


def test_a_gate_needs_winners(small, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml
    table = pq.read_table(yaml.safe_load(small(tmp_path).read_text())["data"]["path"]).slice(0, 6)
    pq.write_table(pa.table({"image": table["jpg_0"], "label": [0] * 6, "prompt": table["caption"]}), tmp_path / "all.parquet")
    file = recipe(small, tmp_path, objective={"kind": "kto", "beta": 500}, reference={"kind": "moving", "gate": 0.5})
    assert main(["train", str(file), f"data.path={tmp_path}/all.parquet"]) == 2
    assert "reference.gate: the first 64 groups hold no winner" in capsys.readouterr().err


TOGETHER = {"objective": {**DPO, "dynamic": 0.6}, "reference": {"kind": "moving", "every": 2, "gate": 0.5},
            "source": {"kind": "online", "reward": "brightness", "k": 3, "sampler": {"steps": 2}},
            "likelihood": {"sequence": {"kind": "stratified", "strata": 4}}}


def test_neither_accumulation_nor_processes_matter(small, tmp_path):
    """A gate, running means, places in the run and samples of the policy: four pairs at once, one by one, in two processes."""
    runs = {"whole": {}, "accumulated": {"train_batch_size": 1, "gradient_accumulation_steps": 4},
            "two": {"train_batch_size": 2}}
    losses = {}
    for name, train in runs.items():
        (folder := tmp_path / name).mkdir()
        file = recipe(small, folder, train=train, **TOGETHER)
        if name == "two":
            ranks.together(main, ["train", str(file)], folder=folder)
        else:
            assert main(["train", str(file)]) == 0
        lines = [line for line in metrics(folder) if "loss" in line]
        losses[name] = [line["loss"] for line in lines]
        assert [line.get("reference_copied") for line in lines] == [None, 1.0, None, 1.0]
        assert apart(lora(folder), lora(tmp_path / "whole")) < 0.02
    assert losses["accumulated"] == pytest.approx(losses["whole"], abs=1e-4)
    assert losses["two"] == pytest.approx(losses["whole"], abs=1e-4)


def test_a_text_file_of_prompts_is_enough_online(small, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red ring on a blue background\na green disc on a white background\n" * 3)
    file = recipe(small, tmp_path, **WITH_STATE["online"])
    assert main(["train", str(file), f"data.path={tmp_path}/prompts.txt", "train.max_train_steps=2"]) == 0
    assert main(["train", str(file), f"data.path={tmp_path}/prompts.txt", "source=stored", f"output_dir={tmp_path}/no"]) == 2
    assert "has no pictures" in capsys.readouterr().err
