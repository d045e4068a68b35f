"""Where a Redis server is and how to greet it, from ``[redis]`` of the configuration."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.config import RedisConfig
from cluster.errors import ConfigError
from storage.protocol import Command
from storage.redis_tls import trust

_DEFAULT_PORT = 6379


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """A server, a database in it, and the password; the password is never shown."""

    host: str = ""
    port: int = 0
    #: Path of a Unix socket; "" for TCP.
    path: str = ""
    #: What to speak TLS with; None for plain text.
    trust: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    #: Seconds that one command may take.
    timeout_s: float = 10.0

    @property
    def shown(self) -> str:
        """Return the server's name for messages."""
        return f"Redis at {self.path or f'{self.host}:{self.port}'}"

    def moved_to(self, host: str, port: int) -> RedisAddress:
        """Return the same but for where it is: what a cluster node answers with MOVED."""
        return replace(self, host=host or self.host, port=port, path="")

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context to connect with, None for plain text."""
        return self.trust

    def greeting(self) -> list[Command]:
        """Return the commands that open a connection. PING comes last: it is what a loading server refuses."""
        commands: list[Command] = []
        if self.password:
            commands.append(("AUTH", self.username, self.password) if self.username else ("AUTH", self.password))
        if self.database:
            commands.append(("SELECT", self.database))
        return [*commands, ("CLIENT", "SETNAME", "lazyfarm"), ("PING",)]


def redis_address(config: RedisConfig) -> RedisAddress:
    """Return the address that *config* names; reads the files that it names.

    Raises:
        ConfigError: no URL, one that can't be meant, or a file that can't be read. The URL is not
            repeated in it: it may hold a password.
    """
    parts = urlsplit(config.url)
    faults: list[str] = []
    if parts.scheme not in {"redis", "rediss", "unix"}:
        faults.append("redis.url: must start with redis://, rediss:// or unix://")
    try:
        port = parts.port or _DEFAULT_PORT
        database = int(parts.path.strip("/") or 0) if parts.scheme != "unix" else 0
    except ValueError:
        port, database = 0, 0
        faults.append("redis.url: its port and its database must be numbers")
    password = unquote(parts.password or "")
    if config.password_file:
        try:
            password = Path(config.password_file).read_text(encoding="utf-8").strip()
        except OSError as exc:
            faults.append(f"redis.password_file: {exc.strerror} ({config.password_file})")
    context: ssl.SSLContext | None = None
    if parts.scheme == "rediss":
        try:
            context = trust(config)
        except ValueError as exc:
            faults.append(str(exc))
    if faults:
        raise ConfigError("redis", tuple(faults))
    is_unix = parts.scheme == "unix"
    return RedisAddress(
        host="" if is_unix else parts.hostname or "127.0.0.1",
        port=0 if is_unix else port,
        path=parts.path if is_unix else "",
        trust=context,
        database=database,
        username=config.username or unquote(parts.username or ""),
        password=password,
        timeout_s=config.timeout_s,
    )
