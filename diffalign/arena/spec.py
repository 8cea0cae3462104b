"""What an arena is: the pictures, who may come, and where the votes are kept."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

SHORTEST_TOKEN = 16  # characters; a token guards votes and pictures against everyone who can reach the address
CRITERIA = "Half for following the prompt, half for how good it looks."


@dataclass(frozen=True, kw_only=True)
class ArenaSpec:
    """A voting page on pictures of several models.

    gallery: JSONL table with the columns prompt, model, image (a path inside the table's folder) and, if there is one, seed;
    or its folder. k: pictures on a ballot, 2 to 9; fewer where a prompt has fewer models. host, port: where the page is
    served; port 0 takes any free one. token_env: name of the environment variable that holds the visitors' token, needed for
    any host but this machine itself. database: file of the votes; null is arena.sqlite beside the table. voter: the judge's
    name in the votes; null gives every browser a random one. criteria: what the page asks to judge by. seed: of the order in
    which prompts and pictures come.
    """

    gallery: str
    k: int = 4
    host: str = "127.0.0.1"
    port: int = 8765
    token_env: str | None = None
    database: str | None = None
    voter: str | None = None
    criteria: str = CRITERIA
    seed: int = 0

    def __post_init__(self):
        if not self.gallery.strip():
            raise ValueError("gallery is empty; give a JSONL table or its folder")
        if not 2 <= self.k <= 9:
            raise ValueError(f"k must be at least 2 and at most 9 (the number keys), got {self.k}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be at least 0 and at most 65535, got {self.port}")
        if not self.host.strip():
            raise ValueError("host is empty; 127.0.0.1 is this machine, 0.0.0.0 all of its addresses")
        if self.token_env is None and not self.local:
            raise ValueError(f"host {self.host} can be reached from other machines: put a secret of {SHORTEST_TOKEN} or more "
                             "characters into an environment variable and name it with token_env")
        if self.voter is not None and not (self.voter.strip() and len(self.voter) <= 100):
            raise ValueError("voter must be a name of 1 to 100 characters")
        if len(self.criteria) > 1000:
            raise ValueError(f"criteria must be at most 1000 characters, got {len(self.criteria)}")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the page."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def token(self) -> str | None:
        """The secret itself. Raises ConfigError naming the variable, never its content."""
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "")
        if len(token) < SHORTEST_TOKEN:
            raise ConfigError(f"arena.token_env: the environment variable {self.token_env} holds {len(token)} characters, "
                              f"{SHORTEST_TOKEN} or more are needed")
        if not (token.isascii() and token.isprintable()):
            raise ConfigError(f"arena.token_env: the environment variable {self.token_env} must be plain ASCII")
        return token

    def database_path(self, table: Path) -> Path:
        """table: the gallery's table."""
        return Path(self.database) if self.database else table.parent / "arena.sqlite"
