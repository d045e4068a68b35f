"""Drivers of the gateway: the session of each, its calls, and what it is asked and told."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from actors.version import VERSION
from cluster.config import Config
from cluster.errors import ClusterError, InternalError, InvalidArgumentError, UnavailableError
from cluster.gateway import (
    WINDOW,
    Answered,
    Asked,
    Frame,
    Hello,
    Verb,
    Welcome,
    session_of,
)
from cluster.metrics import GATEWAY_CALL_SECONDS, GATEWAY_DRIVERS, OTHER
from cluster.wire import decode, decode_error, encode, encode_error
from lazyfarm.gateway.lookups import Lookups
from lazyfarm.gateway.surface import Exports, Surface, Uploads
from lazyfarm.joined.farm import JoinedFarm
from lazyfarm.joined.session import Session
from storage.blobs import S3ContentStore
from storage.keys import Keys
from storage.local_trees import LocalTrees
from storage.registry.credentials import Credential, CredentialSource, hostname

#: Seconds that a driver has to answer for a credential, from when it is asked first: its helper may ask a person.
_ANSWER_S = 60.0
#: Calls of one driver at one time.
_CALLS = 1000
#: Threads of one driver that wait for S3.
_THREADS = 4


class AskedSource(CredentialSource):
    """Credentials that a driver is asked for, each when it is needed.

    They are kept in memory for minutes, as a driver of the cluster keeps its own, and nowhere else.

    Args:
        ask: Asks the driver; called in threads that may wait.
    """

    def __init__(self, ask: Callable[[Asked], Answered]) -> None:
        super().__init__()
        self._ask = ask
        self._refused: set[str] = set()

    def __repr__(self) -> str:
        return "<AskedSource>"

    def forget(self, registry: str) -> None:
        """Ask again at the next lookup, and say why."""
        self._refused.add(hostname(registry))
        super().forget(registry)

    def search(self, host: str) -> Credential | None:
        """Ask the driver for the credential of a host."""
        was_refused = host in self._refused
        answered = self._ask(Asked(registry=host, was_refused=was_refused))
        self._refused.discard(host)
        if answered.error:
            raise decode_error(answered.error)
        if not answered.is_known:
            return None
        return Credential(username=answered.username, secret=answered.secret, identity_token=answered.identity_token)


@dataclass(slots=True, eq=False)
class _Call:
    """A call that a driver waits for."""

    task: asyncio.Task[None] | None = None
    #: Items that the driver has not said to have looked at, with their numbers.
    items: deque[tuple[int, bytes]] = field(default_factory=deque)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    end: Frame | None = None

    def seen(self, number: int) -> None:
        """Forget what was looked at."""
        while self.items and self.items[0][0] <= number:
            self.items.popleft()
        self.room.set()


class Driver:
    """One driver outside the cluster, as long as it may come back.

    Changed on the gateway's event loop alone. What is to be told goes into the outbox of the connection that there is;
    what has not been heard of is kept, and told again on the next one.
    """

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, _Call] = {}
        self._outbox: asyncio.Queue[Frame | None] | None = None
        self._asked: dict[int, tuple[Frame, asyncio.Future[Answered]]] = {}
        self._last_asked = 0
        self._surface: Surface | None = None
        self._stop: Callable[[bool], Awaitable[None]] | None = None
        self._is_closed = False
        self._ended = asyncio.Event()
        #: Ends it, unless the driver comes back.
        self.expiry: asyncio.TimerHandle | None = None
        self._log = structlog.get_logger().bind(session=session_id)

    def __repr__(self) -> str:
        state = "connected" if self.is_connected else "gone"
        return f"<Driver {self.session_id}: {len(self._calls)} calls, {state}>"

    @property
    def is_closed(self) -> bool:
        """Tell whether its session has ended."""
        return self._is_closed

    @property
    def is_connected(self) -> bool:
        """Tell whether it has a connection."""
        return self._outbox is not None

    def serve(self, surface: Surface, stop: Callable[[bool], Awaitable[None]]) -> None:
        """Serve its calls by *surface*; *stop* ends its session."""
        self._surface, self._stop = surface, stop

    async def close(self, discard: bool) -> None:  # noqa: FBT001 - the one thing there is to say
        """End its calls and its session."""
        if self._is_closed:
            return
        self._is_closed = True
        tasks = {call.task for call in self._calls.values() if call.task} - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for _, answer in self._asked.values():
            answer.cancel()
        try:
            if self._stop is not None:
                await self._stop(discard)
        finally:
            self._ended.set()

    async def ended(self) -> None:
        """Wait until what it held is given back, after :meth:`close` began."""
        await self._ended.wait()

    # -- its connection ----------------------------------------------------------------------------------------

    def attach(self, hello: Hello) -> asyncio.Queue[Frame | None]:
        """Return the outbox of a new connection, which takes the place of any other; None in it: it is over."""
        if self._outbox is not None:
            self._outbox.put_nowait(None)
        self._outbox = asyncio.Queue()
        if self.expiry is not None:
            self.expiry.cancel()
        for number in self._calls.keys() - set(hello.calls):
            self._forget(number)  # that nobody waits for it was said on a connection that had dropped
        for frame, _ in self._asked.values():
            self._outbox.put_nowait(frame)
        return self._outbox

    def detach(self, outbox: asyncio.Queue[Frame | None]) -> bool:
        """Let go of a connection that is over; tell whether the driver is gone with it."""
        if self._outbox is not outbox:
            return False
        self._outbox = None
        return True

    def take(self, frame: Frame) -> None:
        """Do what a driver's frame says."""
        match frame.verb:
            case Verb.CALL:
                self._call(frame)
            case Verb.CANCEL | Verb.HEARD:
                self._forget(frame.call)
            case Verb.SEEN:
                if (call := self._calls.get(frame.call)) is not None:
                    call.seen(frame.number)
            case Verb.ANSWER:
                _, answer = self._asked.get(frame.call, (None, None))
                if answer is not None and not answer.done():
                    answer.set_result(decode("answer", Answered, frame.body))
            case _:
                pass  # of a later release

    def _tell(self, frame: Frame) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(frame)

    # -- its calls ---------------------------------------------------------------------------------------------

    def _call(self, frame: Frame) -> None:
        known = self._calls.get(frame.call)
        if known is not None:
            known.seen(frame.number)
            for number, body in known.items:
                self._tell(Frame(verb=Verb.ITEM, call=frame.call, number=number, body=body))
            if known.end is not None:
                self._tell(known.end)
            return
        if len(self._calls) >= _CALLS:
            error = UnavailableError("the gateway", f"this driver has {_CALLS} calls open")
            self._tell(Frame(verb=Verb.FAILED, call=frame.call, body=encode_error(error)))
            return
        call = self._calls[frame.call] = _Call()
        call.task = asyncio.create_task(self._run(call, frame))

    def _forget(self, number: int) -> None:
        call = self._calls.pop(number, None)
        if call is not None and call.task is not None:
            call.task.cancel()

    async def _run(self, call: _Call, frame: Frame) -> None:
        began_s, outcome = self._loop.time(), "failed"
        try:
            end = replace(frame, verb=Verb.END, number=0, body=await self._result(call, frame))
            outcome = "ok"
        except ClusterError as exc:
            end = replace(frame, verb=Verb.FAILED, number=0, body=encode_error(exc))
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as exc:  # noqa: BLE001 - a bug in one call is told to who made it, and ends no other
            # By its type alone: what it says may hold what the driver sent.
            self._log.error("gateway.bug", method=frame.method, error_type=type(exc).__name__)
            error = InternalError(f"{frame.method} at the gateway: {type(exc).__name__}")
            end = replace(frame, verb=Verb.FAILED, number=0, body=encode_error(error))
        finally:
            GATEWAY_CALL_SECONDS.observe(self._loop.time() - began_s, call=self._shown(frame.method), outcome=outcome)
        call.end = end
        self._tell(end)

    def _shown(self, method: str) -> str:
        """Return the name of a method that there is, of any other that it is another: drivers may say anything."""
        surface = self._surface
        return method if surface and (method in surface.methods or method in surface.streams) else OTHER

    async def _result(self, call: _Call, frame: Frame) -> bytes:
        if self._surface is None or self._is_closed:
            raise UnavailableError("the gateway", "this driver's session is over")
        if (found := self._surface.methods.get(frame.method)) is not None:
            method, handle = found
            return encode(method.name, await handle(decode(method.name, method.request, frame.body)))
        if (streamed := self._surface.streams.get(frame.method)) is not None:
            stream, tell = streamed
            items = tell(decode(stream.name, stream.request, frame.body))
            await self._items(call, frame, stream.name, items)
            return b""
        raise InvalidArgumentError("call", repr(frame.method), "this gateway's release doesn't know it")

    async def _items(self, call: _Call, frame: Frame, name: str, items: AsyncIterator[Any]) -> None:
        """Tell items, but for those up to the call's number, which an earlier gateway told."""
        number = 0
        async with contextlib.AsyncExitStack() as stack:
            if (aclose := getattr(items, "aclose", None)) is not None:
                stack.push_async_callback(aclose)
            async for item in items:
                number += 1
                if number <= frame.number:
                    continue
                while len(call.items) >= WINDOW:
                    call.room.clear()
                    await call.room.wait()
                body = encode(name, item)
                call.items.append((number, body))
                self._tell(Frame(verb=Verb.ITEM, call=frame.call, number=number, body=body))

    # -- its credentials ---------------------------------------------------------------------------------------

    def ask(self, asked: Asked) -> Answered:
        """Ask the driver; for threads of other loops, which wait.

        Raises:
            UnavailableError: it is not there, or doesn't answer.
        """
        answering = asyncio.run_coroutine_threadsafe(self._ask(asked), self._loop)
        try:
            return answering.result(_ANSWER_S + 5.0)
        except TimeoutError:
            answering.cancel()
            raise UnavailableError("the driver's credentials", "the gateway is too busy") from None

    async def _ask(self, asked: Asked) -> Answered:
        self._last_asked += 1
        number = self._last_asked
        frame = Frame(verb=Verb.ASK, call=number, body=encode("ask", asked))
        answer: asyncio.Future[Answered] = self._loop.create_future()
        self._asked[number] = frame, answer
        self._tell(frame)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError:
            reason = f"it didn't answer for {asked.registry} in {_ANSWER_S:.0f} s"
            raise UnavailableError("the driver's credentials", reason) from None
        except asyncio.CancelledError:
            if self._is_closed:
                raise UnavailableError("the driver's credentials", "its session is over") from None
            raise
        finally:
            del self._asked[number]


class Drivers:
    """All drivers of a gateway.

    Args:
        config: The farm's.
        state_dir: Its state directory.
    """

    def __init__(self, config: Config, state_dir: Path) -> None:
        self._config = config
        self._state_dir = state_dir
        self._store = S3ContentStore(config.s3)
        endpoint = config.gateway.s3_endpoint or config.s3.endpoint
        self._outside = S3ContentStore(replace(config.s3, endpoint=endpoint))
        self._known: dict[str, Driver] = {}
        #: Held while a session is opened: two connections of one driver don't open two.
        self._opening = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    def __repr__(self) -> str:
        return f"<Drivers of {self._config.farm.name}: {len(self._known)}>"

    async def welcome(self, hello: Hello) -> tuple[Driver, Welcome]:
        """Return the driver that says hello, whether it comes for the first time or comes back.

        Raises:
            UnavailableError: there is no room, or Redis doesn't answer.
        """
        session_id = session_of(hello.key)
        async with self._opening:
            driver = self._known.get(session_id)
            is_new = driver is None or driver.is_closed
            if driver is not None and driver.is_closed:
                await driver.ended()  # else the lease that is taken here would be given back there
            if driver is None or driver.is_closed:
                driver = self._known[session_id] = await self._open(session_id, hello)
        self._log.info("gateway.joined", session=session_id, is_new=is_new, drivers=len(self._known))
        return driver, Welcome(
            session_id=session_id,
            farm=self._config.farm.name,
            is_new=is_new,
            lease_ttl_s=self._config.cache.lease_ttl_s,
            deadline_s=self._config.flight.deadline_s,
            release=VERSION,
        )

    async def _open(self, session_id: str, hello: Hello) -> Driver:
        if len(self._known) >= self._config.gateway.sessions:
            raise UnavailableError("the gateway", f"it has {len(self._known)} drivers (gateway.sessions)")
        driver = Driver(session_id)
        session = Session(
            self._config,
            AskedSource(driver.ask),
            keep_s=self._config.cache.keep_s if hello.keep else None,
            session_id=session_id,
        )
        try:
            await asyncio.to_thread(session.open, is_back=hello.is_back)
        except BaseException:
            await asyncio.to_thread(session.close, discard=True)
            raise
        farm = JoinedFarm(self._config, self._state_dir, session)
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="uploads")
        trees = LocalTrees(
            farm.link, Keys(self._config.farm.name), self._store, threads=threads, hold=farm.hold_resources
        )
        uploads = Uploads(trees, self._store, self._outside)
        lookups = Lookups(self._config, self._state_dir, farm.link, trees.open_tree)

        async def stop(discard: bool) -> None:  # noqa: FBT001 - as of Driver.close
            with contextlib.suppress(ClusterError):
                await asyncio.to_thread(uploads.drop)
            threads.shutdown(wait=False)
            with contextlib.suppress(ClusterError):
                await lookups.aclose()
            try:
                await farm.close(discard=discard)
            finally:
                if self._known.get(session_id) is driver:
                    del self._known[session_id]
            self.show()
            self._log.info("gateway.left", session=session_id, drivers=len(self._known))

        exports = Exports(farm, self._store, self._outside)
        driver.serve(Surface(farm, uploads, exports, lookups, driver.close), stop)
        return driver

    def show(self) -> None:
        """Show how many drivers there are."""
        connected = sum(driver.is_connected for driver in self._known.values())
        GATEWAY_DRIVERS.set(connected, state="connected")
        GATEWAY_DRIVERS.set(len(self._known) - connected, state="gone")

    def dropped(self, driver: Driver) -> None:
        """Give a driver whose connection dropped its time to come back."""
        self.show()
        if not driver.is_closed:
            self._log.info("gateway.dropped", session=driver.session_id)
            loop = asyncio.get_running_loop()
            driver.expiry = loop.call_later(self._config.gateway.grace_s, self._expired, driver)

    def _expired(self, driver: Driver) -> None:
        # What it made is given back, also where it was to be kept: nobody has said that the work was done.
        ending = asyncio.create_task(driver.close(True))  # noqa: FBT003 - as of Driver.close
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
