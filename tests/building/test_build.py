"""Builds: numbers of utilities and selections by hand, resuming after a kill at any instant, and what is refused."""

import json
import math
import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diffalign import run
from diffalign.building import draw, judge, table
from diffalign.building.journal import Journal
from diffalign.building.pictures import fetch
from diffalign.building.select import AllPairs, BestWorst, Groups
from diffalign.building.spec import Sampling
from diffalign.building.types import Candidate, Group, Kept
from diffalign.building.utility import Mean, One, Votes, utilities
from diffalign.cli import main
from diffalign.config import load_build
from diffalign.data.columns import Tally, detect_layout, read_rows
from diffalign.data.prompts import Prompts, read_prompts
from diffalign.data.spec import DataSpec
from diffalign.errors import ConfigError, DataError, ResourceError, UserError
from diffalign.rewards.scenes import is_held_out, parse
from diffalign.sampling import generate, picture_seed
from diffalign.train.checkpoint import claim

from .. import ranks
from . import toy

CARD = np.array([[0.2, 0.5, 0.9], [1, 3, 2], [10, 20, 30]])  # methods card, check 11
NAMES = ("a", "b", "c")


@pytest.fixture
def stub(monkeypatch):
    stand_in = toy.Stub()
    stand_in.put_into(monkeypatch.setattr)
    return stand_in


def group(*utility, scores=None):
    found = tuple(Candidate(image=f"images/{n}.png", scores={"r": value}, model=f"m{n % 2}", seed=n)
                  for n, value in enumerate(utility))
    return Group(id="g", prompt="p", candidates=found, utility=utility)


# --- several rewards, one number ---

def test_vote_share_is_syn_pics():
    # duels won: 0; 1 + 2 + 1 = 4; 2 + 1 + 2 = 5; of 3 rewards x 2 opponents
    assert Votes()(CARD, NAMES) == pytest.approx([0, 4 / 6, 5 / 6])
    assert Votes()(CARD, NAMES).sum() == pytest.approx(1.5)  # every duel is won once: k / 2
    assert Votes()(np.array([[1.0, 1, 0]]), ("a",)) == pytest.approx([0.5, 0.5, 0])  # a tie is won by nobody


def test_mean_of_z_scores():
    # (21, 22, 23): mean 22, population std sqrt(2/3), so -1.2247, 0, 1.2247; equal scores say nothing
    z = math.sqrt(1.5)
    assert Mean()(np.array([[21.0, 22, 23]]), ("a",)) == pytest.approx([-z, 0, z])
    assert Mean()(np.array([[21.0, 22, 23], [0.1, 0.1, 0.1]]), ("a", "b")) == pytest.approx([-z / 2, 0, z / 2])
    both = np.array([[21.0, 22, 23], [3.0, 2, 1]])
    assert Mean(weights={"a": 3})(both, ("a", "b")) == pytest.approx([-z / 2, 0, z / 2])  # (3 - 1) / 4 of z
    assert Mean(weights={"b": -1})(both, ("a", "b")) == pytest.approx([-z, 0, z])  # turned round, both agree
    assert (Mean()(np.full((1, 3), 0.1), ("a",)) == 0).all()


def test_scale_and_order_do_not_matter_to_votes():
    shuffled = [2, 0, 1]
    assert Votes()(100 * CARD[:, shuffled] - 7, NAMES) == pytest.approx(Votes()(CARD, NAMES)[shuffled])
    assert Votes()(CARD[::-1], NAMES) == pytest.approx(Votes()(CARD, NAMES))


@pytest.mark.parametrize("utility", [Votes(), Mean()])
def test_a_missing_score_takes_its_candidate_out_and_nothing_else(utility):
    with_nan = np.insert(CARD, 1, np.nan, axis=1)
    with_nan[0, 1] = 99.0
    found = utility(with_nan, NAMES)
    assert np.isnan(found[1]) and found[[0, 2, 3]] == pytest.approx(utility(CARD, NAMES))


def test_one_reward_reads_no_other():
    assert One(reward="b")(np.array([[np.nan, 1], [5, 6]]), ("a", "b")).tolist() == [5, 6]
    assert Mean(weights={"a": 0})(np.array([[np.nan, 1], [5, 6]]), ("a", "b")) == pytest.approx([-1, 1])


def test_utilities_are_exact_in_float32():
    near = [{"r": 1.0}, {"r": 1.0 + 1e-9}, {"r": 2.0}]
    assert utilities(None, near, ["r"]) == [1.0, 1.0, 2.0]


# --- what goes into the table ---

def test_best_against_worst_takes_the_first_of_equals():
    (row,) = BestWorst()(group(0.0, 0.0, 1.0, 0.0))
    assert (row["chosen_seed"], row["rejected_seed"], row["gap"]) == (2, 0, 1.0)


def test_all_pairs_by_gap():
    rows = AllPairs()(group(1.0, 3.0, 2.0, 2.0))
    assert [(row["chosen_seed"], row["rejected_seed"]) for row in rows] == [(1, 0), (1, 2), (1, 3), (2, 0), (3, 0)]
    assert len(AllPairs()(group(*range(6)))) == 15  # 6 x 5 / 2
    assert len(AllPairs(min_gap=2)(group(1.0, 3.0, 2.0, 2.0))) == 1
    assert len(AllPairs(max_pairs=2)(group(1.0, 3.0, 2.0, 2.0))) == 2
    assert len(AllPairs(min_gap=0.5)(group(0.0, 0.5))) == 1  # the gap itself is enough


@pytest.mark.parametrize("select", [Groups(), BestWorst(), AllPairs()])
def test_ties_never_become_pairs(select):
    assert select(group(0.5, 0.5, 0.5)) == []


def test_groups_keep_the_order_and_need_the_gap():
    (row,) = Groups(min_gap=2)(group(1.0, 3.0, 2.0))
    assert row["scores"] == [1, 3, 2] and row["seeds"] == [0, 1, 2] and row["score_r"] == [1, 3, 2]
    assert Groups(min_gap=2.1)(group(1.0, 3.0, 2.0)) == []


# --- the whole ---

def test_a_build_is_what_the_trainer_reads(stub, tmp_path):
    facts = run.build(toy.spec(tmp_path))
    assert stub.drawn == 20 and facts["counts"]["prompts"] == 5 and facts["counts"]["pictures"] == 20
    assert facts["counts"]["rows"] == len((tmp_path / "out" / "groups.jsonl").read_text().splitlines())
    data = DataSpec(path=str(tmp_path / "out"))
    assert detect_layout(data) == "scored"
    tally = Tally()
    rows = list(read_rows(data, tally))
    assert len(rows) == facts["counts"]["rows"] and tally.bad_rows == 0 and len(rows[0].images) == 4
    for row in rows:
        for ref in row.images:
            assert ref.read()[:4] == b"\x89PNG"
    wins = facts["models"]
    assert sum(share["wins"] for share in wins.values()) == pytest.approx(1)
    assert wins["one"]["candidates"] == 0.5
    assert facts["rewards"]["checker"]["scored"] == 20 and facts["identities"]["checker"]["identity"]["name"] == "scenes"


def test_pairs_are_what_the_trainer_reads(stub, tmp_path):
    facts = run.build(toy.spec(tmp_path, select="all_pairs"))
    data = DataSpec(path=str(tmp_path / "out"))
    assert detect_layout(data) == "chosen_rejected" and len(list(read_rows(data, Tally()))) == facts["counts"]["rows"]
    for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["gap"] == row["chosen_score"] - row["rejected_score"] > 0


def test_pictures_are_those_that_the_prompt_the_model_and_the_number_say(stub, tmp_path):
    run.build(toy.spec(tmp_path))
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(rows) == 20
    for row in rows[:8]:
        assert row["seed"] == picture_seed(0, f"{row['model']}|{row['prompt']}", row["number"])
    assert [row["seed"] for row in rows[-4:]] != [row["seed"] for row in rows[:4]]  # a prompt that comes again: other seeds
    assert rows[-1]["seed"] == picture_seed(0, f"two|{rows[-1]['prompt']}", 3)
    assert rows[-1]["id"] != rows[0]["id"] and len({row["id"] for row in rows}) == 5


def test_later_stages_may_change_without_drawing_again(stub, tmp_path):
    run.build(toy.spec(tmp_path))
    run.build(toy.spec(tmp_path, select={"kind": "best_worst", "min_gap": 0.1},
                       utility={"kind": "reward", "reward": "checker"}))
    assert stub.drawn == 20
    assert (tmp_path / "out" / "pairs.jsonl").exists() and not (tmp_path / "out" / "groups.jsonl").exists()
    run.build(toy.spec(tmp_path, rewards={"checker": "scenes", "colour": "colourfulness"}))  # a reward joins, another leaves
    assert stub.drawn == 20


def test_another_recipe_does_not_go_on_in_the_folder(stub, tmp_path):
    run.build(toy.spec(tmp_path))
    before = toy.files(tmp_path)
    for options, word in (({"seed": 1}, "seed: is 1"), ({"samples": 3}, "samples: is 3"),
                          ({"sampling": {"guidance_scale": 2}}, "sampling.guidance_scale: is 2"),
                          ({"rewards": {"checker": "brightness", "bright": "brightness"}}, "rewards.checker.kind"),
                          ({"max_prompts": 2}, "max_prompts"),
                          ({"models": {"one": {"pretrained_model_name_or_path": toy.MODEL}}}, "models.two")):
        with pytest.raises(ConfigError, match=word):
            run.build(toy.spec(tmp_path, **options))
    assert toy.files(tmp_path) == before and stub.drawn == 20
    run.build(toy.spec(tmp_path, seed=1, overwrite=True))
    assert stub.drawn == 40 and len(toy.files(tmp_path)) == len(before)  # nothing of the earlier build is left
    run.build(toy.spec(tmp_path, seed=1, overwrite=True))
    assert stub.drawn == 40  # the same recipe goes on all the same
    run.build(toy.spec(tmp_path, seed=1, sampling={"batch_size": 5}))  # may be lowered to go on


# --- kill -9 ---

def killed_at(tmp_path, number: int) -> bool:
    """Build in a fork that is killed at its ``number``-th flush or rename; whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call

        try:
            torch.set_num_threads(1)
            os.fsync, os.replace = dying(os.fsync), dying(os.replace)
            run.build(toy.spec(tmp_path))
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_instant_leaves_no_hole_and_no_double(stub, tmp_path):
    run.build(toy.spec(tmp_path / "whole"))
    whole = toy.files(tmp_path / "whole")
    assert len(whole) == 22
    for number in (1, 2, 3, 4, 5, 11, 12, 13, 30, 45, 60, 75, 76, 77, 78, 79, 80, 81, 82):
        folder = tmp_path / str(number)
        killed = killed_at(folder, number)
        assert killed or number > 70
        run.build(toy.spec(folder))
        assert toy.files(folder) == whole
        records = list(Journal(folder / "out" / "work" / "scores"))
        keys = [(one["reward"], one["model"], place) for one in records for place, *_ in one["scores"]]
        assert len(keys) == len(set(keys)) == 40
        assert not list((folder / "out").rglob(".tmp-*"))


def test_kill_after_kill(stub, tmp_path):
    """Seven kills in one folder, each a few writes after the one before."""
    run.build(toy.spec(tmp_path / "whole"))
    kills = sum(killed_at(tmp_path / "cut", 11) for _ in range(7))
    run.build(toy.spec(tmp_path / "cut"))
    assert kills == 7 and toy.files(tmp_path / "cut") == toy.files(tmp_path / "whole")


def test_a_torn_line_is_done_again_wherever_it_is_torn(stub, tmp_path):
    run.build(toy.spec(tmp_path))
    whole, log = toy.files(tmp_path), tmp_path / "out" / "work" / "pictures" / "0.log"
    content = log.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last, last + 1, last + 9, (last + len(content)) // 2, len(content) - 1):
        log.write_bytes(content[:end])
        run.build(toy.spec(tmp_path))
        assert toy.files(tmp_path) == whole and list(Journal(log.parent)) == list(_records(content))
    flipped = bytearray(content)
    flipped[last // 2] ^= 1
    log.write_bytes(flipped)
    run.build(toy.spec(tmp_path))
    assert toy.files(tmp_path) == whole


def _records(content: bytes):
    return [json.loads(line.partition(b" ")[2]) for line in content.splitlines()]


def test_a_lost_picture_is_drawn_again_and_a_damaged_one_is_refused_first(stub, tmp_path):
    run.build(toy.spec(tmp_path))
    whole = toy.files(tmp_path)
    first, second = sorted((tmp_path / "out" / "images").glob("*/*"))[:2]
    first.unlink()
    run.build(toy.spec(tmp_path))
    assert toy.files(tmp_path) == whole
    second.write_bytes(b"\x89PNG no more")
    for log in (tmp_path / "out" / "work" / "scores").glob("*.log"):
        log.unlink()
    with pytest.raises(DataError, match="damaged"):
        run.build(toy.spec(tmp_path))
    run.build(toy.spec(tmp_path))
    assert toy.files(tmp_path) == whole


# --- several processes ---

def test_two_processes_make_what_one_makes(stub, tmp_path):
    (tmp_path / "two").mkdir()
    ranks.together(toy.build, tmp_path / "two", folder=tmp_path)
    run.build(toy.spec(tmp_path / "one"))
    assert toy.files(tmp_path / "two") == toy.files(tmp_path / "one")
    shares = [sum(len(one["images"]) for one in _records(log.read_bytes()))
              for log in sorted((tmp_path / "two" / "out" / "work" / "pictures").glob("*.log"))]
    assert sum(shares) == 20 and min(shares) >= 8  # 4 batches of 3, 3, 3 and 1 a model


def test_the_shares_of_any_world_are_the_whole(stub, tmp_path):
    spec = toy.spec(tmp_path)
    prompts = draw.Plan.of(spec, Prompts(texts=toy.PROMPTS))
    for world in (1, 2, 3, 5):
        folder = tmp_path / str(world)
        for rank in range(world):  # none sees what another has done
            draw.draw(spec, prompts, folder, Journal(folder / f"p-{rank}", rank), rank=rank, world=world, progress=False)
        gather(folder, "p")
        images = draw.drawn(folder, Journal(folder / "p"))
        assert len(images) == 20 and sum(len(one["images"]) for one in Journal(folder / "p")) == 20
        for rank in range(world):
            judge.score(spec.rewards, prompts, images, folder, Journal(folder / f"s-{rank}", rank), rank=rank, world=world,
                        progress=False)
        gather(folder, "s")
        assert sum(len(one["scores"]) for one in Journal(folder / "s")) == 40
        assert len(judge.known(Journal(folder / "s"))) == 40
        table.make(spec, prompts, images, judge.known(Journal(folder / "s")), folder)
        assert (folder / "groups.jsonl").read_bytes() == (tmp_path / "1" / "groups.jsonl").read_bytes()


def gather(folder, stage):
    (folder / stage).mkdir()
    for log in folder.glob(f"{stage}-*/*.log"):
        log.rename(folder / stage / log.name)


# --- the pipeline itself ---

def test_a_picture_is_what_the_pipeline_draws_alone(tmp_path):
    spec = toy.spec(tmp_path, max_prompts=2, models={"base": {"pretrained_model_name_or_path": toy.MODEL}},
                    sampling={"num_inference_steps": 2, "guidance_scale": 1.0, "batch_size": 3})
    run.build(spec)
    pipe = draw.pipeline(spec.models["base"], Sampling())
    for row in pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist():
        (own,) = generate(pipe, [row["prompt"]], [row["seed"]], num_inference_steps=2, guidance_scale=1.0, progress=None)
        stored = np.asarray(fetch(tmp_path / "out", row["image"]), np.int16)
        assert np.abs(stored - np.asarray(own, np.int16)).max() <= 1  # sums of another batch may round otherwise


def test_a_model_may_have_its_own_sampling_and_lora(tmp_path, monkeypatch):
    seen = []
    lora = toy.ROOT / "assets" / "tiny-sdxl-lcm"
    monkeypatch.setattr(draw, "generate", lambda pipe, prompts, seeds, **options: (
        seen.append((type(pipe.scheduler).__name__, pipe.get_active_adapters(), options["num_inference_steps"]))
        or [toy.picture(p, s) for p, s in zip(prompts, seeds)]))
    few = {"num_inference_steps": 4, "guidance_scale": 1.0, "scheduler": "LCMScheduler", "timestep_spacing": "trailing"}
    run.build(toy.spec(tmp_path, max_prompts=1, models={
        "base": {"pretrained_model_name_or_path": toy.MODEL},
        "few": {"pretrained_model_name_or_path": toy.MODEL, "lora": str(lora), "lora_scale": 0.5, "sampling": few}}))
    assert seen[0][1:] == ([], 30) and seen[1][0] == "LCMScheduler" and len(seen[1][1]) == 1 and seen[1][2] == 4


# --- what cannot be scored, and what is refused ---

class Fickle:
    """NaN for every second picture of a prompt with a ring."""

    name = "fickle"
    differentiable = False

    def __call__(self, images, prompts):
        dark = torch.tensor([float(np.asarray(image).mean()) for image in images])
        bad = torch.tensor(["ring" in prompt and int(value) % 2 == 0 for prompt, value in zip(prompts, dark)])
        return torch.where(bad, torch.nan, dark)


def test_a_picture_without_a_score_leaves_its_group(stub, tmp_path):
    spec = replace(toy.spec(tmp_path), rewards={"fickle": Fickle()}, utility=None)
    folder = tmp_path / "out"
    plan = draw.Plan.of(spec, Prompts(texts=toy.PROMPTS))
    draw.draw(spec, plan, folder, Journal(folder / "p"), progress=False)
    images = draw.drawn(folder, Journal(folder / "p"))
    judge.score(spec.rewards, plan, images, folder, Journal(folder / "s"), progress=False)
    scores = judge.known(Journal(folder / "s"))
    lost = sum(math.isnan(value) for value in scores.values())
    made = table.make(spec, plan, images, scores, folder)
    assert 0 < lost == made["counts"]["pictures_not_scored"]
    rows = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    assert all(value is not None and value > 0 for row in rows for value in row["scores"])
    stored = pq.read_table(folder / "scores.parquet")["score_fickle"]
    assert stored.null_count == lost


def test_filters_come_before_the_selection(stub, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class First:
        count: int

        def __call__(self, groups, *, folder, seed):
            assert (folder / groups[0].candidates[0].image).is_file() and seed == 0
            return Kept(groups=list(groups)[:self.count], report={"left": self.count})

    facts = run.build(replace(toy.spec(tmp_path), filters=(First(count=2),)))
    assert facts["counts"]["groups_filtered"] == 2 and facts["counts"]["rows"] <= 2
    assert facts["filters"] == [{"filter": "First", "groups_before": 5, "groups_after": 2, "left": 2}]


def test_no_row_left_is_said_with_the_counts(stub, tmp_path):
    with pytest.raises(DataError, match="no row is left: 5 prompts, 5 with two or more.*min_gap = 2"):
        run.build(toy.spec(tmp_path, select={"kind": "best_worst", "min_gap": 2}))


def test_a_full_disk_is_one_line_and_nothing_is_lost(stub, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        run.build(toy.spec(tmp_path))
    run.build(toy.spec(tmp_path))
    run.build(toy.spec(tmp_path / "whole"))
    assert toy.files(tmp_path) == toy.files(tmp_path / "whole")


RECIPE = f"""
output_dir: OUT
prompts: PROMPTS
models: {{base: {{pretrained_model_name_or_path: {toy.MODEL}}}}}
rewards: {{checker: scenes}}
cpu: true
"""


@pytest.mark.parametrize("override, words", [
    ("prompts=gone.txt", ("prompts: cannot read gone.txt",)),
    ("rewards.checker=scenez", ("rewards.checker.kind", 'Did you mean "scenes"')),
    ("rewards={}", ("rewards: is empty",)),
    ("filters=[ties, {kind: margin, reward: pick}]", ("filters.1.reward names 'pick'", "among rewards: ")),
    ("models.base.pretrained_model_name_or_path=/nowhere/model", ("/nowhere/model",)),
    ("models.base.lora=gone.safetensors", ("models.base.lora", "gone.safetensors")),
    ("models.base.lora_scale=0.5", ("models.base.lora_scale: needs a lora",)),
    ("models={}", ("models: is empty",)),
    ("output_dir=/proc/nowhere", ("output_dir", "/proc/nowhere")),
    ("samples=1", ("samples: must be at least 2",)),
    ("sampling.scheduler=EulerDiscreteSchedular", ("sampling.scheduler", "EulerDiscreteScheduler")),
    ("sampling.steps=4", ("sampling.steps: unknown option",)),
    ("select.kind=best", ("select.kind", "best_worst")),
    ("select={kind: all_pairs, min_gap: -1}", ("select.min_gap: must not be negative",)),
    ("rewards.second=brightness", ("utility: is missing",)),
    ("utility={kind: reward, reward: other}", ("utility", "'other'")),
    ("utility={kind: mean, weights: {checker: 0}}", ("utility: reads no reward",)),
    ("heldout_prompts=PROMPTS", ("held out", "A red ring")),
    ("filters=[nothing]", ("filters.0.kind",)),
])
def test_refused_in_one_line(tmp_path, capsys, override, words):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A red ring on a blue background.\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("OUT", str(tmp_path / "out")).replace("PROMPTS", str(prompts)))
    assert main(["build", str(recipe), override.replace("PROMPTS", str(prompts))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffalign: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "out" / "images").exists()


def test_a_size_that_the_model_cannot_draw_names_this_recipes_option(tmp_path):
    with pytest.raises(ConfigError, match="sampling.height: this model draws"):
        run.build(toy.spec(tmp_path, max_prompts=1, sampling={"height": 33}))
    assert not (tmp_path / "out" / "images").exists()


def test_a_size_beyond_any_memory_is_refused_by_the_recipe(tmp_path):
    with pytest.raises(ConfigError, match="sampling.height: is in pixels, at least 8 and at most 16384, got 1000000"):
        toy.spec(tmp_path, sampling={"height": 1_000_000})


def test_two_builds_at_once_are_refused(stub, tmp_path):
    (tmp_path / "out").mkdir()
    lock = claim(tmp_path / "out")
    try:
        with pytest.raises(UserError, match="another run is at work"):
            run.build(toy.spec(tmp_path))
    finally:
        os.close(lock)


def test_the_shipped_recipe_and_its_prompts(monkeypatch):
    monkeypatch.chdir(toy.ROOT)
    spec = load_build("configs/build/tiny.yaml", ["samples=2"])
    assert spec.samples == 2 and spec.sampling.num_inference_steps == 20
    prompts = read_prompts(spec.prompts).texts
    assert len(set(prompts)) == 512 and not any(is_held_out(parse(text)) for text in prompts)
