"""Text rendering: the formula by hand, a recogniser behind HTTP, and a tiny random VisionEncoderDecoder."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign import _compat  # noqa: F401
from diffalign.config import load_reward
from diffalign.errors import ConfigError, ModelError, ServiceError
from diffalign.rewards.ocr import TextRendering, accuracy, levenshtein, target_of

from .sick import send, server


@pytest.mark.parametrize("text, published, strict", [
    ("xxnasa2049yy", 1, 0.5),        # four insertions: 1 - 4/8
    ("nasa2o49", 0.875, 0.875),      # one substitution: 1 - 1/8
    ("", 0, 0),                      # eight deletions
    ("NASA 2049", 1, 1), ("nasa2049" * 3, 1, 0), ("completely different", 0, 0),
    ("nasa", 0.5, 0.5),
])
def test_the_formula_by_hand(text, published, strict):
    """Target "nasa2049", 8 characters."""
    assert accuracy("nasa2049", text, substring=True) == published
    assert accuracy("nasa2049", text, substring=False) == strict


@pytest.mark.parametrize("prompt, target", [
    ('a sign that says "NASA 2049"', "nasa2049"), ("a sign that says “NASA 2049”", "nasa2049"),
    ('first "one" then "two"', "one"), ("first “one” then \"two\"", "one"), ('first "one" then “two”', "one"),
    ("no quotes", ""), ('empty ""', ""), ('blank "  "', ""), ('open "only', ""), ("'single'", ""), ("", ""),
    ('"tabs\tand\nlines"', "tabsandlines"),
])
def test_the_target_of_a_prompt(prompt, target):
    assert target_of(prompt) == target


words = st.text("ab cé", max_size=8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(words, words, words)
def test_levenshtein_is_a_distance(a, b, c):
    assert (levenshtein(a, b) == 0) == (a == b) and levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    assert levenshtein("x" + a, "x" + b) == levenshtein(a, b)


def test_levenshtein_by_hand():
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == 3 and levenshtein("flaw", "lawn") == 2


# behind HTTP


def remote(url: str, **options) -> TextRendering:
    return load_reward({"kind": "ocr", "service": {"url": url, "deadline": 5, "retries": 0}, **options})


def greys(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (level,) * 3) for level in levels]


def test_a_remote_recogniser_reads_only_what_has_a_target():
    asked = []

    def answer(handler, body):
        asked.extend(p["prompt"] for p in body["pictures"])
        said = {'"stop"': "STOP", '"nasa 2049"': "nasa2o49", '"left"': None, '"right"': 5}
        send(handler, {"texts": [{"id": p["id"], "text": said[p["prompt"]]} for p in reversed(body["pictures"])]})

    with server(answer) as url:
        scores = remote(url)(greys(*range(6)), ['"stop"', "no quotes", '"nasa 2049"', '""', '"left"', '"right"']).tolist()
    assert scores == pytest.approx([1, math.nan, 0.875, math.nan, math.nan, math.nan], nan_ok=True)
    assert asked == ['"stop"', '"nasa 2049"', '"left"', '"right"']


def test_substring_is_an_option():
    def answer(handler, body):
        send(handler, {"texts": [{"id": p["id"], "text": "stopstopstop"} for p in body["pictures"]]})

    with server(answer) as url:
        assert remote(url)(greys(0), ['"stop"']).item() == 1
        assert remote(url, substring=False)(greys(0), ['"stop"']).item() == 0


def test_a_dead_recogniser_is_an_error_and_nothing_to_read_is_not():
    with server(lambda *_: None) as url:
        pass
    with pytest.raises(ServiceError, match="none of 1 pictures was read"):
        remote(url)(greys(0), ['"stop"'])
    assert math.isnan(remote(url)(greys(0), ["no quotes"]).item())
    with pytest.raises(ServiceError, match="does not answer"):
        remote(url).check()


# a local model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random ViT with a TrOCR decoder over letters, as save_pretrained writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        TrOCRConfig,
        TrOCRForCausalLM,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTModel,
    )

    folder = tmp_path_factory.mktemp("ocr")
    vocabulary = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                            pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                 image_size=32, patch_size=8, initializer_range=0.5))
    decoder = TrOCRForCausalLM(TrOCRConfig(vocab_size=len(vocabulary), d_model=32, decoder_layers=2, decoder_attention_heads=2,
                                           decoder_ffn_dim=64, cross_attention_hidden_size=32, max_position_embeddings=64,
                                           init_std=0.5, bos_token_id=0, pad_token_id=1, eos_token_id=2))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": True, "resample": 2,
         "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_a_local_model_is_read_greedily(folder):
    """Against step-by-step arg max over the model's own logits; a picture of 32 x 32 is only normalised."""
    from transformers import VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    reward = TextRendering(model=str(folder), max_tokens=10)
    letters = "?" * 3 + "abcdefghijklmnopqrstuvwxyz0123456789"
    for seed in range(3):
        pixels = torch.tensor(list(noise(seed).tobytes())).reshape(1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1
        ids = [0]
        while len(ids) < 11 and ids[-1] != 2:
            with torch.no_grad():
                logits = model(pixel_values=pixels, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        assert reward._recognise([noise(seed)]) == ["".join(letters[n] for n in ids[1:] if n > 2)]


def test_batch_equals_singles_with_a_local_model(folder, tmp_path):
    reward, images = TextRendering(model=str(folder), batch_size=3, max_tokens=12), [noise(n) for n in range(7)]
    prompts = [f'"{text}"' for text in reward._recognise(images[:4])] + ['"stop"', '"q"', "nothing"]
    batch = reward(images, prompts)
    assert torch.equal(batch.nan_to_num(-1), torch.cat([reward([i], [p]) for i, p in zip(images, prompts)]).nan_to_num(-1))
    assert batch[:4].tolist() == [1] * 4 and batch.dtype == torch.float32 and math.isnan(batch[6])
    noise(0).resize((64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    scores = reward([Image.open(tmp_path / "cut.png"), images[0]], [prompts[0]] * 2).tolist()
    assert math.isnan(scores[0]) and scores[1] == 1


def test_wrong_options_and_folders_are_one_line(folder, tmp_path):
    for options, words in (({}, "either model or service"), ({"model": "m", "service": {"url": "http://h/"}}, "not both"),
                           ({"model": "m", "batch_size": 0}, "batch_size"), ({"service": {"url": "ftp://h"}}, "service.url"),
                           ({"service": {"url": "http://h", "timeot": 3}}, "timeout")):
        with pytest.raises(ConfigError, match=words) as caught:
            load_reward({"kind": "ocr", **options})
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "vision-encoder-decoder"}')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    for model, words in ((tmp_path, "not a VisionEncoderDecoder"), (tmp_path / "pickled", "pickle"),
                         (tmp_path / "model.pt", "pickle")):
        with pytest.raises(ModelError, match=words):
            TextRendering(model=str(model)).check()
    TextRendering(model=str(folder)).check()


def test_what_pins_the_numbers(folder):
    facts = TextRendering(model=str(folder)).identity()
    assert json.dumps(facts) and facts["substring"] is True and len(facts["weights_sha256"]) == 64
    assert load_reward({"kind": "ocr", "service": {"url": "http://h/x?a=1"}}).identity()["service"] == "http://h/x"
