"""A reverse proxy in front of a real registry: counts what is asked, and misbehaves by script."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.doubles.registry import Registry

_BLOB = re.compile(r"/v2/.+/blobs/(sha256:[0-9a-f]{64})\Z")
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})
_CHUNK_BYTES = 64 * 1024


# -- faults: what is done with one request ------------------------------------------------------------------


@dataclass(frozen=True)
class Respond:
    """Answer with this instead of asking the registry."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Truncate:
    """Close the connection in good order after so many bytes of the body."""

    after_bytes: int


@dataclass(frozen=True)
class Reset:
    """Reset the connection after so many bytes of the body; before any answer if negative."""

    after_bytes: int = -1


@dataclass(frozen=True)
class Lie:
    """Serve as many bytes as there are, but others."""


@dataclass(frozen=True)
class IgnoreRange:
    """Answer 200 with the whole blob."""


@dataclass(frozen=True)
class RefuseRange:
    """Answer 416 where a range is asked for."""


@dataclass(frozen=True)
class RedirectTo:
    """Answer 307 to the same path at another base address."""

    base: str
    query: str = ""


@dataclass(frozen=True)
class Slow:
    """Send the body at so many bytes a second."""

    bytes_per_s: float


@dataclass
class Hang:
    """Stop after so many bytes of the body (before the head if negative) until :attr:`proceed` is set."""

    after_bytes: int = -1
    arrived: threading.Event = field(default_factory=threading.Event, repr=False)
    proceed: threading.Event = field(default_factory=threading.Event, repr=False)


Fault = Respond | Truncate | Reset | Lie | IgnoreRange | RefuseRange | RedirectTo | Slow | Hang


@dataclass(frozen=True)
class Seen:
    """One request that came by."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def digest(self) -> str | None:
        """The blob's digest, where it is about one."""
        found = _BLOB.match(self.path.partition("?")[0])
        return found[1] if found else None

    @property
    def range(self) -> str | None:
        """The ``Range`` header."""
        return self.headers.get("range")

    @property
    def authorization(self) -> str | None:
        """The ``Authorization`` header."""
        return self.headers.get("authorization")


@dataclass
class _Rule:
    fault: Fault
    matches: Callable[[Seen], bool]
    #: How often it still applies; None: for ever.
    times: int | None


def blobs(seen: Seen) -> bool:
    """Match GETs of blobs."""
    return seen.method == "GET" and seen.digest is not None


def manifests(seen: Seen) -> bool:
    """Match GETs of manifests."""
    return seen.method == "GET" and "/manifests/" in seen.path


def uploads(seen: Seen) -> bool:
    """Match the PUTs that end uploads."""
    return seen.method == "PUT" and "/blobs/uploads/" in seen.path


@dataclass
class RegistryFaultProxy:
    """A running proxy."""

    host: str
    upstream: str
    #: Bytes per second of one answer's body; None: as fast as it goes.
    bytes_per_s: float | None = None
    seen: list[Seen] = field(default_factory=list)
    #: Bytes of blobs sent on, by digest, ranges included.
    blob_bytes: Counter[str] = field(default_factory=Counter)
    _rules: list[_Rule] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def url(self) -> str:
        """Return ``http://HOST:PORT``."""
        return f"http://{self.host}"

    def script(self, fault: Fault, *, of: Callable[[Seen], bool] = blobs, times: int | None = 1) -> None:
        """Do *fault* to the next *times* requests that match (None: to all); rules apply in their order."""
        with self._lock:
            self._rules.append(_Rule(fault, of, times))

    def unscript(self) -> None:
        """Drop every rule."""
        with self._lock:
            self._rules.clear()

    def forget(self) -> None:
        """Count anew, and drop every rule."""
        with self._lock:
            self.seen.clear()
            self.blob_bytes.clear()
            self._rules.clear()

    def blob_gets(self, digest: str | None = None) -> list[Seen]:
        """Return the GETs of a blob, or of all."""
        with self._lock:
            return [one for one in self.seen if blobs(one) and digest in (None, one.digest)]

    def take(self, seen: Seen) -> Fault | None:
        """Record a request and return what is to be done to it."""
        with self._lock:
            self.seen.append(seen)
            for rule in self._rules:
                if rule.times != 0 and rule.matches(seen):
                    rule.times = None if rule.times is None else rule.times - 1
                    return rule.fault
        return None

    def served(self, seen: Seen, count: int) -> None:
        """Record bytes of a blob that were sent on."""
        if blobs(seen) and seen.digest:
            with self._lock:
                self.blob_bytes[seen.digest] += count


class _ResetError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    proxy: RegistryFaultProxy
    protocol_version = "HTTP/1.1"

    def _handle(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers)
        fault = self.proxy.take(seen)
        try:
            self._do(seen, fault)
        except _ResetError:
            # An abortive close: the peer gets RST, not FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        except OSError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 -- http.server's names

    def _do(self, seen: Seen, fault: Fault | None) -> None:
        match fault:
            case Reset(after_bytes) if after_bytes < 0:
                raise _ResetError
            case Hang(after_bytes=after_bytes, arrived=arrived, proceed=proceed) if after_bytes < 0:
                arrived.set()
                proceed.wait(60)
            case Respond(status, headers, body):
                return self._respond(status, headers, body)
            case RedirectTo(base, query):
                location = f"{base}{self.path}" + (f"?{query}" if query else "")
                return self._respond(307, {"Location": location}, b"")
            case RefuseRange() if seen.range:
                return self._respond(416, {}, b"")
        return self._forward(seen, fault)

    def _respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        # Read first: closing on unread bytes would reset the connection and may lose the answer.
        length = int(self.headers.get("Content-Length", 0))
        while length > 0 and (chunk := self.rfile.read1(min(length, _CHUNK_BYTES))):
            length -= len(chunk)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _forward(self, seen: Seen, fault: Fault | None) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        if isinstance(fault, IgnoreRange):
            headers.pop("Range", None)
        upstream = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        try:
            length = int(self.headers.get("Content-Length", 0))
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                upstream.putheader(name, value)
            if length or self.command in ("POST", "PUT", "PATCH"):
                upstream.putheader("Content-Length", str(length))
            upstream.endheaders()
            while length > 0:
                chunk = self.rfile.read1(min(length, _CHUNK_BYTES))
                if not chunk:
                    raise ConnectionError("the client went away")
                upstream.send(chunk)
                length -= len(chunk)
            self._back(seen, fault, upstream.getresponse())
        finally:
            upstream.close()

    def _back(self, seen: Seen, fault: Fault | None, response: http.client.HTTPResponse) -> None:
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP - {"content-length"}:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        bytes_per_s = fault.bytes_per_s if isinstance(fault, Slow) else self.proxy.bytes_per_s
        stop_at = fault.after_bytes if isinstance(fault, (Truncate, Reset, Hang)) else None
        sent = 0
        started_s = time.monotonic()
        while True:
            limit = _CHUNK_BYTES
            if bytes_per_s is not None:
                # Twenty steps a second, so that who reads sees a steady link.
                limit = max(1, min(limit, int(bytes_per_s / 20)))
            if stop_at is not None and sent < stop_at:
                limit = min(limit, stop_at - sent)
            elif stop_at is not None and sent == stop_at:
                self.wfile.flush()
                if isinstance(fault, Reset):
                    raise _ResetError
                if isinstance(fault, Truncate):
                    self.close_connection = True
                    return
                fault.arrived.set()
                fault.proceed.wait(60)
                stop_at = None
            chunk = response.read1(limit)
            if not chunk:
                return
            if isinstance(fault, Lie):
                chunk = bytes(byte ^ 0xFF for byte in chunk)
            self.wfile.write(chunk)
            sent += len(chunk)
            self.proxy.served(seen, len(chunk))
            if bytes_per_s is not None:
                ahead_s = sent / bytes_per_s - (time.monotonic() - started_s)
                if ahead_s > 0:
                    time.sleep(ahead_s)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Idle kept-alive connections would be waited for.
    block_on_close = False

    def handle_error(self, request, client_address):
        pass  # Clients that went away are the point.


@contextlib.contextmanager
def registry_fault_proxy(upstream: str) -> Iterator[RegistryFaultProxy]:
    """Run a proxy in front of the registry at *upstream* (``http://HOST:PORT``)."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    handler.proxy = RegistryFaultProxy(f"127.0.0.1:{server.server_port}", upstream)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield handler.proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def registry_proxy(registry: Registry) -> Iterator[RegistryFaultProxy]:
    """A proxy in front of the open registry."""
    with registry_fault_proxy(registry.url) as proxy:
        yield proxy
