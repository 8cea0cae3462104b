"""What may enter: tables read by line, pictures inside the folder only, errors that name the place."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from diffalign.arena.gallery import read_gallery
from diffalign.arena.spec import ArenaSpec
from diffalign.errors import ConfigError, DataError

from .toy import gallery


def rows(folder, *lines) -> None:
    (folder / "gallery.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(home / f"{name}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    return home


def row(model="m", image="a.png", **more) -> dict:
    return {"prompt": "p", "model": model, "image": image, **more}


def test_a_gallery(tmp_path):
    found = read_gallery(gallery(tmp_path / "g", models=3, prompts=2, seeds=2))
    assert found.models == ("model-0", "model-1", "model-2") and len(found.pictures) == 12
    entry = found.prompts["prompt 1"]["model-2"][1]
    assert (entry.seed, entry.picture.kind, entry.picture.width) == (1, "png", 24)
    assert read_gallery(tmp_path / "g" / "gallery.jsonl").pictures.keys() == found.pictures.keys()


def test_equal_pictures_are_one(folder):
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    rows(folder, row("m", "a.png"), row("n", "c.png"), "", row("n", "b.png"))
    found = read_gallery(folder)
    assert len(found.pictures) == 2 and len(found.prompts["p"]["n"]) == 2


@pytest.mark.parametrize(
    "image",
    [
        "../secret.png",
        "x/../../secret.png",
        "/etc/passwd",
        "..\\secret.png",
        "link.png",
        "linked/secret.png",
        "a\0.png",
        "~/x.png",
        "x" * 5000,
        "a.png/../../secret.png",
        "loop",
        ".",
    ],
)
def test_no_picture_outside_the_folder(folder, image):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    rows(folder, row("m", image), row("n", "b.png"))
    with pytest.raises(DataError, match="gallery.jsonl line 1: image"):
        read_gallery(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: no JSON object"),
        ("[" * 100_000, "line 1: no JSON object"),
        ("[1]", "line 1: a JSON object is needed, got list"),
        ({"prompt": "p", "image": "a.png"}, "line 1: model: text is needed"),
        ({"prompt": " ", "model": "m", "image": "a.png"}, "line 1: prompt: text is needed"),
        ({"prompt": "p", "model": 3, "image": "a.png"}, "line 1: model: text is needed"),
        ({"prompt": "p", "model": "m" * 201, "image": "a.png"}, "line 1: model: longer than 200"),
        ({"prompt": "\ud800", "model": "m", "image": "a.png"}, "line 1: prompt: no valid Unicode"),
        (row(seed="x"), "line 1: seed: a whole number"),
        (row(seed=True), "line 1: seed: a whole number"),
        (row(image="missing.png"), "line 1: image: .*missing.png is no file"),
        (row(image="broken.png"), "line 1, broken.png: .*no picture|corrupt"),
        (row(image="a.tiff"), "browsers do not show TIFF"),
        (row(), "no prompt has pictures of two models"),
    ],
)
def test_bad_tables(folder, line, message):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.new("RGB", (8, 8)).save(folder / "a.tiff")
    rows(folder, line)
    with pytest.raises(DataError, match=message):
        read_gallery(folder)


def test_bad_places(folder, tmp_path):
    for path in (tmp_path / "nowhere", folder, tmp_path / ("x" * 5000)):
        with pytest.raises(DataError):
            read_gallery(path)
    (folder / "gallery.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        read_gallery(folder)


def test_a_prompt_may_hold_a_line_separator(folder):
    lines = [json.dumps({**row(model, f"{model}.png"), "prompt": "a\u2028b\x85c"}, ensure_ascii=False) for model in "ab"]
    (folder / "gallery.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert list(read_gallery(folder).prompts) == ["a\u2028b\x85c"]


def test_a_picture_that_changed_is_not_shown(folder):
    rows(folder, row("m", "a.png"), row("n", "b.png"))
    found = read_gallery(folder)
    picture = found.prompts["p"]["m"][0].picture
    os.replace(folder.parent / "secret.png", folder / "a.png")
    with pytest.raises(DataError, match="has changed"):
        picture.read()
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        picture.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gallery": " "}, "gallery is empty"),
        ({"k": 1}, "k must be"),
        ({"k": 10}, "k must be"),
        ({"port": -1}, "port must be"),
        ({"port": 70_000}, "port must be"),
        ({"host": " "}, "host is empty"),
        ({"voter": ""}, "voter must"),
        ({"criteria": "x" * 1001}, "criteria must"),
        ({"host": "0.0.0.0"}, "token_env"),
        ({"host": "192.168.1.5"}, "token_env"),
        ({"host": "example.org"}, "token_env"),
        ({"host": "::"}, "token_env"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ArenaSpec(**{"gallery": "g", **options})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    assert ArenaSpec(gallery="g", host=host).token() is None


def test_tokens_come_from_the_environment(monkeypatch):
    spec = ArenaSpec(gallery="g", host="0.0.0.0", token_env="ARENA_TOKEN")
    for value in ("", "short", "x" * 15 + "\n", "ü" * 16):
        monkeypatch.setenv("ARENA_TOKEN", value)
        with pytest.raises(ConfigError, match="ARENA_TOKEN") as error:
            spec.token()
        assert not value or value not in str(error.value)
    monkeypatch.setenv("ARENA_TOKEN", "a-token-of-24-characters")
    assert spec.token() == "a-token-of-24-characters"
