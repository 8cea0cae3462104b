"""A small copy of the main job: the embedded model, 24 of its pairs, a few steps."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from .. import warm  # noqa: F401

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "tiny-sdxl"
DATA = ROOT / "assets" / "preferences"


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A function (folder, **sections) -> path of a recipe, over 24 training and 4 held-out pairs with one shared cache."""
    shared = tmp_path_factory.mktemp("small")
    pq.write_table(pq.read_table(DATA / "train.parquet").slice(0, 24), shared / "train.parquet")
    pq.write_table(pq.read_table(DATA / "validation.parquet").slice(0, 4), shared / "validation.parquet")
    prompts = (DATA / "heldout_prompts.txt").read_text().splitlines()[:6]
    (shared / "prompts.txt").write_text("\n".join(prompts))

    def recipe(folder: Path, **sections) -> Path:
        tree = {
            "output_dir": str(folder / "run"), "seed": 0,
            "model": {"pretrained_model_name_or_path": str(MODEL), "lora": {"rank": 4}},
            "data": {"path": str(shared / "train.parquet"), "validation": str(shared / "validation.parquet"),
                     "cache_dir": str(shared / "cache")},
            "objective": {"kind": "dpo", "beta": 500},
            "train": {"max_train_steps": 4, "train_batch_size": 4, "learning_rate": 1e-3, "mixed_precision": "no", "cpu": True,
                      "checkpointing_steps": 2, "logging_steps": 1},
            "evaluate": {"prompts": str(shared / "prompts.txt"), "judge": "scenes", "num_inference_steps": 2, "batch_size": 6,
                         "guidance_scale": 2.0, "grid_prompts": 2, "bootstrap_resamples": 200},
        }
        for name, values in sections.items():
            tree[name] = {**(tree.get(name) or {}), **values} if isinstance(values, dict) and name != "objective" else values
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return recipe
