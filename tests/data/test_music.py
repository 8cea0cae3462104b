"""Clips as data: WAV files read and refused, codes checked, the batch; the exact checker; the report's page."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.io import wavfile

from diffalign.data.audio import read_wav, write_wav
from diffalign.data.music import read_clips
from diffalign.data.spec import DataSpec
from diffalign.errors import DataError
from diffalign.evaluate.sound import Sounds, spectrogram
from diffalign.evaluate.statistics import paired
from diffalign.models.musicgen import load_inputs
from diffalign.models.spec import ModelSpec
from diffalign.rewards.clips import Clips, every_clip, heard, part_of, synthesise
from tests.models.tiny_music import CODEBOOKS, HOP, RATE, WORDS, make

MUSIC = Path(__file__).parents[2] / "assets" / "music"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return load_inputs(ModelSpec(pretrained_model_name_or_path=str(make(tmp_path_factory.mktemp("music") / "model"))))


def tone(frames, level=0.5):
    return level * np.sin(np.arange(frames * HOP))


def codes(frames, seed=0):
    return np.random.default_rng(seed).integers(WORDS, size=(CODEBOOKS, frames)).tolist()


def written(folder, *rows):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(path=str(folder / "pairs.jsonl"))


def pair(**changes):
    return {"prompt": "a b", "chosen": codes(5), "rejected": codes(3, 1), **changes}


# WAV files.


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32, np.uint8])
def test_every_kind_of_sample_has_one_scale(kind):
    wave, file = tone(10), io.BytesIO()
    scale = {np.int16: 2**15, np.int32: 2**31, np.float32: 1, np.uint8: 128}[kind]
    wavfile.write(file, RATE, (wave * scale + (128 if kind is np.uint8 else 0)).astype(kind))
    assert np.abs(read_wav(file.getvalue(), RATE) - wave).max() < (0.01 if kind is np.uint8 else 1e-4)


def test_channels_stay_apart():
    file = io.BytesIO()
    wavfile.write(file, RATE, np.stack([tone(4), tone(4, 0.1)], 1).astype(np.float32))
    assert read_wav(file.getvalue(), RATE).shape == (2, 4 * HOP)


@pytest.mark.parametrize(("data", "message"), [
    (write_wav(tone(10), 300), "has 300 Hz, and the codec reads 400 Hz; resample"),
    (write_wav(tone(10, 0.0), RATE), "is silent"),
    (write_wav(tone(10, 3.0), RATE), r"is clipped \(\d+\.\d % of its samples"),
    (write_wav(tone(0), RATE), "holds no samples|not a WAV file"),
    (b"ID3 no wave", "not a WAV file that can be read"),
])
def test_files_that_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        read_wav(data, RATE)


def test_a_peak_at_full_scale_is_no_clipping():
    wave = tone(50)
    wave[::40] = 1.0
    assert read_wav(write_wav(wave, RATE), RATE).max() > 0.99


# Rows.


def test_a_batch_of_codes(inputs, tmp_path):
    clips = read_clips(written(tmp_path, pair(), pair(prompt="a b c d")), inputs)
    batch = clips(np.array([0, 1]), np.array([0, 0]))
    assert batch.x0.shape == (2, 2, CODEBOOKS, 5) and batch.x0.dtype == torch.int64
    assert batch.x0[0, 0].tolist() == codes(5) and batch.x0[0, 1, :, :3].tolist() == codes(3, 1)
    assert (batch.x0[0, 1, :, 3:] == WORDS).all()
    assert batch.cond.tokens.shape == (2, 5, 12) and batch.cond.extra["text"][:, 0].sum(1).tolist() == [3, 5]
    assert clips.elements == 16 and clips.report["longest"] == 5  # 4 x (5 + 3) / 2 codes


def test_a_file_goes_through_the_codec(inputs, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.wav").write_bytes(write_wav(tone(6), RATE))
    clips = read_clips(written(tmp_path, pair(chosen="a.wav", rejected=codes(6))), inputs)
    assert clips(np.array([0]), np.array([0])).x0[0, 0].tolist() == inputs.encode(
        read_wav((tmp_path / "a.wav").read_bytes(), RATE)[0]).tolist()


@pytest.mark.parametrize(("changes", "message"), [
    ({"chosen": codes(5)[:3]}, "the codes have 3 codebooks, and the model has 4"),
    ({"rejected": [[0, 1], [0], [0, 1], [0, 1]]}, "rejected: the codebooks of a clip must have one length"),
    ({"rejected": [[0.5]] * 4}, "the codes of a clip are whole numbers"),
    ({"chosen": [[9]] * 4}, "a code is 9; they run from 0 to 7"),
    ({"prompt": "a b c d a b"}, "the prompt has 7 tokens"),
    ({"chosen": "none.wav"}, "cannot read"),
])
def test_rows_that_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(DataError, match=f"line 1.*{message}.*data.bad_rows=skip"):
        read_clips(written(tmp_path, pair(**changes)), inputs)


# The checker.


def test_every_clip_is_heard_as_what_it_is():
    random = np.random.default_rng(0)
    for clip in every_clip():
        wave = synthesise(clip, 0.6) + 0.01 * random.standard_normal(5120)
        assert heard(wave) == (clip.tempo, clip.pitch, clip.instrument)


def test_captions_are_of_one_part_and_the_parts_are_alike():
    parts = [(part_of(clip), clip) for clip in every_clip()]
    assert Counter(part for part, _ in parts) == {"train": 27, "validation": 9, "heldout": 18}
    for name, share in (("train", 3), ("validation", 1), ("heldout", 2)):
        both = Counter((clip.tempo, clip.instrument) for part, clip in parts if part == name)
        assert len(both) == 9 and set(both.values()) == {share}
    assert set(Counter(clip.pitch for part, clip in parts if part == "heldout").values()) == {3}


def test_the_embedded_preferences_keep_to_their_captions():
    """Pairs of training and validation captions only; the lists of captions are the parts."""
    captions = {name: {clip.caption for clip in every_clip() if part_of(clip) == name}
                for name in ("train", "validation", "heldout")}
    for name in ("train", "validation"):
        prompts = pq.read_table(MUSIC / f"{name}.parquet")["prompt"].to_pylist()
        assert prompts and set(prompts) <= captions[name]
    for name in ("validation", "heldout"):
        assert set((MUSIC / f"{name}_prompts.txt").read_text().splitlines()) == captions[name]


def test_the_embedded_codec_is_heard():
    """Clips through the codec are heard as what they were: at least 19 of 20 attributes, at any volume of the training."""
    codec = load_inputs(ModelSpec(pretrained_model_name_or_path=str(MUSIC.parent / "tiny-music")))
    clips = every_clip()
    back = codec.decode(torch.from_numpy(np.stack([codec.encode(synthesise(clip, 0.4 + i % 6 / 10))
                                                   for i, clip in enumerate(clips)])))
    assert Clips()(back.numpy(), [clip.caption for clip in clips]).mean() >= 0.95


def test_the_reward_counts_attributes():
    """Two of three: the tempo is another. Silence has none; a caption of another kind is not scored."""
    one = next(clip for clip in every_clip() if clip.caption == "a slow flute playing g")
    waves = [synthesise(one), synthesise(one), np.zeros(5120), synthesise(one)]
    found = Clips()(waves, ["a slow flute playing g", "a fast flute playing g", "a slow flute playing g", "a red ring"])
    assert torch.allclose(found[:3], torch.tensor([1, 2 / 3, 0])) and found[3].isnan()


def test_a_spectrogram_shows_the_pitch():
    """A tone at a quarter of the rate lies at half of the height; the picture's rows run from high to low."""
    picture = np.asarray(spectrogram(np.sin(np.pi / 2 * np.arange(4000)), 4000)).sum(-1)
    assert abs(int(picture[:, picture.shape[1] // 2].argmax()) - 63) <= 1


def test_the_reports_section():
    waves = [synthesise(clip) for clip in every_clip()[:2]]
    scores = np.array([[0.0, 1.0], [1 / 3, 1.0]])
    sounds = Sounds(prompts=["a", "<b>"], clips={"base": waves, "trained": waves[::-1]}, rate=4000, reward="clips",
                    scores={"base": scores[:, 0], "trained": scores[:, 1]}, result=paired(scores[:, :1], scores[:, 1:]))
    (prompt, players), _ = sounds.players()
    assert prompt == "a" and players[0][2].startswith("data:audio/wav;base64,") and sounds.picture().width > 400
    assert sounds.sentence.startswith("clips: 0.167 -> 1.000 on 2 held-out prompts (2 pairs of clips), difference +0.833")
