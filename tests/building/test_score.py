"""``diffalign score`` over every kind of data: columns, resuming, processes, and what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign import run
from diffalign.building import score as scoring
from diffalign.building.journal import Journal
from diffalign.building.score import Source
from diffalign.building.spec import ScoreSpec
from diffalign.cli import main
from diffalign.config import load_score
from diffalign.data.columns import Tally, detect_layout, read_rows
from diffalign.data.spec import DataSpec
from diffalign.errors import ConfigError, DataError
from diffalign.rewards import REWARDS, Reward
from diffalign.rewards.rules import Brightness

from . import toy

BRIGHT = {"bright": Brightness()}


def write_png(path, value: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    return path


def level(value: int) -> float:
    """Brightness of an even grey."""
    return Brightness()([Image.fromarray(np.full((8, 8, 3), value, np.uint8))], [""]).item()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spec(data, **options) -> ScoreSpec:
    return ScoreSpec(**{"rewards": BRIGHT, "data": str(data), "cpu": True, **options})


@pytest.fixture
def table(tmp_path):
    """100 groups of two as JSONL; 20 pictures in all."""
    for value in range(20):
        write_png(tmp_path / "pictures" / f"{value}.png", 10 * value)
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"p{n}", "images": [f"pictures/{n % 20}.png", f"pictures/{(n + 1) % 20}.png"], "scores": [n, 0],
             "note": {"kept": [n]}} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_are_aligned_with_the_pictures_and_the_rest_is_kept(table):
    before = table.read_bytes()
    facts = run.score(spec(table, rewards={"bright": Brightness(), "b2": Brightness()}))
    found = lines(table.with_name("data.scored.jsonl"))
    assert table.read_bytes() == before and len(found) == facts["rows"] == 100
    for n, (row, own) in enumerate(zip(lines(table), found)):
        assert {name: own.pop(name) for name in row} == row
        assert own == {"score_bright": own["score_b2"], "score_b2": own["score_b2"]}
        assert own["score_b2"] == pytest.approx([level(10 * (n % 20)), level(10 * ((n + 1) % 20))])
    assert facts["rewards"]["bright"]["scored"] == 200


def test_a_column_that_is_no_whole_unicode_is_kept(table):
    """The first half of a surrogate pair, which JSON can say and UTF-8 cannot."""
    table.write_text(json.dumps({"prompt": "p", "image": "pictures/3.png", "label": 1, "note": "cut \ud83d"}) + "\n")
    run.score(spec(table))
    (found,) = lines(table.with_name("data.scored.jsonl"))
    assert found["note"] == "cut \ud83d" and found["score_bright"] == pytest.approx(level(30))


def test_the_scored_table_is_a_data_set_and_the_folder_still_means_the_table(table):
    run.score(spec(table))
    for path in (table.with_name("data.scored.jsonl"), table.parent):
        assert detect_layout(DataSpec(path=str(path))) == "scored"
    assert len(list(read_rows(DataSpec(path=str(table.parent)), Tally()))) == 99  # row 0 is a tie


@pytest.mark.parametrize("columns", [
    {"jpg_0": 0, "jpg_1": 1, "label_0": [1.0, 0.5, 0.0]}, {"chosen": 0, "rejected": 1}, {"image": 0, "label": [1, 0, 1]}])
def test_parquet_of_any_layout_keeps_its_own_columns_exactly(tmp_path, columns):
    def png(value):
        return write_png(tmp_path / "x.png", value).read_bytes()

    values = [[30, 60], [90, 120], [150, 180]]
    given = {name: [png(row[side]) for row in values] if isinstance(side, int) else side for name, side in columns.items()}
    plain = pa.table({**given, "caption": ["a", "b", "c"], "extra": [[1], [], None]})
    noted = plain.replace_schema_metadata({"huggingface": '{"info": {"features": {}}}', "other": "kept"})
    pq.write_table(noted, tmp_path / "t.parquet", row_group_size=2)
    run.score(spec(tmp_path / "t.parquet"))
    found = pq.read_table(tmp_path / "t.scored.parquet")
    assert found.drop(["score_bright"]).cast(plain.schema) == plain and found.schema.metadata == {b"other": b"kept"}
    if "image" in columns:
        assert found["score_bright"].to_pylist() == pytest.approx([level(row[0]) for row in values])
    else:
        assert np.allclose(found["score_bright"].to_pylist(), [[level(value) for value in row] for row in values])
    assert detect_layout(DataSpec(path=str(tmp_path / "t.scored.parquet"))) in ("pickapic", "chosen_rejected", "unpaired")


def test_csv_and_a_folder_with_metadata(tmp_path):
    for name in ("csv", "meta"):
        write_png(tmp_path / name / "a.png", 200)
    with (tmp_path / "csv" / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "prompt", "label"], ["a.png", "one", 1]])
    (tmp_path / "meta" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
    run.score(spec(tmp_path / "csv" / "t.csv"))
    run.score(spec(tmp_path / "meta"))
    for path in (tmp_path / "csv" / "t.scored.jsonl", tmp_path / "meta" / "metadata.scored.jsonl"):
        (row,) = lines(path)
        assert row["score_bright"] == pytest.approx(level(200))


def test_a_folder_of_pictures_with_and_without_prompts(tmp_path):
    write_png(tmp_path / "b.png", 100)
    write_png(tmp_path / "sub" / "a.png", 50)
    (tmp_path / "sub" / "a.txt").write_text("a dark thing\n")
    said = []
    facts = run.score(spec(tmp_path), said.append)
    found = lines(tmp_path / "pictures.scored.jsonl")
    assert found == [{"image": "b.png", "score_bright": pytest.approx(level(100))},
                     {"image": "sub/a.png", "prompt": "a dark thing", "score_bright": pytest.approx(level(50))}]
    assert facts["without_prompt"] == 1 and any("1 rows have no prompt" in line for line in said)
    assert run.score(spec(tmp_path))["rows"] == 2  # its own files are no data


def test_a_folder_with_a_name_that_is_no_unicode(tmp_path):
    """Such as an old archive of Latin-1 names leaves."""
    name = os.fsdecode(b"caf\xe9.png")
    write_png(tmp_path / "d" / name, 50)
    run.score(spec(tmp_path / "d"))
    (found,) = lines(tmp_path / "d" / "pictures.scored.jsonl")
    assert found["image"] == name and found["score_bright"] == pytest.approx(level(50))


def test_a_build_folder(tmp_path, monkeypatch):
    toy.Stub().put_into(monkeypatch.setattr)
    run.build(toy.spec(tmp_path, utility={"kind": "reward", "reward": "bright"}))
    run.score(spec(tmp_path / "out", rewards={"again": Brightness()}))
    rows = lines(tmp_path / "out" / "groups.scored.jsonl")
    assert rows and all(row["score_again"] == pytest.approx(row["score_bright"]) for row in rows)


def test_a_picture_that_cannot_be_scored_is_null_and_named(table):
    (table.parent / "pictures" / "3.png").write_bytes(b"no picture")
    (table.parent / "pictures" / "4.png").unlink()
    said = []
    facts = run.score(spec(table), said.append)
    found = lines(table.with_name("data.scored.jsonl"))
    assert found[2]["score_bright"][1] is None and found[3]["score_bright"] == [None, None]
    assert facts["rewards"]["bright"]["not_scored"] == 20 and facts["rewards"]["bright"]["scored"] == 180
    assert any("line 3" in line and "3.png" in line for line in said)


@dataclass(frozen=True, kw_only=True)
class Liked:
    """A user's name and the picture's brightness."""

    name = "liked"
    differentiable = False
    columns = ("user",)

    def __call__(self, images, prompts, *, user):
        return torch.tensor([float(len(one)) for one in user])


def test_columns_that_a_reward_reads(tmp_path):
    write_png(tmp_path / "a.png", 10)
    rows = [{"prompt": "p", "images": ["a.png", "a.png"], "scores": [1, 0], "user": "ann"},
            {"prompt": "p", "images": ["a.png", "a.png"], "scores": [1, 0], "user": ["x", "yy"]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    liked: dict[str, Reward] = {"liked": Liked()}
    run.score(spec(tmp_path / "t.jsonl", rewards=liked))
    assert [row["score_liked"] for row in lines(tmp_path / "t.scored.jsonl")] == [[3, 3], [1, 2]]
    (tmp_path / "u.jsonl").write_text('{"prompt": "p", "image": "a.png", "label": 1}\n')
    with pytest.raises(DataError, match="rewards.liked reads a column 'user'"):
        run.score(spec(tmp_path / "u.jsonl", rewards=liked))


# --- kills and processes ---

def killed_at(data, number: int) -> bool:
    child = os.fork()
    if child == 0:
        count, real = 0, os.fsync

        def dying(descriptor):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(descriptor)

        try:
            torch.set_num_threads(1)
            os.fsync = dying
            run.score(spec(data))
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_kills_leave_no_hole_and_no_double(table, monkeypatch):
    monkeypatch.setattr(scoring, "UNIT", 16)
    output = table.with_name("data.scored.jsonl")
    run.score(spec(table))
    whole = output.read_bytes()
    for number in range(1, 13):
        for path in (output, output.with_name(f"{output.name}.json")):
            path.unlink()
        for log in table.parent.rglob("*.log"):
            log.unlink()
        killed = killed_at(table, number)
        assert killed or number > 9
        run.score(spec(table))
        assert output.read_bytes() == whole
        units = [one["unit"] for one in Journal(table.parent / "data.scored.jsonl.work" / "scores")]
        assert sorted(units) == list(range(7))


@pytest.mark.parametrize("world", [2, 3, 9])
def test_the_shares_of_any_world_are_the_whole(table, world, monkeypatch):
    monkeypatch.setattr(scoring, "UNIT", 16)
    source, folder = Source(spec(table)), table.parent / "journals"
    folder.mkdir()
    for rank in range(world):  # none sees what another has done
        scoring.score(source, BRIGHT, Journal(folder / f"of-{rank}", rank), rank=rank, world=world, progress=False)
    for log in folder.glob("*/*.log"):
        log.rename(folder / log.name)
    assert len(list(Journal(folder))) == 7
    scoring.write(source, ["bright"], scoring.known(Journal(folder)))
    shared = source.output.read_bytes()
    source.output.unlink()
    run.score(spec(table))
    assert source.output.read_bytes() == shared


def test_a_second_run_scores_nothing_and_another_one_does_not_go_on(table):
    run.score(spec(table))
    whole = table.with_name("data.scored.jsonl").read_bytes()
    fail = {"bright": Broken()}
    with pytest.raises(ConfigError, match="rewards.bright"):
        run.score(spec(table, rewards=fail))
    run.score(spec(table))
    assert table.with_name("data.scored.jsonl").read_bytes() == whole
    more = {"prompt": "new", "images": ["pictures/1.png", "pictures/2.png"], "scores": [1, 2]}
    table.write_text(table.read_text() + json.dumps(more))
    with pytest.raises(ConfigError, match="data: is"):
        run.score(spec(table))
    assert run.score(spec(table, overwrite=True))["rows"] == 101


@dataclass(frozen=True, kw_only=True)
class Broken:
    """Another reward under the same name; its numbers are never asked for."""

    strength: int = 3
    name = "broken"
    differentiable = False

    def __call__(self, images, prompts):
        raise AssertionError("nothing may be scored")


@pytest.mark.parametrize("name", ["data", "data/part-*.tar"])
def test_scores_of_other_rows_are_not_taken_for_those_of_a_folder_or_of_shards(tmp_path, name):
    """As many rows as before, in files of the same names."""
    def fill(value: int) -> None:
        (tmp_path / "data").mkdir(exist_ok=True)
        for number in range(2):
            png = write_png(tmp_path / "a.png", value + number)
            if name.endswith("tar"):
                with tarfile.open(tmp_path / "data" / f"part-{number}.tar", "w") as archive:
                    archive.add(png, f"{number}.jpg_0.png")
                    archive.add(png, f"{number}.jpg_1.png")
            else:
                pq.write_table(pa.table({"jpg_0": [png.read_bytes()], "jpg_1": [png.read_bytes()]}),
                               tmp_path / "data" / f"train-{number}.parquet")

    fill(10)
    own = spec(tmp_path / name, output=str(tmp_path / "out.jsonl"))
    run.score(own)
    first = lines(tmp_path / "out.jsonl")
    assert run.score(own)["rows"] == 2 and first[0]["score_bright"] == pytest.approx([level(10)] * 2)
    fill(200)
    with pytest.raises(ConfigError, match="data: is .* begun with"):
        run.score(own)
    run.score(replace(own, overwrite=True))
    assert lines(tmp_path / "out.jsonl")[1]["score_bright"] == pytest.approx([level(201)] * 2)


def test_the_command_with_two_processes(table):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m", "diffalign", "score",
               "brightness", str(table), "cpu=true"]
    found = subprocess.run(command, cwd=toy.ROOT, capture_output=True, text=True, timeout=240,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(toy.ROOT)})
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("done:") == 1 and len(lines(table.with_name("data.scored.jsonl"))) == 100


# --- the command line ---

def test_rewards_by_kind_by_yaml_and_by_file(tmp_path):
    assert list(load_score("scenes, brightness", "x").rewards) == ["scenes", "brightness"]
    assert load_score("{small: {kind: compressibility, quality: 30}}", "x").rewards["small"].quality == 30
    assert list(load_score("{kind: compressibility, quality: 30}", "x").rewards) == ["compressibility"]
    file = tmp_path / "rewards.yaml"
    file.write_text("a: scenes\nb: {kind: compressibility}\n")
    assert list(load_score(str(file), "x", ["rewards.b.quality=20"]).rewards) == ["a", "b"]


@pytest.mark.parametrize("rewards, data, override, words", [
    ("brightnes", "DATA", None, ("rewards.brightnes.kind", 'Did you mean "brightness"')),
    ("brightness,brightness", "DATA", None, ("rewards: 'brightness' is given twice",)),
    (",", "DATA", None, ("rewards: is empty",)),
    ("gone.yaml", "DATA", None, ("gone.yaml: no such recipe",)),
    ("brightness", "gone.parquet", None, ("gone.parquet: no such file",)),
    ("brightness", "EMPTY", None, ("EMPTY",)),
    ("brightness", "DATA", "output=DATA", ("is the data itself",)),
    ("brightness", "DATA", "output=x.csv", ("must end in .jsonl or .parquet",)),
    ("brightness", "DATA", "output=x.parquet", ("only a parquet file becomes parquet",)),
    ("brightness", "DATA", "output=/proc/nowhere/x.jsonl", ("output: cannot write in /proc/nowhere",)),
    ("brightness", "DATA", "outptu=x", ('Did you mean "output"',)),
    ("note", "DATA", None, ("note",)),
    ("{x: {kind: brightness}}", "TAKEN", None, ("column score_x already",)),
    ("brightness", "TORN", None, ("torn.jsonl line 2", "no JSON")),
])
def test_refused_in_one_line(table, capsys, rewards, data, override, words):
    folder = table.parent
    (folder / "empty").mkdir()
    (folder / "torn.jsonl").write_text('{"prompt": "p", "image": "pictures/1.png"}\n{"prompt": "p", "ima')
    (folder / "taken.jsonl").write_text('{"prompt": "p", "image": "pictures/1.png", "score_x": 1}\n')
    places = {"DATA": str(table), "EMPTY": str(folder / "empty"), "TORN": str(folder / "torn.jsonl"),
              "TAKEN": str(folder / "taken.jsonl")}
    options = [] if override is None else [override.replace("DATA", str(table))]
    before = table.read_bytes()
    assert main(["score", rewards, places.get(data, data), *options]) == 2
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffalign: ")]
    assert len(found) == 1 and all(word.replace("EMPTY", "empty") in found[0] for word in words), found
    assert table.read_bytes() == before


def test_a_link_to_nowhere_is_a_picture_that_cannot_be_read(tmp_path):
    write_png(tmp_path / "pictures" / "b.png", 100)
    (tmp_path / "pictures" / "a.png").symlink_to("nowhere.png")
    run.score(spec(tmp_path / "pictures"))
    assert [row["score_bright"] is None for row in lines(tmp_path / "pictures" / "pictures.scored.jsonl")] == [True, False]


def test_a_reward_that_cannot_be_copied_is_used_itself(table):
    class Locked(Brightness):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle '_thread.lock' object")

    assert run.score(spec(table, rewards={"bright": Locked()}))["rewards"]["bright"]["scored"] == 200


def test_options_may_stand_behind_the_file_of_rewards(table, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("from dataclasses import dataclass\nimport torch\n\n@dataclass(frozen=True, kw_only=True)\nclass Leaves:\n"
                    "    name = 'leaves'\n    differentiable = False\n\n    def __call__(self, images, prompts):\n"
                    "        raise SystemExit(0)\n")
    try:
        code = main(["score", "leaves", str(table), "--rewards-from", str(file), "cpu=true", f"output={tmp_path / 'o.jsonl'}"])
    finally:
        REWARDS.pop("leaves", None)
    assert code == 2 and 'reward "leaves" failed' in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()
    with pytest.raises(SystemExit) as found:
        main(["score", "leaves", str(table), "cpu=true", "--nope"])
    assert found.value.code == 2 and "--nope" in capsys.readouterr().err
