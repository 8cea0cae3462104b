"""Small galleries, and a client that talks to the arena as its page does."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from diffalign.arena.server import HEADER


def gallery(folder: Path, models: int = 5, prompts: int = 4, seeds: int = 1, size: int = 24) -> Path:
    """gallery.jsonl and pictures of flat colours with noise, all different."""
    lines = []
    (folder / "pictures").mkdir(parents=True)
    for m in range(models):
        for p in range(prompts):
            for s in range(seeds):
                random = np.random.default_rng((m, p, s))
                pixels = random.integers(0, 60, (size, size, 3)) + random.integers(0, 190, 3)
                name = f"pictures/{m}-{p}-{s}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
                lines.append({"prompt": f"prompt {p}", "model": f"model-{m}", "image": name, "seed": s})
    (folder / "gallery.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


class Client:
    """One browser: keeps cookies, sends the page's headers."""

    def __init__(self, address: str):
        self.host = address.removeprefix("http://")
        self.cookies: dict[str, str] = {}

    def ask(self, method: str, path: str, body: object = None, headers: dict | None = None):
        """-> (status, headers, body)."""
        connection = http.client.HTTPConnection(self.host, timeout=20)
        sent = {"Cookie": "; ".join(f"{k}={v}" for k, v in self.cookies.items())} if self.cookies else {}
        data = None
        if method == "POST":
            sent |= {HEADER: "1", "Content-Type": "application/json"}
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {name: value for name, value in {**sent, **(headers or {})}.items() if value is not None}
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            for cookie in answer.headers.get_all("Set-Cookie") or []:
                name, value = cookie.split(";")[0].split("=", 1)
                self.cookies[name] = value
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def start(self) -> dict:
        """What the page begins with."""
        status, _, html = self.ask("GET", "/")
        assert status == 200
        return json.loads(re.search(r'id="start">(.*?)</script>', html.decode(), re.DOTALL)[1])

    def vote(self, ballot: dict, outcome: str = "ranked", ranks: list[int] | None = None):
        ranks = ranks or list(range(1, len(ballot["pictures"]) + 1))
        status, _, body = self.ask(
            "POST",
            "/api/vote",
            {"ballot": ballot["id"], "outcome": outcome, **({"ranks": ranks} if outcome == "ranked" else {})},
        )
        return status, json.loads(body)
