"""Clips through a comparison: statistics by hand, the alarm, two processes, players that play, a page that says clips."""

import base64
import io
import re
from html import unescape

import numpy as np
import pytest
from scipy.io import wavfile

from diffalign.evaluate import EvaluateSpec, Run, write_report
from diffalign.evaluate.alarm import alarm
from diffalign.evaluate.compare import compare
from diffalign.evaluate.medium import CLIPS
from diffalign.evaluate.report import write_grids
from diffalign.evaluate.sound import EXCERPT, HEARD, contours, heard, player, spectrogram
from diffalign.rewards.clips import Clips, every_clip, synthesise
from diffalign.rewards.signal import Signal
from diffalign.types import Sound

RATE = 4000
PROMPTS = [clip.caption for clip in every_clip()[::4]]
BY_CAPTION = {clip.caption: clip for clip in every_clip()}
HOW = {"seconds": 1.28, "temperature": 1.0, "seeds": 2, "seed": 0, "batch_size": 8}


def singer(right, noise=0.02, channels=1):
    """Synthesises the caption; a share of seeds sing another pitch."""
    def draw(prompts, seeds):
        sounds = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            random = np.random.default_rng(seed)
            wanted = BY_CAPTION[prompt] if random.random() < right else every_clip()[seed % 54]
            wave = synthesise(wanted, 0.6) + noise * random.standard_normal((channels, 5120))
            sounds.append(Sound(wave=wave.astype(np.float32), rate=RATE))
        return sounds
    return draw


def spec():
    return EvaluateSpec(prompts="captions.txt", judge=Clips(), rewards={"signal": Signal()}, seeds=2, seed=0,
                        bootstrap_resamples=500, grid_prompts=3)


def compared(aligned=None, **options):
    return compare({"base": singer(0.3), "aligned": aligned or singer(0.9)}, PROMPTS, spec(), medium=CLIPS, drawn_with=HOW,
                   **options)


@pytest.fixture(scope="module")
def comparison():
    return compared()


def test_statistics_by_hand():
    """A sine of 0.5 at an eighth of the rate: root mean square 0.5 / sqrt(2) = -9.03 dB, peak 3.01 dB above it, a quarter of
    half the rate; half of a clip silent; full scale held."""
    sine = 0.5 * np.sin(np.pi / 4 * np.arange(4000))
    held = np.concatenate([np.ones(1000), -np.ones(1000)])
    table = heard([Sound(wave=x[None].astype(np.float32), rate=RATE)
                   for x in (sine, np.concatenate([sine, 0 * sine]), held, 0 * sine)])
    rows = dict(zip(HEARD, table, strict=True))
    assert rows["level"] == pytest.approx([-9.031, -12.041, 0, -100], abs=1e-3)
    assert rows["peak factor"] == pytest.approx([3.0103, 6.0206, 0, 0], abs=1e-3)
    assert rows["spectral centroid"][0] == pytest.approx(0.25, abs=1e-3)
    assert rows["silence"] == pytest.approx([0, 0.5, 0, 1]) and rows["clipping"] == pytest.approx([0, 0, 1, 0], abs=1e-3)
    assert rows["spectral flatness"][0] < 0.01 and rows["spectral flatness"][3] == 0


def test_spread_is_nought_for_the_same_clip():
    same, other = synthesise(every_clip()[0]), synthesise(every_clip()[20])
    clips = [Sound(wave=x[None], rate=RATE) for x in (same, same, same, other)]
    assert CLIPS.spread(clips, 2)[0] == 0 and CLIPS.spread(clips, 2)[1] > 3  # dB
    assert contours(clips).shape == (4, 1024)


def test_a_spectrogram_shows_the_pitch():
    """A tone at a quarter of the rate lies at half of the height; rows run from high to low. Silence is black."""
    tone = np.sin(np.pi / 2 * np.arange(4000))[None]
    for wave in (tone, np.tile(tone, 200)):  # a second; minutes
        picture = np.asarray(spectrogram(Sound(wave=wave, rate=RATE))).sum(-1)
        assert abs(int(picture[:, picture.shape[1] // 2].argmax()) - 63) <= 1 and 150 < picture.shape[1] < 260
    assert np.asarray(spectrogram(Sound(wave=0 * tone, rate=RATE))).sum(-1).max() <= 4


def test_the_better_singer_wins(comparison):
    assert comparison.verdict("aligned") == "better" and comparison.subject == "clips"
    assert not comparison.alarms["aligned"].fired
    assert comparison.sides["base"].statistics.shape == (len(HEARD), len(PROMPTS), 2)
    tile = comparison.tiles[0]
    assert tile.clips["base"].rate == RATE and tile.clips["base"].wave.shape == (1, 5120)
    assert tile.pictures["base"].mode == "RGB"
    assert comparison.statistics == compared().statistics, "the same seed gives the same figures"


def test_noise_sets_off_the_alarm():
    """The checker still hears its three attributes through it, and prefers this singer."""
    found = compared(singer(0.9, noise=0.08), training=[Clips()]).alarms["aligned"]
    assert found.fired and found.training.rose and found.reasons[0].startswith("peak factor rose by 1.5")


def test_words_of_the_alarm():
    alike = alarm(np.zeros((2, 6, 8, 2)), diversity=np.stack([np.ones(8), np.zeros(8)]), medium=CLIPS)
    assert alike.reasons[-1].startswith("the clips of a prompt have become alike")


def players(html):
    found = [unescape(uri) for uri in re.findall(r'<audio[^>]* src="([^"]*)"', html)]
    assert all(uri.startswith("data:audio/wav;base64,") for uri in found)
    return [wavfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in found]


def test_the_report_plays(comparison, tmp_path):
    report = write_report(tmp_path, Run(title="DPO of <b>codes</b>", base_model="tiny", subject="clips"), comparison)
    html = (tmp_path / "report.html").read_text()
    shown = len(comparison.tiles) + len(comparison.best) + len(comparison.worst)
    waves = players(html)
    assert len(waves) == 2 * shown and all(rate == RATE and wave.shape == (5120,) for rate, wave in waves)
    first = comparison.tiles[0].clips["base"].wave[0]
    assert np.abs(waves[0][1] / 32767 - first).max() < 1e-4
    assert "media-src data:" in html and "picture" not in html.split("</style>")[1].split("<dialog")[0].lower()
    assert "clips of 1.28 s, temperature 1, no guidance" in html and "at 4,000 Hz" in html
    assert report["rewards"]["signal"]["role"] == "reported" and (tmp_path / "grid.png").stat().st_size > 10_000
    written = write_grids(tmp_path / "grid", "codes", comparison, page=True)
    assert len(players(written["grid.html"].read_text())) == 6


def test_players_hold_an_excerpt_in_mono():
    long = Sound(wave=np.stack([np.full(60_000, 0.5), np.full(60_000, -0.25)]).astype(np.float32), rate=RATE)
    rate, wave = players(f'<audio src="{player(long)}">')[0]
    assert rate == RATE and wave.shape == (int(EXCERPT * RATE),) and abs(wave / 32767 - 0.125).max() < 1e-4


def test_clips_travel_between_processes():
    clip = Sound(wave=np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32), rate=44_100)
    again = CLIPS.unpack(CLIPS.pack(clip))
    assert again.rate == 44_100 and np.array_equal(again.wave, clip.wave) and again.wave.dtype == np.float32
