"""One connection to a Redis server: greeted, and its replies told as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from hiredis import ProtocolError, Reader

from cluster.errors import UnavailableError
from storage.address import RedisAddress
from storage.protocol import pack_all
from storage.redis_primary import Dial, RedisPrimary
from storage.translate import translate_os

#: A reply: bytes, an integer, None, or a list of these. What is in it is the command's affair.
Reply = Any

#: Seconds between attempts to connect, at first and at most.
RETRY_FIRST_S = 0.05
RETRY_MOST_S = 0.5

_NOTHING = object()


class Connection(asyncio.Protocol):
    """One connection: what it receives goes to *on_reply*, its end to *on_lost*."""

    def __init__(
        self, on_reply: Callable[[Reply], None], on_lost: Callable[[Connection, Exception | None], None]
    ) -> None:
        self._reader = Reader(notEnoughData=_NOTHING)
        self._on_reply = on_reply
        self._on_lost = on_lost
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Tell every reply that is whole now."""
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _NOTHING:
                self._on_reply(reply)
        except ProtocolError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the end."""
        self._on_lost(self, exc)

    def write(self, data: bytes) -> None:
        """Send *data*."""
        if self.transport is not None:
            self.transport.write(data)

    def abort(self) -> None:
        """Close it at once; what was not sent is dropped."""
        if self.transport is not None:
            self.transport.abort()


async def open_primary(
    primary: RedisPrimary, on_reply: Callable[[Reply], None], on_lost: Callable[[Connection, Exception | None], None]
) -> Connection:
    """Find the server that takes writes, and connect to it.

    Raises:
        UnavailableError: there is none just now, or it refuses (then ``__cause__`` is its error reply).
    """
    search = primary.search()
    dial = next(search)
    while True:
        connection = None
        answer: list[Reply] | UnavailableError
        try:
            connection, answer = await _greet(dial, on_reply, on_lost)
        except UnavailableError as exc:
            answer = exc
        try:
            dial = search.send(answer)
        except StopIteration:
            if connection is None:  # the search ends well with one that answered
                raise UnavailableError(dial.address.shown, "no connection") from None
            return connection
        except BaseException:
            if connection is not None:
                connection.abort()
            raise
        if connection is not None:
            connection.abort()


async def _greet(
    dial: Dial, on_reply: Callable[[Reply], None], on_lost: Callable[[Connection, Exception | None], None]
) -> tuple[Connection, list[Reply]]:
    loop = asyncio.get_running_loop()
    replies: list[Reply] = []
    greeted: asyncio.Future[None] = loop.create_future()

    def receive(reply: Reply) -> None:
        if greeted.done():
            on_reply(reply)
            return
        replies.append(reply)
        if len(replies) == len(dial.greeting):
            greeted.set_result(None)

    def lost(connection: Connection, exc: Exception | None) -> None:
        if not greeted.done():
            greeted.set_exception(exc or EOFError("closed while greeting"))
        else:
            on_lost(connection, exc)

    connection = Connection(receive, lost)
    try:
        async with asyncio.timeout(dial.timeout_s):
            await _dial(dial.address, connection)
            connection.write(pack_all(dial.greeting))
            await greeted
    except (OSError, EOFError) as exc:  # TimeoutError is an OSError
        connection.abort()
        raise translate_os(exc, dial.address.shown) from exc
    except BaseException:
        connection.abort()
        raise
    return connection, replies


async def _dial(address: RedisAddress, connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    if address.path:
        await loop.create_unix_connection(lambda: connection, address.path)
    else:
        await loop.create_connection(lambda: connection, address.host, address.port, ssl=address.tls())
