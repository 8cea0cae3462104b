"""The loop of evolution and its journal: whom the proposer is shown, what is drawn and scored, kills, processes, order."""

import numpy as np
import pytest
import torch

from diffalign.building.journal import Journal
from diffalign.building.spec import Drawer
from diffalign.config import load_reward
from diffalign.errors import DataError
from diffalign.language import evolve
from diffalign.language.evolve import Explored, Plan, explore, explored
from diffalign.language.propose import ChatProposer, OwnWords, Past
from diffalign.language.rewriter import Writer
from diffalign.language.select import Score
from diffalign.language.studio import Asked, Studio, read_asked

from ..rewards.sick import send, server
from .toy import HELDOUT, ROOT, USERS, Stub, rewriter, users

GENERATOR = Drawer(pretrained_model_name_or_path=str(ROOT / "assets" / "tiny-sdxl"))
CHECKER = {"checker": load_reward("scenes")}
ASKED = [Asked(prompt=row["prompt"], meaning=row["meaning"]) for row in users(10)]


@pytest.fixture
def stub(monkeypatch):
    made = Stub()
    made.put_into(monkeypatch.setattr)
    return made


@pytest.fixture(autouse=True)
def units_of_four(monkeypatch):
    monkeypatch.setattr(evolve, "UNIT", 4)


def studio(seeds: int = 1, rewards=None) -> Studio:
    return Studio(GENERATOR, rewards or CHECKER, seed=0, seeds=seeds)


class Says:
    """Proposes the caption in the round ``when``, else something that is not understood. shown: all that it was told."""

    def __init__(self, when: int = 1):
        self.when, self.shown = when, []

    def __call__(self, asked, count):
        self.shown += asked
        meanings = {one.prompt: one.meaning for one in ASKED}
        return [[meanings[past.prompt] if past.round == self.when else f"odd {past.round} {n}" for n in range(count)]
                for past in asked]


def run(folder, says, rounds=2, parents=2, rank=0, world=1, asked=ASKED, seeds=1):
    plan = Plan(rounds=rounds, proposals=2, parents=parents, score=Score())
    explore(asked, plan, says, studio(seeds), Journal(folder, rank), rank=rank, world=world, progress=False)
    return explored(Journal(folder))


def test_texts_are_scored_against_what_the_user_asked_for(stub, tmp_path):
    found = run(tmp_path, Says(when=2))
    assert [one.asked for one in found] == ASKED
    for one in found:
        assert one.own["checker"] < 0.5  # grey: the stand-in does not understand a user
        assert one.texts[one.asked.meaning][0] == 2 and one.texts[one.asked.meaning][1]["checker"] > 0.7
        assert [text for text, (number, _) in one.texts.items() if number == 1] == ["odd 1 0", "odd 1 1"]


def test_a_reward_never_sees_the_rewrite(stub, tmp_path):
    class Records:
        name, differentiable, columns = "records", False, ()

        def __init__(self):
            self.prompts = []

        def __call__(self, images, prompts):
            self.prompts += prompts
            return torch.zeros(len(prompts))

    reward = Records()
    one = studio(rewards={"r": reward})
    one._rewards = {"r": reward}
    one.scores([(ASKED[0], "a lie"), (ASKED[1], "another")])
    assert reward.prompts == [ASKED[0].meaning, ASKED[1].meaning]


def test_all_texts_of_a_prompt_have_its_seeds(stub, tmp_path):
    run(tmp_path, Says(), asked=ASKED[:2], rounds=1, seeds=2)
    by_text: dict[str, list[int]] = {}
    for text, seed in stub.drawn:
        by_text.setdefault(text, []).append(seed)
    for one in ASKED[:2]:
        assert len(set(by_text[one.prompt])) == 2 and by_text[one.prompt] == by_text[one.meaning]
    assert set(by_text[ASKED[0].prompt]).isdisjoint(by_text[ASKED[1].prompt])


def test_the_mean_over_seeds_counts(stub):
    table = studio(seeds=4).table([(ASKED[0], ASKED[0].meaning)])["checker"]
    assert len(table[0]) == 4
    assert studio(seeds=4).scores([(ASKED[0], ASKED[0].meaning)])[0]["checker"] == pytest.approx(np.mean(table[0]))


def test_the_proposer_is_shown_the_best_so_far(stub, tmp_path):
    says = Says(when=1)
    run(tmp_path, says, rounds=3, parents=2, asked=ASKED[:1])
    assert [past.round for past in says.shown] == [1, 2, 3] and says.shown[0].best == ()
    assert says.shown[1].best[0][0] == ASKED[0].meaning and len(says.shown[1].best) == 1  # said twice, tried once
    assert [text for text, _ in says.shown[2].best] == [ASKED[0].meaning, "odd 2 0"]
    assert says.shown[0].own == {"checker": pytest.approx(says.shown[2].own["checker"])}


def test_what_the_generator_would_cut_is_not_drawn(stub, tmp_path):
    found = run(tmp_path, lambda asked, count: [["word " * 21, "", past.prompt] for past in asked], asked=ASKED[:2])
    assert [one.texts for one in found] == [{}, {}] and [one.cut for one in found] == [2, 2]


def test_a_killed_run_repeats_a_unit_at_most(stub, tmp_path):
    whole = run(tmp_path / "whole", Says())

    class Dies(Says):
        def __call__(self, asked, count):
            if asked[0].prompt == ASKED[4].prompt and asked[0].round == 2:
                raise KeyboardInterrupt
            return super().__call__(asked, count)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Dies())
    assert len(explored(Journal(tmp_path / "killed"))) == 4
    stub.drawn.clear()
    assert run(tmp_path / "killed", Says()) == whole
    assert {text for text, _ in stub.drawn}.isdisjoint({one.prompt for one in ASKED[:4]})


def test_processes_share_units(stub, tmp_path):
    whole = run(tmp_path / "one", Says())
    run(tmp_path / "two", Says(), rank=1, world=2)
    assert run(tmp_path / "two", Says(), rank=0, world=2) == whole


def test_a_record_leads_back(stub, tmp_path):
    one = run(tmp_path, Says(), asked=ASKED[:1])[0]
    assert Explored.of(one.record()) == one


def test_own_words_depend_on_prompts_and_round_alone():
    propose = OwnWords().open(rewriter(), torch.device("cpu"), 0)

    def asked(n, number=1, best=()):
        return Past(prompt=ASKED[n].prompt, own={}, best=best, round=number)

    both = propose([asked(0), asked(1)], 3)
    assert [len(texts) for texts in both] == [3, 3]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert propose([asked(0), asked(1)], 3) == both
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness is touched
    assert propose([asked(0, number=2), asked(1, number=2)], 3) != both


def test_the_best_so_far_are_rewritten_in_turn(monkeypatch):
    told = []
    monkeypatch.setattr(Writer, "sample", lambda self, prompts, seed: told.extend(prompts) or list(prompts))
    propose = OwnWords().open(rewriter(), torch.device("cpu"), 0)
    propose([Past(prompt="p", own={}, best=(("a", {}), ("p", {}), ("b", {})), round=2)], 5)
    assert told == ["p", "a", "b", "p", "a"]


def test_padding_changes_no_answer():
    """Prompts of unlike lengths together and one by one."""
    writer, prompts = Writer(rewriter()), [one.prompt for one in ASKED]
    assert len({len(prompt.split()) for prompt in prompts}) > 1
    assert writer.best(prompts, batch_size=10) == [writer.best([prompt])[0] for prompt in prompts]


def test_a_chat_model_sees_texts_and_scores():
    bodies = []

    def answer(handler, body):
        bodies.append(body)
        send(handler, {"choices": [{"message": {"content": '1. "a red ring"\n2) a ring, red\nThank you!\n3. third'}}]})

    with server(answer) as url:
        propose = ChatProposer(url=url, model="m").open(rewriter(), torch.device("cpu"), 0)
        past = Past(prompt="ring red", own={"s": 0.25}, best=(("red ring", {"s": 0.5}), ("x", {"s": None})), round=2)
        assert propose([past], 2) == [["a red ring", "a ring, red"]]
    question = str(bodies[0])
    assert "0. [ring red] s 0.250" in question and "1. [red ring] s 0.500" in question and "2. [x] s unknown" in question


def test_prompts_and_their_meanings(tmp_path):
    assert read_asked(str(USERS), "prompts")[0] == ASKED[0]
    plain = tmp_path / "plain.txt"
    plain.write_text("a cat\na dog\n")
    assert read_asked(str(plain), "prompts")[1] == Asked(prompt="a dog", meaning="a dog")
    plain.write_text("a cat\na cat\n")
    with pytest.raises(DataError, match='prompts: .*plain.txt holds the prompt "a cat" twice'):
        read_asked(str(plain), "prompts")
    holes = tmp_path / "holes.jsonl"
    holes.write_text('{"prompt": "a", "meaning": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match="entry 2 has no meaning"):
        read_asked(str(holes), "prompts")


def test_the_shipped_prompts_keep_held_out_scenes_apart():
    from diffalign.rewards.scenes import is_held_out, parse

    told, held = read_asked(str(USERS), "prompts"), read_asked(str(HELDOUT), "prompts")
    assert len(told) == 384 and len(held) == 192
    assert not any(is_held_out(parse(one.meaning)) for one in told) and all(is_held_out(parse(one.meaning)) for one in held)
    assert not any(one.prompt == one.meaning for one in told + held)
