"""A driver's connection to the gateway: kept, and made again when it drops; its calls go on.

Runs on a thread and event loop of its own, as a session does, so that a blocked driver still answers for its
credentials and is not taken for gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import aiohttp

from cluster.errors import (
    ClusterError,
    FarmClosedError,
    GatewayNotTrustedError,
    GatewayRefusedError,
    InternalError,
    InvalidArgumentError,
    MalformedPayloadError,
    UnavailableError,
)
from cluster.gateway import (
    HEARTBEAT_S,
    KEY_BYTES,
    MAX_FRAME_BYTES,
    PATH,
    SEEN_EVERY,
    Answered,
    Asked,
    Frame,
    Hello,
    Method,
    Stream,
    Verb,
    Welcome,
    decode_frame,
    encode_frame,
)
from cluster.wire import decode, decode_error, encode, encode_error
from lazyfarm.gateway.access import Access

T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")

#: Seconds that connecting and being welcomed may take: a session is made meanwhile.
_CONNECT_S = 30.0
#: Seconds for which a connection is tried again, and between tries: as long as a restart of the head may take.
_AWAY_S = 120.0
_PAUSE_S = 0.2
_PAUSE_MAX_S = 5.0
_UNAUTHORIZED = 401
_TLS_END_S = 0.25


@dataclass(slots=True, eq=False)
class _Pending:
    """A call that was made and has not ended, or whose end nobody has looked at."""

    frame: Frame
    replays: bool = True
    may_repeat: bool = True
    #: The last item that has come.
    received: int = 0
    looked_at: int = 0
    acknowledged: int = 0
    items: deque[bytes] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    end: bytes | None = None
    error: ClusterError | None = None

    @property
    def is_over(self) -> bool:
        return self.end is not None or self.error is not None


class GatewayLink:
    """One driver's presence at a gateway.

    Args:
        access: How it is reached.
        answer: Answers for credentials; called in a thread. A ClusterError that it raises is the answer.
        keep: As of :meth:`lazyfarm.farm.Farm.connect`.
    """

    def __init__(self, access: Access, *, answer: Callable[[Asked], Answered], keep: bool) -> None:
        self._access = access
        self._answer = answer
        self._hello = Hello(key=secrets.token_bytes(KEY_BYTES), keep=keep)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="lazyfarm-gateway", daemon=True)
        self._calls: dict[int, _Pending] = {}
        self._last_call = 0
        #: Frames for the connection that there is; None: there is none.
        self._outbox: asyncio.Queue[Frame] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._staying: asyncio.Task[None] | None = None
        #: Why nothing is tried any more.
        self._over: ClusterError | None = None
        self._thread.start()

    def __repr__(self) -> str:
        return f"<GatewayLink {self._access.url}: {len(self._calls)} calls>"

    # -- coming and going --------------------------------------------------------------------------------------

    async def open(self) -> Welcome:
        """Connect, and stay connected.

        Raises:
            GatewayRefusedError: it doesn't take the token. GatewayNotTrustedError: its certificate is not what it
                should be. UnavailableError: it doesn't answer, or has no room.
        """
        return await self._there(self._open())

    async def close(self) -> None:
        """Let go of the connection; calls that are still waited for fail."""
        if self._thread.is_alive():
            with contextlib.suppress(ClusterError):
                await self._there(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join, 5.0)
            if not self._loop.is_running():
                self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* on the link's own loop; cancelled here, it is cancelled there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _open(self) -> Welcome:
        welcomed: asyncio.Future[Welcome] = self._loop.create_future()
        self._staying = self._loop.create_task(self._stay(welcomed))
        return await welcomed

    async def _close(self) -> None:
        self._end(FarmClosedError(self._access.url))
        tasks = [*self._answering, *([self._staying] if self._staying else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._access.trust is not None:
            # The end of TLS is said in both directions, and aiohttp waits for neither: its "Graceful Shutdown".
            await asyncio.sleep(_TLS_END_S)

    # -- calls -------------------------------------------------------------------------------------------------

    async def call(self, method: Method[Q, R], request: Q) -> R:
        """Make a call and return what it comes to; raises as it does at the farm.

        Raises:
            UnavailableError: the gateway is away, and stays so; the outcome is unknown.
        """
        pending = _Pending(self._frame(method.name, request), may_repeat=method.may_repeat)
        end = await self._there(self._call(pending))
        return decode(method.name, method.result, end)

    async def stream(self, method: Stream[Q, R], request: Q) -> AsyncIterator[R]:
        """Make a call and yield the items that it tells; raises as :meth:`call`."""
        pending = _Pending(self._frame(method.name, request), replays=method.replays)
        try:
            await self._there(self._begin(pending))
            while True:
                items, is_over = await self._there(self._next(pending))
                for item in items:
                    yield decode(method.name, method.item, item)
                if is_over:
                    return
        finally:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._leave, pending)

    def _frame(self, method: str, request: object) -> Frame:
        body = encode(method, request)
        if len(body) >= MAX_FRAME_BYTES:
            reason = f"through a gateway goes less than {MAX_FRAME_BYTES} bytes at once"
            raise InvalidArgumentError(method, f"asked for with {len(body)} bytes", reason)
        return Frame(verb=Verb.CALL, method=method, body=body)

    async def _begin(self, pending: _Pending) -> None:
        if self._over is not None:
            raise _again(self._over)
        self._last_call += 1
        pending.frame = replace(pending.frame, call=self._last_call)
        self._calls[self._last_call] = pending
        self._send(pending.frame)

    async def _call(self, pending: _Pending) -> bytes:
        try:
            await self._begin(pending)
            while not pending.is_over:
                pending.news.clear()
                await pending.news.wait()
        finally:
            self._leave(pending)
        if pending.error is not None:
            raise pending.error
        return pending.end or b""

    async def _next(self, pending: _Pending) -> tuple[list[bytes], bool]:
        """Wait for items; return them, and whether they were the last ones."""
        while not pending.items and not pending.is_over:
            pending.news.clear()
            await pending.news.wait()
        items = list(pending.items)
        pending.items.clear()
        pending.looked_at += len(items)
        if pending.looked_at - pending.acknowledged >= SEEN_EVERY:
            pending.acknowledged = pending.looked_at
            self._send(Frame(verb=Verb.SEEN, call=pending.frame.call, number=pending.looked_at))
        if not items and pending.error is not None:
            raise pending.error
        return items, pending.is_over and pending.error is None

    def _leave(self, pending: _Pending) -> None:
        """Wait for a call no longer."""
        if self._calls.pop(pending.frame.call, None) is not None:
            verb = Verb.HEARD if pending.is_over else Verb.CANCEL
            self._send(Frame(verb=verb, call=pending.frame.call))

    # -- the connection ----------------------------------------------------------------------------------------

    async def _stay(self, welcomed: asyncio.Future[Welcome]) -> None:
        """Be connected until that can't be; then every call ends."""
        try:
            await self._reconnected(welcomed)
        except Exception as exc:  # noqa: BLE001 - whatever it is: nobody waits for ever
            error = exc if isinstance(exc, ClusterError) else InternalError(f"the gateway's link: {exc!r}")
            self._end(error)
            if not welcomed.done():
                welcomed.set_exception(error)

    async def _reconnected(self, welcomed: asyncio.Future[Welcome]) -> None:
        away_s: float | None = None
        tries = 0
        while True:
            try:
                await self._connected(welcomed)
                away_s, tries = None, 0
            except ClusterError as exc:
                away_s = time.monotonic() if away_s is None else away_s
                if not welcomed.done() or not exc.retryable or time.monotonic() - away_s > _AWAY_S:
                    raise
            tries += 1
            # Jitter: all drivers of a gateway lose it at once.
            pause_s = min(_PAUSE_S * 2**tries, _PAUSE_MAX_S)
            await asyncio.sleep(pause_s * (0.5 + secrets.randbelow(1000) / 2000))

    async def _connected(self, welcomed: asyncio.Future[Welcome]) -> None:
        """Connect, and serve the connection until it drops."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    http = await stack.enter_async_context(aiohttp.ClientSession())
                    socket = await stack.enter_async_context(
                        http.ws_connect(
                            self._access.url + PATH,
                            headers={"authorization": f"Bearer {self._access.token}"},
                            ssl=self._access.trust or False,
                            heartbeat=HEARTBEAT_S,
                            max_msg_size=2 * MAX_FRAME_BYTES,
                        )
                    )
                    hello = replace(self._hello, is_back=welcomed.done(), calls=tuple(self._calls))
                    await socket.send_bytes(encode_frame(Frame(verb=Verb.HELLO, body=encode("hello", hello))))
                    welcome = _welcome(await socket.receive())
            except TimeoutError as exc:
                raise self._unavailable("no answer") from exc
            except aiohttp.WSServerHandshakeError as exc:
                if exc.status == _UNAUTHORIZED:
                    raise GatewayRefusedError(self._access.url) from None  # its cause names the token
                raise self._unavailable(f"it answered {exc.status}") from None
            except aiohttp.ClientConnectorCertificateError as exc:
                raise GatewayNotTrustedError(self._access.url, str(exc.certificate_error)) from exc
            except aiohttp.ClientConnectorError as exc:
                raise self._unavailable(exc.os_error.strerror or str(exc.os_error)) from exc
            except (aiohttp.ClientError, OSError) as exc:
                raise self._unavailable(str(exc) or type(exc).__name__) from exc
            self._came(welcome)
            if not welcomed.done():
                welcomed.set_result(welcome)
            writing = asyncio.create_task(_write(socket, self._outbox))
            try:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.BINARY:
                        self._take(decode_frame(message.data))
            finally:
                self._outbox = None
                writing.cancel()
                await asyncio.wait([writing])

    def _came(self, welcome: Welcome) -> None:
        """Make each call again that has not ended, or go on with it."""
        self._outbox = asyncio.Queue()
        for pending in self._calls.values():
            if pending.is_over:
                continue
            if welcome.is_new and not pending.may_repeat:
                pending.error = self._unavailable("it was started anew, and doesn't know what became of this call")
                pending.news.set()
                continue
            if welcome.is_new and not pending.replays:
                pending.received = pending.looked_at = pending.acknowledged = 0
            self._send(replace(pending.frame, number=pending.received))

    def _take(self, frame: Frame) -> None:
        if frame.verb is Verb.ASK:
            task = asyncio.create_task(self._answered(frame))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        pending = self._calls.get(frame.call)
        if pending is None or pending.is_over:
            return  # left meanwhile
        match frame.verb:
            case Verb.ITEM:
                if frame.number <= pending.received:
                    return  # told before the connection dropped
                pending.received = frame.number
                pending.items.append(frame.body)
            case Verb.END:
                pending.end = frame.body
            case Verb.FAILED:
                pending.error = decode_error(frame.body)
            case _:
                return  # of a later release
        pending.news.set()

    async def _answered(self, frame: Frame) -> None:
        """Answer for a credential, on the connection where it was asked for; elsewhere it is asked for again."""
        outbox = self._outbox
        try:
            answered = await asyncio.to_thread(self._answer, decode("ask", Asked, frame.body))
        except ClusterError as exc:
            answered = Answered(error=encode_error(exc))
        if outbox is not None and outbox is self._outbox:
            self._send(Frame(verb=Verb.ANSWER, call=frame.call, body=encode("answer", answered)))

    def _send(self, frame: Frame) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(frame)

    def _end(self, error: ClusterError) -> None:
        self._over = error
        for pending in self._calls.values():
            if not pending.is_over:
                pending.error = _again(error)
                pending.news.set()

    def _unavailable(self, reason: str) -> UnavailableError:
        return UnavailableError(f"the gateway at {self._access.url}", reason)


async def _write(socket: aiohttp.ClientWebSocketResponse, outbox: asyncio.Queue[Frame] | None) -> None:
    """Send what is put out, until the connection has dropped: whoever reads it notices."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        while outbox is not None:
            await socket.send_bytes(encode_frame(await outbox.get()))


def _welcome(message: aiohttp.WSMessage) -> Welcome:
    """Return what the gateway says first.

    Raises:
        ClusterError: what it says instead. MalformedPayloadError: it is no gateway.
    """
    if message.type is not aiohttp.WSMsgType.BINARY:
        raise UnavailableError("the gateway", "it closed the connection")
    frame = decode_frame(message.data)
    if frame.verb is Verb.FAILED:
        raise decode_error(frame.body)
    if frame.verb is not Verb.WELCOME:
        raise MalformedPayloadError("gateway", f"it begins with {frame.verb.value}")
    return decode("welcome", Welcome, frame.body)


def _again(error: ClusterError) -> ClusterError:
    """Return the error anew, for one more who is told."""
    return type(error)(*error.args)
