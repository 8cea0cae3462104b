"""ImageReward: a tiny random model under the names of the published file, against the original's forward written out here.

The reference below knows nothing of transformers: it computes with the checkpoint's tensors by their published names, as
BLIP's ViT and BERT with cross-attention are defined (arXiv 2201.12086; layer norms 1e-6 and 1e-12, heads 64 wide, exact GELU).
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from diffalign.config import load_reward
from diffalign.errors import ConfigError, ModelError
from diffalign.rewards.image_reward import DEVIATION, MEAN, ImageReward

WIDTH, TEXT, LAYERS, SIDE, PATCH = 128, 192, 2, 32, 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "on", "the", "mat", ",", "##s"]


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the published names; the large one has width 1024, text 768, 24 and 12 layers, 224 pixels."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"blip.visual_encoder.cls_token": (1, 1, WIDTH),
              "blip.visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
              "blip.visual_encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
              "blip.visual_encoder.patch_embed.proj.bias": (WIDTH,),
              "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, TEXT),
              "blip.text_encoder.embeddings.position_embeddings.weight": (40, TEXT)}
    linear = {"blip.vision_proj": (8, WIDTH), "blip.text_proj": (8, TEXT)}   # in the file, never used
    norms = {"blip.visual_encoder.norm": WIDTH, "blip.text_encoder.embeddings.LayerNorm": TEXT}
    for n in range(LAYERS):
        block, layer = f"blip.visual_encoder.blocks.{n}", f"blip.text_encoder.encoder.layer.{n}"
        norms |= {f"{block}.norm1": WIDTH, f"{block}.norm2": WIDTH, f"{layer}.output.LayerNorm": TEXT}
        linear |= {f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH),
                   f"{block}.mlp.fc1": (4 * WIDTH, WIDTH), f"{block}.mlp.fc2": (WIDTH, 4 * WIDTH),
                   f"{layer}.intermediate.dense": (4 * TEXT, TEXT), f"{layer}.output.dense": (TEXT, 4 * TEXT)}
        for attention, source in (("attention", TEXT), ("crossattention", WIDTH)):
            linear |= {f"{layer}.{attention}.self.query": (TEXT, TEXT), f"{layer}.{attention}.self.key": (TEXT, source),
                       f"{layer}.{attention}.self.value": (TEXT, source), f"{layer}.{attention}.output.dense": (TEXT, TEXT)}
            norms[f"{layer}.{attention}.output.LayerNorm"] = TEXT
    widths = (TEXT, 1024, 128, 64, 16, 1)
    linear |= {f"mlp.layers.{n}": (widths[i + 1], widths[i]) for i, n in enumerate((0, 2, 4, 6, 7))}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    tensors = {name: 0.15 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    for name in norms:
        tensors[f"{name}.weight"] += 1
    for name, (_, inputs) in linear.items():
        tensors[f"{name}.weight"] *= 6 / inputs**0.5   # 0.9 / sqrt(inputs): signals neither grow nor die
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        tensors[f"blip.visual_encoder.{name}"] *= 0.05   # small, so that the first layer norm's epsilon counts
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors


class Reference:
    """The original's forward by the published names."""

    def __init__(self, tensors):
        self.w = tensors

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    @staticmethod
    def attend(q, k, v):
        """[L, D], [M, D], [M, D] -> [L, D], in heads of 64."""
        heads = zip(q.split(64, 1), k.split(64, 1), v.split(64, 1), strict=True)
        return torch.cat([F.softmax(a @ b.T / 8, -1) @ c for a, b, c in heads], 1)

    def see(self, picture):
        """[3, S, S] normalised -> [1 + patches, WIDTH]."""
        v = "blip.visual_encoder"
        patches = F.conv2d(picture[None], self.w[f"{v}.patch_embed.proj.weight"], self.w[f"{v}.patch_embed.proj.bias"],
                           stride=PATCH)
        x = torch.cat([self.w[f"{v}.cls_token"][0], patches[0].flatten(1).T]) + self.w[f"{v}.pos_embed"][0]
        for n in range(LAYERS):
            block = f"{v}.blocks.{n}"
            q, k, value = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).split(WIDTH, 1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, value))
            hidden = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{v}.norm", x, 1e-6)

    def read(self, ids, seen):
        """Token ids [L] without padding, [M, WIDTH] -> the first token's state [TEXT]."""
        e = "blip.text_encoder.embeddings"
        x = self.w[f"{e}.word_embeddings.weight"][ids] + self.w[f"{e}.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{e}.LayerNorm", x, 1e-12)
        for n in range(LAYERS):
            layer = f"blip.text_encoder.encoder.layer.{n}"
            for kind, source in (("attention", None), ("crossattention", seen)):
                name, from_ = f"{layer}.{kind}", x if source is None else source
                mixed = self.attend(*(self.linear(f"{name}.self.{part}", y) for part, y in
                                      (("query", x), ("key", from_), ("value", from_))))
                x = self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", mixed) + x, 1e-12)
            hidden = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", hidden) + x, 1e-12)
        return x[0]

    def score(self, picture, ids):
        x = self.read(ids, self.see(picture))
        for n in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{n}", x)
        return (x.item() - MEAN) / DEVIATION


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    save_file(published(), folder / "ImageReward.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return folder


@pytest.fixture(scope="module")
def reward(folder) -> ImageReward:
    return load_reward({"kind": "image_reward", "weights": str(folder / "ImageReward.safetensors"), "tokenizer": str(folder)})


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def normalised(image: Image.Image) -> torch.Tensor:
    """A SIDE x SIDE picture, so nothing is resized. Mean and deviation of CLIP."""
    x = torch.tensor(list(image.tobytes())).reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 255
    mean, deviation = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (x - mean[:, None, None]) / deviation[:, None, None]


def test_the_score_is_the_originals(reward):
    """Different lengths of text, so that the padding's mask counts; words beyond the vocabulary are [UNK] = 1."""
    cases = [("a red cat on the mat", [2, 5, 6, 8, 10, 11, 12, 3]), ("dogs", [2, 9, 14, 3]), ("", [2, 3]),
             ("Blue, zebra", [2, 7, 13, 1, 3])]
    pictures = [noise(SIDE, SIDE, seed) for seed in range(len(cases))]
    reference = Reference(published())
    rows = zip(pictures, cases, strict=True)
    expected = [reference.score(normalised(picture), torch.tensor(ids)) for picture, (_, ids) in rows]
    assert reward(pictures, [text for text, _ in cases]).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_long_text_is_cut_at_35_tokens(reward):
    """35 = [CLS], 33 words, [SEP]: the 34th word never counts, the 33rd does."""
    words = ["cat"] * 33
    short, longer, other = " ".join(words), " ".join([*words, "red", "dog"]), " ".join([*words[:-1], "red"])
    a, b, c = reward([noise(SIDE, SIDE, 1)] * 3, [short, longer, other]).tolist()
    assert a == pytest.approx(b, abs=1e-6) and abs(a - c) > 1e-3


@pytest.mark.parametrize("raw, score", [(0, -0.161780), (0.16717363, 0), (1.2, 0.999503)])
def test_the_standardisation_by_hand(reward, monkeypatch, raw, score):
    """(0 - 0.16717363) / 1.03333950 = -0.161780; (1.2 - 0.16717363) / 1.03333950 = 0.999503."""
    monkeypatch.setattr(type(reward._model), "forward", lambda self, pictures, *_: torch.full((len(pictures),), float(raw)))
    assert reward([noise(8, 8, 0)], [""]).item() == pytest.approx(score, abs=1e-6)


def test_batch_equals_singles_and_order_does_not_matter(reward):
    images = [noise(40 + 3 * n, 64 - 2 * n, n) for n in range(7)]
    texts = ["a red cat on the mat , the dog"[: 4 * n] for n in range(7)]
    batch = reward(images, texts)
    assert batch.dtype == torch.float32 and torch.allclose(batch, reward(images[::-1], texts[::-1]).flip(0), atol=1e-6)
    assert torch.allclose(batch, torch.cat([reward([i], [t]) for i, t in zip(images, texts, strict=True)]), atol=1e-6)


def test_a_broken_picture_is_nan(reward, tmp_path):
    noise(64, 64, 0).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    scores = reward([Image.open(tmp_path / "a.png"), noise(64, 64, 0)], ["", ""]).tolist()
    assert math.isnan(scores[0]) and math.isfinite(scores[1])


def test_gradients_reach_the_pixels(reward):
    """The slope along a random direction against a finite difference."""
    random = torch.Generator().manual_seed(3)
    picture = torch.rand(3, 48, 40, generator=random).requires_grad_()
    direction = torch.randn(3, 48, 40, generator=random)
    (slope,) = torch.autograd.grad(reward([picture], ["a cat"]).sum(), picture)
    with torch.no_grad():
        up, down = (reward([picture + step * direction], ["a cat"]).item() for step in (1e-3, -1e-3))
    assert (slope * direction).sum().item() == pytest.approx((up - down) / 2e-3, rel=0.02, abs=1e-3)
    assert not any(p.requires_grad for p in reward._model.parameters())


def test_float_and_pil_agree(reward):
    image = noise(48, 40, 5)
    tensor = torch.tensor(list(image.tobytes())).reshape(40, 48, 3).permute(2, 0, 1) / 255
    assert reward([image], ["a cat"]).item() == pytest.approx(reward([tensor], ["a cat"]).item(), abs=0.02)


# files


def written(tmp_path, folder, change) -> ImageReward:
    tensors = published()
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return ImageReward(weights=str(tmp_path / "changed.safetensors"), tokenizer=str(folder))


@pytest.mark.parametrize("name", sorted(n for n in published() if "_proj." not in n and "position_ids" not in n)[::7])
def test_a_missing_tensor_is_an_error(name, tmp_path, folder):
    reward = written(tmp_path, folder, lambda tensors: tensors.pop(name))
    for act in (reward.check, lambda: reward([noise(8, 8, 0)], [""])):
        with pytest.raises(ModelError, match="missing|expected"):
            act()


def test_a_tensor_of_another_shape_is_an_error(tmp_path, folder):
    def change(tensors):
        tensors["mlp.layers.2.weight"] = torch.zeros(128, 7)

    with pytest.raises(ModelError, match=r"head.2.weight has shape \[128, 7\]"):
        written(tmp_path, folder, change).check()


def test_what_is_not_used_may_be_missing(tmp_path, folder, reward):
    def change(tensors):
        for name in [n for n in tensors if "vision_proj" in n or "text_proj" in n or "position_ids" in n]:
            del tensors[name]

    other = written(tmp_path, folder, change)
    assert other([noise(9, 9, 0)], ["a"]).item() == pytest.approx(reward([noise(9, 9, 0)], ["a"]).item(), abs=1e-6)


def test_check_says_what_is_wrong(tmp_path, folder):
    good = str(folder / "ImageReward.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / "ImageReward.safetensors").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    for options, words in (({"weights": "ImageReward.pt"}, "pickle"), ({"weights": "none.safetensors"}, "no file"),
                           ({"weights": str(tmp_path / "cut.safetensors")}, "complete safetensors"),
                           ({"weights": good, "tokenizer": str(tmp_path / "empty")}, "neither tokenizer.json nor vocab.txt")):
        with pytest.raises(ModelError, match=words) as caught:
            ImageReward(**{"tokenizer": str(folder), **options}).check()
        assert "\n" not in str(caught.value)
    ImageReward(weights=good, tokenizer=str(folder)).check()
    with pytest.raises(ConfigError, match="batch_size"):
        load_reward({"kind": "image_reward", "weights": good, "batch_size": 0})
    with pytest.raises(ConfigError, match="weights"):
        load_reward("image_reward")


def test_what_pins_the_numbers(reward):
    facts = reward.identity()
    assert json.dumps(facts) and len(facts["weights_sha256"]) == 64 and facts["model"] == "ImageReward-v1.0"
