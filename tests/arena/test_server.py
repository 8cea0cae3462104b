"""The page's promises: anonymous until the vote, nothing but pictures of the table, no foreign visitors."""

from __future__ import annotations

import json
import re
import socket
import threading
from pathlib import Path

import pytest

from diffalign.arena import server
from diffalign.arena.ballots import Ballots
from diffalign.arena.gallery import read_gallery
from diffalign.arena.server import HEADER, LARGEST_BODY, Arena
from diffalign.arena.spec import ArenaSpec
from diffalign.arena.store import Record, Store
from diffalign.errors import ConfigError

from .toy import Client, gallery

TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gallery(tmp_path_factory.mktemp("arena") / "g")


@pytest.fixture
def opened(folder, tmp_path):
    """A function: options, token -> a running arena."""
    open_now = []

    def start(token=None, **options) -> Arena:
        spec = ArenaSpec(**{"gallery": str(folder), "port": 0, "database": str(tmp_path / "votes.sqlite"), **options})
        store = Store(spec.database)
        open_now[:0] = [Arena(spec, read_gallery(folder), store, token), store]
        return open_now[0]

    yield start
    for thing in open_now:
        thing.close()


@pytest.fixture
def arena(opened):
    return opened()


@pytest.fixture
def client(arena):
    return Client(arena.address)


def test_a_vote_from_the_page_to_the_table(arena, client):
    start = client.start()
    ballot = start["ballot"]
    assert (
        len(ballot["pictures"]) == 4 and start["progress"] == {"votes": 0, "seen": 0, "prompts": 4} and start["undo"] is None
    )
    status, told = client.vote(ballot, ranks=[2, 1, 1, 3])
    assert status == 200 and told["next"]["progress"]["votes"] == 1 and told["next"]["undo"] == ballot["id"]
    (record,) = arena.store.records()
    assert record.ranks == (2, 1, 1, 3) and list(record.ballot.models) == told["models"]
    shown = [picture["src"].split("/")[-1] for picture in ballot["pictures"]]
    assert list(record.ballot.images) == shown
    for model, image in zip(told["models"], shown):
        entries = arena.gallery.prompts[ballot["prompt"]][model]
        assert image in [entry.picture.sha256 for entry in entries]


def test_names_stay_hidden_until_the_vote(client):
    _, _, page = client.ask("GET", "/")
    assert "model-" not in page.decode() and "pictures/" not in page.decode()
    for _ in range(3):
        ballot = client.start()["ballot"]
        assert "model-" not in json.dumps(ballot)
        status, told = client.vote(ballot)
        assert len(told["models"]) == 4 and "model-" not in json.dumps(told["next"])


def test_the_order_is_shuffled(arena, client):
    """The place of a model in the row says nothing: over 60 ballots, model-0 is seen in every place."""
    places = set()
    for _ in range(60):
        status, told = client.vote(client.start()["ballot"], "all_bad")
        places |= {i for i, model in enumerate(told["models"]) if model == "model-0"}
        if told["next"]["ballot"] is None:
            break
    assert places == {0, 1, 2, 3}


def test_the_page_of_a_seed_is_the_same(opened, tmp_path):
    """Same seed, empty database: same prompts, same order."""

    def walk(name):
        client, seen = Client(opened(voter="ana", seed=3, database=str(tmp_path / name)).address), []
        shown = client.start()
        for _ in range(5):
            seen.append((shown["ballot"]["prompt"], [p["src"] for p in shown["ballot"]["pictures"]]))
            shown = client.vote(shown["ballot"])[1]["next"]
        return seen

    assert walk("one") == walk("two")


def test_reloading_shows_the_same_ballot(client):
    assert client.start()["ballot"] == client.start()["ballot"]


def test_a_voter_sees_every_prompt_and_no_set_twice(opened, folder):
    """5 models, k 4, 4 prompts: 5 sets a prompt, so 20 ballots; then all is judged."""
    client, seen = Client(opened(voter="ana").address), []
    shown = client.start()
    while shown["ballot"]:
        seen.append((shown["ballot"]["prompt"], frozenset(p["src"] for p in shown["ballot"]["pictures"])))
        status, told = client.vote(shown["ballot"])
        shown = told["next"]
    assert len(seen) == len(set(seen)) == 20 and len({prompt for prompt, _ in seen[:4]}) == 4


@pytest.mark.parametrize("seeded, sets", [(True, 3), (False, 9)])
def test_all_pictures_of_a_model_come_before_all_is_judged(seeded, sets, tmp_path):
    """2 models with 3 pictures each of one prompt: 3 sets where the table pairs them by seed, else 3 x 3."""
    table = gallery(tmp_path / "g", models=2, prompts=1, seeds=3) / "gallery.jsonl"
    if not seeded:
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        table.write_text("\n".join(json.dumps({name: row[name] for name in ("prompt", "model", "image")}) for row in rows))
    found = read_gallery(table)
    for seed in range(8):
        ballots, shown = Ballots(found, ArenaSpec(gallery=str(table), seed=seed)), []
        while ballot := ballots.next("ana", len(shown)):
            shown.append(frozenset(ballot.images))
            ballots.learn(Record(ballot=ballot, outcome="skipped", ranks=None, cast_at=""))
        assert len(shown) == len(set(shown)) == sets


def test_votes_go_where_they_are_needed(arena, client):
    """After every vote the least compared model is on the next ballot, so that meetings stay level."""
    shown = client.start()
    for _ in range(15):
        shown = client.vote(shown["ballot"])[1]["next"]
    meetings = {row.model: row.meetings for row in arena.standings().ratings.rows}
    assert sum(meetings.values()) == 15 * 12 and max(meetings.values()) - min(meetings.values()) <= 6


def test_undo(arena, client):
    ballot = client.start()["ballot"]
    client.vote(ballot)
    for _ in range(2):  # a retry is harmless
        status, _, body = client.ask("POST", "/api/undo", {"ballot": ballot["id"]})
        again = json.loads(body)["next"]
        assert status == 200 and again["ballot"]["pictures"] == ballot["pictures"] and again["ballot"]["id"] != ballot["id"]
        assert again["progress"]["votes"] == 0 and again["undo"] is None and arena.store.records() == []
    assert client.vote(again["ballot"], "skipped")[0] == 200
    assert [record.outcome for record in arena.store.records()] == ["skipped"]


def test_browsers_are_voters_and_have_their_own_ballots(arena, client):
    other = Client(arena.address)
    ballot = client.start()["ballot"]
    other.start()
    assert other.vote(ballot)[0] == 404
    assert client.vote(ballot)[0] == 200 and client.vote(ballot)[0] == 200
    assert client.vote(ballot, ranks=[4, 3, 2, 1])[0] == 409 and len(arena.store.records()) == 1
    client.ask(
        "POST",
        "/api/vote",
        {"ballot": other.start()["ballot"]["id"], "outcome": "skipped"},
        {"Cookie": 'diffalign_voter="../../x"'},
    )
    assert {record.ballot.voter for record in arena.store.records()} == {client.cookies["diffalign_voter"]}


def test_pictures_come_by_hash_and_by_nothing_else(arena, client, folder):
    source = client.start()["ballot"]["pictures"][0]["src"]
    status, headers, body = client.ask("GET", source)
    assert status == 200 and headers["Content-Type"] == "image/png" and body == arena.gallery.pictures[source[9:]].read()
    hostile = [
        "/picture/",
        "/picture/" + "0" * 64,
        "/picture/../gallery.jsonl",
        "/picture/%2e%2e/gallery.jsonl",
        "/gallery.jsonl",
        "/votes.sqlite",
        "/pictures/0-0-0.png",
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/picture/" + str(folder / "gallery.jsonl"),
        "/picture//etc/passwd",
        source + "/..",
        source.upper(),
        source + "%00",
        "/page.html.j2",
        "/static/x",
        "/\\etc\\passwd",
        "/picture/" + "٠" * 64,
    ]
    for path in hostile:
        with socket.create_connection((client.host.split(":")[0], int(client.host.split(":")[1])), timeout=5) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
        assert answer.split()[1] in (b"404", b"400"), (path, answer[:80])
        assert b"root:" not in answer and b'"model"' not in answer and b"PNG" not in answer


def test_a_picture_that_was_swapped_is_not_served(opened, tmp_path):
    own = gallery(tmp_path / "own")
    spec = ArenaSpec(gallery=str(own), port=0)
    with Store(tmp_path / "own.sqlite") as store, Arena(spec, read_gallery(own), store) as arena:
        client = Client(arena.address)
        source = client.start()["ballot"]["pictures"][0]["src"]
        path = arena.gallery.pictures[source[9:]].path
        path.unlink()
        path.symlink_to("/etc/passwd")
        status, _, body = client.ask("GET", source)
        assert status == 503 and b"has changed" in body and b"root:" not in body


@pytest.mark.parametrize("path", ["/", "/standings", "/nothing", "picture"])
def test_headers(client, path):
    path = client.start()["ballot"]["pictures"][0]["src"] if path == "picture" else path
    _, headers, body = client.ask("GET", path)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src 'self' data:;") and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    for nonce in re.findall(rb'nonce="([^"]+)"', body):
        assert f"script-src 'nonce-{nonce.decode()}'" in policy
    assert "Access-Control-Allow-Origin" not in headers


def test_nonces_are_fresh(client):
    pages = [client.ask("GET", "/")[1]["Content-Security-Policy"] for _ in range(2)]
    assert pages[0] != pages[1]


def test_hostile_prompts_are_text(tmp_path):
    own = gallery(tmp_path / "own", models=2, prompts=1)
    table = own / "gallery.jsonl"
    table.write_text(
        table.read_text().replace("prompt 0", "</script><script>alert(1)</script>").replace("model-1", "<img src=x>")
    )
    with (
        Store(tmp_path / "own.sqlite") as store,
        Arena(ArenaSpec(gallery=str(own), port=0), read_gallery(own), store) as arena,
    ):
        client = Client(arena.address)
        start = client.start()
        assert start["ballot"]["prompt"] == "</script><script>alert(1)</script>"
        client.vote(start["ballot"])
        for path in ("/", "/standings"):
            page = client.ask("GET", path)[2].decode()
            assert "<script>alert" not in page and "<img src=x>" not in page


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "10.0.0.1",
        "[::2]",
        "a@evil.example",
        "localhost@evil.example",
    ],
)
def test_foreign_names_are_refused(client, host):
    assert client.ask("GET", "/", headers={"Host": host})[0] == 403
    assert client.ask("POST", "/api/vote", {}, {"Host": host})[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:1", "[::1]:80", "127.0.0.2"])
def test_own_names_are_served(client, host):
    assert client.ask("GET", "/", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {HEADER: None},
        {HEADER: "0"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
def test_votes_of_foreign_pages_are_refused(arena, client, headers):
    ballot = client.start()["ballot"]
    status, _, body = client.ask("POST", "/api/vote", {"ballot": ballot["id"], "outcome": "skipped"}, headers)
    assert status == 403 and arena.store.records() == []
    assert client.ask("POST", "/api/vote", {"ballot": ballot["id"], "outcome": "skipped"}, {"Origin": arena.address})[0] == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"[" * 10_000, {}, 400),
        (b"\xff", {}, 400),
        ({}, {}, 400),
        ({"ballot": 3}, {}, 400),
        ({"ballot": "\ud800"}, {}, 400),
        ({"ballot": "x' OR 1=1 --"}, {}, 400),
        ({"ballot": "f" * 32, "outcome": "skipped"}, {}, 404),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b"x" * (LARGEST_BODY + 1), {}, 413),
        (b"{}", {"Content-Length": "9" * 12}, 411),
        (b"{}", {"Content-Length": "-1"}, 411),
    ],
)
def test_bodies_that_are_no_votes(arena, client, body, headers, status):
    client.start()
    found, _, answer = client.ask("POST", "/api/vote", body, headers)
    assert found == status and set(json.loads(answer)) == {"error"} and arena.store.records() == []


def test_addresses_that_are_none(arena, client, capfd):
    """A stranger's request is no reason for a traceback in the terminal."""
    with socket.create_connection(("127.0.0.1", int(client.host.rpartition(":")[2]))) as raw:
        raw.sendall(b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 400"
    assert client.ask("POST", "/api/vote", {}, {"Origin": "http://["})[0] == 400
    assert capfd.readouterr().err == ""


def test_other_methods_and_addresses(client):
    assert client.ask("PUT", "/")[0] == 501 and client.ask("OPTIONS", "/api/vote")[0] == 501
    assert client.ask("POST", "/", {})[0] == 404 and client.ask("GET", "/api/vote")[0] == 404


def test_a_database_that_fails_is_said_and_nothing_is_acknowledged(arena, client, monkeypatch):
    ballot = client.start()["ballot"]
    arena.store._db.execute("PRAGMA query_only=ON")
    status, told = client.vote(ballot)
    assert status == 503 and "database cannot be used" in told["error"]
    arena.store._db.execute("PRAGMA query_only=OFF")
    assert client.vote(ballot)[0] == 200 and len(arena.store.records()) == 1


def test_with_a_token_nothing_is_shown_without_it(opened, folder):
    arena = opened(TOKEN)
    client = Client(arena.address)
    picture = next(iter(arena.gallery.pictures))
    for path in (
        "/",
        "/standings",
        f"/picture/{picture}",
        "/?token=wrong",
        "/?token=",
        f"/?token={TOKEN[:-1]}",
        "/?tokeN=" + TOKEN,
        "/?token=%FF",
    ):
        status, headers, body = client.ask("GET", path)
        assert status == 401 and "Set-Cookie" not in headers and b"prompt" not in body, path
    assert client.ask("POST", f"/api/vote?token={TOKEN}", {})[0] == 401
    status, headers, body = client.ask("GET", f"/?token={TOKEN}")
    assert (status, headers["Location"], body) == (303, "/", b"")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and TOKEN not in cookie
    ballot = client.start()["ballot"]
    assert client.vote(ballot)[0] == 200 and client.ask("GET", f"/picture/{picture}")[0] == 200
    forged = Client(arena.address)
    forged.cookies[arena.cookie] = TOKEN
    assert forged.ask("GET", "/")[0] == 401
    assert client.ask("GET", "/", headers={"Host": "box.example:8765"})[0] == 200  # the cookie guards, not the name


def test_a_port_in_use_is_said(arena, opened):
    with pytest.raises(ConfigError, match="arena.port: cannot listen on 127.0.0.1"):
        opened(port=int(arena.address.split(":")[-1]))


def test_two_servers_on_one_database(opened, tmp_path):
    """They learn of each other's votes: no set of pictures comes twice, and each is counted once."""
    one, two = (Client(opened(voter="ana").address) for _ in range(2))
    seen = []
    for client in (one, two, one, two, two, one):
        ballot = client.start()["ballot"]
        seen.append((ballot["prompt"], frozenset(p["src"] for p in ballot["pictures"])))
        assert client.vote(ballot)[0] == 200
    assert len(set(seen)) == 6 and one.start()["progress"] == two.start()["progress"] == {"votes": 6, "seen": 4, "prompts": 4}


def test_standings(arena, client):
    assert b"0 ranked ballots" in client.ask("GET", "/standings")[2]
    ballot = client.start()["ballot"]
    for _ in range(12):
        found = arena.store.open_ballot(client.cookies["diffalign_voter"])
        ranks = [sorted(found.models).index(model) + 1 for model in found.models]
        ballot = client.vote(ballot, ranks=ranks)[1]["next"]["ballot"]
    client.vote(ballot, "all_bad")
    page = client.ask("GET", "/standings")[2].decode()
    assert "12 ranked ballots" in page and "1 all bad" in page and page.index("model-0") < page.index("model-4")
    table = arena.standings()
    assert all(row.separable for row in table.ratings.rows) and page.count(">open<") == 10  # nobody lost out of order
    assert table is arena.standings()
    assert table.score("model-0") > table.score("model-4") and table.wins[0, 4] == 1


def test_nobody_waits_with_a_vote_for_the_standings(arena, client, monkeypatch):
    """They are fits to a thousand resamples."""
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(server, "standings", lambda *args, **options: (begun.set(), go_on.wait(20)))
    other = threading.Thread(target=arena.standings, daemon=True)
    other.start()
    assert begun.wait(20)
    try:
        assert client.vote(client.start()["ballot"])[0] == 200 and other.is_alive()
    finally:
        go_on.set()
        other.join(20)


def test_votes_on_models_that_left_still_count(opened, tmp_path, folder):
    arena = opened(voter="ana")
    client = Client(arena.address)
    client.vote(client.start()["ballot"])
    gone = json.loads((folder / "gallery.jsonl").read_text().splitlines()[0])["model"]
    small = tmp_path / "small.jsonl"
    lines = [line for line in (folder / "gallery.jsonl").read_text().splitlines() if json.loads(line)["model"] != gone]
    (folder / small.name).write_text("\n".join(lines))
    try:
        spec = ArenaSpec(gallery=str(folder / small.name), port=0, voter="ana")
        with Arena(spec, read_gallery(spec.gallery), arena.store) as later:
            assert Client(later.address).start()["ballot"] and len(later.standings().ratings.rows) in (4, 5)
    finally:
        Path(folder / small.name).unlink()
