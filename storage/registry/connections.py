"""Kept-alive HTTP connections for the byte path, shared by threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import urlsplit

from storage.registry.endpoint import Trust

#: Seconds after which an idle connection is not used again; servers close theirs after 60 s and more.
_MAX_IDLE_S = 30.0
#: Idle connections that are kept for one host.
_MAX_IDLE = 8

_Key = tuple[str, str]


class ConnectionPool:
    """Idle connections by scheme and host. Thread-safe; a connection is one thread's while it is out."""

    def __init__(self, trust: Trust, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._trust = trust
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: defaultdict[_Key, list[tuple[float, HTTPConnection]]] = defaultdict(list)
        self._closed = False

    def __repr__(self) -> str:
        with self._lock:
            return f"<ConnectionPool {sum(map(len, self._idle.values()))} idle>"

    def take(self, url: str) -> HTTPConnection | None:
        """Take an idle connection to the host of *url*, the last one used; None where there is none."""
        stale: list[HTTPConnection] = []
        try:
            with self._lock:
                idle = self._idle[_key(url)]
                while idle:
                    since_s, connection = idle.pop()
                    if self._clock() - since_s <= _MAX_IDLE_S:
                        return connection
                    stale.append(connection)
                return None
        finally:
            for connection in stale:
                connection.close()

    def make(self, url: str, *, timeout_s: float, redirected_from: str | None) -> HTTPConnection:
        """Return a new connection to the host of *url*; it connects with its first request."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "http":
            return HTTPConnection(host, port, timeout=timeout_s)
        context = self._trust.context(parts.netloc, redirected_from=redirected_from)
        return HTTPSConnection(host, port, timeout=timeout_s, context=context)

    def give_back(self, url: str, connection: HTTPConnection) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            idle = self._idle[_key(url)]
            if not self._closed and len(idle) < _MAX_IDLE:
                idle.append((self._clock(), connection))
                return
        connection.close()

    def close(self) -> None:
        """Close the idle connections; those that are out are closed when they come back."""
        with self._lock:
            self._closed = True
            idle = [connection for entries in self._idle.values() for _, connection in entries]
            self._idle.clear()
        for connection in idle:
            connection.close()


def _key(url: str) -> _Key:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
