"""The embedded CLIPs: how they are trained (distances by hand, the ladder by brute force), and that they know the scenes."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPTokenizer

from diffalign.reward_training.accuracy import accuracy
from diffalign.rewards.clip import ClipScore
from diffalign.rewards.scenes import parse, render

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "assets")]
import make_clip  # noqa: E402
import reward_accuracy  # noqa: E402

SMALL = {name: make_clip.Plan(**{**vars(plan), "families": 12, "batch": 16}) for name, plan in make_clip.PLANS.items()}


def attributes(scene) -> torch.Tensor:
    return torch.tensor(make_clip.attributes_of(scene))


def test_a_lost_object_is_three_requirements_off():
    """Of a pair: the number, the layout, half of the colours and half of the shapes: 1 + 1 + 1/2 + 1/2."""
    scene = parse("a red ring left of a green square on a white background")
    lost = make_clip.replace(scene, objects=(make_clip.replace(scene.objects[0], colour="white"), scene.objects[1]))
    assert make_clip.distance(attributes(scene), attributes(lost)) == 3
    assert make_clip.distance(attributes(scene), attributes(scene)) == 0
    picture = render(lost, np.random.default_rng(0))
    assert len(np.unique(picture.reshape(-1, 3)[:, 0])) > 1 and (picture[:, :30] == 245).all()  # the left half shows nothing


def test_a_strange_scene_is_none_of_its_family():
    for family in make_clip.families(np.random.default_rng(0), 60, strange=2):
        known = {make_clip.attributes_of(scene) for scene in family[:4]}
        assert len(family) == 6 and not known & {make_clip.attributes_of(scene) for scene in family[4:]}


@pytest.mark.parametrize("name", SMALL)
def test_the_ladder_is_every_two_of_a_family_whose_distances_differ(name):
    plan, tokenizer = SMALL[name], CLIPTokenizer.from_pretrained(ROOT / "assets" / "tiny-clip")
    pool = make_clip.Pool(np.random.default_rng(0), plan)
    pixels, _, same, found = pool.draw(tokenizer, np.random.default_rng(1), plan.batch)
    n, strange = plan.batch, plan.strange
    assert len(pixels) == n + n // 4 * strange + n // 4 and same.shape == (n, n) and len(found) == n + n // 4 * strange
    assert all(int(found[:, i].max()) < most + (i == 1) for i, most in enumerate(plan.attributes))
    logits = torch.randn(len(pixels), n, generator=torch.Generator().manual_seed(0))
    losses = []
    for f in range(n // 4):
        captions = range(4 * f, 4 * f + 4)
        pictures = [*captions, *range(n + strange * f, n + strange * (f + 1))]
        for i, a, b in itertools.product(captions, pictures, pictures):
            if make_clip.distance(found[b], found[i]) > make_clip.distance(found[a], found[i]) + 0.1:
                losses.append(F.softplus(logits[b, i] - logits[a, i]))
        for i, a, b in itertools.product(pictures, captions, captions):
            if make_clip.distance(found[i], found[b]) > make_clip.distance(found[i], found[a]) + 0.1:
                losses.append(F.softplus(logits[i, b] - logits[i, a]))
    torch.testing.assert_close(make_clip.ladder(logits, found), torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-clip-fine"])
def test_an_embedded_clip_orders_the_committed_pairs_and_reads_their_captions(name):
    """96.7 % and 93.4 % of the 91 decided pairs; with the captions of other rows no better than a coin."""
    rows = [row for row in pq.read_table(ROOT / "assets" / "preferences" / "validation.parquet").to_pylist()
            if row["label_0"] != 0.5]
    sides = [[Image.open(io.BytesIO(row[side])) for row in rows] for side in ("jpg_0", "jpg_1")]
    captions, target = [row["caption"] for row in rows], np.array([row["label_0"] for row in rows])
    clip = ClipScore(model=str(ROOT / "assets" / name), batch_size=64)

    def right(prompts: list[str]) -> float:
        margins = (clip(sides[0], prompts) - clip(sides[1], prompts)).numpy()
        return accuracy(margins, target, captions).value

    assert right(captions) >= 0.92
    assert right(captions[7:] + captions[:7]) < 0.75


def test_the_accuracy_script_reads_rewards_and_pairs(monkeypatch, capsys):
    path = str(ROOT / "assets" / "preferences" / "validation.parquet")
    monkeypatch.setattr(sys, "argv", ["reward_accuracy.py", "scenes,brightness", path])
    reward_accuracy.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("scenes: 100.0 % [") and first.endswith("of 91 pairs, 91 prompts")
    assert second.startswith("brightness: ") and "% [-" in second and second.endswith("more than the first")
