"""The voting page, served by the standard library.

Who may do what. The page listens on this machine only, unless a token guards it; then a visit with ``?token=`` sets a cookie
without which nothing is served. Names other than this machine's are refused in the Host header where no token is asked for,
so that a foreign site cannot reach the page through a name that it points here (DNS rebinding). A change needs JSON, a header
that no foreign page can send without a permission we never give, and an Origin that is ours (cross-site requests). Pictures
are named by the hash of their content and looked up in a table: no address is ever turned into a path.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import ConfigError, UserError
from .ballots import Ballots
from .gallery import Gallery, read_gallery
from .spec import ArenaSpec
from .standings import Standings, standings
from .store import Ballot, Record, Refused, Store

LARGEST_BODY = 16_384  # bytes of a vote
HEADER = "X-Diffalign-Arena"
VOTER = "diffalign_voter"
QUIET = 30  # seconds after which a silent connection is closed


def serve(spec: ArenaSpec, printer: Callable[[str], None] = print) -> None:
    """Serves the page until Ctrl-C or SIGTERM. Raises UserError when the gallery, the database or the address is no good."""
    token = spec.token()
    gallery = read_gallery(spec.gallery, progress=True)
    with Store(spec.database_path(gallery.table)) as store, Arena(spec, gallery, store, token) as arena, _stopped() as stop:
        printer(f"{len(gallery.models)} models, {len(gallery.prompts)} prompts, {len(gallery.pictures)} pictures; "
                f"votes are kept in {store.path}")
        printer(f"vote at {arena.address}{'/?token=$' + spec.token_env if token else ''}   standings at "
                f"{arena.address}/standings   stop with Ctrl-C")
        stop.wait()
        printer(f"stopped; {len(store.records())} votes are kept in {store.path}")


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the handlers before it are put back."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Arena:
    """The running page: the server in a thread of its own, and what its requests share. Close it, or use it in ``with``."""

    def __init__(self, spec: ArenaSpec, gallery: Gallery, store: Store, token: str | None = None):
        self.spec, self.gallery, self.store = spec, gallery, store
        # the cookie proves that its browser once had the token, without holding it
        self.pass_ = hmac.new(token.encode(), b"diffalign arena", hashlib.sha256).hexdigest() if token else None
        self.token = token
        self._lock, self._counting = threading.Lock(), threading.Lock()  # of ballots; of standings, which may take seconds
        self._ballots, self._learned = Ballots(gallery, spec), (0, 0)
        self._standings: tuple[tuple, Standings] | None = None
        self._server = _listening(spec, self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening. A vote being stored is finished first."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self._lock:
            pass

    @property
    def cookie(self) -> str:
        """Cookies ignore ports, and two arenas may run on one machine."""
        return f"diffalign_arena_{self._server.server_port}"

    @property
    def address(self) -> str:
        host = self.spec.host if self.spec.host not in ("0.0.0.0", "::") else socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}"

    def ballot(self, voter: str) -> dict:
        """What the page shows this voter: the open ballot, or a new one."""
        with self._lock:
            return self._shown(voter)

    def vote(self, voter: str, ballot: str, outcome: object, ranks: object) -> dict:
        """Stores a vote and, only then, tells whose pictures they were and what comes next."""
        with self._lock:
            found, new = self.store.cast(ballot, voter, outcome, ranks)
            if new:
                ranks = tuple(ranks) if outcome == "ranked" else None
                self._ballots.learn(Record(ballot=found, outcome=outcome, ranks=ranks, cast_at=""))
                self._learned = (self._learned[0] + 1, self._learned[1])
            return {"models": list(found.models), "next": self._shown(voter)}

    def undo(self, voter: str, ballot: str) -> dict:
        """Takes a vote back; its pictures come again."""
        with self._lock:
            self.store.withdraw(ballot, voter)
            return {"next": self._shown(voter)}

    def standings(self) -> Standings:
        """Computed again only when there are new votes."""
        with self._counting:
            state = self.store.state()
            if self._standings is None or self._standings[0] != state:
                self._standings = state, standings(self.store.records(), self.gallery.models, seed=self.spec.seed)
            return self._standings[1]

    def _shown(self, voter: str) -> dict:
        state = self.store.state()
        if state != self._learned:  # a vote was taken back, or another process stored some
            self._ballots.restart(self.store.records())
            self._learned = state
        ballot = self.store.open_ballot(voter)
        if ballot is None or not set(ballot.images) <= set(self.gallery.pictures):
            ballot = self._ballots.next(voter, self.store.issued())
            if ballot is not None:
                self.store.issue(ballot)
        return {"ballot": self._anonymous(ballot) if ballot else None, "progress": self._ballots.progress(voter),
                "undo": self.store.last_vote(voter)}

    def _anonymous(self, ballot: Ballot) -> dict:
        pictures = [self.gallery.pictures[image] for image in ballot.images]
        return {"id": ballot.id, "prompt": ballot.prompt, "criteria": ballot.criteria, "pictures": [
            {"src": f"/picture/{picture.sha256}", "width": picture.width, "height": picture.height} for picture in pictures]}

    @cached_property
    def templates(self) -> Environment:
        environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                                  trim_blocks=True, lstrip_blocks=True)
        environment.filters["count"] = lambda number: f"{number:,}"
        return environment


def _listening(spec: ArenaSpec, arena: Arena) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
        daemon_threads, block_on_close = True, False

        def handle_error(self, request, client_address):
            """A browser that leaves in the middle is no news; anything else is our bug and keeps its traceback."""
            import sys

            if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
                super().handle_error(request, client_address)

    handler = type("Handler", (_Handler,), {"arena": arena})
    try:
        return Server((spec.host, spec.port), handler)
    except OSError as error:
        raise ConfigError(f"arena.port: cannot listen on {spec.host} port {spec.port} ({error.strerror or error}); another "
                          "port may be free, 0 takes any") from None


class _Handler(BaseHTTPRequestHandler):
    """One connection. ``arena`` is set by the server that it belongs to."""

    arena: Arena
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffalign", ""
    timeout = QUIET

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _answered(self, action: Callable[[], None]) -> None:
        """Runs it; what goes wrong becomes a status and a sentence."""
        try:
            self._admit()
            action()
        except Refused as refusal:
            self._refuse(*refusal.args)
        except UserError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _admit(self) -> None:
        """Raises Refused for a foreign name and for a visitor without the pass."""
        arena, self.fresh = self.arena, []
        if arena.pass_ is None:
            if not _is_local(self.headers.get("Host", "")):
                raise Refused(HTTPStatus.FORBIDDEN, "This page answers to the names of its own machine only.")
            return
        if not hmac.compare_digest(self._cookies().get(arena.cookie, "").encode(), arena.pass_.encode()):
            given = parse_qs(_address(self.path).query, errors="replace").get("token", [""])[0]
            if self.command != "GET" or not hmac.compare_digest(given.encode(), arena.token.encode()):
                raise Refused(HTTPStatus.UNAUTHORIZED, "A token is needed: open the page as /?token=...")
            self.fresh = [f"{arena.cookie}={arena.pass_}"]

    def _get(self) -> None:
        url = _address(self.path)
        if "token" in parse_qs(url.query):  # out of the address bar and of the history
            return self._send(HTTPStatus.SEE_OTHER, b"", "text/plain", cookies=self.fresh, location="/")
        picture = re.fullmatch(r"/picture/([0-9a-f]{64})", url.path)
        if picture:
            return self._picture(picture[1])
        if url.path == "/":
            voter, cookies = self._voter()
            return self._page("page.html.j2", cookies, start=self.arena.ballot(voter), header=HEADER)
        if url.path == "/standings":
            return self._page("standings.html.j2", [], table=self.arena.standings())
        raise Refused(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _post(self) -> None:
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        if self.headers.get(HEADER) != "1" or site != "same-origin" or (
                origin is not None and _address(origin).netloc != self.headers["Host"]):
            raise Refused(HTTPStatus.FORBIDDEN, "Votes are taken from the page itself only.")
        body, (voter, cookies) = self._body(), self._voter()
        if self.path == "/api/vote":
            answer = self.arena.vote(voter, _id(body), body.get("outcome"), body.get("ranks"))
        elif self.path == "/api/undo":
            answer = self.arena.undo(voter, _id(body))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such action.")
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json", cookies=cookies)

    def _body(self) -> dict:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length) or self.headers.get("Transfer-Encoding"):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "The length of the request is needed.")
        if int(length) > LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A vote has at most {LARGEST_BODY} bytes.")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A vote is JSON.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "This is no JSON.") from None
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "A JSON object is needed.")
        return body

    def _picture(self, sha256: str) -> None:
        picture = self.arena.gallery.pictures.get(sha256)
        if picture is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such picture.")
        self._send(HTTPStatus.OK, picture.read(), f"image/{picture.kind}", cache="private, max-age=31536000, immutable")

    def _page(self, name: str, cookies: list[str], **values) -> None:
        nonce = secrets.token_urlsafe(16)
        html = self.arena.templates.get_template(name).render(nonce=nonce, **values)
        self._send(HTTPStatus.OK, html.encode(), "text/html; charset=utf-8", cookies=cookies, nonce=nonce)

    def _voter(self) -> tuple[str, list[str]]:
        """The judge's name, and the cookie to set when it was made up just now."""
        if self.arena.spec.voter is not None:
            return self.arena.spec.voter, []
        known = self._cookies().get(VOTER, "")
        if re.fullmatch(r"[0-9a-f]{16}", known):
            return known, []
        made = secrets.token_hex(8)
        return made, [f"{VOTER}={made}; Max-Age=31536000"]

    def _cookies(self) -> dict[str, str]:
        try:
            return {name: morsel.value for name, morsel in SimpleCookie(self.headers.get("Cookie", "")).items()}
        except CookieError:
            return {}

    def _refuse(self, status: int, sentence: str) -> None:
        self.close_connection = True  # a body may be left unread
        if self.command == "POST":
            self._send(status, json.dumps({"error": sentence}).encode(), "application/json")
        else:
            self._send(status, sentence.encode(), "text/plain; charset=utf-8")

    def _send(self, status: int, body: bytes, kind: str, *, cookies: list[str] = (), cache: str = "no-store",
              nonce: str | None = None, location: str | None = None) -> None:
        self.send_response(status)
        own = f"'nonce-{nonce}'" if nonce else "'none'"
        policy = (f"default-src 'none'; img-src 'self' data:; style-src {own}; script-src {own}; connect-src 'self'; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": cache, "Location": location,
                   "Connection": "close" if self.close_connection else None,
                   "Content-Security-Policy": policy}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        for cookie in cookies:
            self.send_header("Set-Cookie", f"{cookie}; HttpOnly; SameSite=Lax; Path=/")
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in (("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
                            ("X-Frame-Options", "DENY"), ("Cross-Origin-Resource-Policy", "same-origin"),
                            ("Cross-Origin-Opener-Policy", "same-origin")):
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_) -> None:
        """Nothing: a line a request would hide the address, and a token in it would be kept."""


def _id(body: dict) -> str:
    ballot = body.get("ballot")
    if not (isinstance(ballot, str) and re.fullmatch(r"[0-9a-f-]{1,80}", ballot)):
        raise Refused(HTTPStatus.BAD_REQUEST, "A ballot is needed.")
    return ballot


def _address(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "This is no address.") from None


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine: localhost, 127.x.y.z or [::1], with any port (tunnels change it)."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
