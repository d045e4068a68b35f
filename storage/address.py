"""Where a Redis server is and how to greet it, from ``[redis]`` of the configuration."""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.config import RedisConfig
from cluster.errors import ConfigError
from cluster.redis_url import Place, RedisKind, RedisUrl, parse_redis_url
from storage.protocol import Command
from storage.redis_tls import trust


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """A server, a database in it, and the password, which is never shown.

    A password from a file is read again for each connection: it may be exchanged while the farm runs.
    """

    host: str = ""
    port: int = 0
    #: Path of a Unix socket; "" for TCP.
    path: str = ""
    #: What to speak TLS with; None for plain text.
    trust: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    #: What the server is, or whom to ask for it.
    kind: RedisKind = RedisKind.SERVER
    #: Sentinels, or nodes of a cluster, that may be asked.
    places: tuple[Place, ...] = ()
    #: What sentinels call the primary.
    primary: str = ""
    database: int = 0
    username: str = ""
    #: As it was when this was made, where it is from a file.
    password: str = field(default="", repr=False)
    #: Where it is from; "" for nowhere but here.
    password_file: str = ""
    #: Seconds that one command may take.
    timeout_s: float = 10.0
    #: Replicas that must have what is to survive a fail-over.
    wait_replicas: int = 0

    @property
    def shown(self) -> str:
        """Return the server's name for messages."""
        return f"Redis at {self.path or Place(self.host, self.port)}"

    def moved_to(self, place: Place) -> RedisAddress:
        """Return the same but for where it is."""
        return replace(self, host=place.host or self.host, port=place.port, path="")

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context to connect with, None for plain text."""
        return self.trust

    def login(self) -> list[Command]:
        """Return the command that shows the password; none where there is none."""
        password = self._password_now()
        if not password:
            return []
        return [("AUTH", self.username, password) if self.username else ("AUTH", password)]

    def _password_now(self) -> str:
        """Return what the file says; what it said, where it is no good just now, because it is being written."""
        if not self.password_file:
            return self.password
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return _read_password(self.password_file) or self.password
        return self.password

    def greeting(self) -> list[Command]:
        """Return the commands that open a connection. PING is what a loading server refuses."""
        commands = self.login()
        if self.database:
            commands.append(("SELECT", self.database))
        return [*commands, ("CLIENT", "SETNAME", "lazyfarm"), ("PING",)]


def redis_address(config: RedisConfig) -> RedisAddress:
    """Return the address that *config* names; reads the files that it names.

    Raises:
        ConfigError: no URL, one that can't be meant, or a file that can't be read. The URL is not
            repeated in it: it may hold a password.
    """
    faults: list[str] = []
    url = RedisUrl(kind=RedisKind.SERVER)
    try:
        url = parse_redis_url(config.url)
    except ValueError as exc:
        faults.append(f"redis.url: {exc}")
    password = url.password
    if config.password_file:
        try:
            password = _read_password(config.password_file)
        except OSError as exc:
            faults.append(f"redis.password_file: {exc.strerror} ({config.password_file})")
        except UnicodeDecodeError:
            faults.append(f"redis.password_file: it is not UTF-8 text ({config.password_file})")
    context: ssl.SSLContext | None = None
    if url.is_tls:
        try:
            context = trust(config)
        except ValueError as exc:
            faults.append(str(exc))
    if faults:
        raise ConfigError("redis", tuple(faults))
    first = url.places[0] if url.places else Place("", 0)
    return RedisAddress(
        host=first.host,
        port=first.port,
        path=url.path,
        trust=context,
        kind=url.kind,
        places=url.places,
        primary=url.primary,
        database=url.database,
        username=config.username or url.username,
        password=password,
        password_file=config.password_file,
        timeout_s=config.timeout_s,
        wait_replicas=config.wait_replicas,
    )


def _read_password(path: str) -> str:
    return Path(path).read_text(encoding="utf-8").strip()
