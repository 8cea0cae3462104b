"""report.json, report.html, grid.png and README.md: complete, honest, self-contained, and safe with a stranger's words."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from diffalign.errors import ResourceError
from diffalign.evaluate import EvaluateSpec, Run, write_card, write_report
from diffalign.evaluate.compare import compare
from diffalign.evaluate.curves import draw, drawings, read_metrics
from diffalign.evaluate.files import clean, redact, write
from diffalign.rewards.scenes import SceneChecker, parse

from .scenes import prompts, side

HOSTILE = [
    '<script>alert("x")</script>',
    '"><img src=x onerror=alert(1)>',
    "</article></main><h1>owned</h1>",
    "{{ 7*7 }} {% raw %}",
    "| a | `b` ](javascript:alert(1))",
    "]]></script><script>alert(2)</script>",
]
HELDOUT = {
    "before": 0.5,
    "after": 0.7,
    "after_low": 0.6,
    "after_high": 0.8,
    "of": "implicit reward",
    "per_draw": 0.6,
    "pairs": 80,
    "by_time": [0.6, 0.7, 0.7, None, 0.5],
    "draws": 8,
    "margin": 1e-3,
    "win_error_change": -1e-4,
    "lose_error_change": 2e-4,
    "likelihood_accuracy": {"before": None, "after": {"value": 0.6, "by_time": [0.6] * 5}},
}


@pytest.fixture(scope="module")
def comparison():
    texts = [*prompts(40), *HOSTILE]
    kinds = ["<b>odd</b>", *(parse(text).kind if parse(text) else "none" for text in texts[1:])]
    spec = EvaluateSpec(prompts="x", judge=SceneChecker(), bootstrap_resamples=300, grid_prompts=46)
    return compare({"base": side(0.6, 1), "aligned": side(0.2, 2)}, texts, spec, categories=kinds, progress=None)


@pytest.fixture
def run(tmp_path) -> Run:
    rows = [
        {"step": i, "loss": 0.69 - 0.001 * i, "accuracy": 0.5 + 0.002 * i, "grad_norm": float("nan") if i == 7 else 0.1}
        for i in range(1, 60)
    ]
    lines = [json.dumps(row) for row in rows] + [
        json.dumps({"step": 30, "validation/accuracy": 0.6}),
        json.dumps({"step": 60, "validation/accuracy": 0.65}),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "lo')
    return Run(
        title="Diffusion-DPO <on> tiny",
        method="Diffusion-DPO",
        base_model="stabilityai/stable-diffusion-xl-base-1.0",
        data="/home/someone/private/train.parquet",
        rank=16,
        beta=2000.0,
        seed=3,
        pairs=300,
        steps=60,
        train_seconds=12.5,
        total_seconds=20.0,
        heldout=HELDOUT,
        metrics=tmp_path / "metrics.jsonl",
        command="diffalign train quickstart.yaml",
        config={"seed": 3, "objective": {"beta": 2000.0}},
        files=("pytorch_lora_weights.safetensors", "q_comfy.safetensors"),
    )


class Page(HTMLParser):
    """Tags, their attributes and the page's own words."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def finite(tree) -> bool:
    if isinstance(tree, dict):
        return all(map(finite, tree.values()))
    if isinstance(tree, list):
        return all(map(finite, tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def test_json_has_every_promised_field(tmp_path, comparison, run):
    returned = write_report(tmp_path, run, comparison)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == returned and finite(report)
    for name in ("base_score", "aligned_score", "win_rate", "win_rate_low", "win_rate_high"):
        assert isinstance(report[name], float)
    assert report["win_rate_low"] <= report["win_rate"] <= report["win_rate_high"]
    assert report["heldout_preference_accuracy"]["before"] == 0.5 and report["heldout_preference_accuracy"]["after"] == 0.7
    assert (report["pairs"], report["steps"], report["train_seconds"], report["total_seconds"], report["seed"]) == (
        300,
        60,
        12.5,
        20,
        3,
    )
    assert {"torch", "diffusers", "diffalign", "python"} <= set(report["versions"])
    assert report["comparison"]["prompts"][41]["base"] == [None]  # a prompt the judge cannot read: null, not 0
    assert report["comparison"]["statistics"]["unscored"] == len(HOSTILE)
    assert report["config"] == {"seed": 3, "objective": {"beta": 2000.0}} and report["verdict"] == "better"


def test_page_is_self_contained(tmp_path, comparison, run):
    write_report(tmp_path, run, comparison)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.all("link") and all(image["src"].startswith("data:") for image in page.all("img"))
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text) and "url(" not in text and "@import" not in text
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:") and "script-src 'sha256-" in policy
    assert any(meta.get("name") == "viewport" for meta in page.all("meta")) and "prefers-color-scheme: dark" in text
    assert len(page.all("img")) == 2 * (46 + len(comparison.best) + len(comparison.worst)) + 1


def test_policy_names_exactly_this_script(tmp_path, comparison, run):
    import hashlib

    write_report(tmp_path, run, comparison)
    text = (tmp_path / "report.html").read_bytes().decode()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_a_strangers_words_stay_words(tmp_path, comparison, run):
    """Prompts, categories, title and configuration come from outside."""
    write_report(tmp_path, replace(run, config={"note": HOSTILE[0]}, command=HOSTILE[1]), comparison)
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.all("script")) == 1 and not page.all("h1")[1:] and len(page.all("main")) == 1 and len(page.all("b")) == 5
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    words = " ".join(page.words)
    assert all(" ".join(text.split()) in " ".join(words.split()) for text in HOSTILE)  # shown as they are, not dropped
    assert "Diffusion-DPO <on> tiny" in words and "<b>odd</b>" in words


def test_headline_is_the_verdict_with_its_interval(tmp_path, comparison, run):
    write_report(tmp_path, run, comparison)
    text = (tmp_path / "report.html").read_text()
    statistics = comparison.statistics
    assert f"<p>{statistics.sentence}</p>" in text and "The aligned model is better" in text
    assert f"left: {100 * statistics.win_rate_low:.2f}%" in text and f"left: {100 * statistics.win_rate:.2f}%" in text
    assert "Biggest losses" in text and "6" in text and f"left out, not scored {len(HOSTILE)}" in text


@pytest.mark.parametrize("prompts, fired, tone", [(40, False, "calm"), (40, True, "warn"), (5, False, "undecided")])
def test_the_alarms_box_is_green_only_where_it_could_have_fired(tmp_path, comparison, run, prompts, fired, tone):
    found = replace(comparison.alarms["aligned"], prompts=prompts, fired=fired, reasons=["x"] * fired, notes=["too few"])
    write_report(tmp_path, run, replace(comparison, alarms={**comparison.alarms, "aligned": found}))
    page = Page((tmp_path / "report.html").read_text())
    assert [attrs["class"] for attrs in page.all("div") if "card alarm" in attrs.get("class", "")] == [f"card alarm {tone}"]
    assert found.verdict in page.words and (tone == "undecided") == (found.verdict == "not enough prompts")


def test_embedded_small_pictures_are_lossless(tmp_path, comparison, run):
    write_report(tmp_path, run, comparison)
    page = Page((tmp_path / "report.html").read_text())
    first = page.all("img")[0]["src"].split(",", 1)[1]
    shown = Image.open(io.BytesIO(base64.b64decode(first)))
    assert np.array_equal(np.asarray(shown), np.asarray(comparison.tiles[0].pictures["base"]))


def test_large_pictures_are_reduced(tmp_path, comparison, run):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype="uint8"))
    tiles = [replace(tile, pictures={"base": noise, "aligned": noise}) for tile in comparison.tiles[:2]]
    write_report(tmp_path, run, replace(comparison, tiles=tiles, best=[], worst=[]))
    assert (tmp_path / "report.html").stat().st_size < 4 * 600_000
    page = Page((tmp_path / "report.html").read_text())
    assert page.all("img")[0]["src"].startswith("data:image/jpeg")


def test_without_comparison_or_training_it_still_reads(tmp_path, comparison, run):
    bare = Run(title="t", method="m", base_model="b")
    report = write_report(tmp_path, bare, None)
    assert report["win_rate"] is None and "nothing is shown about quality" in report["sentence"]
    assert report["heldout_preference_accuracy"] == {"before": None, "after": None} and not (tmp_path / "grid.png").exists()
    assert "70.0%" in write_report(tmp_path, replace(run, metrics=None), None)["sentence"]
    pictures = replace(
        comparison,
        judge=None,
        results={},
        best=[],
        worst=[],
        categories={},
        tiles=[replace(tile, scores={"base": None, "aligned": None}) for tile in comparison.tiles],
    )
    assert write_report(tmp_path, bare, pictures)["verdict"] is None and (tmp_path / "grid.png").exists()


def test_curves_show_what_was_measured(run):
    rows = read_metrics(run.metrics)
    assert len(rows) == 61  # the half-written last line is left out
    panels = {panel["title"]: panel for panel in drawings(rows)}
    assert list(panels) == ["Loss", "Preference accuracy", "Gradient norm"]
    assert panels["Preference accuracy"]["legend"] == ["training pairs", "held-out pairs"]
    assert "nan" not in panels["Gradient norm"]["svg"] and panels["Loss"]["svg"].count("<polyline") == 1


def test_curve_points_by_hand():
    """Steps 0 to 10 fill x from 46 to 326; values 0 and 1 with 6 % room fill y from 154 - ... to 10 + ...: 8.4 px each."""
    svg = draw("t", [("a", np.asarray([0.0, 10.0]), np.asarray([0.0, 1.0]))])
    inner = 180 - 10 - 26
    low, high = 10 + inner * 1.06 / 1.12, 10 + inner * 0.06 / 1.12
    assert f'points="46.0,{low:.1f} 326.0,{high:.1f}"' in svg


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [1e-9, 2e-9], [-1e6, 1e6]])
def test_curves_of_any_scale(values):
    assert "nan" not in draw("t", [("<a>", np.asarray([1.0, 2.0]), np.asarray(values))]) and "<a>" not in draw(
        "t", [("<a>", np.asarray([1.0, 2.0]), np.asarray(values))]
    )


def test_card(tmp_path, comparison, run):
    report = write_report(tmp_path, run, comparison)
    text = write_card(tmp_path, run, report).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0" and front["library_name"] == "diffusers"
    assert {"diffalign", "text-to-image", "lora", "diffusion-dpo"} <= set(front["tags"])
    for words in (
        "95% interval",
        "beta | 2000",
        "load_lora_weights",
        "q_comfy.safetensors",
        "ComfyUI",
        "licence",
        "grid.png",
        "diffalign train quickstart.yaml",
        "50.0% before, 70.0% after",
        "train.parquet",
    ):
        assert words in text
    assert "/home/someone" not in text and "Diffusion-DPO &lt;on&gt; tiny" in text
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")


def test_card_of_a_full_fine_tune_and_a_local_base(tmp_path, comparison, run):
    full = replace(run, rank=None, base_model=str(tmp_path / "tiny-sdxl"), files=())
    text = write_card(tmp_path, full, write_report(tmp_path, full, comparison)).read_text()
    assert "load_lora_weights" not in text and "all weights of the denoiser" in text and str(tmp_path) not in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "tiny-sdxl"


def test_card_of_a_few_step_base(tmp_path, comparison, run):
    """Its code loads the fused LoRA first and draws with the sampler and the steps of the figures."""
    sampling = {"scheduler": "LCMScheduler", "timestep_spacing": "trailing", "num_inference_steps": 4, "guidance_scale": 1.0}
    few = replace(run, fuse_lora="/home/someone/lcm/pytorch_lora_weights.safetensors", sampling=sampling)
    text = write_card(tmp_path, few, write_report(tmp_path, few, comparison)).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    calls = ["from_pretrained", 'load_lora_weights("path/to/lcm")', "fuse_lora()", "unload_lora_weights()",
             'load_lora_weights("path/to/this/folder"', "original_inference_steps=1000",
             "num_inference_steps=4, guidance_scale=1)"]
    assert sorted(calls, key=code.index) == calls
    assert "import DiffusionPipeline, LCMScheduler" in code and "Fused into it | lcm" in text and "the LoRA lcm" in text
    assert "/home/someone" not in text
    other = replace(few, rank=None, sampling={**sampling, "scheduler": None})
    text = write_card(tmp_path, other, write_report(tmp_path, other, comparison)).read_text()
    assert 'type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")' in text
    assert "load_lora_weights" not in text  # the saved pipeline holds it


SECRETS = [
    "hf_abcdefghijklmnopqrstuvwxyz012345",
    "sk-proj-abcdefghijklmnop1234",
    "ghp_abcdefghijklmnopqrstuv123456",
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-1234567890-abcdef",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghij",
]


def test_secrets_stay_out(tmp_path, comparison, run):
    config = {
        "a": SECRETS[0],
        "hub_token": "plain-looking",
        "url": "https://user:hunter2pass@host/x?token=qwerty123&b=1",
        "list": SECRETS[1:],
        "wandb_api_key": "0123456789abcdef",
        "header": "Authorization: Bearer abc.def-ghi123",
    }
    hostile = replace(
        run, config=config, command=f"HF_TOKEN={SECRETS[0]} WANDB_API_KEY=0123456789abcdef diffalign train x.yaml"
    )
    write_card(tmp_path, hostile, write_report(tmp_path, hostile, comparison))
    for name in ("report.json", "report.html", "README.md"):
        text = (tmp_path / name).read_text()
        assert not [
            s
            for s in [*SECRETS, "plain-looking", "hunter2pass", "qwerty123", "0123456789abcdef", "abc.def-ghi123"]
            if s in text
        ]


def test_ordinary_words_are_not_redacted():
    for text in (
        "a token of love",
        "tokens: 77",
        "max_token_length",
        "the secret garden",
        "sk-8 board",
        "https://host/path@2x",
    ):
        assert redact(text) == text
    assert clean({"tokenizer": "clip", "b": np.float32(1.5), "n": float("inf"), "t": (1, np.int64(2))}) == {
        "tokenizer": "clip",
        "b": 1.5,
        "n": None,
        "t": [1, 2],
    }


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    import os

    write(tmp_path / "a.txt", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ResourceError, match="cannot write .*a.txt: No space left on device"):
            write(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
