"""``train-reward`` and ``rich``: each fault gets one clear line and exit code 2, and leaves no half-written result."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from diffalign import run
from diffalign.cli import main
from diffalign.errors import UserError
from diffalign.train.checkpoint import claimed

from ..building.test_rich import spec
from .test_bad_input import MODEL, ROOT, refused, write_pairs

CLIP = ROOT / "assets" / "tiny-clip"
DPO = ROOT / "configs" / "tiny" / "dpo.yaml"


@pytest.fixture
def learn(tmp_path, capsys):
    """Runs ``train-reward`` on a recipe that would do; tests spoil one thing."""
    tree = {"output_dir": str(tmp_path / "out"), "backbone": str(CLIP), "epochs": 1, "device": "cpu",
            "data": {"path": str(write_pairs(tmp_path / "pairs.parquet")),
                     "validation": str(write_pairs(tmp_path / "held.parquet", caption=[f"held out {i}" for i in range(4)]))}}
    return runner(tmp_path, capsys, "train-reward", tree)


@pytest.fixture
def criticise(tmp_path, capsys):
    """The same with ``rich``; no service listens and no editor is there."""
    tree = {"output_dir": str(tmp_path / "out"), "data": str(write_pairs(tmp_path / "pairs.parquet")),
            "critic": {"kind": "chat", "url": "http://127.0.0.1:9/v1", "model": "vlm"},
            "instructor": {"kind": "chat", "url": "http://127.0.0.1:9/v1", "model": "vlm"},
            "editor": {"kind": "instruct_pix2pix", "folder": str(tmp_path / "editor")}, "labeller": "brightness"}
    return runner(tmp_path, capsys, "rich", tree)


def runner(tmp_path, capsys, command, tree):
    file = tmp_path / "recipe.yaml"

    def run(*overrides):
        file.write_text(yaml.safe_dump(tree))
        return main([command, str(file), *overrides])
    run.tree, run.file = tree, file
    run.refused = lambda overrides, *words: refused(capsys, run(*overrides), *words)
    return run


def test_the_recipe_that_the_tests_spoil_is_good(learn):
    assert learn() == 0


@pytest.mark.parametrize("overrides, words", [
    (["data.path=gone.parquet"], ["gone.parquet"]),
    (["data.validation=gone.parquet"], ["gone.parquet"]),
    (["data.path=EMPTY"], ["empty.parquet"]),
    (["data.validation=EMPTY"], ["empty.parquet"]),
    (["data.path=BARE"], ["bare.parquet", "label"]),
    (["data.path=TIES"], ["tie"]),
    (["data.path=TIES", "data.ties=soft"], ["tie"]),
    (["data.validation=TIES"], ["tie"]),
    (["data.path=TEXT"], ["notes.txt"]),
    (["data.path=NOPARQUET"], ["no.parquet"]),
    (["data.validation=null", "data.validation_share=0.5", "data.path=ONE"], ["one.parquet"]),
    (["data.path=ONE", "stop_share=0.99"], ["stop_share"]),
    (["backbone=gone"], ["gone"]),
    (["backbone=RECIPE"], ["recipe.yaml"]),
    ([f"backbone={MODEL}"], ["tiny-sdxl", "model.safetensors"]),
    (["backbone=''"], ["backbone"]),
    (["backbone_revision=main"], ["revision"]),
    (["output_dir=''"], ["output_dir"]),
    (["output_dir=RECIPE"], ["output_dir", "recipe.yaml"]),
    (["device=tpu"], ["device", "tpu"]),
    (["device=cuda:99"], ["device", "cuda:99"]),
    (["batch_size=0"], ["batch_size"]),
    (["epochs=many"], ["epochs"]),
    (["compare=[scens]"], ["compare", "scens"]),
    (["head.kind=pal"], ["head"]),
    (["features=lora", "lora.target_modules=[]"], ["lora.target_modules"]),
    (["features=lora", "lora.rank=1000000"], ["lora.rank"]),
    (["learning_rate=.nan"], ["learning_rate"]),
], ids=" ".join)
def test_train_reward(learn, tmp_path, overrides, words):
    learn.refused([spelled(text, tmp_path) for text in overrides], *words)
    assert not (tmp_path / "out" / "reward").exists()


def spelled(text: str, folder: Path) -> str:
    """An override with the files that it names, made."""
    made = {"EMPTY": lambda: write_pairs(folder / "empty.parquet", rows=0),
            "BARE": lambda: write_pairs(folder / "bare.parquet", label_0=None),
            "TIES": lambda: write_pairs(folder / "ties.parquet", label=0.5, caption=[f"other {i}" for i in range(4)]),
            "ONE": lambda: write_pairs(folder / "one.parquet", caption=["one prompt"] * 4),
            "BROKEN": lambda: write_pairs(folder / "broken.parquet", broken=2),
            "PROMPTLESS": lambda: write_pairs(folder / "mute.parquet", caption=None),
            "NOTHING": lambda: (folder / "nothing").mkdir() or folder / "nothing",
            "EDITOR": lambda: editor(folder / "editor"),
            "RECIPE": lambda: folder / "recipe.yaml",
            "NOPARQUET": lambda: bytes_at(folder / "no.parquet", b"PAR1 and then nothing"),
            "TEXT": lambda: bytes_at(folder / "notes.txt", b"not a table\n")}
    name, equals, value = text.partition("=")
    return f"{name}={made[value]()}" if value in made else text


def editor(folder: Path) -> Path:
    """Looks like an instruction-editing pipeline until it is loaded."""
    shutil.copytree(MODEL, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "StableDiffusionXLInstructPix2PixPipeline"))
    return folder


def bytes_at(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_train_reward_into_a_folder_that_is_not_ours(learn, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    learn.refused([], "output_dir", "out")


def test_train_reward_into_a_folder_where_another_is_at_work(learn, tmp_path):
    (tmp_path / "out").mkdir()
    with claimed(tmp_path / "out"):
        learn.refused([], "another run is at work", "out")


@pytest.mark.parametrize("command", ["train-reward", "rich"])
def test_a_recipe_for_another_command(command, capsys):
    refused(capsys, main([command, str(DPO)]), "unknown option")


def test_one_prompt_only(learn, tmp_path):
    """With nothing to stop by, all epochs are trained; what is measured on one prompt has no interval, but is no error."""
    one = spelled("data.path=ONE", tmp_path)
    assert learn(one, "patience=0") == 0
    report = json.loads((tmp_path / "out" / "reward" / "reward.json").read_text())
    assert report["pairs"]["train"] == 4


@pytest.mark.parametrize("overrides, words", [
    ([], ["editor"]),
    (["editor.folder=EDITOR"], ["127.0.0.1:9"]),
    (["critic.url=ftp://x"], ["critic.url"]),
    (["critic=chat"], ["critic"]),
    (["critic.kind=chatty"], ["critic.kind", "chat"]),
    (["editor.folder=RECIPE"], ["recipe.yaml"]),
    ([f"editor.folder={MODEL}"], ["tiny-sdxl", "follows no edits"]),
    (["editor.folder=EDITOR", "editor.device=tpu"], ["device", "tpu"]),
    (["labeller=brightnes"], ["labeller", "brightness"]),
    (["output_dir=''"], ["output_dir"]),
    (["output_dir=RECIPE"], ["output_dir", "recipe.yaml"]),
    (["resolution=1000000"], ["resolution"]),
    (["max_records=0"], ["max_records"]),
    (["tie=.nan"], ["tie"]),
    (["least_change=2"], ["least_change"]),
], ids=" ".join)
def test_rich(criticise, tmp_path, overrides, words):
    criticise.refused([spelled(text, tmp_path) for text in overrides], *words)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


@pytest.mark.parametrize("overrides, words", [
    ("data=gone.parquet", "gone.parquet"), ("data=EMPTY", "empty.parquet"), ("data=NOPARQUET", "no.parquet"),
    ("data=TEXT", "notes.txt"), ("data=BROKEN", "row 2"), ("data=PROMPTLESS", "mute.parquet"), ("data=NOTHING", "nothing"),
])
def test_rich_data(tmp_path, overrides, words):
    """With stages that work: what is wrong with the data is said in one line too."""
    data = spelled(overrides, tmp_path).partition("=")[2]
    with pytest.raises(UserError, match=words) as caught:
        run.rich(spec(tmp_path, data))
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "pairs.jsonl").exists()
