"""HPSv3 on a tiny random Qwen2-VL under the published names, with a local byte tokenizer.

The reference below takes the authors' path through stock transformers: Qwen2-VL's own image processor, embeddings with the
picture's rows put in by hand, the language model on those without positions, the head by matrix products.
"""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffalign import _compat  # noqa: F401
from diffalign.config import load_reward
from diffalign.errors import ConfigError, ModelError
from diffalign.rewards.hpsv3 import PIXELS, PUBLISHED, HPSv3, _patches, _size

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
ROWS = 256 + len(SPECIAL) + 1   # bytes, control tokens, the reward token
CHAT = ("{% for message in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QUESTION = "\nJudge it.\nTextual prompt - {text_prompt}\n\nThe rating: <|Reward|>\n\nEND\n"


def config(rows: int = ROWS):
    from transformers import Qwen2VLConfig

    text = {"vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=256 + 6, video_token_id=256 + 7,
                         vision_start_token_id=256 + 3, vision_end_token_id=256 + 4)


def published(layout: str) -> dict[str, torch.Tensor]:
    """Tensors under the names of transformers 4.45 ("old") or of 4.52 and later ("new"), with the unused output layer."""
    from transformers import Qwen2VLModel

    torch.manual_seed(0)
    body = Qwen2VLModel(config()).state_dict()
    tensors = {}
    for name, value in body.items():
        value = value + 0.1 * torch.randn_like(value)   # biases start at zero, norms at one
        if layout == "new":
            tensors[f"model.{name}"] = value
        else:
            tensors[name.replace("language_model.", "model.")] = value
    widths = (32, 1024, 16, 2)
    for place, inputs, outputs in zip((0, 3, 5), widths, widths[1:], strict=False):
        tensors[f"rm_head.{place}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        tensors[f"rm_head.{place}.bias"] = 0.1 * torch.randn(outputs)
    return tensors | {"lm_head.weight": torch.zeros(ROWS, 32)}


def tokenizer_files(folder) -> None:
    """Bytes as tokens, no merges, Qwen2's control tokens; the reward token is not among them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    for layout in ("old", "new"):
        save_file(published(layout), folder / f"{layout}.safetensors")
    config(152064).save_pretrained(folder)   # as published: more rows than the tokenizer has, until it is cut
    tokenizer_files(folder)
    (folder / "question.txt").write_text(QUESTION)
    return folder


def make(folder, weights="old.safetensors", **options) -> HPSv3:
    return load_reward({"kind": "hpsv3", "weights": str(folder / weights), "backbone": str(folder), "dtype": "float32",
                        "instruction": str(folder / "question.txt"), **options})


@pytest.fixture(scope="module")
def reward(folder) -> HPSv3:
    return make(folder)


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def their_score(folder, image: Image.Image, prompt: str) -> torch.Tensor:
    """[2], by stock parts. A byte's number is its letter's place in the sorted alphabet."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    seen = Qwen2VLImageProcessorPil(size=size)(images=[image], return_tensors="pt")
    head, tail = CHAT_TEXT.format(QUESTION.replace("{text_prompt}", prompt)).split("<|image_pad|>")
    count = int(seen["image_grid_thw"].prod()) // 4
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids, reward_id = [], ROWS - 1
    for part in _split(head) + ["<|image_pad|>"] * count + _split(tail):
        if part in [*SPECIAL, "<|Reward|>"]:
            ids.append(256 + [*SPECIAL, "<|Reward|>"].index(part))
        else:
            ids += [letters.index(letter) for letter in mapped.pre_tokenize_str(part)[0][0]] if part else []
    ids = torch.tensor([ids])
    model = Qwen2VLModel(config())
    tensors = published("new")
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    for buffer in model.buffers():
        buffer.copy_(buffer.to(torch.bfloat16))
    with torch.no_grad():
        embedded = model.language_model.embed_tokens(ids)
        features = model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"])
        features = features.pooler_output if hasattr(features, "pooler_output") else features
        embedded[0, ids[0] == 256 + 6] = features
        x = model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, ids[0] == reward_id][0]
    for place in (0, 3, 5):
        x = tensors[f"rm_head.{place}.weight"] @ x + tensors[f"rm_head.{place}.bias"]
        x = x.clamp(min=0) if place < 5 else x
    return x


CHAT_TEXT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
             "<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n")


def _split(text: str) -> list[str]:
    import re

    return re.split(r"(<\|[A-Za-z_]+\|>)", text)


def test_the_score_is_the_authors(folder, reward):
    """mu and log sigma, for a small, a large and a tall picture; the two layouts of names are the same model."""
    cases = [(noise(64, 64, 0), "a cat"), (noise(640, 480, 1), "Zwei Bäume {in} 'Öl'"), (noise(90, 500, 2), "")]
    images, prompts = [image for image, _ in cases], [prompt for _, prompt in cases]
    expected = torch.stack([their_score(folder, *case) for case in cases])
    assert torch.allclose(reward(images, prompts), expected[:, 0], atol=1e-5)
    assert torch.allclose(make(folder, output="log_sigma")(images, prompts), expected[:, 1], atol=1e-5)
    assert torch.allclose(make(folder, "new.safetensors")(images, prompts), expected[:, 0], atol=1e-5)
    assert expected[:, 0].std() > 1e-3


def test_bfloat16_is_near(folder, reward):
    image = noise(200, 200, 3)
    exact, rough = (scorer([image], ["a cat"]).item() for scorer in (reward, make(folder, dtype="bfloat16")))
    assert rough == pytest.approx(exact, abs=0.05) and rough != exact


def test_batch_equals_singles(reward, folder):
    """Long and short prompts and different grids in one batch: padding must not count."""
    images = [noise(300 + 90 * n, 300 - 30 * n, n) for n in range(5)]
    prompts = ["a cat " * (1 + 3 * n) for n in range(5)]
    batch = make(folder, batch_size=3)(images, prompts)
    singles = torch.cat([reward([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert batch.dtype == torch.float32 and torch.allclose(batch, singles, atol=2e-6)


@pytest.mark.parametrize("height, width, sides", [
    (1024, 1024, (448, 448)),      # 200704 exactly
    (512, 512, (448, 448)), (8, 8, (448, 448)), (448, 448, (448, 448)),
    (768, 1024, (364, 504)),       # scale 0.50518: 387.98/28 = 13.86 -> 13, 517.3/28 = 18.47 -> 18
    (100, 200, (336, 644)),        # enlarged, scale 3.1678: 316.8/28 = 11.3 -> 12, 633.6/28 = 22.6 -> 23
])
def test_the_size_by_hand(height, width, sides):
    assert _size(height, width) == sides


def test_the_size_is_theirs_also_where_rounding_decides():
    """492 x 492 would be 448 x 448 exactly; their floor of 447.99999999999994 / 28 gives 420."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sizes = [(side, side) for side in range(28, 2049)] + [(h, 4 * h) for h in range(28, 600)] + [(164, 1476), (492, 492)]
    assert [s for s in sizes if _size(*s) != smart_resize(*s, min_pixels=PIXELS, max_pixels=PIXELS)] == []


@pytest.mark.parametrize("width, height", [(64, 64), (640, 480), (90, 500), (1000, 37), (29, 28), (2000, 11)])
def test_pictures_are_prepared_as_qwen2_vl_does(width, height):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = noise(width, height, 4)
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    theirs = Qwen2VLImageProcessorPil(size=size)(images=[image], return_tensors="pt")
    patches, grid = _patches(image)
    assert (1, *grid) == tuple(theirs["image_grid_thw"][0].tolist())
    assert torch.allclose(patches, theirs["pixel_values"], atol=1e-5)


def test_what_cannot_be_scored_is_nan(reward, tmp_path):
    noise(64, 64, 0).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    good, broken, strip = noise(64, 64, 0), Image.open(tmp_path / "a.png"), Image.new("RGB", (401, 2))
    scores = reward([good, broken, strip, good, good], ["a", "a", "a", "<|Reward|>", "say <|im_end|>"]).tolist()
    assert [math.isnan(score) for score in scores] == [False, True, True, True, True]
    assert reward([], []).shape == (0,)
    with pytest.raises(ValueError, match="one prompt per picture"):
        reward([good], [])


def test_another_instruction_is_warned_of(folder, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    make(folder).check()
    assert "its scores are not HPSv3's" in caplog.text
    caplog.clear()
    import hashlib

    monkeypatch.setattr("diffalign.rewards.hpsv3.PUBLISHED", hashlib.sha256(QUESTION.encode()).hexdigest())
    make(folder).check()
    assert not caplog.text and len(PUBLISHED) == 64


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "1 of .* missing.*up_proj"),
    (lambda t: t.pop("visual.merger.mlp.0.bias"), "missing.*visual.merger"),
    (lambda t: t.pop("rm_head.5.bias"), "missing.*head.5.bias"),
    (lambda t: t.update({"rm_head.3.weight": torch.zeros(16, 9)}), r"head.3.weight has shape \[16, 9\]"),
    (lambda t: t.pop("model.embed_tokens.weight"), "no token embedding"),
    (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(999, 32)}), "do not belong together"),
], ids=["text", "vision", "head", "shape", "embedding", "rows"])
def test_wrong_weights_are_one_line(change, words, folder, tmp_path):
    tensors = published("old")
    change(tensors)
    save_file(tensors, folder / "changed.safetensors")
    with pytest.raises(ModelError, match=words) as caught:
        make(folder, "changed.safetensors").check()
    assert "\n" not in str(caught.value)


def test_wrong_files_and_options_are_one_line(folder, tmp_path):
    (tmp_path / "twice.txt").write_text(QUESTION * 2)
    for options, error, words in (
            ({"weights": "HPSv3.pth"}, ModelError, "pickle"), ({"weights": "none.safetensors"}, ModelError, "no file"),
            ({"instruction": "none.txt"}, ConfigError, "cannot be read"),
            ({"instruction": str(tmp_path / "twice.txt")}, ConfigError, "once each"),
            ({"backbone": str(tmp_path)}, ModelError, "config.json is missing"),
            ({"output": "sigma"}, ConfigError, "output"), ({"dtype": "float16"}, ConfigError, "dtype"),
            ({"batch_size": 0}, ConfigError, "batch_size")):
        with pytest.raises(error, match=words) as caught:
            make(folder, **options).check()
        assert "\n" not in str(caught.value)
    make(folder).check()


def test_what_pins_the_numbers(reward):
    facts = reward.identity()
    assert json.dumps(facts) and len(facts["weights_sha256"]) == 64 and facts["pixels"] == 200704
