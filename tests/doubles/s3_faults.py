"""A proxy before an S3 server whose faults are scripted: an error, a reset, a slow answer, a lost object."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

from cluster.config import S3Config

_CHUNK = 64 * 1024
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Answer:
    """Answer with this status and S3 error code instead; the request never reaches the server."""

    status: int
    code: str


@dataclass(frozen=True)
class LoseAnswer:
    """Let the server do it, then reset the connection without an answer: the outcome is unknown."""


@dataclass(frozen=True)
class ResetAfter:
    """Reset the connection after so many bytes of the answer's body."""

    count: int


@dataclass(frozen=True)
class TruncateAfter:
    """Close the connection, orderly, after so many bytes of the answer's body."""

    count: int


@dataclass(frozen=True)
class Hang:
    """Send nothing until told to proceed; ``arrived`` says that a request is being held."""

    arrived: threading.Event = field(default_factory=threading.Event, repr=False)
    proceed: threading.Event = field(default_factory=threading.Event, repr=False)


Fault = Answer | LoseAnswer | ResetAfter | TruncateAfter | Hang
#: S3 forgets an object: what it says for a key that it doesn't have.
LOST = Answer(404, "NoSuchKey")


@dataclass
class FaultPlan:
    """Do *then* to the requests of *method* whose target contains *target*, after *after* of them, *times* times."""

    then: Fault
    method: str
    target: str = ""
    after: int = 0
    times: int = 1

    def applies(self, method: str, target: str) -> bool:
        """Tell whether this request is one of them, and count it."""
        if method != self.method or self.target not in target or self.times == 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return True


class S3FaultProxy:
    """Forwards to the S3 server of *upstream*; ``config`` reaches that server through the proxy."""

    def __init__(self, upstream: S3Config) -> None:
        self._upstream = urlsplit(upstream.endpoint)
        self._lock = threading.Lock()
        self._plans: list[FaultPlan] = []
        #: (method, target) of every request that arrived.
        self.requests: list[tuple[str, str]] = []
        #: Bytes of answer bodies sent, all requests together.
        self.sent_bytes = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        port = self._server.server_address[1]
        self.config = replace(upstream, endpoint=f"http://127.0.0.1:{port}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for plan in self._plans:
            if isinstance(plan.then, Hang):
                plan.then.proceed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def plan(self, then: Fault, *, method: str, target: str = "", after: int = 0, times: int = 1) -> None:
        """Add a fault; the first that applies to a request is taken."""
        with self._lock:
            self._plans.append(FaultPlan(then=then, method=method, target=target, after=after, times=times))

    def count(self, method: str, target: str = "") -> int:
        """Return how many requests of *method* arrived whose target contains *target*."""
        with self._lock:
            return sum(1 for was, at in self.requests if was == method and target in at)

    def fault_for(self, method: str, target: str) -> Fault | None:
        """Record a request and return what to do to it."""
        with self._lock:
            self.requests.append((method, target))
            return next((plan.then for plan in self._plans if plan.applies(method, target)), None)

    def count_sent(self, count: int) -> None:
        """Count bytes of an answer's body."""
        with self._lock:
            self.sent_bytes += count

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection to the server."""
        return http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=_DEADLINE_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: S3FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that goes away in the middle is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.proxy.fault_for(self.command, self.path)
        match fault:
            case Answer(status, code):
                self._answer(status, code)
                return
            case Hang(arrived, proceed):
                arrived.set()
                proceed.wait(_DEADLINE_S)
                self._reset()
                return
        connection = self.server.proxy.connect()
        try:
            # The Host header goes on as it came: it is part of what the client signed.
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            if isinstance(fault, LoseAnswer):
                answer.read()
                self._reset()
                return
            self._relay(answer, fault)
        finally:
            connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815 - http.server's names

    def _relay(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        self.send_response_only(answer.status, answer.reason)
        length = answer.getheader("Content-Length")
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        has_body = self.command != "HEAD" and answer.status not in (204, 304)
        if length is None and has_body:
            self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        limit = fault.count if isinstance(fault, ResetAfter | TruncateAfter) else None
        while chunk := answer.read(_CHUNK if limit is None else min(_CHUNK, limit - sent)):
            # Counted first: who has read the last byte may look at the count at once.
            self.server.proxy.count_sent(len(chunk))
            sent += len(chunk)
            self.wfile.write(chunk)
        if isinstance(fault, ResetAfter):
            self._reset()
        elif isinstance(fault, TruncateAfter) or (length is None and has_body):
            self.close_connection = True

    def _answer(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the test</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        # Lingering for zero seconds makes close() send a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
