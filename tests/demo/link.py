"""A thin link: a TCP forwarder that passes so many bytes a second in all, on any number of connections."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 16 * 1024


class ThinLink:
    """Forwards connections to *upstream*; what comes back shares ``bytes_per_s`` (None: no limit)."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes_per_s: float | None = None
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing alone does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            ends = list(self._open)
        for end in ends:
            _end(end)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._upstream, timeout=30)
        except OSError:
            near.close()
            return
        # Little is under way inside: what the registry counts as sent, the other end has nearly got.
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * _CHUNK_BYTES)
        far.settimeout(None)
        with self._lock:
            self._open |= {near, far}
        up = threading.Thread(target=self._pass, args=(near, far, False), daemon=True)
        up.start()
        self._pass(far, near, True)
        up.join()
        for end in (near, far):
            with self._lock:
                self._open.discard(end)
            end.close()

    def _pass(self, source: socket.socket, sink: socket.socket, is_limited: bool) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                if is_limited:
                    self._wait_turn(count)
                sink.sendall(memoryview(buffer)[:count])
        # One direction's end ends both: no client of a registry half-closes.
        _end(source)
        _end(sink)

    def _wait_turn(self, count: int) -> None:
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / rate
            pause_s = self._free_at - time.monotonic()
        time.sleep(max(pause_s, 0))


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
