"""Each fault gets one clear line and exit code 2, before anything is half-written (issue: bad input)."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from diffalign.cli import main
from diffalign.train.checkpoint import claimed

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "tiny-sdxl"


def png(value=0) -> bytes:
    import io
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(path: Path, rows=4, label=1.0, broken=None, **columns):
    table = {"jpg_0": [png(10 + i) for i in range(rows)], "jpg_1": [png(100 + i) for i in range(rows)],
             "label_0": [label] * rows, "caption": [f"a red ring on a blue background {i}" for i in range(rows)], **columns}
    if broken is not None:
        table["jpg_0"][broken] = b"this is no picture"
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path)
    return path


@pytest.fixture
def recipe(tmp_path):
    """A tree that trains two steps; tests spoil one thing."""
    tree = {"output_dir": str(tmp_path / "run"), "model": {"pretrained_model_name_or_path": str(MODEL), "lora": {"rank": 2}},
            "data": {"path": str(write_pairs(tmp_path / "pairs.parquet"))}, "objective": {"kind": "dpo", "beta": 100},
            "train": {"max_train_steps": 2, "train_batch_size": 2, "mixed_precision": "no", "cpu": True}}
    file = tmp_path / "recipe.yaml"

    def run(*overrides, command="train"):
        file.write_text(yaml.safe_dump(tree))
        return main([command, str(file), *overrides])
    run.tree = tree
    return run


def refused(capsys, code, *words):
    error = capsys.readouterr().err.strip().splitlines()
    line = [text for text in error if text.startswith("diffalign: ")]
    assert code == 2, error
    assert len(line) == 1 and "Traceback" not in "\n".join(error)
    for word in words:
        assert word in line[0], line[0]
    return line[0]


def test_missing_model_folder(recipe, capsys, tmp_path):
    refused(capsys, recipe(f"model.pretrained_model_name_or_path={tmp_path}/nothing"), "nothing")


def test_a_name_steers_no_terminal(recipe, capsys, tmp_path):
    """Escape sequences in the names of an archive's members, and line ends: one plain line."""
    import tarfile
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a\x1b[2J\nb\x9b.pth"))
    line = refused(capsys, recipe(f"data.path={tmp_path}/t.tar", command="check"), "t.tar: holds a\ufffd[2J b\ufffd.pth, and")
    assert line.isprintable()


def test_pickle_weights(recipe, capsys, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(MODEL, folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.bin"))
    refused(capsys, recipe(f"model.pretrained_model_name_or_path={folder}"), "pickle", "unet")


def test_not_a_pipeline(recipe, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(capsys, recipe(f"model.pretrained_model_name_or_path={tmp_path}/empty"), "model_index.json")


def test_unsupported_denoiser(recipe, capsys, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(MODEL, folder)
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(index.replace("StableDiffusionXLPipeline", "WuerstchenDecoderPipeline"))
    refused(capsys, recipe(f"model.pretrained_model_name_or_path={folder}"), "Wuerstchen")


def test_unknown_key_and_bad_beta(recipe, capsys):
    refused(capsys, recipe("train.lerning_rate=1"), "train.lerning_rate", "learning_rate")
    refused(capsys, recipe("objective.beta=0"), "objective.beta", "above 0")


def test_no_preference_column(recipe, capsys, tmp_path):
    path = write_pairs(tmp_path / "bare.parquet", label_0=None)
    refused(capsys, recipe(f"data.path={path}"), "bare.parquet", "label")


def test_empty_data_set(recipe, capsys, tmp_path):
    refused(capsys, recipe(f"data.path={write_pairs(tmp_path / 'none.parquet', rows=0)}"), "none.parquet")


def test_all_rows_tied(recipe, capsys, tmp_path):
    refused(capsys, recipe(f"data.path={write_pairs(tmp_path / 'ties.parquet', label=0.5)}"), "tie")


def test_image_that_is_no_image(recipe, capsys, tmp_path):
    path = write_pairs(tmp_path / "broken.parquet", broken=2)
    refused(capsys, recipe(f"data.path={path}"), "row 2", "jpg_0")
    assert recipe(f"data.path={path}", "data.bad_rows=skip") == 0


def test_missing_data(recipe, capsys, tmp_path):
    refused(capsys, recipe(f"data.path={tmp_path}/gone.parquet"), "gone.parquet")


def test_checkpoint_of_another_config(recipe, capsys):
    assert recipe() == 0
    refused(capsys, recipe("train.learning_rate=0.5", "train.max_train_steps=3"), "train.learning_rate", "0.5")


def test_checkpoint_of_another_base_model(recipe, capsys, tmp_path):
    assert recipe() == 0
    folder = tmp_path / "twin"
    shutil.copytree(MODEL, folder)
    from safetensors.torch import load_file, save_file
    file = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] * 1.001}, file)
    shutil.rmtree(MODEL.parent / "nothing", ignore_errors=True)
    moved = tmp_path / "old"
    shutil.move(str(tmp_path / "run"), moved)
    # same recipe text, other weights under the same path
    recipe.tree["model"]["pretrained_model_name_or_path"] = str(tmp_path / "base")
    shutil.copytree(MODEL, tmp_path / "base")
    assert recipe() == 0
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(folder, tmp_path / "base")
    refused(capsys, recipe("train.max_train_steps=3"), "base")


def test_output_folder_not_writable(recipe, capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    refused(capsys, recipe(f"output_dir={blocker}/run"), "file")
    assert blocker.read_text() == "in the way"


def test_disk_full_while_saving(recipe, capsys, tmp_path, monkeypatch):
    assert recipe("train.checkpointing_steps=1") == 0
    kept = tmp_path / "run" / "checkpoint-2"
    before = {file.name: file.read_bytes() for file in kept.iterdir() if file.is_file()}
    from diffalign.train import checkpoint

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "_write", full)
    refused(capsys, recipe("train.checkpointing_steps=1", "train.max_train_steps=4"), "checkpoint")
    assert {file.name: file.read_bytes() for file in kept.iterdir() if file.is_file()} == before
    assert not list((tmp_path / "run").glob("checkpoint-3"))


def test_judge_and_prompts(recipe, capsys, tmp_path):
    refused(capsys, recipe(command="evaluate"), "evaluate")
    refused(capsys, recipe(f"evaluate={{prompts: {tmp_path}/no.txt, judge: scenes}}", command="evaluate"), "no.txt")
    (tmp_path / "p.txt").write_text("a red ring on a blue background\n")
    refused(capsys, recipe(f"evaluate={{prompts: {tmp_path}/p.txt, judge: scens}}", command="evaluate"), "scens", "scenes")
    refused(capsys, recipe(f"evaluate={{prompts: {tmp_path}/p.txt, judge: scenes}}", command="evaluate"), "train")


@pytest.mark.parametrize("command", ["evaluate", "grid"])
def test_two_evaluations_at_once(tmp_path, capsys, command):
    """The second would mix its pictures and its report with the first one's."""
    (tmp_path / "p.txt").write_text("a red ring on a blue background\n")
    file = tmp_path / "evaluation.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "cpu": True,
                                    "model": {"pretrained_model_name_or_path": str(MODEL)},
                                    "evaluate": {"prompts": str(tmp_path / "p.txt"), "models": {
                                        "same": {"pretrained_model_name_or_path": str(MODEL)}}}}))
    (tmp_path / "out").mkdir()
    with claimed(tmp_path / "out"):
        refused(capsys, main([command, str(file)]), "another run is at work", "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("override, words", [
    ("model.fuse_lora=/no/such/lora", ["model.fuse_lora", "no such file"]),
    (f"model.fuse_lora={MODEL / 'unet' / 'diffusion_pytorch_model.safetensors'}", ["model.fuse_lora", "holds no LoRA"]),
    ("model.fuse_lora=''", ["model.fuse_lora", "is empty"]),
    ("evaluate.scheduler=LCM", ["evaluate.scheduler", '"LCM"', 'Did you mean "LCMScheduler"?']),
    ("evaluate.scheduler=FlowMatchEulerDiscreteScheduler", ["evaluate.scheduler", "is not for this model"]),
    ("evaluate={prompts: PROMPTS, scheduler: LCMScheduler, num_inference_steps: 51}", ["evaluate.scheduler", "50"]),
    ("evaluate={prompts: PROMPTS, scheduler: LCMScheduler, timestep_spacing: leading}", ["evaluate.timestep_spacing"]),
    ("evaluate.height=1000000", ["evaluate.height", "at most 16384", "1000000"]),
    ("evaluate.width=0", ["evaluate.width", "at least 8"]),
    ("data.resolution=1000000", ["data.resolution", "at most 16384"]),
])
@pytest.mark.parametrize("command", ["train", "check", "evaluate"])
def test_few_step_options(recipe, tmp_path, capsys, monkeypatch, command, override, words):
    """Found before a model is loaded or a file is written, whatever the command."""
    from diffusers import ModelMixin

    monkeypatch.setattr(ModelMixin, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded a model"))
    (tmp_path / "prompts.txt").write_text("a red ring on a blue background\n")
    recipe.tree["evaluate"] = {"prompts": str(tmp_path / "prompts.txt")}
    refused(capsys, recipe(override.replace("PROMPTS", str(tmp_path / "prompts.txt")), command=command), *words)
    assert not list((tmp_path / "run").glob("*"))


TURBO = "[999, 749, 499, 249]"
STEPWISE = ("likelihood=transitions", "source={kind: stepwise, judge: {kind: predicted_image, reward: scenes}}")


@pytest.mark.parametrize("overrides, words", [
    (["likelihood={times: {kind: discrete, timesteps: [249, 999]}}"],
     ["likelihood.times.timesteps", "was not distilled", "fuse_lora"]),
    ([f"source={{kind: semi_policy, sampler: {{timesteps: {TURBO}}}}}"], ["source.sampler.timesteps", "was not distilled"]),
    (["likelihood=transitions"], ["likelihood.kind", "source.kind=online"]),
    (["likelihood=transitions", "source={kind: online, reward: scenes}"], ["source.sampler.solver", "ddim", "eta 0"]),
    (["source={kind: stepwise, judge: {kind: predicted_image, reward: scenes}}"], ["likelihood.kind", "transitions"]),
    ([*STEPWISE, "source.sampler.solver=ddim"], ["source", "eta 0", "no density"]),
    ([*STEPWISE, "source.sampler={solver: ancestral, steps: 3}", "source.block=4"], ["source", "a comparison needs 4 steps"]),
    ([*STEPWISE, "source.push=0.1"], ["source.push", "differentiable"]),
    (["source={kind: online, reward: scens}"], ["scens", "scenes"]),
    (["source={kind: online, reward: scenes, k: 1}"], ["source.k", "at least 2"]),
    (["objective.labels=dcg"], ["data.layout", "scores"]),
    (["objective={kind: dpo, beta: 1, labels: soft_margin}", "source.kind=semi_policy"], ["data.layout", "scores"]),
    (["objective={kind: set_contrast, beta: 1}"], ["data.layout", "scores"]),
    (["objective={kind: dpo, beta: 1, reference_free: true, flip: sign}"], ["objective.flip", "reference"]),
    (["objective.clip=2"], ["objective.clip"]),
    (["reference={kind: moving, every: 0}"], ["reference.every"]),
    (["reference.kind=past", "model.lora=null"], ["reference", "model.lora"]),
    (["source.kind=semi_policy", "reference={kind: moving, origin_share: 0.5}"], ["reference.origin_share", "source.weights"]),
    (["source={kind: online, reward: scenes}", "data.random_flip=true"], ["data.random_flip"]),
    (["likelihood.sequence={kind: stratified, strata: 1}"], ["likelihood.sequence.strata"]),
    (["likelihood.noise={kind: inverted, eta: 2}"], ["likelihood.noise.eta"]),
    (["likelihood.noise.kind=invertd"], ["likelihood.noise", "inverted"]),
])
def test_methods_that_do_not_fit(recipe, tmp_path, capsys, monkeypatch, overrides, words):
    """Said before a model is loaded or a file is written, by both commands that read a whole recipe."""
    from diffusers import ModelMixin

    monkeypatch.setattr(ModelMixin, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded a model"))
    for command in ("train", "check"):
        refused(capsys, recipe(*overrides, command=command), *words)
        assert not list((tmp_path / "run").glob("*"))


def test_one_picture_a_group_where_pairs_are_needed(recipe, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    table = pa.table({"image": [row["jpg_0"] for row in rows], "label": [1] * len(rows), "prompt": ["a ring"] * len(rows)})
    pq.write_table(table, tmp_path / "single.parquet")
    line = refused(capsys, recipe(f"data.path={tmp_path}/single.parquet"), "data.layout", "one picture a group")
    assert "kto" in line  # what can be done with them
    assert not list((tmp_path / "run").glob("*"))


def test_rankings_with_ties_train_and_a_wrong_length_is_named(recipe, tmp_path, capsys):
    """Ties inside a ranking are data, not a fault: their own pair weighs nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    images = [[row["jpg_0"], row["jpg_1"], row["jpg_0"]] for row in rows]
    ranked = {"prompt": ["a ring"] * len(rows), "images": images}
    pq.write_table(pa.table({**ranked, "scores": [[1.0, 0.5, 1.0]] * len(rows)}), tmp_path / "ties.parquet")
    assert recipe(f"data.path={tmp_path}/ties.parquet", "objective={kind: dpo, beta: 1, pairs: all, labels: dcg}") == 0
    capsys.readouterr()
    pq.write_table(pa.table({**ranked, "scores": [[1.0, 0.5]] * len(rows)}), tmp_path / "short.parquet")
    code = recipe(f"data.path={tmp_path}/short.parquet", f"output_dir={tmp_path}/short")
    refused(capsys, code, "short.parquet", "row 0", "scores")


def test_what_cut_weights_cannot_do_is_said_before_training(recipe, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    (Path(recipe.tree["output_dir"]).parent / "prompts.txt").write_text("a red ring\n")
    prompts = str(Path(recipe.tree["output_dir"]).parent / "prompts.txt")
    refused(capsys, recipe(f"monitor.prompts={prompts}", "monitor.judge=scenes"), "monitor: ", "configs/accelerate/ddp.yaml")
    refused(capsys, recipe("train.optimizer=adafactor"), "train.optimizer: adafactor", "FSDP2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused(capsys, recipe(), "DeepSpeed", "configs/accelerate/zero2.yaml")
