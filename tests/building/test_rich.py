from __future__ import annotations

import io
import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.building.chat import ChatQuality, fill
from diffalign.building.editor import InstructPix2Pix
from diffalign.building.feedback import ChatCritic, ChatInstructor, Failure
from diffalign.building.fingerprint import probe
from diffalign.building.pictures import fetch
from diffalign.building.rich import STATUSES, RichSpec, build_rich, fit
from diffalign.config import load_rich
from diffalign.data.columns import Tally, read_rows
from diffalign.data.spec import DataSpec
from diffalign.errors import ConfigError, DataError, ModelError, ServiceError
from diffalign.rewards import Brightness

from ..data.toy import jsonl, picture
from ..models import tiny
from ..rewards.sick import send, server

SIZE = (32, 32)


@dataclass(frozen=True)
class Says:
    """A critic for tests. garbage: prompts it answers with something unreadable; away: those it does not answer."""

    text: str = "too dark"
    garbage: tuple[str, ...] = ()
    away: tuple[str, ...] = ()
    calls: list = field(default_factory=list, compare=False, repr=False)

    def __call__(self, prompts, images):
        self.calls.extend(prompts)
        return [Failure(reason="garbage") if prompt in self.garbage else Failure(reason="no answer", again=True)
                if prompt in self.away else f"{self.text}: {prompt}" for prompt in prompts]


@dataclass(frozen=True)
class Tells:
    """An instructor. fine: prompts with nothing to mend."""

    edits: tuple[str, ...] = ("make it brighter",)
    fine: tuple[str, ...] = ()
    calls: list = field(default_factory=list, compare=False, repr=False)

    def __call__(self, prompts, images, critiques):
        assert all(prompt in critique for prompt, critique in zip(prompts, critiques, strict=True))
        self.calls.extend(prompts)
        return [[] if prompt in self.fine else list(self.edits) for prompt in prompts]


@dataclass(frozen=True)
class Shifts:
    """An editor that adds ``by`` (of 255) where there is an edit, and ``mark``, a fixed pattern, to every picture it is given.
    wobble: by plus or minus by, as the seed says. die: raise at the n-th call."""

    by: int = 40
    mark: int = 0
    wobble: bool = False
    die: int | None = None
    batch_size: int = 2
    multiple: int = 8
    calls: list = field(default_factory=list, compare=False, repr=False)

    def identity(self):
        return {"by": self.by, "mark": self.mark, "wobble": self.wobble}

    def __call__(self, images, edits, seeds):
        self.calls.append(len(images))
        if self.die is not None and len(self.calls) >= self.die:
            raise KeyboardInterrupt
        return [self._one(*each) for each in zip(images, edits, seeds, strict=True)]

    def _one(self, image, edits, seed):
        array = np.asarray(image, dtype=np.int64)
        sign = -1 if self.wobble and seed % 2 else 1
        pattern = np.random.default_rng(0).integers(0, 2, array.shape) * self.mark
        return Image.fromarray((array + pattern + (sign * self.by if edits else 0)).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Grey:
    """Mean pixel in 0..1; NaN for the prompt "blind"."""

    name = "grey"
    differentiable = False
    columns = ()

    def __call__(self, images, prompts):
        return torch.tensor([math.nan if prompt == "blind" else np.asarray(image).mean() / 255
                             for image, prompt in zip(images, prompts)], dtype=torch.float32)


def flat(tmp_path, greys, prompts=None):
    """A scored data set with one flat grey picture a row (and another one that is darker)."""
    tmp_path.mkdir(exist_ok=True)
    rows = []
    for i, grey in enumerate(greys):
        for side, value in (("a", grey), ("b", max(0, grey - 30))):
            Image.new("RGB", SIZE, (value,) * 3).save(tmp_path / f"{side}{i}.png")
        rows.append({"prompt": (prompts or [f"prompt {k}" for k in range(99)])[i], "images": [f"a{i}.png", f"b{i}.png"],
                     "scores": [1, 0]})
    return jsonl(tmp_path / "data.jsonl", rows)


def spec(tmp_path, data, **options) -> RichSpec:
    options = {"critic": Says(), "instructor": Tells(), "editor": Shifts(), "labeller": Grey(), "which": "best", "tie": 0.0,
               **options}
    return RichSpec(output_dir=str(options.pop("out", tmp_path / "out")), data=str(data), **options)


def pairs(rich) -> list[dict]:
    from pathlib import Path

    return [json.loads(line) for line in (Path(rich.output_dir) / "pairs.jsonl").read_text().splitlines()]


def records(rich) -> list[dict]:
    return pq.read_table(f"{rich.output_dir}/records.parquet").to_pylist()


# --- the checks of the card, in its order


@pytest.mark.parametrize("by, winner, margin", [(-51, "original", -0.2), (51, "edit", 0.2)])
def test_the_edit_is_not_assumed_to_win(tmp_path, by, winner, margin):
    rich = spec(tmp_path, flat(tmp_path / "data", [128, 130]), editor=Shifts(by=by))
    facts = build_rich(rich)
    assert facts["edit_wins"] == (winner == "edit") and facts["statuses"]["ok"] == 2
    assert [record["winner"] for record in records(rich)] == [winner] * 2
    assert records(rich)[0]["margin"] == pytest.approx(margin, abs=1 / 255)
    for row in pairs(rich):
        chosen, rejected = (np.asarray(fetch(tmp_path / "out", row[side])).mean() for side in ("chosen", "rejected"))
        assert chosen > rejected and row["gap"] == pytest.approx(0.2, abs=1 / 255)
        assert row["chosen_score"] > row["rejected_score"]


def test_tie_band(tmp_path):
    """8/255 = 0.031 lies within 0.05, 15/255 = 0.059 does not."""
    data = flat(tmp_path / "data", [100, 110, 120])
    with pytest.raises(DataError, match=r"no pair is left of 3 pictures \(3 tie\); records.parquet says why of each"):
        build_rich(spec(tmp_path, data, editor=Shifts(by=8), tie=0.05, least_change=0.0))
    assert not (tmp_path / "out" / "pairs.jsonl").exists()
    assert build_rich(spec(tmp_path, data, editor=Shifts(by=15), tie=0.05))["statuses"]["ok"] == 3
    facts = build_rich(spec(tmp_path, data, editor=Shifts(by=15), tie=None))  # a tenth of the standard deviation
    assert facts["tie"] == pytest.approx(0.1 * np.std([100, 110, 120, 115, 125, 135]) / 255)


def test_no_op(tmp_path):
    rich = spec(tmp_path, flat(tmp_path / "data", [100, 110, 120]), editor=Shifts(by=0))
    with pytest.raises(DataError, match=r"no pair is left of 3 pictures \(3 no_op\)"):
        build_rich(rich)
    assert {record["change"] for record in records(rich)} == {0.0}


def test_nothing_to_mend(tmp_path):
    editor = Shifts()
    rich = spec(tmp_path, flat(tmp_path / "data", [100, 110, 120]), editor=editor, instructor=Tells(fine=("prompt 1",)))
    facts = build_rich(rich)
    assert facts["statuses"]["no_issue"] == 1 and sum(editor.calls) == 4  # two pictures, each with its guard
    nothing = Shifts()
    with pytest.raises(DataError, match="3 no_issue"):
        build_rich(replace(rich, editor=nothing, instructor=Tells(fine=("prompt 0", "prompt 1", "prompt 2"), edits=("x",))))
    assert nothing.calls == []


def test_every_input_has_a_status(tmp_path):
    greys = [100, 110, 120, 130, 140, 250, 160, 170]
    prompts = ["fine", "unreadable", "silent", "blind", "ok", "white", "ok too", "ok three"]
    rich = spec(tmp_path, flat(tmp_path / "data", greys, prompts), critic=Says(garbage=("unreadable",), away=("silent",)),
                instructor=Tells(fine=("fine",)), least_change=0.05)
    facts = build_rich(rich)
    assert facts["statuses"] == {**dict.fromkeys(STATUSES, 0), "ok": 3, "no_issue": 1, "no_op": 1, "parse_error": 1,
                                 "unscored": 1, "unanswered": 1}
    assert sum(facts["statuses"].values()) == facts["records"] == 8
    assert {row["prompt"] for row in pairs(rich)} == {"ok", "ok too", "ok three"}
    by_prompt = {record["prompt"]: record for record in records(rich)}
    assert by_prompt["unreadable"]["detail"] == "garbage" and by_prompt["unreadable"]["winner"] is None
    # what was not answered is asked again, what could not be read is not
    critic = Says()
    again = build_rich(replace(rich, critic=replace(rich.critic, away=("silent",), calls=critic.calls)))
    assert critic.calls == ["silent"] and again == facts


def test_broken_edits(tmp_path):
    data = flat(tmp_path / "data", [20, 100])
    facts = build_rich(spec(tmp_path, data, editor=Shifts(by=-30), least_score=0.1, least_change=0.05))
    assert facts["statuses"] == {**dict.fromkeys(STATUSES, 0), "ok": 1, "broken": 1}  # 20 - 30 is black, 70 / 255 is not
    with pytest.raises(DataError, match="2 broken"):
        build_rich(spec(tmp_path, data, editor=Shifts(by=100), most_change=0.3))


@pytest.mark.parametrize("guard", [True, False])
def test_killed_and_resumed(tmp_path, guard):
    """Killed within the third stage: the first two are not asked again, and the result equals the uncut run's to the byte."""
    data = flat(tmp_path / "data", [100, 110, 120, 130, 140])
    whole = spec(tmp_path, data, out=tmp_path / "whole", guard=guard)
    build_rich(whole)
    cut = spec(tmp_path, data, out=tmp_path / "cut", guard=guard, editor=Shifts(die=4 if guard else 3))
    with pytest.raises(KeyboardInterrupt):
        build_rich(cut)
    first = [len(cut.critic.calls), len(cut.instructor.calls)]
    editor = Shifts()
    resumed = replace(cut, editor=editor)
    build_rich(resumed)
    assert [len(cut.critic.calls), len(cut.instructor.calls)] == first == [5, 5]
    assert sum(editor.calls) == (6 if guard else 1)  # what was not on the disk yet, guards included
    for name in ("pairs.jsonl", "records.parquet", "rich.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    build_rich(resumed)  # nothing is left to do
    assert [len(cut.critic.calls), len(cut.instructor.calls), sum(editor.calls)] == [5, 5, 6 if guard else 1]
    darker = replace(resumed, labeller=Brightness())  # another labeller begins with the edited pictures that are there
    build_rich(darker)
    assert sum(editor.calls) == (6 if guard else 1) and len(cut.critic.calls) == 5
    build_rich(replace(resumed, critic=Says(text="too flat", calls=cut.critic.calls)))
    assert len(cut.critic.calls) == 10  # another critic, and all that follows


def test_a_lost_picture_is_edited_again(tmp_path):
    rich = spec(tmp_path, flat(tmp_path / "data", [100, 110]))
    build_rich(rich)
    before = (tmp_path / "out" / "pairs.jsonl").read_bytes()
    (tmp_path / "out" / records(rich)[0]["edited"]).unlink()
    build_rich(rich)
    assert (tmp_path / "out" / "pairs.jsonl").read_bytes() == before
    assert (tmp_path / "out" / records(rich)[0]["edited"]).exists()


def test_fingerprint(tmp_path):
    """An editor that leaves a pattern of one step: a linear probe tells the sides apart, unless both went through it."""
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(picture(i, (32, 32)))
    data = jsonl(tmp_path / "d.jsonl", [{"prompt": f"p {i}", "image": f"{i}.png", "label": 1} for i in range(40)])
    editor = Shifts(by=8, mark=1, wobble=True)
    bare = build_rich(spec(tmp_path, data, editor=editor, guard=False, out=tmp_path / "bare"))
    guarded = build_rich(spec(tmp_path, data, editor=editor, guard=True, out=tmp_path / "guarded"))
    assert bare["probe"]["accuracy"] > 0.9 and bare["probe"]["low"] > 0.75
    assert guarded["probe"]["low"] <= 0.5 <= guarded["probe"]["high"]
    assert bare["probe"]["pairs"] == guarded["probe"]["pairs"] == 40


def test_the_prompt_stays_as_it_was(tmp_path):
    prompts = ["  A cat,\tÉté — {prompt} {critique}", "B  "]
    rich = spec(tmp_path, flat(tmp_path / "data", [100, 110], prompts), instructor=Tells(edits=("paint it mauve",)))
    build_rich(rich)
    assert [row["prompt"] for row in pairs(rich)] == prompts
    assert "mauve" not in (tmp_path / "out" / "pairs.jsonl").read_text()
    assert records(rich)[0]["instructions"] == ["paint it mauve"]


def test_the_trainer_reads_the_pairs(tmp_path):
    """And a model that is its own reference has the loss ln 2 on them."""
    from diffalign.objectives import OBJECTIVES
    from diffalign.types import Batch, Cond, Estimate, Memory

    rich = spec(tmp_path, flat(tmp_path / "data", [100, 110, 120]))
    build_rich(rich)
    for path in (tmp_path / "out", tmp_path / "out" / "pairs.jsonl"):
        rows = list(read_rows(DataSpec(path=str(path)), tally := Tally()))
        assert tally.layout == "chosen_rejected" and [row.prompt for row in rows] == [f"prompt {i}" for i in range(3)]
        assert all(np.asarray(Image.open(row.images[0].path)).mean() > np.asarray(Image.open(row.images[1].path)).mean()
                   for row in rows)
    error = torch.rand(3, 2)
    batch = Batch(x0=torch.zeros(3, 2, 1, 1, 1), cond=Cond(tokens=torch.zeros(3, 1, 1)), valid=torch.ones(3, 2, dtype=bool),
                  utility=torch.tensor([row.utility for row in rows]), key=torch.zeros(3, 2, dtype=torch.int64))
    same = Estimate(policy=-error, reference=-error, error=error, reference_error=error, t=torch.zeros(3, 2))
    loss = OBJECTIVES["dpo"](beta=2000.0)(same, batch, Memory())
    assert loss.per_group.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)


# --- beyond the card


def test_which_pictures_and_how_many(tmp_path):
    data = flat(tmp_path / "data", [100, 110])
    for which, greys in (("best", [100, 110]), ("worst", [70, 80]), ("all", [100, 70, 110, 80])):
        rich = spec(tmp_path, data, which=which, out=tmp_path / which)
        build_rich(rich)
        found = [round(np.asarray(fetch(tmp_path / which, record["image"]))[..., 0].mean()) for record in records(rich)]
        assert found == greys
    assert build_rich(spec(tmp_path, data, which="all", max_records=3))["records"] == 3
    with pytest.raises(DataError, match="no such file or folder"):
        build_rich(spec(tmp_path, tmp_path / "no.jsonl"))


def test_balance(tmp_path):
    data = flat(tmp_path / "data", [100, 102, 104, 106, 108, 110, 112, 114, 116, 118])
    rich = spec(tmp_path, data, editor=Shifts(by=30, wobble=True))
    before = Counter(row["winner"] for row in pairs(rich)) if build_rich(rich) else None
    facts = build_rich(replace(rich, balance=True))
    fewer = min(before.values())
    assert facts["edit_wins"] == 0.5 and facts["statuses"]["ok"] == 2 * fewer
    assert facts["statuses"]["balanced_out"] == abs(before["edit"] - before["original"])


def test_pictures_are_made_to_fit():
    image = Image.new("RGB", (1030, 517))
    assert fit(image, resolution=None, multiple=8, where="x").size == (1024, 512)
    small = fit(image, resolution=512, multiple=8, where="x")  # area 512^2: 722 x 363 before the crop
    assert small.size == (720, 360) and fit(small, resolution=512, multiple=8, where="x").size == small.size
    assert fit(Image.new("RGB", (40, 40)), resolution=512, multiple=8, where="x").size == (40, 40)  # never enlarged
    with pytest.raises(DataError, match="row 3: 40 x 7 pixels, less than the 8"):
        fit(Image.new("RGB", (40, 7)), resolution=None, multiple=8, where="row 3")


def test_probe_says_nothing_of_few_or_small():
    image = Image.new("RGB", (32, 32))
    assert probe([image] * 19, [image] * 19) is None and probe([image.resize((16, 16))] * 30, [image] * 30) is None


# --- the real interfaces: a chat server and instruction-editing pipelines


def answering(reply):
    """An OpenAI-style server; reply(text of the question, whether a picture came with it) -> the answer's text."""
    asked = []

    def answer(handler, body):
        parts = body["messages"][0]["content"]
        text = next(part["text"] for part in parts if part["type"] == "text")
        image = next((part["image_url"]["url"] for part in parts if part["type"] == "image_url"), None)
        assert body["temperature"] == 0 and handler.path == "/v1/chat/completions"
        asked.append((text, image))
        said = reply(text, image)
        if said is None:
            return send(handler, {"error": "sick"}, status=400)
        send(handler, {"choices": [{"message": {"content": said}}]})
    return asked, answer


def base(address: str) -> str:
    return address.removesuffix("/score") + "/v1"


def chat(cls, url, **options):
    return cls(url=url, model="m", retries=0, deadline=20, timeout=10, **options)


def test_chat_critic_and_instructor():
    replies = {"one": "It is dark.\nVerdict: faults", "two": "Fine.\n**Verdict: none**", "three": "It is dark", "four": None,
               "five": "Half of a letter: \ud83d.\nVerdict: faults"}
    asked, answer = answering(lambda text, image: replies[text.rsplit("[", 1)[1][:-1]])
    image = Image.new("RGB", (8, 8), "red")
    with server(answer) as address:
        said = chat(ChatCritic, base(address))(list(replies), [image] * 5)
    assert said[0] == "It is dark.\nVerdict: faults" and said[1].startswith("Fine")
    assert said[2] == Failure(reason="the critique does not end in a verdict")
    assert said[3].again and "HTTP 400" in said[3].reason
    assert said[4] == "Half of a letter: ?.\nVerdict: faults"  # what no table and no tokenizer could hold
    assert all(url.startswith("data:image/png;base64,") for _, url in asked)
    edits = {"a": '["make it brighter", "add a hat"]', "b": "[]", "c": '```json\n["x"]\n```', "d": "Make it brighter.",
             "e": '["1","2","3","4"]', "f": '["a\\nb"]', "g": '{"edits": []}', "h": '["' + "x" * 400 + '"]', "i": "[" * 5000}
    asked, answer = answering(lambda text, image: edits[text.rsplit("[", 1)[1][:-1]])
    with server(answer) as address:
        told = chat(ChatInstructor, base(address), show_picture=False)(["p {critique}"] * 9, [image] * 9, list(edits))
    assert told[:3] == [["make it brighter", "add a hat"], [], ["x"]]
    assert all(isinstance(one, Failure) and not one.again for one in told[3:])
    assert all(url is None and "[p {critique}]" in text and "At most 3" in text for text, url in asked)


def test_chat_refuses():
    for options, words in (({"template": "no"}, "template must contain {prompt}"), ({"max_tokens": 0}, "max_tokens must be"),
                           ({"url": "ftp://x"}, "url must be an address")):
        with pytest.raises(ValueError, match=words):
            ChatCritic(**{"url": "http://localhost/v1", "model": "m", **options})
    assert fill("{a} {b}", {"a": "{b}", "b": "x"}) == "{b} x"
    _, answer = answering(lambda text, image: None)
    with server(answer) as address, pytest.raises(ServiceError, match="none of 2 questions was answered: HTTP 400"):
        chat(ChatCritic, base(address))(["a", "b"], [Image.new("RGB", (8, 8))] * 2)


def test_chat_quality():
    replies = {"good": "Clear.\nScore: 8.5", "bad": "Score: 3\nNo, Score: **0**", "odd": "eleven", "high": "Score: 11"}
    asked, answer = answering(lambda text, image: replies[text.rsplit("[", 1)[1][:-1]])
    with server(answer) as address:
        quality = chat(ChatQuality, base(address))
        assert quality(list(replies)).tolist() == pytest.approx([8.5, 0, math.nan, math.nan], nan_ok=True)
        assert quality.identity()["model"] == "m" and "Score" in quality.identity()["template"]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def editing(request, tmp_path_factory):
    """A tiny random instruction-editing pipeline as a folder."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionXLInstructPix2PixPipeline,
    )

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    common = {"vae": tiny._vae(), "text_encoder": tiny._clip(8, False), "tokenizer": tiny._tokenizer(folder, "one"),
              "scheduler": EulerDiscreteScheduler(**tiny._betas("epsilon"))}
    if request.param == "sd":
        pipe = StableDiffusionInstructPix2PixPipeline(unet=tiny._unet(8, in_channels=8), safety_checker=None,
                                                      feature_extractor=None, requires_safety_checker=False, **common)
    else:
        unet = tiny._unet(20, in_channels=8, addition_embed_type="text_time", addition_time_embed_dim=32,
                          projection_class_embeddings_input_dim=6 * 32 + 12, transformer_layers_per_block=1)
        pipe = StableDiffusionXLInstructPix2PixPipeline(unet=unet, text_encoder_2=tiny._clip(12, True),
                                                        tokenizer_2=tiny._tokenizer(folder, "two"), **common)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            tiny._spread(module)
    pipe.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def test_instruction_editing_pipeline(editing):
    images = [Image.open(io.BytesIO(picture(i, size))) for i, size in enumerate([(16, 16), (24, 16), (16, 16)])]
    editor = InstructPix2Pix(folder=str(editing), num_inference_steps=2, device="cpu", batch_size=2)
    editor.check()
    edits = [["make it red", "add a ring"], [], ["a ring"]]
    drawn = editor(images, edits, [1, 2, 3])
    assert [image.size for image in drawn] == [image.size for image in images]
    again = InstructPix2Pix(folder=str(editing), num_inference_steps=2, device="cpu")  # alone, and loaded anew
    for i, image in enumerate(drawn):
        single = np.asarray(again([images[i]], [edits[i]], [i + 1])[0], dtype=int)
        assert np.abs(single - np.asarray(image, dtype=int)).max() <= 1
    other = np.asarray(again([images[0]], [["a dog"]], [1])[0], dtype=int)
    assert np.abs(other - np.asarray(drawn[0], dtype=int)).max() > 1  # the edit is read
    assert np.abs(np.asarray(again([images[0]], [edits[0]], [9])[0], dtype=int) - np.asarray(drawn[0], dtype=int)).max() > 1
    assert set(editor.identity()) >= {"editor", "weights_sha256", "guidance_scale"}


def test_editors_that_are_refused(tmp_path, editing):
    with pytest.raises(ModelError, match="no such folder; download the editing pipeline once"):
        InstructPix2Pix(folder=str(tmp_path / "no")).check()
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ModelError, match="a StableDiffusionPipeline follows no edits"):
        InstructPix2Pix(folder=str(tmp_path)).check()
    index.write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline", "unet": ["evil", "Unet"]}')
    with pytest.raises(ModelError, match="code that comes with the model"):
        InstructPix2Pix(folder=str(tmp_path)).check()
    index.write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
                     )
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="holds only pickle weights"):
        InstructPix2Pix(folder=str(tmp_path)).check()
    with pytest.raises(ValueError, match="guidance_scale and image_guidance_scale must be at least 1"):
        InstructPix2Pix(folder="x", guidance_scale=0.5)


def test_all_of_it_from_a_recipe(tmp_path, editing):
    """Chat server, diffusers editor and labeller behind their real interfaces."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i, (16, 16)))
    data = jsonl(tmp_path / "d.jsonl", [{"prompt": f"p {i}", "image": f"{i}.png", "label": 1} for i in range(3)])

    def reply(text, image):
        return '["make it red"]' if "JSON" in text else "It is not red.\nVerdict: faults"
    asked, answer = answering(reply)
    with server(answer) as address:
        recipe = tmp_path / "rich.yaml"
        recipe.write_text(f"""
output_dir: {tmp_path / "out"}
data: {data}
critic: {{kind: chat, url: "{base(address)}", model: vlm}}
instructor: {{kind: chat, url: "{base(address)}", model: vlm, most: 2}}
editor: {{kind: instruct_pix2pix, folder: {editing}, device: cpu}}
labeller: brightness
least_change: 0.0
""")
        rich = load_rich(recipe, ["editor.num_inference_steps=2", "tie=0"])
        said = []
        facts = build_rich(rich, said.append)
        assert facts["statuses"]["ok"] == 3 and len(asked) == 6 and "3 pairs" in said[-1]
        assert facts["stages"]["critiques"]["model"] == "vlm" and facts["labeller"] == "brightness"
    build_rich(rich)  # the server is gone, and nothing is asked
    with pytest.raises(ConfigError, match="editor.kind: no editor called 'magic'"):
        load_rich(recipe, ["editor.kind=magic"])
    with pytest.raises(ConfigError, match="least_change"):
        load_rich(recipe, ["least_change=0.9"])
