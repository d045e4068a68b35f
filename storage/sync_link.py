"""A blocking Redis client for one thread: the flights' renewer, and commands that only read."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

from hiredis import ProtocolError, Reader, ReplyError

from cluster.errors import UnavailableError
from storage.address import RedisAddress
from storage.protocol import Argument, Command, pack_all
from storage.redis_primary import Dial, RedisPrimary
from storage.scripts import script
from storage.translate import error_code, is_elsewhere, translate_os, translate_reply

_NOTHING = object()
_READ_BYTES = 65536
#: How often one call follows a MOVED.
_MOVES = 3


class SyncLink:
    """A server as one thread uses it. Connects when first used, and anew after a drop."""

    def __init__(self, address: RedisAddress) -> None:
        self._primary = RedisPrimary(address)
        self._socket: socket.socket | None = None
        self._reader = Reader(notEnoughData=_NOTHING)

    @property
    def address(self) -> RedisAddress:
        """Return where the server is, or was when it was last seen."""
        return self._primary.address

    def execute(self, *command: Argument, may_repeat: bool = False) -> Any:
        """Send one command and return its reply; raises as :meth:`storage.link.RedisLink.execute`."""
        return self.execute_many([command], may_repeat=may_repeat)[0]

    def execute_many(self, commands: Sequence[Command], *, may_repeat: bool = False) -> list[Any]:
        """Send commands together, pipelined, not atomically; raises for the first that fails."""
        replies = self._converse(commands, self._deadline(None), may_repeat=may_repeat)
        return [self._checked(reply) for reply in replies]

    def run_many(
        self,
        calls: Sequence[tuple[str, tuple[Argument, ...]]],
        *,
        may_repeat: bool = False,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Run scripts together, pipelined, each as its name and (prefix, arguments …).

        Args:
            calls: What to run.
            may_repeat: True where it does no harm to run them twice.
            timeout_s: Seconds that they may take together; the link's own if None.
        """
        deadline = self._deadline(timeout_s)
        sent: list[Command] = [("EVALSHA", script(name).sha, 1, *args) for name, args in calls]
        replies = self._converse(sent, deadline, may_repeat=may_repeat)
        unknown = [
            index
            for index, reply in enumerate(replies)
            if isinstance(reply, ReplyError) and error_code(reply) == "NOSCRIPT"
        ]
        if unknown:
            whole: list[Command] = [("EVAL", script(calls[at][0]).source, 1, *calls[at][1]) for at in unknown]
            for at, reply in zip(unknown, self._converse(whole, deadline, may_repeat=may_repeat), strict=True):
                replies[at] = reply
        return [self._checked(reply) for reply in replies]

    def close(self) -> None:
        """Disconnect; the next call connects anew."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.address.timeout_s if timeout_s is None else timeout_s)

    def _converse(self, commands: Sequence[Command], deadline: float, *, may_repeat: bool) -> list[Any]:
        if not commands:
            return []
        data = pack_all(commands)
        # A connection that was idle may have been dropped unnoticed; a fresh one is tried once.
        may_try_again = may_repeat and self._socket is not None
        try:
            replies = self._exchange(data, len(commands), deadline)
        except UnavailableError:
            if not may_try_again or time.monotonic() >= deadline:
                raise
            replies = self._exchange(data, len(commands), deadline)
        for _ in range(_MOVES):
            elsewhere = [reply for reply in replies if is_elsewhere(reply)]
            if not elsewhere or not (may_repeat or len(elsewhere) == len(replies)):
                break
            self._primary.bounced(elsewhere[0])
            self.close()  # the next call looks for the primary; this one only where it was told
            if error_code(elsewhere[0]) != "MOVED" or time.monotonic() >= deadline:
                break
            replies = self._exchange(data, len(commands), deadline)
        return replies

    def _exchange(self, data: bytes, count: int, deadline: float) -> list[Any]:
        try:
            if self._socket is None:
                self._connect(deadline)
            return self._send(data, count, deadline)
        except (OSError, EOFError) as exc:
            self.close()
            raise translate_os(exc, self.address.shown) from exc
        except ProtocolError as exc:
            self.close()
            raise UnavailableError(self.address.shown, f"what answers there is no Redis: {exc}") from exc

    def _connect(self, deadline: float) -> None:
        search = self._primary.search()
        dial = next(search)
        while True:
            answer: list[Any] | UnavailableError
            try:
                answer = self._greet(dial, min(deadline, time.monotonic() + dial.timeout_s))
            except (OSError, EOFError) as exc:
                answer = translate_os(exc, dial.address.shown)
                answer.__cause__ = exc
            try:
                dial = search.send(answer)
            except StopIteration:
                return
            except BaseException:
                self.close()
                raise
            self.close()

    def _greet(self, dial: Dial, deadline: float) -> list[Any]:
        address = dial.address
        timeout_s = max(deadline - time.monotonic(), 0.001)
        self._reader = Reader(notEnoughData=_NOTHING)
        if address.path:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket = plain  # closed by whoever catches what goes wrong from here on
            plain.settimeout(timeout_s)
            plain.connect(address.path)
        else:
            plain = socket.create_connection((address.host, address.port), timeout=timeout_s)
            self._socket = plain
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (context := address.tls()) is not None:
            self._socket = context.wrap_socket(plain, server_hostname=address.host)
        return self._send(pack_all(dial.greeting), len(dial.greeting), deadline)

    def _send(self, data: bytes, count: int, deadline: float) -> list[Any]:
        if self._socket is None:
            raise EOFError("not connected")
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        self._socket.sendall(data)
        replies: list[Any] = []
        while True:
            while (reply := self._reader.gets()) is not _NOTHING:
                replies.append(reply)
            if len(replies) >= count:
                return replies
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            received = self._socket.recv(_READ_BYTES)
            if not received:
                raise EOFError("closed by the server; the outcome is unknown")
            self._reader.feed(received)

    def _checked(self, reply: Any) -> Any:
        if isinstance(reply, ReplyError):
            raise translate_reply(reply, self.address.shown) from reply
        return reply
