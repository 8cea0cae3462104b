"""Asking a service behind HTTP: a stranger that may be slow, sick or hostile, and must not hang, crash or fill a run.

JSON in, JSON out, http and https only. Redirects are refused, a reply may hold 1 MB, and one call takes at most its deadline
whatever the service does. Requests run side by side in threads; answers come back in the order of the questions.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlsplit

from ..errors import ConfigError, ServiceError
from ..redact import HIDDEN, SECRET_NAME, redact

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

LARGEST_REPLY = 1_000_000  # bytes
FAILURES_IN_A_ROW = 5      # then the rest of a call is not asked
PROBE = 5.0                # seconds that ``check`` waits for a sign of life
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_SECRET_QUERY = re.compile(r"^(key|sig|signature|auth|code|pass|pwd)$", re.IGNORECASE)


class Refusal(Exception):
    """Why a question has no answer. again: whether another attempt may help; after: seconds the service asks to wait."""

    def __init__(self, reason: str, *, again: bool = False, after: float = 0.0):
        super().__init__(reason)
        self.again, self.after = again, after


@dataclass(frozen=True, kw_only=True)
class Service:
    """An address and how patiently it is asked.

    url: http or https, without password or token. api_key_env: name of the environment variable that holds the key, sent as
    "Authorization: Bearer"; the key itself is never stored, logged or shown. deadline: seconds for one whole call, retries
    included. timeout: seconds for one attempt. retries: further attempts after an error that may pass (no connection, cut
    off, timed out, HTTP 408, 425, 429, 5xx), with jittered exponential waits or what Retry-After says. concurrency: requests
    at the same time. After 5 failures in a row the rest of a call is not asked, and the next call begins with one trial.
    """

    url: str
    api_key_env: str | None = None
    deadline: float = 300.0
    timeout: float = 60.0
    retries: int = 4
    concurrency: int = 8

    def __post_init__(self):
        _check_address(self.url)
        if self.api_key_env is not None and not _is_variable(self.api_key_env):
            raise ValueError("api_key_env must be the name of an environment variable, not the key itself")
        for name in ("deadline", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")
        for name, least in (("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")

    @property
    def address(self) -> str:
        """What is posted to."""
        return self.url

    @property
    def shown(self) -> str:
        """The address as messages and files may show it: no query, nothing secret."""
        parts = urlsplit(self.address)
        return redact(f"{parts.scheme}://{parts.netloc}{parts.path}")

    def check(self) -> None:
        """Raises ConfigError where the key's variable is empty, ServiceError where nothing answers within 5 seconds."""
        words = ["timed out"]
        thread = threading.Thread(target=self._probe, args=(self._client(self._key()), words), daemon=True)
        thread.start()
        thread.join(PROBE + 0.5)
        if words:
            raise ServiceError(f"{self.shown} does not answer: {words[0]}. Start the service, or mend the url")

    def _probe(self, client: httpx.Client, words: list[str]) -> None:
        """Any answer is a sign of life and empties ``words``: a service need not know GET."""
        import httpx

        try:
            with client, client.stream("GET", self.address, timeout=min(PROBE, self.timeout)):
                words.clear()
        except httpx.HTTPError as error:
            words[0] = _words(error)

    def ask(self, questions: Sequence[Any], body: Callable[[Any], dict], read: Callable[[Any, Any], Any]) -> list[Any]:
        """One answer, or the Refusal in its place, for each question, in their order.

        body(question): the JSON to post, made in the worker's thread. read(question, reply): the answer, from parsed JSON; it
        raises Refusal for a reply of another form. Raises ConfigError where the key is missing.
        """
        key, end = self._key(), time.monotonic() + self.deadline
        late = Refusal(f"no answer within the deadline of {self.deadline:g} s")
        answers: list[Any] = [late] * len(questions)
        faults: list[Exception] = []
        places, stop, client = iter(range(len(questions))), threading.Event(), self._client(key)
        lock = threading.Lock()
        self._breaker.trial()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    place = next(places, None)
                if place is None:
                    return
                try:
                    answers[place] = self._guarded(client, questions[place], body, read, end, stop)
                except Refusal as refusal:
                    answers[place] = refusal
                except Exception as fault:  # ours, not the service's: raised below, in the caller's thread
                    if not stop.is_set():
                        faults.append(fault)
                        stop.set()

        # Daemons: a service that sends a byte now and then must hold up neither this call nor the program's end.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(questions)))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
        finally:
            stop.set()
            client.close()
        if faults:
            raise faults[0]
        return [self._scrubbed(answer, key) for answer in answers]

    # one question

    @cached_property
    def _breaker(self) -> _Breaker:
        return _Breaker()

    def _guarded(self, client, question, body, read, end, stop) -> Any:
        if self._breaker.is_open():
            raise Refusal(f"not asked any more after {FAILURES_IN_A_ROW} failures in a row")
        content = json.dumps(body(question)).encode()
        try:
            answer = read(question, self._persistent(client, content, end, stop))
        except Refusal:
            self._breaker.note(failed=True)
            raise
        self._breaker.note(failed=False)
        return answer

    def _persistent(self, client: httpx.Client, content: bytes, end: float, stop: threading.Event) -> Any:
        import tenacity

        backoff = tenacity.wait_exponential_jitter(initial=0.5, max=20, jitter=0.5)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Refusal) and error.again),
            wait=lambda state: max(backoff(state), state.outcome.exception().after),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.retries + 1),
                tenacity.stop_when_event_set(stop),
                lambda state: time.monotonic() + state.upcoming_sleep >= end,  # Retry-After beyond the deadline ends it now
            ),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        return retrying(self._attempt, client, content, end)

    def _attempt(self, client: httpx.Client, content: bytes, end: float) -> Any:
        """Parsed JSON of one reply, or Refusal."""
        import httpx

        until = min(end, time.monotonic() + self.timeout)
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise Refusal(f"no answer within the deadline of {self.deadline:g} s")
        try:
            with client.stream("POST", self.address, content=content, timeout=seconds) as reply:
                _refuse_redirect(reply)
                text = _read(reply, until)
                _refuse_status(reply, text)
        except httpx.HTTPError as error:
            raise Refusal(_words(error), again=True) from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Refusal("its reply is not JSON") from None

    # secrets

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigError(f"api_key_env: the environment variable {self.api_key_env} is not set: put the key there")
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ConfigError(f"api_key_env: the environment variable {self.api_key_env} holds characters no key can have")
        return key

    def _client(self, key: str | None) -> httpx.Client:
        import httpx

        # Replies are read raw against the size limit, so none may be packed: a few bytes could unpack to gigabytes.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=self.concurrency)
        return httpx.Client(headers=headers, follow_redirects=False, limits=limits)

    def _scrubbed(self, answer: Any, key: str | None) -> Any:
        """A service may quote the key it was given in its error; nobody shall read it from there."""
        if not isinstance(answer, Refusal):
            return answer
        text = str(answer)
        for secret in {key, quote(key, safe="")} if key else ():
            text = text.replace(secret, HIDDEN)
        return Refusal(redact(text))


class _Breaker:
    """Counts failures in a row, over all threads and calls of one reward."""

    def __init__(self):
        self._lock, self._failures = threading.Lock(), 0

    def is_open(self) -> bool:
        return self._failures >= FAILURES_IN_A_ROW

    def trial(self) -> None:
        """One more failure opens it again; one success forgets them all."""
        with self._lock:
            self._failures = min(self._failures, FAILURES_IN_A_ROW - 1)

    def note(self, *, failed: bool) -> None:
        with self._lock:
            self._failures = self._failures + 1 if failed else 0


def report(service: Service, what: str, reasons: Sequence[str | None], asked: int, refused: int) -> None:
    """One warning for a call's failures. reasons: why a picture has no score (None: it has one), in the order of pictures.

    asked, refused: how many requests were made and how many the service failed. Raises ServiceError when it failed them all.
    """
    failed = [number for number, reason in enumerate(reasons) if reason is not None]
    if not failed:
        return
    first = reasons[failed[0]]
    if asked and refused == asked:
        raise ServiceError(f"{service.shown}: none of {len(failed)} pictures was {what}: {first}")
    names = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
    logger.warning("%s: %d of %d pictures were not %s and count as NaN (number %s); the first: %s",
                   service.shown, len(failed), len(reasons), what, names, first)


def _check_address(url: str) -> None:
    """ValueError unless it is a plain http(s) address; the message repeats nothing of it that may be secret."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        port_is_fine = False
    if not port_is_fine or parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise ValueError('url must be an address such as "http://host:8000/score" or "https://host/v1"')
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    hides = any(SECRET_NAME.search(name) or _SECRET_QUERY.match(name) for name in names)
    if "@" in parts.netloc or hides or redact(url) != url:
        raise ValueError("url must carry no password, key or token: put it into an environment variable, named by api_key_env")


def _is_variable(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)) and redact(name) == name


def _refuse_redirect(reply: httpx.Response) -> None:
    if 300 <= reply.status_code < 400:
        raise Refusal(f"HTTP {reply.status_code}: it redirects, which is never followed: give the final address")


def _read(reply: httpx.Response, until: float) -> bytes:
    """The reply's bytes. Refusal where it is packed, larger than the limit, or not complete in time."""
    if reply.headers.get("content-encoding", "identity") != "identity":
        raise Refusal("its reply is compressed, which was not asked for")
    text = bytearray()
    for chunk in reply.iter_raw():
        text += chunk
        if len(text) > LARGEST_REPLY:
            raise Refusal(f"its reply is larger than {LARGEST_REPLY // 1_000_000} MB")
        if time.monotonic() > until:
            raise Refusal("timed out while replying", again=True)
    return bytes(text)


def _refuse_status(reply: httpx.Response, text: bytes) -> None:
    status = reply.status_code
    if status == 200:
        return
    after = _seconds(reply.headers.get("retry-after")) if status in (429, 503) else 0.0
    wait = f" (asks to wait {after:g} s)" if after else ""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[:600].decode("utf-8", "replace")).split())[:160]
    raise Refusal(f"HTTP {status}{wait}" + (f": {words}" if words else ""), again=status in _TRY_AGAIN, after=after)


def _seconds(header: str | None) -> float:
    """Retry-After (RFC 9110, 10.2.3): seconds, or a date; 0 where there is none or it cannot be read."""
    from email.utils import parsedate_to_datetime

    if not header:
        return 0.0
    if re.fullmatch(r"\d{1,9}", header.strip()):
        return float(header)
    try:
        return min(1e9, max(0.0, parsedate_to_datetime(header).timestamp() - time.time()))
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _words(error: Exception) -> str:
    """Short words for what httpx raised; the words of its timeouts are empty."""
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return "timed out"
    if isinstance(error, httpx.ConnectError):
        return f"no connection ({error})"
    return f"the connection broke ({error or type(error).__name__})"
