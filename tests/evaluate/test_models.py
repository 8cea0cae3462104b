"""Any number of models beside one base: order, memory, multiplicity, rewards, strengths, judges that were trained on."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import DataError
from diffalign.evaluate import EvaluateSpec, Run, write_report
from diffalign.evaluate.alarm import Alarm, Statistic
from diffalign.evaluate.compare import Stage, compare, trained_on
from diffalign.evaluate.report import write_gallery
from diffalign.evaluate.shards import blocks
from diffalign.evaluate.sides import Side, draw_and_keep, draw_side
from diffalign.evaluate.spec import Entrant
from diffalign.rewards.rules import Brightness, Colourfulness, Compressibility
from diffalign.rewards.scenes import SceneChecker, parse
from diffalign.train import make_accelerator
from diffalign.train.spec import TrainSpec
from diffalign.world import world_of

from .. import ranks
from .scenes import prompts, side


def spec(**fields) -> EvaluateSpec:
    return EvaluateSpec(**{"prompts": "unused.txt", "judge": SceneChecker(), "bootstrap_resamples": 500, "grid_prompts": 3,
                           "batch_size": 6, **fields})


MODELS = {"base": side(0.6, 1), "aligned": side(0.1, 2), "slightly": side(0.5, 3), "broken": side(0.95, 4)}


@pytest.fixture(scope="module")
def found():
    texts = prompts(60)
    kinds = [parse(text).kind for text in texts]
    rewards = {"vivid": Colourfulness(), "small": Compressibility()}
    return compare(MODELS, texts, spec(rewards=rewards), categories=kinds, training=(Colourfulness(), Brightness()),
                   progress=None)


def test_every_model_has_its_own_verdict(found):
    assert list(found.sides) == list(MODELS) and found.models == ("aligned", "slightly", "broken") and found.base == "base"
    assert [found.verdict(name) for name in found.models] == ["better", "undecided", "worse"]
    assert found.statistics is found.results["aligned"]
    alone = compare({name: MODELS[name] for name in ("base", "broken")}, prompts(60), spec(), progress=None)
    assert alone.results["broken"] == found.results["broken"]
    assert set(found.categories) == set(found.models) == set(found.alarms)
    assert all(list(tile.pictures) == list(MODELS) for tile in found.tiles)
    assert all(list(tile.pictures) == ["base", "aligned"] for tile in [*found.best, *found.worst])


def test_the_sentence_says_how_many_were_compared(found):
    assert found.sentence.startswith("The aligned model is better: it wins ")
    assert found.sentence.endswith("3 models were compared with the base, so their sign tests are corrected by Holm's rule: "
                                   "better: aligned; worse: broken; not decided: slightly.")
    assert found.corrected["aligned"] == pytest.approx(3 * found.results["aligned"].sign_test)


def test_a_verdict_may_not_survive_its_company():
    """60 prompts, 24 wins, 9 losses: sign test 0.0135 alone; beside four level models 0.0675 by Holm's rule."""
    texts = prompts(60)

    @dataclass(frozen=True)
    class Numbers:
        name = "numbers"
        differentiable = False

        def __call__(self, images, texts):
            return torch.tensor([image.getpixel((0, 0))[0] / 1.0 for image in images])

    def level(values):
        from PIL import Image
        row = {text: value for text, value in zip(texts, values, strict=True)}
        return lambda asked, seeds: [Image.new("RGB", (8, 8), (row[text], 0, 0)) for text in asked]

    texts = [f"{i} {text}" for i, text in enumerate(texts)]
    base, shifted = [100] * 60, [101] * 24 + [99] * 9 + [100] * 27
    few = {"base": level(base), "aligned": level(shifted)}
    many = few | {f"level {i}": level(base) for i in range(4)}
    alone = compare(few, texts, spec(judge=Numbers()), progress=None)
    assert alone.verdict("aligned") == "better" and alone.statistics.sign_test == pytest.approx(0.0135, abs=1e-4)
    together = compare(many, texts, spec(judge=Numbers()), progress=None)
    assert together.results["aligned"] == alone.results["aligned"] and together.verdict("aligned") == "undecided"
    assert together.corrected["aligned"] == pytest.approx(5 * alone.statistics.sign_test)
    assert together.sentence.startswith("No difference is shown once 5 models are compared: taken alone the aligned model "
                                        "would count as better (62.5% of 60 prompts")


def test_further_rewards_are_reported_not_judged(found, tmp_path):
    assert list(found.rewards) == ["vivid", "small", "brightness"]  # what was optimised is measured, too
    side_scores = found.sides["aligned"].rewards["vivid"]
    images = MODELS["aligned"]([found.prompts[5]], [int(found.seeds[5, 0])])
    assert side_scores[5, 0] == pytest.approx(float(Colourfulness()(images, [found.prompts[5]])[0]))
    report = write_report(tmp_path, Run(title="t", base_model="b"), found)
    assert {name: row["role"] for name, row in report["rewards"].items()} == {
        "scenes": "judge", "vivid": "trained on", "small": "reported", "brightness": "trained on"}
    assert set(report["rewards"]["small"]["means"]) == set(MODELS)
    assert report["rewards"]["scenes"]["failures"] == dict.fromkeys(MODELS, 0)
    assert report["models"]["broken"]["verdict_corrected"] == "worse" and report["holm"] == found.corrected
    assert report["held_out"] is True and report["training_rewards"] == ["colourfulness", "brightness"]
    parts = report["models"]["broken"]["categories"].values()
    assert parts and all("win_rate_low" in part and not {"verdict", "sentence"} & set(part) for part in parts)
    assert set(report["alarm"]) >= {"fired", "reasons", "sentence"}
    assert report["identity"]["rewards"]["small"]["name"] == "compressibility"
    assert report["comparison"]["prompts"][0]["scores"].keys() == MODELS.keys()
    assert report["comparison"]["sampling"]["seed"] == 0
    page = (tmp_path / "report.html").read_text()
    assert "All models beside the base" in page and "Is the reward being hacked?" in page


def test_alarms_are_told(found, tmp_path):
    said = HACKED
    report = write_report(tmp_path, Run(title="t", base_model="b"), replace(found, alarms={**found.alarms, "aligned": said}))
    assert report["alarm"] == report["models"]["aligned"]["alarm"] and report["alarm"]["fired"]
    assert report["alarm"]["sentence"] == "Reward hacking: brightness left the base's band."
    page = (tmp_path / "report.html").read_text()
    assert "brightness left the base&#39;s band" in page and "+1.60 [+1.40, +1.80] · out" in page and "few prompts" in page


def test_the_alarm_reads_what_was_optimised(found):
    """One reward as it is; the judge is not held out where it was optimised itself; several as the mean of their z-scores."""
    one = compare(MODELS, found.prompts, spec(seed=0), training=[Brightness()], progress=None)
    scores = [side.rewards["brightness"].mean(1) for side in (one.sides["base"], one.sides["aligned"])]
    assert one.alarms["aligned"].training.base == pytest.approx(scores[0].mean())
    assert one.alarms["aligned"].training.aligned == pytest.approx(scores[1].mean())
    assert one.alarms["aligned"].judge.base == pytest.approx(one.results["aligned"].base_score)
    own = compare(MODELS, found.prompts, spec(seed=0), training=[SceneChecker()], progress=None)
    assert own.alarms["aligned"].judge is None and own.alarms["aligned"].training.base == pytest.approx(
        one.results["aligned"].base_score)
    assert found.alarms["aligned"].training.base == pytest.approx(0, abs=1e-6)  # two rewards: the base is where zero lies


def test_optimised_rewards_of_one_kind_are_all_reported(found):
    """Three settings of one class: none takes another's place, in the table or in what the alarm reads."""
    training = [Compressibility(quality=quality) for quality in (50, 60, 70)]
    both = compare(MODELS, found.prompts, spec(seed=0), training=training, progress=None)
    assert both.trained == ("compressibility", "compressibility (trained on)", "compressibility (trained on) 2")
    assert len({both.sides["base"].rewards[name].sum() for name in both.trained}) == 3
    assert both.alarms["aligned"].training is not None


HACKED = Alarm(fired=True, reasons=["brightness left the base's band"], notes=["few prompts"], prompts=30, diversity=None,
               training=None, judge=None, gap=None, doubted=False, statistics=[Statistic(
                   name="brightness", base=0.4, aligned=0.8, shift=1.6, low=1.4, high=1.8, band_low=-1.0, band_high=1.0,
                   left=True)])


@dataclass(frozen=True, kw_only=True)
class Sum:
    rewards: dict
    batch_size: int = 4
    name = "sum"
    differentiable = False

    def __call__(self, images, prompts):
        return sum(reward(images, prompts) for reward in self.rewards.values())


def test_drawn_rows_are_a_gallery_of_the_arena(found, tmp_path):
    from diffalign.arena import read_gallery
    table = write_gallery(tmp_path / "gallery", found)
    gallery = read_gallery(str(table.parent))
    assert set(gallery.models) == set(MODELS) and len(gallery.prompts) == len({tile.prompt for tile in found.tiles}) == 3
    tile = found.tiles[0]
    entry, = gallery.prompts[tile.prompt]["broken"]
    with Image.open(entry.picture.path) as picture:
        assert entry.seed == tile.seed and np.array_equal(np.asarray(picture), np.asarray(tile.pictures["broken"]))


def test_a_judge_that_was_trained_on_is_called_so():
    assert trained_on(SceneChecker(), (Sum(rewards={"a": Brightness(), "b": SceneChecker()}),))
    assert trained_on(Sum(rewards={"a": Brightness()}), (Brightness(),))
    assert not trained_on(SceneChecker(), (Sum(rewards={"a": Brightness()}), Compressibility()))
    assert not trained_on(SceneChecker(), ())
    two = {name: MODELS[name] for name in ("base", "aligned")}
    told = compare(two, prompts(30), spec(), training=(SceneChecker(),), progress=None)
    assert told.held_out is False and "The judge (scenes) was trained on: not held out." in told.sentence
    assert not told.rewards  # it is the judge: not reported twice
    unknown = compare(two, prompts(30), spec(), progress=None)
    assert unknown.held_out is None and "trained on" not in unknown.sentence


@dataclass(frozen=True)
class Version(Brightness):
    """One of two models that share a name."""

    number: int = 1

    def identity(self):
        return {"number": self.number}


def test_only_what_was_optimised_is_marked_trained_on(tmp_path):
    """Not another version of the same name; but a part of a sum is."""
    two = {name: MODELS[name] for name in ("base", "aligned")}
    rewards = {"first": Version(1), "second": Version(2), "small": Compressibility()}
    for training, expected in (((Version(2),), {"second"}), ((Sum(rewards={"a": Version(1)}),), {"first", "sum"}),
                               (None, set())):
        found = compare(two, prompts(6), spec(rewards=rewards), training=training, progress=None)
        table = write_report(tmp_path, Run(title="t", base_model="b"), found)["rewards"]
        assert {name for name, row in table.items() if row["role"] == "trained on"} == expected


def test_the_best_strength_is_named_with_its_doubt(tmp_path):
    models = {"base": side(0.7, 1), "aligned": side(0.5, 2), "strength 0.5": side(0.1, 3)}
    strengths = {"base": 0.0, "strength 0.5": 0.5, "aligned": 1.0}
    found = compare(models, prompts(60), spec(), strengths=strengths, progress=None)
    assert found.models == ("aligned",) and found.corrected.keys() == {"aligned"}  # a sweep is no further test
    assert found.sweep.best == "strength 0.5" and found.sweep.picked["strength 0.5"] > 0.99
    assert sum(found.sweep.picked.values()) == pytest.approx(1)
    report = write_report(tmp_path, Run(title="t", base_model="b"), found)
    told = report["strengths"]
    assert told["best"] == 0.5 and [row["strength"] for row in told["strengths"]] == [0, 0.5, 1]
    assert "Best strength by the judge: 0.5" in told["sentence"] and "too good" in told["sentence"]
    assert told["strengths"][1]["statistics"]["win_rate_low"] > 0.5
    assert (tmp_path / "strengths.png").exists() and "strengths.webp" in {path.name for path in tmp_path.iterdir()}
    assert compare(models, prompts(6), spec(judge=None), strengths=strengths, progress=None).sweep is None


def test_one_stage_is_open_at_a_time_and_the_base_may_come_late():
    now, most = set(), []

    def stage(*names):
        @contextmanager
        def open_():
            now.add(names)
            most.append(len(now))
            yield {name: MODELS[name] for name in names}
            now.remove(names)
        return Stage(names=names, open=open_, facts={name: {"id": name} for name in names})

    found = compare([stage("base", "broken"), stage("aligned"), stage("slightly")], prompts(20), spec(), progress=None,
                    compared=("aligned", "slightly", "broken"))
    assert max(most) == 1 and list(found.sides) == list(MODELS) and found.identity["models"]["slightly"] == {"id": "slightly"}
    together = compare(MODELS, prompts(20), spec(), progress=None)
    assert found.results == together.results and found.tiles[0].scores == together.tiles[0].scores


def test_only_what_is_shown_is_kept():
    import weakref
    made, most = [], 0

    def draw(texts, seeds):
        nonlocal most
        images = side(0.5, 1)(texts, seeds)
        made.extend(weakref.ref(image) for image in images)
        most = max(most, sum(one() is not None for one in made))
        return images

    _, kept = draw_and_keep(draw, prompts(60), SceneChecker(), spec(seed=0), keep=[(0, 0), (7, 0), (31, 0)])
    assert set(kept) == {(0, 0), (7, 0), (31, 0)} and most <= 2 * 6  # a block and the one before it


def test_a_side_with_rewards_survives_its_file(tmp_path):
    rewards = {"a/b": Brightness(), "c": Colourfulness()}
    made = draw_side(side(0.5, 1), prompts(5), None, spec(seed=0, seeds=2), rewards=rewards)
    made.save(tmp_path / "s.npz")
    again = Side.load(tmp_path / "s.npz")
    assert list(again.rewards) == ["a/b", "c"] and np.isnan(again.scores).all() and made.statistics.shape == (9, 5, 2)
    assert all(np.array_equal(made.rewards[name], again.rewards[name]) for name in made.rewards)
    assert np.allclose(made.rewards["a/b"], made.statistics[0], atol=1e-6)  # brightness is the first statistic


def test_a_damaged_side_is_one_line(tmp_path):
    """Any flipped bits, any cut: the arrays or a DataError that names the file, and nothing else."""
    file, random = tmp_path / "s.npz", np.random.default_rng(0)
    scores = random.integers(0, 9, (40, 5)).astype(np.float32)
    Side(scores=scores, statistics=scores[None], spread=scores[:, 0]).save(file)
    whole, refused = file.read_bytes(), 0
    for _ in range(500):
        content = bytearray(whole)
        for place in random.integers(0, 8 * len(whole), random.integers(1, 4)):
            content[place // 8] ^= 1 << place % 8
        file.write_bytes(content[:random.integers(len(content))] if random.random() < 0.2 else content)
        try:
            Side.load(file)
        except DataError as error:
            refused += 1
            assert str(error).startswith(str(file)) and "\n" not in str(error)
    assert refused > 300


def test_blocks_do_not_depend_on_the_number_of_processes():
    @dataclass
    class World:
        rank: int
        size: int

    whole = [(s.start, s.stop) for s in blocks(23, 4, World(0, 1))]
    for size in (2, 3, 8):
        parts = [(s.start, s.stop) for rank in range(size) for s in blocks(23, 4, World(rank, size))]
        assert sorted(parts) == whole == [(i, min(i + 4, 23)) for i in range(0, 23, 4)]


def two_ranks_compare(folder):
    """What one rank found."""
    world = world_of(make_accelerator(TrainSpec(cpu=True, mixed_precision="no"), folder))
    found = compare(MODELS, prompts(41), spec(seeds=2, rewards={"vivid": Colourfulness()}), progress=None, world=world)
    if world.rank == 0:
        write_report(folder / "2", Run(title="t", base_model="b"), found)
    facts = [found.sentence, found.results["broken"].win_rate, [tile.seed for tile in found.tiles]]
    (folder / f"found-{world.rank}.json").write_text(json.dumps(facts))


def test_two_processes_find_what_one_finds(tmp_path):
    """To the last bit: scores, rewards, statistics, intervals, and the grid's bytes."""
    ranks.together(two_ranks_compare, tmp_path, folder=tmp_path)
    single = compare(MODELS, prompts(41), spec(seeds=2, rewards={"vivid": Colourfulness()}), progress=None)
    write_report(tmp_path / "1", Run(title="t", base_model="b"), single)
    said = [(tmp_path / f"found-{rank}.json").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and json.loads(said[0])[0] == single.sentence
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("1", "2"))
    for name in ("comparison", "models", "rewards", "sentence", "holm"):
        assert one[name] == two[name], name
    assert (tmp_path / "1" / "grid.png").read_bytes() == (tmp_path / "2" / "grid.png").read_bytes()
    pages = [(tmp_path / name / "report.html").read_text() for name in ("1", "2")]
    assert pages[0].split("<main>")[1].split("<h2>Reproduce")[0] == pages[1].split("<main>")[1].split("<h2>Reproduce")[0]


@pytest.mark.parametrize(("fields", "words"), [
    ({"models": {"base": Entrant(lora="x")}}, "models has one called 'base'"),
    ({"bootstrap_resamples": 1}, "bootstrap_resamples must be at least 100"),
    ({"strengths": (0.5, 0.5)}, "strengths must differ"), ({"strengths": (0.1, 0.10000001)}, "strengths must differ"),
    ({"strengths": (0.5,), "models": {"strength 0.5": Entrant(lora="x")}}, "models has one called 'strength 0.5'"),
    ({"strengths": (-0.1,)}, "lie in 0..10")])
def test_specs_that_cannot_be_meant(fields, words):
    with pytest.raises(ValueError, match=words):
        spec(**fields)


@pytest.mark.parametrize(("fields", "words"), [
    ({}, "lora is missing"), ({"checkpoint": 3, "lora": "x"}, "checkpoint stands alone"),
    ({"lora": "x", "revision": "y"}, "belong to"),
    ({"lora": "x", "lora_scale": 11}, "lora_scale must lie"), ({"checkpoint": -1}, "must not be negative")])
def test_entrants_that_cannot_be_meant(fields, words):
    with pytest.raises(ValueError, match=words):
        Entrant(**fields)
