from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import sparse

from diffalign.building.filters import FILTERS, Curate, Duplicates, Fifa, Margin, Ties, curate, fifa
from diffalign.building.filters.duplicates import perceptual_hash
from diffalign.building.filters.text import Ngrams, Rules, TextModel, remembered
from diffalign.building.pictures import fetch, store
from diffalign.building.table import filtered
from diffalign.building.types import Candidate, Group
from diffalign.config import _build
from diffalign.errors import ConfigError, DataError, ModelError

from ..data.toy import jsonl, picture

NAN = math.nan


def group(id, prompt="a cat", utility=(1.0, 0.0), images=None, **scores) -> Group:
    """scores: a reward's name -> one number a candidate."""
    images = images or [f"images/{id}-{i}.png" for i in range(len(utility))]
    candidates = tuple(Candidate(image=image, scores={name: values[i] for name, values in scores.items()})
                       for i, image in enumerate(images))
    return Group(id=str(id), prompt=prompt, candidates=candidates, utility=tuple(utility))


def ids(kept) -> list[str]:
    return [found.id for found in kept.groups]


def run(filter, groups, folder=None, seed=0):
    kept = filter(groups, folder=folder, seed=seed)
    assert kept.report["groups"] == len(groups) and kept.report["kept"] == len(kept.groups)
    json.dumps(kept.report, allow_nan=False)
    return kept


def accounted(kept) -> bool:
    return sum(kept.report["dropped"].values()) + kept.report["kept"] == kept.report["groups"]


# --- ties and margins


def test_ties():
    groups = [group(0), group(1, utility=(0.5, 0.5)), group(2, utility=(0.5, 0.53, 0.51)), group(3, utility=(1.0, NAN)),
              group(4, utility=(0.5, NAN, 0.56))]
    assert ids(run(Ties(), groups)) == ["0", "2", "4"]
    kept = run(Ties(least=0.05), groups)  # 0.53 - 0.50 is closer than 0.05, 0.56 - 0.50 is not
    assert ids(kept) == ["0", "4"] and kept.report["dropped"] == {"tie": 2, "unscored": 1} and accounted(kept)
    assert run(Ties(), []).groups == []
    with pytest.raises(ValueError, match="least must be a number from 0, got -1"):
        Ties(least=-1)


def test_margin_by_a_proxy():
    """Proxy margins (labelled best minus worst): 3, 1, -2, 0.5, unknown. It disagrees with 1 of the 4 it told apart."""
    groups = [group(i, r=(score, 1.0)) for i, score in enumerate((4.0, 2.0, -1.0, 1.5, NAN))]
    kept = run(Margin(reward="r"), groups)
    assert ids(kept) == ["0", "1", "2", "3"] and kept.report["disagreement"] == 0.25 and accounted(kept)
    kept = run(Margin(reward="r", signed=True, least=0.75), groups)
    assert ids(kept) == ["0", "1"] and kept.report["kept_disagreement"] == 0.0 and accounted(kept)
    assert kept.report["dropped"] == {"tie": 0, "unscored": 0, "proxy_unknown": 1, "proxy_disagrees": 1, "small_margin": 1,
                                      "outside_quantiles": 0}
    # sizes 0.5, 1, 2, 3: quantiles by thirds of the way, so 0.4 is 1.2 and 0.9 is 2.7
    kept = run(Margin(reward="r", min_quantile=0.4, max_quantile=0.9), groups)
    assert ids(kept) == ["2"] and kept.report["dropped"]["outside_quantiles"] == 3 and accounted(kept)
    assert ids(run(Margin(), [group(0, utility=(0.0, 2.0)), group(1)])) == ["0", "1"]
    assert run(Margin(reward="r", signed=True), [group(0, r=(0, 1))]).groups == []
    with pytest.raises(DataError, match='no candidate has a score of the reward "x"; scored were: r'):
        run(Margin(reward="x"), groups)
    with pytest.raises(ValueError, match="min_quantile below max_quantile, got 0.5 and 0.5"):
        Margin(min_quantile=0.5, max_quantile=0.5)


# --- duplicates


def stored(folder, image) -> str:
    return store(folder, image)


def image_of(seed, size=(64, 64)) -> Image.Image:
    return Image.open(io.BytesIO(picture(seed, size))).convert("RGB")


def jpeg(image, quality=80) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def test_duplicate_pictures_in_a_group(tmp_path):
    a, b, c = (image_of(i) for i in range(3))
    names = [stored(tmp_path, x) for x in (a, jpeg(a), b, c)]
    file = io.BytesIO()
    a.save(file, "PNG", compress_level=0)  # other bytes, same pixels
    again = f"images/{hashlib.sha256(file.getvalue()).hexdigest()}.png"
    (tmp_path / again).write_bytes(file.getvalue())
    groups = [group(0, images=[names[0], again]), group(1, utility=(3, 2, 1), images=[names[0], again, names[2]]),
              group(2, images=[names[0], names[1]]), group(3, images=[names[2], names[3]])]
    assert ids(run(Duplicates(same="bytes"), groups, tmp_path)) == ["0", "1", "2", "3"]
    kept = run(Duplicates(), groups, tmp_path)
    assert ids(kept) == ["1", "2", "3"] and kept.groups[0].utility == (3, 1) and len(kept.groups[0].candidates) == 2
    assert kept.report["dropped"]["identical_pictures"] == 1 and kept.report["groups_with_fewer_candidates"] == 1
    kept = run(Duplicates(same="perceptual"), groups, tmp_path)
    assert ids(kept) == ["1", "3"] and kept.report["dropped"]["identical_pictures"] == 2 and accounted(kept)
    unpaired = group(9, utility=(1.0,), images=[names[0]])
    assert ids(run(Duplicates(), [unpaired], tmp_path)) == ["9"]
    (tmp_path / names[3]).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        run(Duplicates(), groups, tmp_path)


def test_contradicting_and_repeated_labels():
    """Pictures a and b under one prompt: twice a over b (one a repeat), once b over a; c and d are even."""
    def pair(id, best, worst, prompt="a cat"):
        return group(id, prompt, images=[best, worst])
    groups = [pair(0, "a", "b"), pair(1, "a", "b", "A  cat."), pair(2, "b", "a"), pair(3, "c", "d"), pair(4, "d", "c"),
              pair(5, "b", "a", "a dog"), group(6, utility=(0.5, 0.5), images=["a", "b"]),
              group(7, utility=(3, 2, 1), images=["a", "x", "b"])]
    kept = run(Duplicates(same="bytes"), groups)
    assert ids(kept) == ["0", "5", "6", "7"] and accounted(kept)
    assert kept.report["dropped"] == {"identical_pictures": 0, "repeated": 1, "contradiction": 3, "prompt_cap": 0}
    kept = run(Duplicates(same="bytes", contradictions="drop"), groups)
    assert ids(kept) == ["5", "6"] and accounted(kept)


def test_cap_of_a_prompt_does_not_depend_on_order():
    groups = [group(i, "A cat" if i % 2 else "a cat.") for i in range(10)] + [group(10, "a dog")]
    kept = run(Duplicates(same="bytes", max_groups_per_prompt=3), groups)
    assert len(kept.groups) == 4 and "10" in ids(kept) and kept.report["dropped"]["prompt_cap"] == 7
    shuffled = random.Random(0).sample(groups, len(groups))
    assert set(ids(run(Duplicates(same="bytes", max_groups_per_prompt=3), shuffled))) == set(ids(kept))
    other = run(Duplicates(same="bytes", max_groups_per_prompt=3), groups, seed=1)
    assert set(ids(other)) != set(ids(kept))


def test_perceptual_hash_sees_colour_and_forgives_encoding():
    def disc(colour, ground):
        image = Image.new("RGB", (64, 64), ground)
        image.paste(colour, (20, 20, 44, 44))
        return image

    def distance(one, other):
        return int((perceptual_hash(one) != perceptual_hash(other)).sum())
    assert perceptual_hash(image_of(0)).shape == (63 + 15 + 2 * (15 + 15),)
    for seed in range(5):
        image = image_of(seed)
        assert distance(image, jpeg(image)) <= 4 and distance(image, image.resize((96, 96)).filter(ImageFilter.SMOOTH)) <= 4
    assert distance(disc("red", "blue"), disc("lime", "blue")) > 4      # one shape in two colours
    assert distance(Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")) > 4
    assert min(distance(image_of(i), image_of(j)) for i, j in itertools.combinations(range(8), 2)) > 15


# --- fifa: the checks of the card, in its order


@dataclass(frozen=True)
class Places:
    """An embedder for tests: each prompt's place on a line."""

    of: tuple[tuple[str, float], ...]

    def __call__(self, prompts):
        return np.array([[dict(self.of)[prompt]] for prompt in prompts])


@dataclass(frozen=True)
class Grades:
    of: tuple[tuple[str, float], ...]

    def __call__(self, prompts):
        return np.array([dict(self.of)[prompt] for prompt in prompts])


def scored(margins, places, grades, prompts=None):
    """Groups 0, 1, ... with these proxy margins, and the embedder and quality of their prompts."""
    prompts = prompts or [f"prompt {i}" for i in range(len(margins))]
    groups = [group(i, prompt, r=(margin, 0.0)) for i, (prompt, margin) in enumerate(zip(prompts, margins))]
    return groups, Places(tuple(zip(prompts, places))), Grades(tuple(zip(prompts, grades)))


FOUR = ((2.5, 0.4, 1.2, 3.0), (0, 1, 3, 7), (7, 9, 8, 2))


def test_knn_by_hand():
    def line(*x):
        return np.array(x, dtype=float)[:, None]
    first, _ = fifa.knn_distances(line(0, 1, 3, 7), 1)
    assert first.tolist() == [1, 1, 2, 4] and np.log(first).sum() == pytest.approx(2.079442, abs=1e-6)  # ln 8
    second, _ = fifa.knn_distances(line(0, 1, 3, 7), 2)
    assert second.tolist() == [3, 2, 3, 6] and np.log(second).sum() == pytest.approx(4.682131, abs=1e-6)  # ln 108
    tight, _ = fifa.knn_distances(line(0, 0.1, 0.2, 0.3), 1)
    assert np.log(tight).sum() == pytest.approx(-9.210340, abs=1e-6) and np.log(tight).sum() < np.log(first).sum()
    assert fifa.knn_distances(line(0, 1, 3, 7), 9)[0].tolist() == [7, 6, 4, 7]  # fewer than 9 others: the farthest
    assert np.isnan(fifa.knn_distances(line(5), 1)[0]).all()


def test_equal_prompts_count_once():
    """{0, 0, 3, 7} as rows would give log 0; as {0, 3, 7} the distances are {3, 3, 4}: ln 36."""
    for points in (np.array([[0.0], [-0.0], [3], [7]]), sparse.csr_matrix([[0.0], [0], [3], [7]])):
        distance, which = fifa.knn_distances(points, 1)
        assert distance.tolist() == [3, 3, 3, 4] and which.tolist() == [0, 0, 1, 2]
        assert np.log(distance[1:]).sum() == pytest.approx(3.583519, abs=1e-6)
    noisy = np.array([[0.6, 0.8], [0.6, 0.8 + 1e-9], [1, 0]])  # the same prompt from two batches
    assert fifa.knn_distances(noisy, 1)[1].tolist() == [0, 0, 1]


def test_scores_by_hand():
    """Min-max of margins (0.807692, 0, 0.307692, 1), of qualities (5/7, 1, 6/7, 0), of logs (0, 0, 1/2, 1); 1, 1/2, 1/2."""
    groups, places, grades = scored(*FOUR)
    spec = Fifa(keep=2, reward="r", normalise="minmax", embedder=places, quality=grades)
    rows = [(one, 0, 1) for one in groups]
    terms = spec._terms(rows, np.array(FOUR[0]), None)
    assert terms.score.tolist() == pytest.approx([1.164835, 0.5, 0.986264, 1.5], abs=1e-6)
    kept = run(spec, groups)
    assert ids(kept) == ["0", "3"] and accounted(kept)
    # a rule comes after the scores: item 3 goes, and the others keep theirs
    ruled = run(replace(spec, least_quality=5.0), groups)
    assert ids(ruled) == ["0", "2"] and ruled.report["dropped"]["low_quality"] == 1 and accounted(ruled)


def test_scale_of_the_margins():
    """Without scaling, margins of 0.01 times the size no longer count; with z-scores and ranks nothing changes."""
    rng = np.random.default_rng(0)
    margins = rng.exponential(3, 30)
    groups, places, grades = scored(margins, rng.normal(size=30), rng.uniform(0, 10, 30))
    small, _, _ = scored(0.01 * margins, rng.normal(size=30), rng.uniform(0, 10, 30))
    for how, same in (("none", False), ("z", True), ("rank", True), ("minmax", True)):
        spec = Fifa(keep=6, reward="r", normalise=how, embedder=places, quality=grades)
        assert (ids(run(spec, groups)) == ids(run(spec, small))) is same, how


def test_cap_of_pairs_a_prompt():
    """14 pairs of one excellent prompt and 10 others."""
    prompts = ["excellent"] * 14 + [f"prompt {i}" for i in range(10)]
    margins = [9.0 + 0.1 * i for i in range(14)] + [1.0 + 0.1 * i for i in range(10)]
    groups, places, grades = scored(margins, [50.0] * 14 + list(range(10)), [10.0] * 14 + [5.0] * 10, prompts)
    spec = Fifa(keep=5, reward="r", embedder=places, quality=grades)
    for selection in ("scores", "greedy"):
        spec = replace(spec, selection=selection)
        kept = run(spec, groups)
        assert len({found.prompt for found in kept.groups}) == 5 and kept.report["kept_prompts"] == 5
        assert "13" in ids(kept)  # its widest margin stands for the prompt
        assert len({found.prompt for found in run(replace(spec, max_per_prompt=14), groups).groups}) == 1


def test_sign():
    """Item 1's proxy says -2: with absolute margins it comes first, with signed ones it goes."""
    groups, places, grades = scored((0.5, -2.0, 1.0), (0, 1, 2), (5, 5, 5))
    spec = Fifa(keep=1, reward="r", embedder=places, quality=grades)
    kept = run(spec, groups)
    assert ids(kept) == ["1"] and kept.report["kept_disagreement"] == 1.0 and kept.report["disagreement"] == 0.3333
    signed = run(replace(spec, signed=True, keep=1.0), groups)
    assert ids(signed) == ["0", "2"] and signed.report["dropped"]["proxy_disagrees"] == 1 and accounted(signed)


@pytest.mark.parametrize("selection", ["scores", "greedy"])
def test_order_of_rows_does_not_matter(selection):
    """Many equal margins, so that ties decide: they go by id."""
    rng = np.random.default_rng(1)
    prompts = [f"prompt {i % 17}" for i in range(60)]
    groups, places, grades = scored(rng.integers(1, 4, 60).astype(float), [float(p.split()[1]) for p in prompts],
                                    [5.0] * 60, prompts)
    spec = Fifa(keep=11, reward="r", embedder=places, quality=grades, selection=selection, max_per_prompt=2)
    wanted = set(ids(run(spec, groups)))
    for seed in range(5):
        assert set(ids(run(spec, random.Random(seed).sample(groups, 60)))) == wanted
    flat, places, grades = scored([1.0] * 12, [0.0, 1.0] * 6, [5.0] * 12)
    assert ids(run(Fifa(keep=1, reward="r", embedder=places, quality=grades), flat)) == ["0"]


def test_ties_are_never_selected():
    groups, places, grades = scored((1.0, 9.0, 2.0), (0, 1, 2), (5, 5, 5))
    groups[1] = replace(groups[1], utility=(0.5, 0.5))
    kept = run(Fifa(keep=1.0, reward="r", embedder=places, quality=grades), groups)
    assert ids(kept) == ["0", "2"] and kept.report["dropped"]["tie"] == 1


# --- fifa: beyond the card


def test_unknown_quality_is_neither_zero_nor_the_mean():
    groups, places, grades = scored((1.0, 5.0, 2.0, 3.0), (0, 1, 2, 3), (5, NAN, 6, 7))
    kept = run(Fifa(keep=1.0, reward="r", embedder=places, quality=grades), groups)
    assert ids(kept) == ["0", "2", "3"] and kept.report["dropped"]["quality_unknown"] == 1 and accounted(kept)
    assert ids(run(Fifa(keep=1.0, reward="r", embedder=places, quality=grades, quality_weight=0.0), groups)) == list("0123")
    groups[0] = group(0, "prompt 0", r=(NAN, 1.0))
    assert run(Fifa(keep=1.0, reward="r", embedder=places, quality=grades), groups).report["dropped"]["proxy_unknown"] == 1


def test_greedy_follows_the_objective():
    """Three prompts close together far from a crowd: each looks lonely... except to the other two. By scores of the full set
    the best two are near twins; within a selection of two they would be neighbours at 0.5."""
    places = (0.0, 0.5, 10, 11.2, 12.4, 13.6)
    groups, embedder, grades = scored((3.0, 2.9, 2.0, 2.0, 2.0, 2.0), places, (5,) * 6)
    spec = Fifa(keep=2, reward="r", normalise="none", quality_weight=0, diversity_weight=1.0, embedder=embedder,
                quality=grades)
    top, greedy = run(spec, groups), run(replace(spec, selection="greedy"), groups)
    assert ids(top) == ["0", "1"] and ids(greedy) == ["0", "5"]
    # 3 + 2.9 + 2 ln 0.5 = 4.513706 against 3 + 2 + 2 ln 13.6 = 10.220140
    assert top.report["objective"] == pytest.approx(5.9 + 2 * math.log(0.5), abs=1e-6)
    assert greedy.report["objective"] == pytest.approx(5 + 2 * math.log(13.6), abs=1e-6)


@pytest.mark.parametrize("k, normalise", [(1, "z"), (2, "none"), (3, "rank")])
def test_greedy_against_all_subsets(k, normalise):
    """The search's own gains must be those of the objective; it lies between the scores' choice and the optimum."""
    rng, better = np.random.default_rng(k), 0
    for _ in range(6):
        places = [(f"prompt {i}", float(x)) for i, x in enumerate(rng.normal(size=9))]
        groups, _, grades = scored(rng.exponential(1, 9), [0] * 9, rng.uniform(0, 10, 9))
        spec = Fifa(keep=4, reward="r", k=k, normalise=normalise, diversity_weight=2.0, embedder=Places(tuple(places)),
                    quality=grades)
        rows = [(one, 0, 1) for one in groups]
        terms = spec._terms(rows, np.array([one.candidates[0].scores["r"] for one in groups]), None)
        values = {subset: spec.objective(terms, subset) for size in (1, 2, 3, 4)
                  for subset in itertools.combinations(range(9), size)}
        chosen = spec._greedy(terms, np.ones(9, dtype=bool), 4)
        for size in range(1, 5):  # each step is the best one
            before = tuple(sorted(chosen[:size - 1]))
            reachable = [values[tuple(sorted((*before, i)))] for i in range(9) if i not in before]
            assert values[tuple(sorted(chosen[:size]))] == pytest.approx(max(reachable), abs=1e-9)
        top = values[tuple(sorted(spec._top(terms, np.ones(9, dtype=bool), 4)))]
        best = max(value for subset, value in values.items() if len(subset) == 4)
        assert values[tuple(sorted(chosen))] <= best + 1e-9
        better += values[tuple(sorted(chosen))] >= top - 1e-9
    assert better >= 5


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ranked_distances_do_not_hang_on_rounding(k):
    """In the plane a distance within the selection and the same one in the whole set come from two algorithms."""
    rng = np.random.default_rng(k)
    points = {f"prompt {i}": rng.normal(size=2) for i in range(8)}
    groups, _, grades = scored(rng.exponential(1, 8), [0] * 8, [0] * 8)
    spec = Fifa(keep=5, reward="r", k=k, normalise="rank", quality_weight=0, diversity_weight=1.0, quality=grades,
                embedder=lambda prompts: np.stack([points[prompt] for prompt in prompts]))
    terms = spec._terms([(one, 0, 1) for one in groups], np.array([one.candidates[0].scores["r"] for one in groups]), None)
    search = fifa._Search(spec, terms, np.ones(8, dtype=bool))
    for _ in range(5):
        gain, before = terms.own + search._diversity_gain(), spec.objective(terms, search.chosen)
        for place in np.flatnonzero(search.open):
            assert gain[place] == pytest.approx(spec.objective(terms, [*search.chosen, place]) - before, abs=1e-9)
        search.step()


def test_scales():
    values = np.array([1.0, 2, 2, 5, NAN])
    assert fifa.scale(values, "minmax")(values)[:4].tolist() == [0, 0.25, 0.25, 1]
    assert fifa.scale(values, "rank")(values)[:4].tolist() == [0.125, 0.5, 0.5, 0.875]
    z = fifa.scale(values, "z")(values)
    assert z[:4].mean() == pytest.approx(0) and z[:4].std() == pytest.approx(1) and np.isnan(z[4])
    assert fifa.scale(np.ones(3), "z")(np.ones(3)).tolist() == [0, 0, 0]


def test_fifa_as_a_share_and_with_its_own_tools():
    words = ["red ring", "blue square", "green disc on white", "two dogs in the snow", "a castle by the sea at night"]
    groups = [group(i, f"{words[i % 5]} number {i // 5}", r=(float(i % 7), 0.5)) for i in range(40)]
    kept = run(Fifa(keep=0.25, reward="r"), groups)
    assert len(kept.groups) == 10 and kept.report["kept_margin"]["median"] > kept.report["margin"]["median"]
    assert ids(run(Fifa(keep=1000, reward="r"), groups)) == [one.id for one in groups]
    one = run(Fifa(keep=3), [group(0)])
    assert ids(one) == ["0"] and run(Fifa(keep=3), []).groups == []
    with pytest.raises(ConfigError, match="selection: greedy is for at most 1000 pairs"):
        many = [group(i, f"prompt {i}") for i in range(1200)]
        Fifa(keep=1100, selection="greedy")(many, folder=None, seed=0)
    with pytest.raises(DataError, match='two groups have the id "0"'):
        run(Fifa(keep=1), [group(0), group(0)])
    for options, words in (({"keep": 0}, "keep must be a count"), ({"keep": 1.5}, "a share in 0..1, got 1.5"),
                           ({"keep": 1, "k": 0}, "k must be at least 1"),
                           ({"keep": 1, "quality_weight": -1.0}, "quality_weight must be a number from 0")):
        with pytest.raises(ValueError, match=words):
            Fifa(**options)


# --- text


def test_rules():
    """"a red cat on the mat": 15 letters of 20, 6 distinct of 6 words, no odd characters: 7.5."""
    quality = Rules()(["a red cat on the mat", "a portrait of an old sailor, oil on canvas", "cat cat cat cat cat cat cat cat",
                       "@@##%% &&", "", "красивый замок на берегу моря"])
    assert quality[0] == pytest.approx(7.5) and quality[1] == 10 and quality[2] == pytest.approx(10 / 8)
    assert quality[3] == 0 and quality[4] == 0 and quality[5] == 10


def test_ngrams_put_like_spellings_near():
    rows = Ngrams()(["a red cat", "a red cats", "submarine"]).toarray()
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1)
    assert np.linalg.norm(rows[0] - rows[1]) < 1 < np.linalg.norm(rows[0] - rows[2])
    assert Ngrams()(["", "  "]).shape == (2, 1)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    import torch

    from ..models.tiny import _clip, _tokenizer

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = _clip(8, False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    model.save_pretrained(folder / "model", safe_serialization=True)
    _tokenizer(folder, "words").save_pretrained(folder / "model")
    return folder / "model"


def test_text_model(clip_folder):
    prompts = ["a", "a red ring", "an owl", "b" * 40]
    model = TextModel(folder=str(clip_folder), device="cpu")
    rows = model(prompts)
    assert rows.shape == (4, 8) and np.linalg.norm(rows, axis=1) == pytest.approx(1)
    singles = np.concatenate([TextModel(folder=str(clip_folder), device="cpu", batch_size=1)([p]) for p in prompts])
    assert np.abs(rows - singles).max() < 1e-6  # padding changes nothing
    groups = [group(i, prompt) for i, prompt in enumerate(prompts)]
    assert len(run(Fifa(keep=2, embedder=model, quality_weight=0), groups).groups) == 2


def test_text_model_refuses(tmp_path, clip_folder):
    with pytest.raises(ModelError, match="no such folder; download the text encoder once"):
        TextModel(folder=str(tmp_path / "no")).check()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle"):
        Fifa(keep=1, embedder=TextModel(folder=str(tmp_path))).check()
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(ModelError, match="auto_map"):
        TextModel(folder=str(tmp_path))(["a"])


class Counting:
    """A quality that is worth remembering; "odd" cannot be read."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked.append(list(prompts))
        return np.array([NAN if prompt == "odd" else float(len(prompt)) for prompt in prompts])

    def identity(self):
        return {"model": "m"}


def test_quality_is_asked_once_a_prompt(tmp_path):
    quality = Counting()
    assert remembered(quality, ["ab", "odd", "ab", "c"], tmp_path).tolist() == pytest.approx([2, NAN, 2, 1], nan_ok=True)
    assert quality.asked == [["ab", "c", "odd"]]
    again = Counting()
    assert remembered(again, ["ab", "odd", "new"], tmp_path).tolist() == pytest.approx([2, NAN, 3], nan_ok=True)
    assert again.asked == [["new", "odd"]]  # what was unknown is asked again, what is known is not
    (file,) = tmp_path.glob("*.json")
    file.write_text("{damaged")
    assert remembered(Counting(), ["ab"], tmp_path).tolist() == [2]


# --- curation: the checks of the card, in its order

P = np.array([0.5, 0.5])
R = np.log([1.0, 3.0])


def curated(p, r, k):
    """The distribution of the picks of K draws from p, by all K-tuples; K x its weight on x, over p, is the paper's H."""
    out = np.zeros(len(p))
    for draws in itertools.product(range(len(p)), repeat=k):
        chances = curate.pick_probabilities(np.array([r[x] for x in draws]))
        for x, chance in zip(draws, chances):
            out[x] += np.prod(p[list(draws)]) * chance
    return out


def mixed(p, r, k, share, rounds):
    q = p
    for _ in range(rounds):
        q = (p + share * curated(q, r, k)) / (1 + share)
        q /= q.sum()  # rounding errors of the total would double with each round
    return q


def test_curated_by_hand():
    for k, h, wanted in ((2, (0.75, 1.25), (0.375, 0.625)), (3, (0.657143, 1.342857), (0.328571, 0.671429)),
                         (4, (0.6125, 1.3875), (0.30625, 0.69375))):
        assert curated(P, R, k).tolist() == pytest.approx(wanted, abs=1e-6)
        assert (curated(P, R, k) / P).tolist() == pytest.approx(h, abs=1e-6)
    assert curated(P, R, 9)[1] == pytest.approx(0.72, abs=0.015)  # towards 0.75


def test_gumbel_picker_draws_the_choice():
    draw = np.random.default_rng(0)
    rewards = R[draw.integers(0, 2, size=(1_000_000, 3))]
    picked = np.take_along_axis(rewards, curate.pick(rewards, draw.gumbel(size=rewards.shape))[:, None], 1)
    assert (picked > 0.5).mean() == pytest.approx(0.671429, abs=0.002)
    sharp = curate.pick(np.tile(R, (200_000, 1)), draw.gumbel(size=(200_000, 2)), 0.5)
    assert sharp.mean() == pytest.approx(0.9, abs=0.003)  # 9 / (1 + 9) at temperature 1/2
    assert curate.pick(np.array([NAN, -5.0]), np.array([100.0, 0.0])) == 1


def test_iterated_without_real_data():
    p, seen = P, []
    for _ in range(6):
        p = curated(p, R, 2)
        seen.append(p[1])
    assert seen == pytest.approx([0.625, 0.742188, 0.837860, 0.905785, 0.948454, 0.972899], abs=1e-6)
    assert [1 + 2 * x for x in seen[:4]] == pytest.approx([2.25, 2.484375, 2.675720, 2.811571], abs=1e-6)  # E[e^r]


@pytest.mark.parametrize("share, fixed", [(0.25, (0.468871, 0.531129)), (0.5, (0.438447, 0.561553)),
                                          (1.0, (0.381966, 0.618034)), (2.0, (0.292893, 0.707107))])
def test_mixed_with_real_data(share, fixed):
    q = mixed(P, R, 2, share, 200)
    assert q.tolist() == pytest.approx(fixed, abs=1e-6)
    bound = curate.divergence_bound(share, 2)
    if share < 1:
        assert (q * np.log(q / P)).sum() <= bound and (q / P).max() <= 1 / (1 - share)
    else:
        assert bound is None
    if share == 0.5:
        assert mixed(P, R, 2, share, 1).tolist() == pytest.approx((0.458333, 0.541667), abs=1e-6)
        assert bound == pytest.approx(math.log(2)) and (q * np.log(q / P)).sum() == pytest.approx(0.007597, abs=1e-6)
        assert (q / P).max() == pytest.approx(1.123106, abs=1e-6)   # at most 1 / (1 - 0.5 (2 - 1)) = 2


def test_one_candidate_is_no_choice_and_equal_ones_keep_their_shares():
    assert curated(np.array([0.2, 0.8]), R, 1).tolist() == pytest.approx([0.2, 0.8])
    p, r = np.array([0.2, 0.3, 0.5]), np.array([1.0, 1.0, 0.0])
    for _ in range(80):
        p = curated(p, r, 2)
        p /= p.sum()
    assert p.tolist() == pytest.approx([0.4, 0.6, 0], abs=1e-6)


def test_expected_exponential_reward_rises_as_promised():
    draw = np.random.default_rng(3)
    for k, _ in itertools.product((2, 3), range(30)):
        p, r = draw.dirichlet(np.ones(3)), draw.normal(size=3)
        e = np.exp(r)
        mean = (p * e).sum()
        least = (k - 1) / k * (p * (e - mean) ** 2).sum() / e.max()
        assert (curated(p, r, k) * e).sum() - mean >= least - 1e-12


def test_a_hard_prompt_keeps_its_share():
    """Two prompts, one ten points below: within a prompt both keep every group; one choice over all would lose it."""
    groups = [group(i, "easy" if i % 2 else "hard", (0.1, 0.2, 0.3), r=np.arange(3) + (10.0 if i % 2 else 0))
              for i in range(20)]
    kept = run(Curate(reward="r"), groups)
    assert [one.prompt for one in kept.groups].count("hard") == 10
    pooled = curate.pick_probabilities(np.concatenate([[c.scores["r"] for c in one.candidates] for one in groups]))
    assert pooled.reshape(20, 3)[::2].sum() < 1e-3


# --- curation: groups


def test_curate_keeps_the_picked_one():
    groups = [group(i, f"prompt {i}", (0.0, 1.0, NAN), r=(2.0, 1.0, NAN)) for i in range(400)] + [group("x", r=(NAN, 1.0))]
    kept = run(Curate(reward="r"), groups)
    assert len(kept.groups) == 400 and kept.report["dropped"]["unscored"] == 1 and accounted(kept)
    first = np.mean([one.candidates[0].image.endswith("-0.png") for one in kept.groups])
    chance = 1 / (1 + math.exp(-1))
    assert first == pytest.approx(chance, abs=0.06)
    for one in kept.groups:
        winner, loser = one.candidates
        assert one.utility == (1.0, 0.0) and winner.image != loser.image and not loser.image.endswith("-2.png")
        assert winner.facts["pick_probability"] == pytest.approx(chance if winner.image.endswith("-0.png") else 1 - chance)
    entropy = -(chance * math.log(chance) + (1 - chance) * math.log(1 - chance))
    assert kept.report["pick_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert kept.report["even_entropy"] == pytest.approx(math.log(2), abs=1e-6)
    shuffled = run(Curate(reward="r"), random.Random(0).sample(groups, len(groups)))
    assert {one.id: one for one in shuffled.groups} == {one.id: one for one in kept.groups}
    assert run(Curate(reward="r"), groups, seed=1).groups != kept.groups
    with pytest.raises(DataError, match='no candidate has a score of the reward "no"'):
        run(Curate(reward="no"), groups)


def test_standardised_rewards_have_one_temperature():
    big = [group(i, r=(3.0, 1.0, 2.0), utility=(1, 2, 3)) for i in range(20)]
    small = [group(i, r=(0.03, 0.01, 0.02), utility=(1, 2, 3)) for i in range(20)]
    spec = Curate(reward="r", standardise=True)
    images = [[c.image for c in one.candidates] for one in run(spec, big).groups]
    assert images == [[c.image for c in one.candidates] for one in run(spec, small).groups]
    plain = run(Curate(reward="r"), small)
    assert plain.report["pick_entropy"] == pytest.approx(math.log(3), abs=1e-4)  # hardly a choice
    assert run(spec, small).report["pick_entropy"] < 0.95 * math.log(3)


def test_mixing_with_real_rows(tmp_path, caplog):
    (tmp_path / "real").mkdir()
    for i in range(8):
        (tmp_path / "real" / f"{i}.png").write_bytes(picture(i))
    real = jsonl(tmp_path / "real" / "real.jsonl", [
        {"prompt": f"real {i}", "chosen": f"{i}.png", "rejected": f"{(i + 1) % 8}.png"} for i in range(8)])
    groups = [group(i, r=(1.0, 0.0, 0.5, 0.2), utility=(1, 2, 3, 4)) for i in range(20)]
    folder = tmp_path / "out"
    spec = Curate(reward="r", real=str(real), synthetic_per_real=0.25)
    kept = spec(groups, folder=folder, seed=0)
    drawn, mixed_in = kept.groups[:2], kept.groups[2:]  # floor(0.25 * 8) = 2 picks
    assert len(mixed_in) == 8 and all(one.id.startswith("real-") for one in mixed_in)
    assert len({one.id for one in mixed_in}) == 8 and [one.id for one in drawn] != ["0", "1"]
    assert np.array_equal(np.asarray(fetch(folder, mixed_in[3].candidates[0].image)),
                          np.asarray(Image.open(tmp_path / "real" / "3.png").convert("RGB")))
    assert kept.report["kl_bound"] == pytest.approx(-math.log(1 - 0.25 * 3), abs=1e-6) and kept.report["bounded"]
    assert kept.report["real_share"] == 0.8 and kept.report["dropped"]["over_share"] == 18 and not caplog.records
    loose = replace(spec, synthetic_per_real=1.0)(groups, folder=folder, seed=0)
    assert loose.report["bounded"] is False and loose.report["kl_bound"] is None
    assert "not below 1 / (K - 1) = 0.333" in caplog.text
    lone = jsonl(tmp_path / "real" / "lone.jsonl", [{"prompt": "p", "image": "0.png", "label": 1}])
    with pytest.raises(DataError, match="lone.jsonl line 1: one picture alone"):
        replace(spec, real=str(lone))(groups, folder=folder, seed=0)
    with pytest.raises(ValueError, match="real and synthetic_per_real go together"):
        Curate(real=str(real))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Curate(temperature=0.0)


# --- together


def test_filters_follow_one_another():
    groups = [group(i, f"prompt {i}", (float(i % 3), 1.0)) for i in range(9)]
    left, reports = filtered(groups, [Ties(), Margin(least=1.0), Duplicates(same="bytes")], None, 0)
    assert len(left) == 6 and [step["filter"] for step in reports] == ["Ties", "Margin", "Duplicates"]
    assert reports[1]["groups"] == reports[0]["kept"] == 6
    with pytest.raises(DataError, match=r"filters: Ties leaves none of 9 groups \(9 tie\); loosen its options"):
        filtered(groups, [Ties(least=5.0)], None, 0)


def test_filters_are_their_own_configuration():
    tree = {"keep": 0.01, "reward": "pick", "normalise": "rank", "quality": "rules",
            "embedder": {"kind": "ngrams", "largest": 4}}
    assert _build(FILTERS["fifa"], tree, "filters.0") == Fifa(keep=0.01, reward="pick", normalise="rank",
                                                               embedder=Ngrams(largest=4))
    assert _build(FILTERS["fifa"], {"keep": 5000}, "f").keep == 5000
    with pytest.raises(ConfigError, match=r"f\.embedder\.kind: no embedder called 'bert'"):
        _build(FILTERS["fifa"], {"keep": 1, "embedder": "bert"}, "f")
