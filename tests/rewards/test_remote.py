"""Rewards behind HTTP: what a sick, slow or hostile service can do to a run, which is nothing but NaN or one clear error."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign.config import load_reward
from diffalign.errors import ConfigError, ServiceError, UserError
from diffalign.rewards.remote import RemoteReward, VLMJudge, _by_owner, finite
from diffalign.rewards.service import Refusal, Service, _seconds

from .sick import brightness, send, server

ROOT = Path(__file__).parents[2]
KEY = "abc123XYZ-the-plain-key"  # of no known shape: only exact replacement can hide it


def greys(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (n % 256, n // 256, 0)) for n in range(count)]


def load(kind: str, **options):
    return load_reward({"kind": kind, **options})


def remote(url: str, **options) -> RemoteReward:
    return load("remote", url=url, **{"deadline": 5.0, "timeout": 2.0, "retries": 0, **options})


def vlm(url: str, **options) -> VLMJudge:
    return load("vlm", url=url, model="judge", **{"deadline": 5.0, "timeout": 2.0, "retries": 0, **options})


def honest(handler, body):
    send(handler, {"scores": brightness(body)})


# the protocol


def test_scores_come_back_to_their_pictures_and_nothing_is_lost_on_the_way():
    """Batches of 3, so that the last is ragged; the server reads the very pixels that were sent."""
    seen = []

    def answer(handler, body):
        seen.extend((p["prompt"], p["png"]) for p in body["pictures"])
        honest(handler, body)

    noise = Image.frombytes("RGB", (16, 16), random.Random(0).randbytes(768))
    with server(answer) as url:
        scores = remote(url, batch_size=3)([*greys(10), noise], [f"p{n}" for n in range(11)])
    assert scores.dtype == torch.float32 and scores[:10].tolist() == list(range(10))
    sent = dict(seen)
    assert set(sent) == {f"p{n}" for n in range(11)}
    png = base64.b64decode(sent["p10"])
    assert png.startswith(b"\x89PNG") and Image.open(io.BytesIO(png)).tobytes() == noise.tobytes()


def test_batch_equals_singles():
    with server(honest) as url:
        reward = remote(url, batch_size=4)
        batch = reward(greys(9), [""] * 9)
        assert torch.equal(batch, torch.cat([reward([image], [""]) for image in greys(9)]))
        assert reward([], []).shape == (0,)


def test_shuffled_and_duplicated_replies_never_mismatch():
    """1,000 pictures; each reply is shuffled, padded with repeats, strangers' ids and rubbish: 0 mismatched."""
    dice = random.Random(1)

    def answer(handler, body):
        rows = brightness(body)
        rows += dice.choices(rows, k=3) + [{"id": "stranger-0", "score": 99}, {"score": 1}, {"id": 5, "score": 1}, 7, None]
        dice.shuffle(rows)
        send(handler, {"scores": rows})

    with server(answer) as url:
        scores = remote(url, batch_size=20, concurrency=8)(greys(1000), [""] * 1000)
    assert scores.tolist() == [n % 256 for n in range(1000)]


def test_an_answer_to_another_call_is_not_taken():
    """A cache that replays an old reply: its ids are not those of this call."""
    kept = []

    def answer(handler, body):
        kept.append({"scores": brightness(body)})
        send(handler, kept[0])

    with server(answer) as url:
        reward = remote(url)
        assert reward(greys(2), ["", ""]).tolist() == [0, 1]
        with pytest.raises(ServiceError, match="none of the ids"):
            reward(greys(2)[::-1], ["", ""])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "x"]), st.sampled_from([1, 2.5, None, float("nan"), "4", True]))))
def test_owner_is_exact_for_any_reply(rows):
    """Against a plain restatement of the rule: no row NaN, different rows NaN, and strangers do not count."""
    entries = [{"id": name, "score": value} for name, value in rows]
    if not any(name in "abc" for name, _ in rows):
        with pytest.raises(Refusal):
            _by_owner(["a", "b", "c"], entries, "score", finite)
        return
    for name, reading in zip("abc", _by_owner(["a", "b", "c"], entries, "score", finite), strict=True):
        own = {finite(value) for owner, value in rows if owner == name}
        assert reading.value == (own.pop().value if len(own) == 1 else None)
        assert (reading.reason is None) == (reading.value is not None)


@pytest.mark.parametrize("score, value", [
    (1, 1.0), (-2.5, -2.5), (0, 0.0), (None, None), (math.nan, None), (math.inf, None), (1e300, None), (10**400, None),
    ("3", None), (True, None), ([1], None), ({}, None),
])
def test_only_finite_numbers_are_scores(score, value):
    assert finite(score).value == value


# a sick service (RELIABILITY F5, H1)


def slow(handler, body):
    time.sleep(0.3)
    honest(handler, body)


def hang(handler, body):
    time.sleep(30)


def drip(handler, body):
    """A byte now and then, for ever: every single read is fast enough."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(300):
        handler.wfile.write(b"X")
        handler.wfile.flush()
        time.sleep(0.1)


def drip_body(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def error500(handler, body):
    send(handler, b"boom", 500)


def drop(handler, body):
    handler.connection.close()


def cut(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


def garbage(handler, body):
    send(handler, b"\xff\x00<html>")


def nested(handler, body):
    send(handler, b"[" * 100_000)


def huge(handler, body):
    send(handler, b" " * 3_000_000)


def endless(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(b" " * 65536)


def bomb(handler, body):
    send(handler, gzip.compress(b" " * 10_000_000), Content_Encoding="gzip")


def wait_long(handler, body):
    send(handler, b"", 429, Retry_After="3600")


def redirect(handler, body):
    send(handler, b"", 307, Location="http://127.0.0.1:9/")


def http_nonsense(handler, body):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")


def short(handler, body):
    send(handler, {"scores": brightness(body)[:-1]})


def nans(handler, body):
    send(handler, json.dumps({"scores": [{**row, "score": math.nan} for row in brightness(body)]}).encode())


LATE = "deadline|timed out"
FATAL = {  # nothing of these can be used: the words that the one line must have
    hang: LATE, drip: LATE, drip_body: LATE, error500: "HTTP 500: boom", drop: "connection broke", cut: "connection broke",
    garbage: "not JSON", nested: "not JSON", huge: "larger than 1 MB", endless: "larger than 1 MB", bomb: "compressed",
    wait_long: "429.*3600 s", redirect: "redirects", http_nonsense: "connection broke",
}
AGAIN = (error500, drop, cut, http_nonsense)  # that would be tried again
BUSY = 2.0  # seconds that a machine with other work may take to wake a thread; who heeds no deadline takes longer


@pytest.mark.parametrize("behaviour", FATAL, ids=lambda f: f.__name__)
def test_a_service_that_always_fails_is_one_line_within_the_deadline(behaviour):
    """Only what never answers is given little time: what another does must be seen before, on a busy machine too."""
    deadline, timeout = (0.8, 0.5) if FATAL[behaviour] == LATE else (60, 30)
    with server(behaviour) as url:
        reward = remote(url, deadline=deadline, timeout=timeout, retries=0 if behaviour in AGAIN else 3, batch_size=1)
        start = time.monotonic()
        with pytest.raises(ServiceError, match=FATAL[behaviour]) as caught:
            reward(greys(6), [""] * 6)
        assert time.monotonic() - start < (deadline * 1.1 + BUSY if FATAL[behaviour] == LATE else 20)
    assert url in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert "none of 6 pictures" in str(caught.value)


@pytest.mark.parametrize("behaviour, expected, reason", [
    (slow, [0, 1, 2, 3], None), (short, [0, math.nan, 2, math.nan], "no score for it"),
    (nans, [math.nan] * 4, "not finite"),
], ids=["slow", "short list", "NaN"])
def test_a_service_that_answers_partly(behaviour, expected, reason, caplog):
    with server(behaviour) as url:
        scores = remote(url, batch_size=2)(greys(4), [""] * 4).tolist()
    assert scores == pytest.approx(expected, nan_ok=True)
    assert len(caplog.records) == (reason is not None)
    assert reason is None or reason in caplog.text


def test_trying_again_ends_with_the_deadline():
    """Waits of 0.5, 1 and 2 s and more between four attempts each, of which one second has room for one."""
    with server(error500) as url:
        reward, start = remote(url, deadline=1.0, timeout=0.9, retries=3, batch_size=1), time.monotonic()
        with pytest.raises(ServiceError, match=f"HTTP 500: boom|{LATE}"):
            reward(greys(6), [""] * 6)
        assert time.monotonic() - start < 1.1 + BUSY


def test_twenty_calls_to_a_hanging_service_stay_within_their_deadlines():
    with server(hang) as url:
        reward, start = remote(url, deadline=0.1, timeout=0.1), time.monotonic()
        for _ in range(20):
            with pytest.raises(ServiceError):
                reward(greys(2), ["", ""])
        assert time.monotonic() - start < 20 * 0.1 * 1.1 + BUSY


def test_partial_failures_are_named_in_one_warning(caplog):
    def answer(handler, body):
        dark = brightness(body)[0]["score"] in (1, 3)
        send(handler, b"too dark", 400) if dark else honest(handler, body)

    with server(answer) as url:
        scores = remote(url, batch_size=1)(greys(5), [""] * 5)
    assert scores.tolist() == pytest.approx([0, math.nan, 2, math.nan, 4], nan_ok=True)
    (record,) = caplog.records
    assert "2 of 5 pictures" in record.getMessage() and "number 1, 3" in record.getMessage()
    assert "HTTP 400: too dark" in record.getMessage()


def test_a_broken_picture_is_nan_and_never_sent(tmp_path):
    target = tmp_path / "cut.png"
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(target)
    target.write_bytes(target.read_bytes()[:2000])
    counted = []

    def answer(handler, body):
        counted.append(len(body["pictures"]))
        honest(handler, body)

    with server(answer) as url:
        scores = remote(url)([greys(8)[7], Image.open(target)], ["", ""])
    assert scores.tolist() == pytest.approx([7, math.nan], nan_ok=True) and counted == [1]


def test_passing_errors_are_tried_again_with_growing_jittered_waits():
    """Waits between attempts: 0.5 and 1 s plus up to 0.5 of jitter each; the third attempt is answered."""
    times = []

    def answer(handler, body):
        times.append(time.monotonic())
        send(handler, b"", 503) if len(times) < 3 else honest(handler, body)

    with server(answer) as url:
        assert remote(url, retries=3, deadline=8)(greys(1), [""]).tolist() == [0]
    waits = [b - a for a, b in zip(times, times[1:], strict=False)]
    for wait, least in zip(waits, (0.5, 1), strict=True):
        assert least <= wait < least + 0.7


def test_errors_that_stay_are_not_tried_again():
    asked = []

    def answer(handler, body):
        asked.append(1)
        send(handler, {"error": "no such model"}, 404)

    with server(answer) as url, pytest.raises(ServiceError, match="HTTP 404.*no such model"):
        remote(url, retries=5)(greys(1), [""])
    assert len(asked) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form):
    times = []

    def answer(handler, body):
        times.append(time.monotonic())
        if len(times) == 1:
            send(handler, b"", 429, Retry_After="1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True))
        else:
            honest(handler, body)

    with server(answer) as url:
        assert remote(url, retries=1)(greys(1), [""]).tolist() == [0]
    assert 0.9 <= times[1] - times[0] < 2.3


@pytest.mark.parametrize("header, seconds", [
    (None, 0), ("", 0), ("12", 12), ("-3", 0), ("soon", 0), ("1e9", 0), ("9" * 400, 0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ("Thu, 32 Foo 99999 99:99:99 GMT", 0),
])
def test_retry_after_of_any_form(header, seconds):
    assert _seconds(header) == seconds


def test_the_breaker_stops_asking_after_five_failures_and_tries_once_later():
    asked = []

    def answer(handler, body):
        asked.append(1)
        honest(handler, body) if healthy.is_set() else send(handler, b"", 400)

    healthy = threading.Event()
    with server(answer) as url:
        reward = remote(url, batch_size=1, concurrency=1)
        with pytest.raises(ServiceError, match="HTTP 400"):
            reward(greys(30), [""] * 30)
        assert len(asked) == 5
        with pytest.raises(ServiceError):
            reward(greys(30), [""] * 30)
        assert len(asked) == 6
        healthy.set()
        assert reward(greys(30), [""] * 30).tolist() == list(range(30))


def test_requests_run_side_by_side():
    with server(slow) as url:
        start = time.monotonic()
        assert remote(url, batch_size=1, concurrency=8)(greys(16), [""] * 16).tolist() == list(range(16))
    assert time.monotonic() - start < 1.5  # 16 * 0.3 = 4.8 s one after the other


def test_redirects_are_never_followed():
    asked = []

    def target(handler, body):
        asked.append(1)
        honest(handler, body)

    with server(target) as there:
        with server(lambda handler, body: send(handler, b"", 308, Location=there)) as url, pytest.raises(ServiceError):
            remote(url)(greys(1), [""])
    assert not asked


def test_our_own_faults_are_not_the_services():
    with server(honest) as url:
        with pytest.raises(TypeError, match="a picture is"):
            remote(url)(["not a picture"], [""])
        with pytest.raises(ValueError, match="one prompt per picture"):
            remote(url)(greys(2), [""])
        with pytest.raises(ZeroDivisionError):
            Service(url=url, deadline=2).ask([1], lambda _: {"pictures": []}, lambda *_: 1 / 0)


# checking beforehand


def test_check_finds_a_dead_a_hanging_and_a_living_service():
    with server(honest) as url:
        remote(url).check()
    with pytest.raises(ServiceError, match="does not answer: no connection"):
        remote(url).check()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServiceError, match="timed out"):
        remote(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=0.2).check()


@pytest.mark.parametrize("options", [
    {"url": "ftp://host/x"}, {"url": "file:///etc/passwd"}, {"url": "host:80"}, {"url": "http://"}, {"url": "http://h:99999/"},
    {"url": "http://h/a b"}, {"url": "http://[::1"}, {"deadline": 0}, {"deadline": math.inf}, {"timeout": -1}, {"retries": -1},
    {"concurrency": 0}, {"batch_size": 0}, {"api_key_env": "two words"}, {"colour": 1},
])
def test_wrong_options_are_one_line(options):
    with pytest.raises(ConfigError, match=r"^reward") as caught:
        load("remote", **{"url": "http://h/", **options})
    assert next(iter(options)) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [
    {"template": "no place"}, {"pattern": "("}, {"pattern": "no group"}, {"pattern": "(a)(b)"}, {"low": 5, "high": 1},
    {"low": math.nan}, {"model": ""}, {"max_tokens": 0},
])
def test_wrong_options_of_the_judge_are_one_line(options):
    with pytest.raises(ConfigError, match=r"^reward") as caught:
        load("vlm", **{"url": "http://h/", "model": "m", **options})
    assert next(iter(options)) in str(caught.value)


# secrets (RELIABILITY F6)


@pytest.mark.parametrize("url", [
    "https://user:hunter2@host/", "https://hunter2@host/", "https://host/?token=hunter2", "https://host/?key=hunter2",
    "https://host/?a=1&api_key=hunter2", "https://host/hf_hunter2hunter2hunter2", "https://user:hunter2@[bad/",
])
def test_an_address_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(ConfigError) as caught:
        load("remote", url=url)
    assert "url" in str(caught.value) and "hunter2" not in str(caught.value)


def test_a_key_given_in_place_of_its_variable_is_not_repeated():
    for key in (KEY, "hf_" + "A" * 30):
        with pytest.raises(ConfigError) as caught:
            load("remote", url="http://h/", api_key_env=key)
        assert "api_key_env" in str(caught.value) and key not in str(caught.value)


@pytest.mark.parametrize("behaviour", ["quoted", "cut", "echoed header", "answered", "partly"])
def test_the_key_is_sent_and_never_shown(behaviour, monkeypatch, caplog):
    """Errors, warnings, logs of every library at DEBUG, repr, identity."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    got = []

    def answer(handler, body):
        got.append(handler.headers["Authorization"])
        if behaviour == "cut":
            return cut(handler, body)
        if behaviour == "answered" or (behaviour == "partly" and brightness(body)[0]["score"] == 0):
            return honest(handler, body)
        quoted = f"{got[-1].removeprefix('Bearer ')} is none of our keys".encode()
        send(handler, quoted, 401, **({"X_Key": KEY} if "header" in behaviour else {}))

    with server(answer) as url:
        reward = remote(url, api_key_env="JUDGE_KEY", batch_size=1)
        message = ""
        try:
            reward(greys(3), [""] * 3)
        except ServiceError as error:
            message = str(error) + repr(error.__cause__) + repr(error.__context__)
        assert bool(message) == (behaviour not in ("answered", "partly"))
    assert got[0] == f"Bearer {KEY}"
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("diffalign", "httpx")))
    assert not any(KEY in text for text in (message, ours, repr(reward), json.dumps(reward.identity())))


@pytest.mark.parametrize("value", [None, "", "  ", "new\nline", "umlaut-ä"])
def test_an_unusable_key_is_a_config_error_naming_its_variable(value, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    for act in (lambda reward: reward.check(), lambda reward: reward(greys(1), [""])):
        with pytest.raises(ConfigError, match="JUDGE_KEY") as caught:
            act(remote("http://127.0.0.1:9/", api_key_env="JUDGE_KEY"))
        assert not value or not value.strip() or value not in str(caught.value)


# the judge


def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def judged(said, **options) -> float:
    with server(lambda handler, body: send(handler, said if isinstance(said, dict) else chat(said))) as url:
        return vlm(url, **options)(greys(1), ["a cat"]).item()


def test_the_judge_is_asked_the_openai_way():
    seen = []

    def answer(handler, body):
        seen.append((handler.path, body))
        send(handler, chat("cat (object): 1\nFinal Score: 4.5"))

    with server(answer) as url:
        for base in ("/v1", "/v1/", "/v1/chat/completions"):
            assert vlm(url.replace("/score", base))(greys(1), ['a {cat} "x"']).item() == 4.5
    assert {path for path, _ in seen} == {"/v1/chat/completions"}
    body = seen[0][1]
    picture, text = body["messages"][0]["content"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 512)
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text["text"].endswith('Text Caption: [a {cat} "x"]')


@pytest.mark.parametrize("said, score", [
    ("Final Score: 4", 4), ("Final Score: 3.25.", 3.25), ("**Final Score:** 2", 2), ("Final Score:5/5", 5),
    ("I write Final Score: 1 to 5 later. Final Score: 3", 3),
    ("Final Score: 10", math.nan), ("Final Score: 0.5", math.nan), ("Final Score: -3", math.nan),
    ("Final Score: 4,5", math.nan), ("Final Score: 4.5.1", math.nan), ("", math.nan), ("the score is 4", math.nan),
    ("Final Score: four", math.nan), (None, math.nan),
])
def test_the_number_after_final_score(said, score):
    assert judged(said) == pytest.approx(score, nan_ok=True)


def test_range_and_normalisation():
    """(4 - 1) / (5 - 1) = 0.75; a pattern and a range of one's own."""
    assert judged("Final Score: 4", normalise=True) == 0.75
    own = {"pattern": "<answer>(.*?)</answer>", "low": 0, "high": 100}
    assert judged("<answer>85</answer>", normalise=True, **own) == pytest.approx(0.85)
    assert math.isnan(judged("<answer>high</answer>", **own)) and math.isnan(judged("<answer>nan</answer>", **own))


def test_a_reply_without_number_is_nan_with_a_warning_but_no_error(caplog):
    assert math.isnan(judged("I cannot judge this."))
    assert "1 of 1 pictures" in caplog.text and "no score in the judge's reply" in caplog.text


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{}]}, {"choices": {"0": 1}}, {"error": "busy"}])
def test_a_reply_that_is_no_chat_completion_is_a_service_error(reply):
    with pytest.raises(ServiceError, match="not a chat completion"):
        judged(reply)


def test_what_pins_the_numbers():
    judge = load("vlm", url="https://host/v1?api-version=3", model="m")
    assert judge.address == "https://host/v1/chat/completions?api-version=3"
    assert judge.identity()["service"] == "https://host/v1/chat/completions" and judge.identity()["model"] == "m"
    assert json.dumps(judge.identity())
    assert load("remote", url="https://host/x?a=1").identity() == {"reward": "remote", "service": "https://host/x"}


# the served reward, end to end


def test_a_served_reward_gives_the_numbers_of_the_local_one():
    noise = [Image.frombytes("RGB", (16, 16), random.Random(n).randbytes(768)) for n in range(5)]
    local = load("compressibility", quality=80)(noise, [""] * 5)
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "scripts/serve_reward.py", "compressibility", "--port", str(port), "quality=80"], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    try:
        reward = remote(f"http://127.0.0.1:{port}/", batch_size=2, deadline=30)
        _until_it_answers(reward)
        assert torch.equal(reward(noise, [""] * 5), local)
        (bad,) = reward.ask([0], lambda _: {"pictures": [{"id": "a"}]}, lambda *_: 0)
        assert isinstance(bad, Refusal) and "HTTP 400" in str(bad)
    finally:
        process.kill()
        process.wait()


def test_serving_an_unknown_reward_is_one_line():
    result = subprocess.run([sys.executable, "scripts/serve_reward.py", "compresibility"], cwd=ROOT, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert result.returncode == 2 and 'Did you mean "compressibility"' in result.stderr and "Traceback" not in result.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _until_it_answers(reward) -> None:
    for _ in range(100):
        try:
            return reward.check()
        except UserError:
            time.sleep(0.2)
    raise AssertionError("the service did not start")
