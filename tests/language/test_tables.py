"""Preference tables to TRL's columns and back, and TRL's DPO of a tiny vision-language model on them."""

import math

import pytest
import torch

from diffalign.data.columns import Tally, read_rows
from diffalign.data.spec import DataSpec
from diffalign.errors import DataError
from diffalign.language.tables import from_trl, to_trl
from diffalign.language.tuning import trl

from ..data.toy import jsonl, picture
from .toy import ROOT, rewriter

PAIRS = str(ROOT / "assets" / "preferences" / "train.parquet")


def rows(count: int):
    return [row for row, _ in zip(read_rows(DataSpec(path=PAIRS), Tally()), range(count))]


def test_pairs_there_and_back():
    own = rows(40)
    records = list(to_trl(own))
    assert len(records) == 40
    back = list(from_trl(records))
    for row, record, old in zip(own, records, back, strict=True):
        best = row.images[row.utility.index(max(row.utility))].read()
        assert (old["jpg_0"] if old["label_0"] == 1 else old["jpg_1"]) == best and old["caption"] == row.prompt
        assert row.prompt in record["prompt"][0]["content"]
    answers = [record["chosen"][0]["content"] for record in records]
    assert 8 < answers.count("A") < 32  # the place says nothing
    assert [r["images"] for r in to_trl(own)] == [r["images"] for r in records]  # keyed, so the same again
    assert list(to_trl(own[::-1]))[::-1] == records  # and whatever the order


def test_rankings_unpaired_and_ties(tmp_path):
    names = []
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        names.append(f"{n}.png")
    ranked = jsonl(tmp_path / "ranked.jsonl", [{"prompt": "p", "images": names, "ranks": [1, 2, 2]}])
    records = list(to_trl(read_rows(DataSpec(path=str(ranked)), Tally())))
    assert len(records) == 2  # 1 over 2, twice; the tie is left out
    single = jsonl(tmp_path / "single.jsonl", [{"prompt": "p", "image": names[0], "label": label} for label in (1, 0)])
    liked = list(to_trl(read_rows(DataSpec(path=str(single)), Tally())))
    assert [record["chosen"][0]["content"] for record in liked] == ["yes", "no"]
    assert [row["label"] for row in from_trl(liked)] == [1, 0]


@pytest.mark.parametrize("change, match", [
    ({"caption": None}, "no caption or no images"), ({"chosen": []}, "chosen holds no message"),
    ({"chosen": [{"role": "assistant", "content": "C"}]}, "the answer 'C'")])
def test_foreign_records(change, match):
    with pytest.raises(DataError, match=match):
        list(from_trl([{**next(iter(to_trl(rows(1)))), **change}]))


@pytest.fixture(scope="module")
def judge():
    """A Llava of two layers with a vision tower of one, and its processor; the words are the tiny rewriter's."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    tokenizer = rewriter().tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(["A", "B", "yes", "no"], special_tokens=True)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                              patch_size=8)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                         vision_feature_layer=-1)
    template = ("<bos>{% for m in messages %} {{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
                "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% if m['role'] == 'assistant' %}<eos>{% endif %}"
                "{% endfor %}{% if add_generation_prompt %} assistant {% endif %}")
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return config, LlavaProcessor(image_processor=images, tokenizer=tokenizer, patch_size=8, chat_template=template,
                                  vision_feature_select_strategy="default", num_additional_image_tokens=1)


# where policy and reference are one, beta 0.1: ln 2; 1; (0 - 1 / (2 * 0.1))^2; 2 ln 2; 0.8 ln 2 + 0.2 * 2 ln 2 and no SFT term
@pytest.mark.parametrize("names, weights, first", [
    (["sigmoid"], None, math.log(2)), (["hinge"], None, 1.0), (["ipo"], None, 25.0), (["bco_pair"], None, 2 * math.log(2)),
    (["sigmoid", "bco_pair"], [0.8, 0.2], 1.2 * math.log(2))])
def test_five_losses_on_a_tiny_vision_language_model(judge, tmp_path, names, weights, first):
    from datasets import Dataset, Features, Image, List, Value
    from peft import LoraConfig
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    config, processor = judge
    records = [{key: record[key] for key in ("images", "prompt", "chosen", "rejected")} for record in to_trl(rows(8))]
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": message, "chosen": message, "rejected": message})
    library = trl()
    options = library.DPOConfig(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
                                loss_type=names, loss_weights=weights, report_to="none", save_strategy="no", logging_steps=1,
                                use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, disable_tqdm=True)
    trainer = library.DPOTrainer(
        model=LlavaForConditionalGeneration(config), args=options, processing_class=processor,
        train_dataset=Dataset.from_list(records, features=features),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(first, rel=1e-3) and logged[-1] < logged[0]
