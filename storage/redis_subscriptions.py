"""Subscriptions to Redis channels that outlive the connection they are made on."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import UnavailableError
from storage.protocol import Command, pack
from storage.redis_connection import RETRY_FIRST_S, RETRY_MOST_S, Connection, Reply, open_primary
from storage.redis_primary import RedisPrimary
from storage.translate import translate_os

#: Seconds of silence after which the connection is asked for a sign of life.
_PING_EVERY_S = 5.0
#: Messages that one subscriber may be behind; older ones are dropped (push is best effort by contract).
_BACKLOG = 1024


class _Channel:
    """Who listens to one channel."""

    __slots__ = ("listeners", "subscribed")

    def __init__(self) -> None:
        self.listeners: set[_Listener] = set()
        self.subscribed = asyncio.Event()


class _Listener(AsyncIterator[bytes]):
    """One subscriber's messages that it has not read yet."""

    __slots__ = ("_came", "_messages")

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque(maxlen=_BACKLOG)
        self._came = asyncio.Event()

    def put(self, message: bytes) -> None:
        self._messages.append(message)
        self._came.set()

    async def __anext__(self) -> bytes:
        while not self._messages:
            self._came.clear()
            await self._came.wait()
        return self._messages.popleft()


class Subscriptions:
    """The subscriptions of one link, over one connection that is kept up while there are any."""

    def __init__(self, primary: RedisPrimary) -> None:
        self._primary = primary
        self._channels: dict[bytes, _Channel] = {}
        #: SUBSCRIBEs sent and not confirmed, by channel; only the last confirmation counts, as a channel may
        #: have been left and subscribed anew in between.
        self._unconfirmed: Counter[bytes] = Counter()
        self._connection: Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._heard_at = 0.0

    @asynccontextmanager
    async def subscribe(self, name: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Subscribe to a channel; see :meth:`storage.link.RedisLink.subscribe`."""
        key = name.encode()
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = _Channel()
            self._send_subscribe(key)
        listener = _Listener()
        channel.listeners.add(listener)
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
        try:
            try:
                async with asyncio.timeout(self._primary.address.timeout_s):
                    await channel.subscribed.wait()
            except TimeoutError as exc:
                raise translate_os(exc, self._primary.address.shown) from exc
            yield listener
        finally:
            channel.listeners.discard(listener)
            if not channel.listeners and self._channels.get(key) is channel:
                del self._channels[key]
                self._write(("UNSUBSCRIBE", key))

    def reconnect(self) -> None:
        """Subscribe anew: the primary has moved."""
        if self._connection is not None:
            self._connection.abort()

    async def close(self) -> None:
        """End all of them, and disconnect."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            self._connection.abort()

    def _write(self, command: Command) -> None:
        if self._connection is not None:
            self._connection.write(pack(command))

    def _send_subscribe(self, key: bytes) -> None:
        if self._connection is not None:
            self._unconfirmed[key] += 1
            self._write(("SUBSCRIBE", key))

    async def _keep(self) -> None:
        """Keep the connection up, and every channel subscribed on it."""
        loop = asyncio.get_running_loop()
        delay_s = RETRY_FIRST_S
        while True:
            self._lost.clear()
            try:
                self._connection = await open_primary(self._primary, self._on_reply, self._on_lost)
            except UnavailableError:
                # Who waits to be subscribed has a deadline of its own.
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_MOST_S)
                continue
            delay_s = RETRY_FIRST_S
            self._heard_at = loop.time()
            self._unconfirmed.clear()
            for key, channel in self._channels.items():
                channel.subscribed.clear()
                self._send_subscribe(key)
            while not self._lost.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PING_EVERY_S):
                        await self._lost.wait()
                # A subscriber that hears nothing can't tell silence from a connection that is gone.
                if loop.time() - self._heard_at > 3 * _PING_EVERY_S:
                    self.reconnect()  # unless it was lost just now
                else:
                    self._write(("PING",))

    def _on_lost(self, connection: Connection, _exc: Exception | None) -> None:
        if connection is self._connection:
            self._connection = None
            self._lost.set()

    def _on_reply(self, reply: Reply) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        match reply:
            case [b"message", bytes(key), bytes(message)]:
                if channel := self._channels.get(key):
                    for listener in channel.listeners:
                        listener.put(message)
            case [b"subscribe", bytes(key), _]:
                self._unconfirmed[key] -= 1
                if self._unconfirmed[key] <= 0:
                    del self._unconfirmed[key]
                    if channel := self._channels.get(key):
                        channel.subscribed.set()
            case _:  # unsubscribe, pong
                pass
