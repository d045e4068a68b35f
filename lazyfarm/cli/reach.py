"""Whether somebody accepts connections at an address: the quickest of all health checks."""

from __future__ import annotations

import socket
from typing import NamedTuple
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443, "redis": 6379, "rediss": 6379}


class Address(NamedTuple):
    """A TCP address."""

    host: str
    port: int


def url_address(url: str) -> Address | None:
    """Return the address a URL of the configuration names; None for none, a Unix socket's, or several."""
    if "+" in url.partition("://")[0]:  # a Redis that others are asked for
        return None
    parts = urlsplit(url)
    if not parts.hostname:
        return None
    return Address(parts.hostname, parts.port or _DEFAULT_PORTS[parts.scheme])


def ray_address(text: str) -> Address | None:
    """Return the address in ``HOST:PORT``; None for none."""
    host, _, port = text.rpartition(":")
    return Address(host.strip("[]"), int(port)) if host else None


def accepts(address: Address, *, timeout_s: float) -> bool:
    """Tell whether a connection is accepted there within *timeout_s* seconds."""
    try:
        with socket.create_connection(address, timeout=timeout_s):
            return True
    except OSError:
        return False
