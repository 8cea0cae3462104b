"""MusicGen: the delayed likelihood against transformers' own loss and generation, padding, weight sets, saving, refusals."""

import json

import numpy as np
import pytest
import torch
from transformers import MusicgenForConditionalGeneration

from diffalign.errors import DataError, ModelError
from diffalign.likelihood import CodeLikelihood
from diffalign.methods import Context
from diffalign.models.musicgen import load_denoiser, load_inputs, padded_states
from diffalign.models.spec import LoRA, ModelSpec
from diffalign.models.weights import WeightBank
from diffalign.process import Delay
from diffalign.sampling.music import CodeSampler
from diffalign.types import Batch, Cond, Memory
from tests.models.tiny_music import CODEBOOKS, HOP, RATE, WORDS, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("music") / "model")


@pytest.fixture(scope="module")
def inputs(folder):
    return load_inputs(spec_of(folder))


def spec_of(folder, **options):
    return ModelSpec(pretrained_model_name_or_path=str(folder), **{"lora": None, **options})


def codes_of(n, frames, seed=0):
    return torch.randint(WORDS, (n, CODEBOOKS, frames), generator=torch.Generator().manual_seed(seed))


def batch_of(codes, states, k=2):
    groups = len(codes) // k
    return Batch(x0=codes.unflatten(0, (groups, k)), cond=padded_states(states, k),
                 valid=torch.ones(groups, k, dtype=torch.bool),
                 utility=torch.tensor([1.0, 0.0])[:k].expand(groups, k), key=torch.zeros(groups, 2, dtype=torch.int64))


def context(bank):
    return Context(predict=bank.predict, process=bank.denoiser.process, param=None, seed=0, step=0, memory=Memory())


def bank_of(folder, lora=None):
    return WeightBank.build(load_denoiser(spec_of(folder)), lora, reads=("policy", "reference"), seed=0)


def test_the_delay_is_the_stock_classs(folder):
    """K = 4, T = 6: ten columns, 24 codes to predict; row k begins with k + 1 fillers and ends with 3 - k."""
    codes = codes_of(2, 6)
    columns = Delay(codebooks=4, start_id=WORDS)(codes)
    assert columns.shape == (2, 4, 10) and (columns[..., 1:] != WORDS).sum() == 2 * 24
    for k in range(4):
        assert (columns[:, k, :k + 1] == WORDS).all() and (columns[:, k, 7 + k:] == WORDS).all()
    stock = MusicgenForConditionalGeneration.from_pretrained(folder)
    begun = torch.cat([torch.full((8, 1), WORDS), codes.flatten(0, 1)], 1)
    _, mask = stock.decoder.build_delay_pattern_mask(begun, pad_token_id=WORDS, max_length=10)
    assert torch.equal(columns.flatten(0, 1), mask)
    assert torch.equal(Delay(codebooks=4, start_id=WORDS).undo(columns), codes)


def test_the_likelihood_is_the_stock_classs_loss(folder, inputs):
    """Its loss is the mean over K * T of the delayed labels; undelayed labels give another number."""
    codes = codes_of(2, 6)
    est = CodeLikelihood()(batch_of(codes, [inputs.states("a b")]), context(bank_of(folder)), None)
    stock = MusicgenForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor([inputs.tokenizer("a b")["input_ids"]])

    def loss(columns, row):
        one = columns[row:row + 1]
        with torch.no_grad():
            return stock(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=one[0, :, :-1],
                         labels=one[..., 1:].transpose(1, 2)).loss

    columns = Delay(codebooks=4, start_id=WORDS)(codes)
    undelayed = torch.cat([torch.full((2, 4, 1), WORDS), codes], 2)
    for row in range(2):
        assert est.error[0, row].item() == pytest.approx(loss(columns, row).item(), abs=1e-5)
        assert est.policy[0, row].item() == pytest.approx(-24 * loss(columns, row).item(), abs=2e-4)
        assert abs(est.error[0, row].item() - loss(undelayed, row).item()) > 1e-3


def test_the_likelihood_is_that_of_generation(folder, inputs):
    """Greedy codes of our sampler are the stock decoder's, whose step scores add up to the same sum."""
    bank = bank_of(folder)
    states = inputs.states("c d a")
    found = CodeSampler(frames=6, temperature=0)(context(bank), "current", padded_states([states]), torch.zeros(1, 1).long())
    stock = MusicgenForConditionalGeneration.from_pretrained(folder).eval()
    hidden = stock.enc_to_dec_proj(torch.from_numpy(states)[None])
    columns = torch.full((4, 1), WORDS)
    total = 0.0
    with torch.no_grad():
        for at in range(1, 10):
            scores = stock.decoder(input_ids=columns, encoder_hidden_states=hidden).logits[:, -1].log_softmax(-1)
            inside = torch.tensor([k + 1 <= at <= k + 6 for k in range(4)])
            total += scores.max(-1).values[inside].sum().item()
            columns = torch.cat([columns, torch.where(inside, scores.argmax(-1), WORDS)[:, None]], 1)
    assert torch.equal(Delay(codebooks=4, start_id=WORDS)(found)[0], columns)
    est = CodeLikelihood()(batch_of(found, [states], k=1), context(bank), None)
    assert est.policy.item() == pytest.approx(total, abs=1e-4)


def test_without_the_tail_it_counts_what_audiocraft_trains(folder):
    """6 + 5 + 4 + 3 = 18 of 24 codes."""
    columns = Delay(codebooks=4, start_id=WORDS)(codes_of(3, 6))
    assert CodeLikelihood(tail=False).kept(columns, WORDS).sum((0, 2)).tolist() == [18, 15, 12, 9]
    assert CodeLikelihood().kept(columns, WORDS).sum((0, 2)).tolist() == [18] * 4


def test_a_shorter_clip_and_prompt_are_what_they_are_alone(folder, inputs):
    bank = bank_of(folder)
    codes = codes_of(4, 6)
    codes[1, :, 4:] = WORDS  # four frames, filled up
    states = [inputs.states("a"), inputs.states("a b c d")]
    together = CodeLikelihood()(batch_of(codes, states), context(bank), "reference")
    alone = CodeLikelihood()(batch_of(codes[1:2, :, :4], states[:1], k=1), context(bank), "reference")
    assert together.policy[0, 1].item() == pytest.approx(alone.policy.item(), abs=1e-4)
    assert together.error[0, 1].item() == pytest.approx(alone.error.item(), abs=1e-5)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_policy_and_reference_agree_at_the_start_also_in_training_mode(folder, inputs, lora):
    """MusicGen's dropout is a function: with it policy and reference would differ."""
    bank = bank_of(folder, lora)
    bank.denoiser.module.train()
    batch = batch_of(codes_of(4, 5), [inputs.states("a b"), inputs.states("c")])
    est = CodeLikelihood()(batch, context(bank), "reference", "origin" if lora else None)
    assert torch.equal(est.policy, est.reference)
    assert lora is None or est.anchor.abs().max() < 1e-6
    est.policy.sum().backward()
    trained = bank.trainable()
    assert not any(name.startswith(("text_encoder", "audio_encoder")) for name in trained)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def test_the_anchor_is_the_divergence_over_the_vocabulary():
    """One frame, two codebooks, two words: KL((.75, .25) || (.5, .5)) = .75 ln 1.5 + .25 ln .5 = .1308 for each code."""
    logits = {"policy": torch.tensor([0.75, 0.25]).log(), "origin": torch.tensor([0.5, 0.5]).log()}

    def predict(name, xt, t, cond):
        return logits[name].expand(*xt.shape, 2)

    ctx = Context(predict=predict, process=Delay(codebooks=2, start_id=2), param=None, seed=0, step=0, memory=Memory())
    batch = Batch(x0=torch.zeros(1, 1, 2, 1, dtype=torch.int64), cond=Cond(), utility=torch.ones(1, 1),
                  valid=torch.ones(1, 1, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64))
    est = CodeLikelihood()(batch, ctx, {"origin": 1.0}, "origin")
    assert est.anchor.item() == pytest.approx(2 * 0.13081, abs=1e-4)
    assert est.policy.item() == pytest.approx(2 * np.log(0.75), abs=1e-5)
    assert est.log_ratio.item() == pytest.approx(2 * np.log(1.5), abs=1e-5)


def test_saved_weights_are_a_model_of_the_stock_class(folder, tmp_path):
    bank = bank_of(folder)
    with torch.no_grad():
        next(iter(bank.trainable().values())).add_(1.0)
    bank.save(tmp_path, {})
    again = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["MusicgenForConditionalGeneration"]
    for name, x in bank.denoiser.module.state_dict().items():
        assert torch.equal(x, again.state_dict()[name])
    assert load_inputs(spec_of(tmp_path / "model")).states("a").shape == (2, 12)


def test_a_lora_is_read_by_peft(folder, inputs, tmp_path):
    from peft import PeftModel

    bank = bank_of(folder, LoRA(rank=2))
    with torch.no_grad():
        for p in bank.trainable().values():
            p.add_(0.1)
    bank.save(tmp_path, {})
    peft = PeftModel.from_pretrained(MusicgenForConditionalGeneration.from_pretrained(folder), tmp_path).eval()
    codes = codes_of(2, 5)
    states, columns = inputs.states("a b"), Delay(codebooks=4, start_id=WORDS)(codes)
    cond = padded_states([states, states])
    ours = bank.predict("current", columns[..., :-1], torch.zeros(2), cond)
    theirs = peft(decoder_input_ids=columns[..., :-1].flatten(0, 1), encoder_outputs=(cond.tokens,),
                  attention_mask=cond.extra["text"]).logits
    assert torch.allclose(ours.flatten(0, 1), theirs, atol=1e-5)
    assert not torch.allclose(ours, bank.predict("origin", columns[..., :-1], torch.zeros(2), cond), atol=1e-3)


def test_samples_do_not_depend_on_their_neighbours(folder, inputs):
    ctx = context(bank_of(folder))
    cond, keys = inputs.cond(["a", "b c"]), torch.tensor([[0, 0], [1, 0]])
    both = CodeSampler(frames=4)(ctx, "current", cond, keys)
    assert both.shape == (2, 4, 4) and both.max() < WORDS
    assert torch.equal(both[1:], CodeSampler(frames=4)(ctx, "current", inputs.cond(["b c"]), keys[1:]))


def test_clips_go_through_the_models_own_codec(folder, inputs):
    codes = inputs.encode(np.sin(np.arange(10 * HOP)).astype(np.float32))
    assert codes.shape == (CODEBOOKS, 10) and 0 <= codes.min() and codes.max() < WORDS
    assert inputs.rate == RATE and inputs.decode(torch.from_numpy(codes)[None].long()).shape == (1, 10 * HOP)


@pytest.mark.parametrize(("codes", "message"), [
    (np.zeros((3, 5), int), "the codes have 3 codebooks, and the model has 4"),
    (np.zeros(5, int), "1 axes"),
    (np.zeros((4, 29), int), "has 29 frames; the model takes 1 to 28"),
    (np.full((4, 5), 8), "a code is 8; they run from 0 to 7"),
    (np.full((4, 5), -1), "a code is -1"),
])
def test_codes_that_are_not_the_models(folder, inputs, codes, message):
    with pytest.raises(DataError, match=message):
        inputs.checked(codes)


def test_a_prompt_longer_than_the_model(folder, inputs):
    with pytest.raises(DataError, match="the prompt has 7 tokens, and the model's text encoder reads 6"):
        inputs.states("a b c d a b")


@pytest.mark.parametrize(("section", "changes", "message"), [
    (None, {"model_type": "llama"}, "model_type is 'llama'"),
    ("decoder", {"audio_channels": 2}, "stereo"),
    ("decoder", {"pad_token_id": 0}, "decoder.pad_token_id is 0"),
])
def test_other_models_are_refused(folder, tmp_path, section, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(changes)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_denoiser(spec_of(tmp_path))
