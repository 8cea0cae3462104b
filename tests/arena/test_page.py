"""The page in a real browser. Screenshots are left in DIFFALIGN_SCREENSHOTS when that names a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffalign.arena.gallery import read_gallery
from diffalign.arena.server import Arena
from diffalign.arena.spec import ArenaSpec
from diffalign.arena.store import Store

from .chromium import BINARY, Page
from .toy import gallery

pytestmark = pytest.mark.skipif(BINARY is None, reason="needs Chromium")

LOADED = "[...document.querySelectorAll('.pick img')].filter(i => i.complete && i.naturalWidth).length === 4"
FITS = "document.documentElement.scrollWidth <= innerWidth"
ON_SCREEN = "[...document.querySelectorAll('.pick img')].every(i => i.getBoundingClientRect().bottom < innerHeight)"


def places(page: Page) -> list[str]:
    return page.js("[...document.querySelectorAll('.place')].map(p => p.textContent)")


def keep(page: Page, name: str) -> None:
    if os.environ.get("DIFFALIGN_SCREENSHOTS"):
        page.screenshot(Path(os.environ["DIFFALIGN_SCREENSHOTS"]) / f"{name}.png")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("profile")


@pytest.fixture
def arena(tmp_path):
    folder = gallery(tmp_path / "g", models=6, size=300)
    with (
        Store(tmp_path / "a.sqlite") as store,
        Arena(ArenaSpec(gallery=str(folder), port=0, voter="ana"), read_gallery(folder), store) as arena,
    ):
        yield arena


def test_voting_by_keys_at_a_desk(arena, profile):
    page = Page(profile / "desk", 1280, 800)
    try:
        page.open(arena.address)
        page.wait(LOADED)
        keep(page, "desk")
        assert page.js(FITS) and page.js(ON_SCREEN) and page.js("document.querySelector('#main').disabled")
        page.press("3")
        page.press("t")
        page.press("1")
        assert places(page) == ["1", "", "1", ""]
        page.press("3")  # takes the shared first rank back
        assert places(page) == ["", "", "", ""]
        for key in ("3", "1", "4"):
            page.press(key)
        assert places(page) == ["2", "4", "1", "3"]  # the last one follows
        assert arena.store.records() == [] and "model-" not in page.js("document.body.innerText")
        page.press("Enter")
        page.wait("document.body.classList.contains('over')")
        keep(page, "desk-saved")
        (record,) = arena.store.records()
        assert record.ranks == (2, 4, 1, 3)
        names = page.js("[...document.querySelectorAll('.name')].map(n => n.textContent)")
        assert tuple(names) == record.ballot.models
        page.press("u")
        page.wait("!document.body.classList.contains('over')")
        assert arena.store.records() == [] and page.js("document.querySelector('#hint').textContent").startswith("Taken back")
        page.press("e")
        page.press("Enter")
        page.wait("document.body.classList.contains('over')")
        page.press("Enter")
        page.wait("!document.body.classList.contains('over')")
        for key, outcome in (("b", "all_bad"), ("s", "skipped")):
            page.press(key)
            if key == "b":
                page.wait("document.body.classList.contains('over')")
                page.press("Enter")
            page.wait(
                f"document.querySelector('#count').textContent.startsWith('{2 if key == 'b' else 3} votes')"
                " && !document.body.classList.contains('over')"
            )
            assert arena.store.records()[-1].outcome == outcome
        assert arena.store.records()[0].ranks == (1, 1, 1, 1)
        page.open(f"{arena.address}/standings")
        assert page.js(FITS) and "1 ranked ballot" in page.js("document.body.innerText")
        assert page.problems == []
    finally:
        page.close()


def test_voting_by_taps_on_a_phone(arena, profile):
    page = Page(profile / "phone", 390, 844, touch=True)
    try:
        page.open(arena.address)
        page.wait(LOADED)
        keep(page, "phone")
        assert page.js("innerWidth") == 390 and page.js(FITS) and page.js(ON_SCREEN)
        page.click(".zoom", 2)
        assert page.js("document.querySelector('dialog').open") and page.js(
            "document.querySelector('dialog img').getBoundingClientRect().width > 340"
        )
        page.click("[data-close]")
        for n in (1, 0, 3):
            page.click(".pick", n)
        assert places(page) == ["2", "1", "4", "3"]
        page.click("#main")
        page.wait("document.body.classList.contains('over')")
        assert arena.store.records()[0].ranks == (2, 1, 4, 3)
        page.click("#main")
        page.wait("!document.body.classList.contains('over')")
        assert page.js(LOADED) or page.wait(LOADED) is None
        page.open(f"{arena.address}/standings")
        keep(page, "phone-standings")
        assert page.js(FITS) and page.problems == []
    finally:
        page.close()


def test_a_lost_answer_is_asked_for_again(arena, profile, monkeypatch):
    """The server stores the vote and dies before it answers; the page asks until it hears, and the vote is there once."""
    calls, cast = [], arena.store.cast

    def lossy(*values):
        result = cast(*values)
        calls.append(values)
        if len(calls) == 1:
            raise ConnectionResetError
        return result

    monkeypatch.setattr(arena.store, "cast", lossy)
    page = Page(profile / "lost", 900, 700)
    try:
        page.open(arena.address)
        page.wait(LOADED)
        page.press("e")
        page.press("Enter")
        page.wait("document.body.classList.contains('over')")
        assert len(calls) == 2 and calls[0] == calls[1] and len(arena.store.records()) == 1
        assert page.js("document.querySelector('#count').textContent").startswith("1 vote ")
    finally:
        page.close()
