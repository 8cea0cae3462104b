"""Clips as sentences: there and back, what is refused, TRL's loss against ours on the same codes, tuning by a reward."""

import copy
import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from diffalign.errors import ConfigError, DataError
from diffalign.language import tuning
from diffalign.language.codes import BEGIN, END, PLAY, FlatCodes
from diffalign.language.rewriter import Rewriter, Writer
from diffalign.language.spec import DpoSpec, GrpoSpec
from diffalign.likelihood import CodeLikelihood
from diffalign.methods import Context
from diffalign.objectives import Logistic, Pairwise
from diffalign.process import Delay
from diffalign.types import Batch, Cond, Memory

FLAT = FlatCodes(codebooks=2, words=4)
CAPTIONS = ["slow low", "fast low", "slow high", "fast high"]
QUICK = {"batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, "warmup": 0.0, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama that reads captions and plays codes."""
    folder, tokenizer = tmp_path_factory.mktemp("flat"), FLAT.tokenizer(CAPTIONS, longest=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    return folder


def source_of(folder, longest=9):
    return Rewriter(pretrained_model_name_or_path=str(folder), instruction="", max_new_tokens=longest, top_k=0)


def codes_of(frames, seed):
    return np.random.default_rng(seed).integers(FLAT.words, size=(FLAT.codebooks, frames))


# There and back.


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32))
def test_codes_come_back(codebooks, words, frames, seed):
    flat = FlatCodes(codebooks=codebooks, words=words)
    codes = np.random.default_rng(seed).integers(words, size=(codebooks, frames))
    text = flat.write(codes)
    assert len(text.split()) == codes.size and np.array_equal(flat.read(text), codes)
    assert flat.write(torch.from_numpy(codes)) == flat.write(codes.tolist()) == text


def test_frames_follow_one_another():
    assert FLAT.write([[0, 1, 2], [3, 3, 0]]) == "0:0 1:3 0:1 1:3 0:2 1:0"


def test_a_word_is_a_token_and_the_model_writes_it_back(folder):
    tokenizer, text = source_of(folder).tokenizer(), FLAT.write(codes_of(5, 0))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "slow low"}, {"role": "assistant", "content": text}],
                                        return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [BEGIN, "slow", "low", PLAY, *text.split(), END]
    assert tokenizer.unk_token_id not in ids and np.array_equal(FLAT.read(tokenizer.decode(ids[4:-1])), codes_of(5, 0))
    assert len(Writer(source_of(folder)).sample(["slow low", "fast high"], seed=0)) == 2


def test_samples_of_codebooks_in_turn_are_whole_clips(folder):
    """Also of a model that never learned the order, and of captions that are padded to one length."""
    source = source_of(folder, longest=8)
    texts = Writer(source, allowed=FLAT.allowed(source.tokenizer())).sample(["slow", "fast high", "high high low"], seed=0)
    assert [FLAT.read(text).shape for text in texts] == [(2, 4)] * 3
    assert len({*texts, *Writer(source).sample(["slow"], seed=0)}) == 4


@pytest.mark.parametrize(("text", "message"), [
    ("", "0 words are no whole frames of 2 codes"), ("0:0 1:1 0:2", "3 words are no whole frames"),
    ("1:0 0:0", "word 0 is '1:0'; its place is that of a code of codebook 0"), ("0:0 1:4", "word 1 is '1:4'"),
    ("0:0 slow", "word 1 is 'slow'"), ("0:-1 1:0", "word 0"), ("0:\u0663 1:0", "word 0")])
def test_text_that_is_no_clip(text, message):
    with pytest.raises(DataError, match=message):
        FLAT.read(text)


@pytest.mark.parametrize(("codes", "message"), [
    ([[0, 1]], "whole numbers \\[2, frames\\]"), ([[0.5], [1]], "whole numbers"), ([0, 1], "whole numbers"),
    ([[0], [4]], "a code is 4; they run from 0 to 3"), ([[-1], [0]], "a code is -1")])
def test_codes_that_are_refused(codes, message):
    with pytest.raises(DataError, match=message):
        FLAT.write(codes)


# TRL's loss is ours.


def test_the_loss_of_trl_is_our_likelihood_and_link(folder, tmp_path):
    """One stream is MusicGen's pattern with one codebook: <play> begins it, the end is its last code. Policy and reference
    differ, clips have two lengths, and both add up every code and the end.
    """
    source, beta = source_of(folder), 0.3
    tokenizer, policy = source.tokenizer(), source.model()
    reference = copy.deepcopy(policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn_like(weight)
    clips = [(caption, codes_of(3 + i, 2 * i), codes_of(4, 2 * i + 1)) for i, caption in enumerate(CAPTIONS)]
    table = [{"prompt": source.messages(caption), "chosen": source.messages(caption, FLAT.write(chosen))[-1:],
              "rejected": source.messages(caption, FLAT.write(rejected))[-1:]} for caption, chosen, rejected in clips]
    library = tuning.trl()
    from datasets import Dataset

    options = library.DPOConfig(output_dir=str(tmp_path), beta=beta, per_device_eval_batch_size=4, bf16=False, use_cpu=True,
                                report_to="none", disable_tqdm=True, gradient_checkpointing=False)
    rows = Dataset.from_list(table)
    theirs = library.DPOTrainer(model=policy, ref_model=reference, args=options, train_dataset=rows, eval_dataset=rows,
                                processing_class=tokenizer).evaluate()

    play, end = tokenizer.convert_tokens_to_ids([PLAY, END])
    streams = [[*tokenizer(FLAT.write(clip), add_special_tokens=False)["input_ids"], end] for row in clips for clip in row[1:]]
    x0 = torch.full((8, 1, max(map(len, streams))), play)
    for i, stream in enumerate(streams):
        x0[i, 0, :len(stream)] = torch.tensor(stream)
    prompts = torch.tensor([tokenizer(f"{BEGIN} {caption}", add_special_tokens=False)["input_ids"] for caption in CAPTIONS])
    batch = Batch(x0=x0.unflatten(0, (4, 2)), cond=Cond(tokens=prompts), valid=torch.ones(4, 2, dtype=torch.bool),
                  utility=torch.tensor([[1.0, 0.0]] * 4), key=torch.zeros(4, 2, dtype=torch.int64))

    def predict(name, xt, t, cond):
        model = {"policy": policy, "reference": reference}[name]
        return model(torch.cat([cond.tokens, xt[:, 0]], 1)).logits[:, None, cond.tokens.shape[1]:]

    ctx = Context(predict=predict, process=Delay(codebooks=1, start_id=play), param=None, seed=0, step=0, memory=Memory())
    with torch.no_grad():
        est = CodeLikelihood()(batch, ctx, "reference")
        loss = Pairwise(beta=beta, link=Logistic())(est, batch, Memory()).per_group.mean().item()
    assert abs(loss - 0.6931) > 0.05  # not the value where the two models are one
    assert theirs["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert theirs["eval_logps/chosen"] == pytest.approx(est.policy[:, 0].mean().item(), rel=1e-5)
    assert theirs["eval_logps/rejected"] == pytest.approx(est.policy[:, 1].mean().item(), rel=1e-5)
    ratios = beta * est.log_ratio.mean(0)
    assert theirs["eval_rewards/chosen"] == pytest.approx(ratios[0].item(), abs=1e-4)
    assert theirs["eval_rewards/rejected"] == pytest.approx(ratios[1].item(), abs=1e-4)


# Through the driver.


def test_dpo_of_clips_through_the_driver(folder, tmp_path):
    rows = [{"prompt": caption, "chosen": FLAT.write(codes_of(4, i)), "rejected": FLAT.write(codes_of(4, 9 + i))}
            for i, caption in enumerate(CAPTIONS)]
    facts = tuning.dpo(source_of(folder), rows, DpoSpec(epochs=6, **QUICK), tmp_path, seed=0, cpu=True)
    losses = [entry["loss"] for entry in facts["log"] if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5


def test_grpo_learns_what_the_reward_asks(folder, tmp_path):
    """Codes 0:2 are wanted; the reward is asked with plain texts and may leave one unscored."""
    asked = []

    def reward(prompts, answers):
        asked.extend(zip(prompts, answers, strict=True))
        return [None if answer.startswith("slow") else answer.split().count("0:2") / 9 for answer in answers]

    spec = GrpoSpec(epochs=5, generations=4, **{**QUICK, "batch_size": 8, "learning_rate": 2e-2})
    facts = tuning.grpo(source_of(folder), CAPTIONS * 2, reward, spec, tmp_path, seed=0, cpu=True)
    rewards = [entry["reward"] for entry in facts["log"] if "reward" in entry]
    assert {prompt for prompt, _ in asked} == set(CAPTIONS) and all(isinstance(answer, str) for _, answer in asked)
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.05
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_groups_that_do_not_fill_a_batch_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="generations: TRL refuses it"):
        tuning.grpo(source_of(folder), CAPTIONS, lambda prompts, answers: [0.0] * len(answers),
                    GrpoSpec(generations=3, **QUICK), tmp_path, seed=0, cpu=True)
