"""URLs of a Redis: one server, the primary that sentinels name, or a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import unquote, urlsplit


class RedisKind(StrEnum):
    """How the server that keeps the farm's keys is found."""

    #: It is the one that is named.
    SERVER = "server"
    #: Sentinels say which one is the primary just now.
    SENTINEL = "sentinel"
    #: Each node of the cluster says which one it is.
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUrl:
    """What a URL says; the password is never shown."""

    kind: RedisKind
    #: The server, or those that are asked for it. Empty for a Unix socket.
    places: tuple[Place, ...] = ()
    #: Path of a Unix socket.
    path: str = ""
    is_tls: bool = False
    #: What the sentinels call the primary.
    primary: str = ""
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class _Form:
    kind: RedisKind
    #: What comes after ``scheme://[user@]``.
    shown: str
    path: re.Pattern[str]
    port: int


_DATABASE = r"(?:/(?P<database>[0-9]{0,4}))?"
_FORMS = {
    "": _Form(RedisKind.SERVER, "HOST:PORT/DB", re.compile(_DATABASE), 6379),
    "sentinel": _Form(
        RedisKind.SENTINEL, "HOST:PORT,HOST:PORT/PRIMARY/DB", re.compile(r"/(?P<primary>[\w.-]+)" + _DATABASE), 26379
    ),
    # A cluster has one database.
    "cluster": _Form(RedisKind.CLUSTER, "HOST:PORT,HOST:PORT", re.compile("(?:/0?)?"), 6379),
}
_SCHEMES = {
    f"{scheme}+{kind}" if kind else scheme: (is_tls, form)
    for kind, form in _FORMS.items()
    for scheme, is_tls in (("redis", False), ("rediss", True))
}


def parse_redis_url(text: str) -> RedisUrl:
    """Return what *text* says.

    Raises:
        ValueError: it can't be meant, and why; *text* is not repeated, as it may hold a password.
    """
    # By hand: urlsplit knows one host a URL.
    scheme, _, rest = text.partition("://")
    authority, slash, end = rest.partition("/")
    user, _, named = authority.rpartition("@")
    username, password = (unquote(part) for part in user.partition(":")[::2])
    if scheme != "unix" and scheme not in _SCHEMES:
        raise ValueError(f"must start with one of {', '.join(f'{known}://' for known in (*_SCHEMES, 'unix'))}")
    if "?" in rest or "#" in rest:
        raise ValueError("must end after the database: other settings are keys of [redis]")
    try:
        places = _places(named)
    except ValueError:
        # The reason has parts of the text in it.
        raise ValueError("is no URL: its host or port can't be read") from None
    if scheme == "unix":
        if not end or places:
            raise ValueError("must be unix:///ABSOLUTE/PATH")
        return RedisUrl(kind=RedisKind.SERVER, path=slash + end, username=username, password=password)
    is_tls, form = _SCHEMES[scheme]
    path = form.path.fullmatch(slash + end)
    if not places or path is None or (form.kind is RedisKind.SERVER and len(places) > 1):
        raise ValueError(f"must be {scheme}://{form.shown}")
    said = path.groupdict()
    return RedisUrl(
        kind=form.kind,
        places=tuple(Place(host, port or form.port) for host, port in places),
        is_tls=is_tls,
        primary=said.get("primary") or "",
        database=int(said.get("database") or 0),
        username=username,
        password=password,
    )


def _places(text: str) -> list[tuple[str, int | None]]:
    """Return host and port of each place; raises ValueError where one can't be read."""
    found = []
    for place in text.split(",") if text else ():
        parts = urlsplit(f"//{place}")
        if not parts.hostname:
            raise ValueError("no host")
        found.append((parts.hostname, parts.port))
    return found
