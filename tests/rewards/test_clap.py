"""CLAP on a few thousand random weights: the stock model's cosine, segments, sample rates, what cannot be scored."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig, PreTrainedTokenizerFast

from diffalign.errors import ModelError
from diffalign.rewards.clap import Clap, segments
from diffalign.rewards.sound import resampled
from diffalign.types import Sound

RATE = 4800


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    torch.manual_seed(0)
    text = ClapTextConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=20, projection_dim=8)
    audio = ClapAudioConfig(window_size=2, num_mel_bins=16, spec_size=64, hidden_size=16, depths=[1, 1], patch_size=4,
                            num_attention_heads=[2, 2], patch_embeds_hidden_size=8, patch_stride=[4, 4], projection_dim=8,
                            num_hidden_layers=2)
    ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=8)).save_pretrained(folder)
    ClapFeatureExtractor(feature_size=16, sampling_rate=RATE, hop_length=48, max_length_s=1, fft_window_size=64,
                         frequency_max=2400, truncation="rand_trunc").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b"])},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
                            ).save_pretrained(folder)
    return folder


def noise(seconds, seed=0, rate=RATE):
    return 0.3 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


def sound(wave, rate=RATE):
    return Sound(wave=wave[None], rate=rate)


def test_the_score_is_the_stock_models_cosine_over_segments(folder):
    reward, wave = Clap(pretrained_model_name_or_path=str(folder)), noise(3)
    model, features, tokenizer = reward._parts
    text = model(**tokenizer(["a b"], return_tensors="pt"), **features(wave[:RATE], sampling_rate=RATE, return_tensors="pt"))
    cosine = (text.audio_embeds @ text.text_embeds.T).item()
    assert reward([sound(wave[:RATE])], ["a b"]).item() == pytest.approx(cosine, abs=1e-5)
    thirds = reward([sound(wave[i * RATE:(i + 1) * RATE]) for i in range(3)], ["a b"] * 3)
    assert reward([sound(wave)], ["a b"]).item() == pytest.approx(thirds.mean().item(), abs=1e-5)


def test_segments_by_hand():
    """25 of 10: three (2.5 is rounded to 2, 2.6 to 3), from the start to the end."""
    assert [list(part[[0, -1]]) for part in segments(np.arange(26), 10)] == [[0, 9], [8, 17], [16, 25]]
    assert [len(part) for part in segments(np.arange(30), 10)] == [10, 10, 10] and len(segments(np.arange(4), 10)[0]) == 4


def test_a_clip_of_another_rate_is_resampled(folder):
    """A tone at twice the model's rate, in stereo, scores as the same tone at its own; a bare array says no rate."""
    reward = Clap(pretrained_model_name_or_path=str(folder))
    one, two = (np.sin(2 * np.pi * 300 * np.arange(RATE * times) / (RATE * times)) for times in (1, 2))
    found = reward([sound(one), Sound(wave=np.stack([two, two]), rate=2 * RATE), sound(two)], ["a b"] * 3)
    assert abs(found[1] - found[0]) < 0.01 < abs(found[2] - found[0])
    with pytest.raises(TypeError, match="knows its sample rate"):
        reward([one], ["a b"])


def test_resampling_keeps_a_tone():
    tone = resampled(np.sin(2 * np.pi * 100 * np.arange(1000) / 1000), 1000, 4800)
    assert len(tone) == 4800 and np.abs(np.fft.rfft(tone)).argmax() == 100


def test_what_cannot_be_scored_and_no_model(folder, tmp_path):
    reward = Clap(pretrained_model_name_or_path=str(folder))
    found = reward([sound(np.zeros(0)), sound(np.full(9, np.nan)), sound(noise(0.5))], ["a"] * 3)
    assert found.isnan().tolist() == [True, True, False] and found[2].abs() <= 1
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ModelError):
        Clap(pretrained_model_name_or_path=str(tmp_path)).check()
