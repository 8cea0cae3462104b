"""Rewards of clips beside CLAP: what is clean as a signal, the exact checker's rates, and rewards of clips in sums."""

import numpy as np
import pytest

from diffalign.config import load_reward
from diffalign.errors import ConfigError, RewardError
from diffalign.rewards import check, judged
from diffalign.rewards.clips import Clips, every_clip, synthesise
from diffalign.rewards.signal import Signal, faults
from diffalign.rewards.sound import flat_tops, flatness, resampled
from diffalign.types import Sound

RATE = 8000
TONE = 0.5 * np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE)  # 1 s, whole cycles


def sound(wave, rate=RATE):
    return Sound(wave=np.atleast_2d(np.asarray(wave, np.float32)), rate=rate)


def score(wave):
    return Signal()([sound(wave)], ["any"]).item()


def test_each_fault_by_hand():
    assert score(TONE) == pytest.approx(1, abs=0.01)
    half = np.where(np.arange(RATE) < RATE // 2, TONE, 0)
    assert faults(sound(half))["silence"] == pytest.approx(0.5) and score(half) == pytest.approx(1 - 0.5 / 4, abs=0.01)
    gaps = np.where(np.arange(RATE) // 800 % 2, 0, TONE)  # five silences of 0.1 s: the longest counts, not their sum
    assert faults(sound(gaps))["silence"] == pytest.approx(0.1)
    offset = TONE / np.sqrt((TONE**2).mean()) * 0.3 + 0.1  # mean 0.1 over root mean square sqrt(0.3^2 + 0.1^2) = 0.316
    assert faults(sound(offset))["offset"] == pytest.approx(0.1 / 0.31623 / 0.5, abs=1e-3)
    assert faults(sound(TONE * 4))["clipping"] == 1, "what lies above full scale is cut off when it is written"


def test_clipping_counts_flat_tops():
    """100 of 8000 samples in one flat run are 1.25 %, a quarter of the 5 % of a whole fault; two in a row are none."""
    wave = TONE.copy()
    wave[1000:1100] = 1.0
    wave[3000:3002] = -1.0
    assert flat_tops(wave[None]) == pytest.approx(0.0125, abs=1e-5)
    assert faults(sound(wave))["clipping"] == pytest.approx(0.25, abs=1e-3)


def test_flatness_of_noise_and_tone():
    """Powers of white noise are exponential: exp(E log x) / E x = exp(-0.5772) = 0.5615."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(20 * RATE)
    assert flatness(noise, RATE) == pytest.approx(0.5615, abs=0.01) and flatness(TONE, RATE) < 0.01
    assert np.isnan(flatness(np.zeros(RATE), RATE))
    assert score(noise) == pytest.approx(0.75, abs=0.01)


def test_silence_is_nothing_and_what_is_no_clip_is_not_scored():
    found = Signal()([sound(np.zeros(99)), sound(np.zeros((1, 0))), sound([np.nan, 1])], [""] * 3)
    assert found[0] == 0 and found[1:].isnan().all()
    assert score(np.full(3, 0.5)) < 1  # a clip shorter than a frame


def test_the_exact_checker_hears_at_any_rate():
    clip = every_clip()[7]
    wave = synthesise(clip)
    at_eight = resampled(wave.astype(np.float64), 4000, RATE)
    clips = [sound(wave, 4000), sound(np.stack([at_eight, at_eight])), sound(at_eight, 4000), wave]
    assert Clips()(clips, [clip.caption] * 4).tolist()[:2] == [1, 1] and Clips()(clips[2:], [clip.caption] * 2)[1] == 1
    assert Clips()(clips[2:3], [clip.caption]).item() < 1  # an octave low, and at half the tempo


def test_sums_of_rewards_of_clips():
    clip = every_clip()[0]
    both = load_reward({"kind": "weighted_sum", "rewards": ["clips", "signal"], "weights": [2, 1]})
    wave = sound(synthesise(clip), 4000)
    check(both, "clips")
    assert judged(both, [wave], [clip.caption]).item() == pytest.approx(2 + Signal()([wave], [""]).item(), abs=1e-6)
    with pytest.raises(ConfigError, match='reward "weighted_sum" scores clips, and here are pictures'):
        check(both)
    with pytest.raises(ConfigError, match='reward "scenes" scores pictures, and here are clips'):
        check(load_reward({"kind": "weighted_sum", "rewards": ["clips", "scenes"]}), "clips")


def test_errors_speak_of_clips():
    with pytest.raises(RewardError, match='reward "signal" failed on 1 clips .*knows its sample rate'):
        judged(Signal(), [np.zeros(9)], ["a"])
