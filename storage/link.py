"""An asyncio Redis client that pipelines by itself.

Commands submitted within one tick of the event loop go out as one write, and replies are matched to
them in order: with many callers at once, one connection carries several times what a pool of
connections does (measured 6-11 times against redis-py's pool at equal concurrency, as the cost is in
system calls and wake-ups). It speaks RESP2 through hiredis and nothing else, which also keeps it cheap to
import: redis-py alone takes 0.35 s, more than half of what a reading command may take in all.

Three promises that pools have broken elsewhere:

- A caller that is cancelled never poisons the connection: its command has been submitted, its reply is
  read and dropped.
- Every call ends by its deadline, or some deadlines later where answers keep coming. Replies come in order, so one
  timer on the oldest call is enough; when it fires, the connection is given up, as what follows on it would be
  late too.
- A command is sent twice only if its caller said that it may be (*may_repeat*): reads, and scripts that
  are idempotent. Any other whose connection drops ends in UnavailableError, outcome unknown.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

from hiredis import ReplyError

from cluster.errors import ClusterError, DeadlineExceededError, InternalError, UnavailableError
from cluster.metrics import REDIS_FAILURES, REDIS_SECONDS
from storage.address import RedisAddress
from storage.protocol import Argument, Command, pack, pack_all
from storage.redis_connection import RETRY_FIRST_S, RETRY_MOST_S, Connection, Reply, open_primary
from storage.redis_primary import RedisPrimary
from storage.redis_subscriptions import Subscriptions
from storage.replication import read_replication
from storage.scripts import Script, read_scripts, script
from storage.translate import error_code, is_elsewhere, translate_reply

_NOT_IN_TIME = "no connection in time"
#: Seconds between looks at what replicas have.
_REPLICATION_LOOK_S = 0.05
#: Time limits for which a call may be late, beyond its own, as long as the server answers others.
_PATIENCE = 4


class _Call:
    """Commands that were submitted together and the future of their replies."""

    __slots__ = ("count", "data", "deadline", "future", "may_repeat", "replies")

    def __init__(self, data: bytes, count: int, future: asyncio.Future[list[Reply]], deadline: float) -> None:
        self.data = data
        self.count = count
        self.future = future
        self.deadline = deadline
        self.may_repeat = False
        self.replies: list[Reply] = []

    def fail(self, error: ClusterError) -> None:
        if not self.future.done():
            REDIS_FAILURES.add()
            self.future.set_exception(error)


class RedisLink:
    """A server as one event loop uses it: one connection for commands, one for subscriptions.

    Connects when first used, and again after a drop: calls that were not yet sent wait for that, within
    their deadline. Belongs to the event loop that first uses it.
    """

    def __init__(self, address: RedisAddress) -> None:
        read_scripts()
        self._named = address
        self._primary = RedisPrimary(address)
        self._loop: asyncio.AbstractEventLoop | None = None
        #: Submitted and not yet written.
        self._waiting: deque[_Call] = deque()
        #: Written on the current connection and not yet answered, in order.
        self._sent: deque[_Call] = deque()
        #: Answered by a server that is not the primary, or not yet: nothing was executed. In order, and sent again as
        #: soon as all that was sent with them is answered.
        self._bounced: list[_Call] = []
        #: How often in a row the primary could not be reached, or bounced a call.
        self._failures = 0
        #: Why, the last time.
        self._failure = _NOT_IN_TIME
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._drops = 0
        #: When the last answer came, loop time.
        self._heard_s = -math.inf
        self._is_flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._subscriptions: Subscriptions | None = None

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "connected" if self._connection else "not connected"
        return f"<RedisLink {self.address.shown}: {state}, {len(self._waiting)} waiting, {len(self._sent)} sent>"

    @property
    def address(self) -> RedisAddress:
        """Return where the server is, or was when it was last seen."""
        return self._primary.address

    def clone(self) -> RedisLink:
        """Return another link to the same server, with connections of its own: for commands that block."""
        return RedisLink(self._named)

    @property
    def drops(self) -> int:
        """Return how many connections were lost so far; :meth:`replicated` asks for it."""
        return self._drops

    async def execute(self, *command: Argument, may_repeat: bool = False) -> Reply:
        """Send one command and return its reply.

        Raises:
            UnavailableError: no answer, the connection dropped, or the server can't just now.
            InternalError: the command makes no sense to the server.
        """
        (reply,) = await self._submit(pack(command), 1, may_repeat=may_repeat)
        return self._checked(reply)

    async def execute_many(self, commands: Sequence[Command], *, may_repeat: bool = False) -> list[Reply]:
        """Send commands together, pipelined, not atomically; raises as :meth:`execute` for the first that fails."""
        if not commands:
            return []
        return [
            self._checked(reply)
            for reply in await self._submit(pack_all(commands), len(commands), may_repeat=may_repeat)
        ]

    async def run(self, name: str, prefix: str, *args: Argument, may_repeat: bool = False) -> Reply:
        """Run the script *name* with *prefix* as its only key; raises as :meth:`execute`.

        A server that doesn't have the script yet gets its source.
        """
        lua: Script = script(name)
        call = ("EVALSHA", lua.sha, 1, prefix, *args)
        (reply,) = await self._submit(pack(call), 1, may_repeat=may_repeat)
        if isinstance(reply, ReplyError) and error_code(reply) == "NOSCRIPT":
            call = ("EVAL", lua.source, 1, prefix, *args)
            (reply,) = await self._submit(pack(call), 1, may_repeat=may_repeat)
        return self._checked(reply)

    async def replicated(self, timeout_s: float, *, since: int) -> bool:
        """Tell whether as many replicas as ``redis.wait_replicas`` says have all that was written here.

        False means that it may yet be lost: what can't be taken back must not follow. A fail-over in between
        lost what it lost and then answers for the rest, hence *since*:

            since = link.drops
            await link.run(…)  # any number of writes, or reads of what others wrote
            if await link.replicated(3.0, since=since): …

        Args:
            timeout_s: Seconds to wait for the replicas. They say once a second what they have.
            since: What :attr:`drops` was before the first of these commands.

        Raises:
            UnavailableError: no answer. It may yet be lost.
        """
        # Not WAIT, which since Redis 7.2 goes by what the connection itself has written: after a read it says yes at
        # once. And it would hold up whoever shares the connection.
        wanted = self.address.wait_replicas
        written: int | None = None
        give_up_s = time.monotonic() + timeout_s
        while wanted and self._drops == since:
            told = read_replication(await self.execute("INFO", "replication", may_repeat=True))
            written = told.written if written is None else written
            if sum(received >= written for received in told.received) >= wanted:
                break
            if time.monotonic() >= give_up_s:
                return False
            await asyncio.sleep(_REPLICATION_LOOK_S)
        return self._drops == since

    def run_soon(self, name: str, prefix: str, *args: Argument) -> None:
        """Send the script without waiting; its outcome is nobody's affair. What is submitted later runs later.

        (But for the first time a server sees the script: then it runs one round trip later.)
        """
        lua = script(name)

        def again_with_source(done: asyncio.Future[list[Reply]]) -> None:
            if done.cancelled() or done.exception() is not None or self._is_closed:
                return
            (reply,) = done.result()
            if isinstance(reply, ReplyError) and error_code(reply) == "NOSCRIPT":
                again = self._submit(pack(("EVAL", lua.source, 1, prefix, *args)), 1, may_repeat=False)
                again.add_done_callback(lambda done: done.cancelled() or done.exception())

        if not self._is_closed:
            first = self._submit(pack(("EVALSHA", lua.sha, 1, prefix, *args)), 1, may_repeat=False)
            first.add_done_callback(again_with_source)

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Subscribe to a channel; entered means subscribed.

        Subscriptions of one link share a connection, which is made anew when it drops: messages may be
        lost then, or when the reader is far behind.
        """
        if self._subscriptions is None:
            self._subscriptions = Subscriptions(self._primary)
        return self._subscriptions.subscribe(channel)

    async def close(self) -> None:
        """Let what was submitted end, within the deadline, and disconnect."""
        self._is_closed = True
        if calls := [call.future for call in (*self._bounced, *self._sent, *self._waiting) if not call.future.done()]:
            await asyncio.wait(calls, timeout=self.address.timeout_s)
        if self._connecting is not None:
            self._connecting.cancel()
        self._drop_all(UnavailableError(self.address.shown, "this client was closed"))
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        if self._subscriptions is not None:
            await self._subscriptions.close()
        await asyncio.sleep(0)  # transports close in the next tick

    # -- calls --------------------------------------------------------------------------------------

    def _submit(self, data: bytes, count: int, *, may_repeat: bool) -> asyncio.Future[list[Reply]]:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise InternalError("a Redis link is used from two event loops")
        if self._is_closed:
            raise UnavailableError(self.address.shown, "this client was closed")
        call = _Call(data, count, loop.create_future(), loop.time() + self.address.timeout_s)
        call.may_repeat = may_repeat
        self._waiting.append(call)
        self._flush_soon()
        if self._timer is None:
            self._timer = loop.call_at(call.deadline, self._on_timer)
        return call.future

    def _flush_soon(self) -> None:
        if self._connection is None:
            if self._connecting is None:
                self._connecting = asyncio.get_running_loop().create_task(self._connect())
        elif not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Write all that was submitted since the last tick, at once."""
        self._is_flush_due = False
        if self._connection is not None and self._waiting and not self._bounced:
            self._connection.write(b"".join([call.data for call in self._waiting]))
            self._sent.extend(self._waiting)
            self._waiting.clear()

    def _on_reply(self, reply: Reply) -> None:
        if not self._sent:  # an answer to nothing: not the protocol we speak
            if self._connection is not None:
                self._connection.abort()
            return
        self._heard_s = asyncio.get_running_loop().time()
        call = self._sent[0]
        call.replies.append(reply)
        if len(call.replies) == call.count:
            self._sent.popleft()
            self._on_answer(call)

    def _on_answer(self, call: _Call) -> None:
        # Its type first, as every reply comes by here.
        elsewhere = [reply for reply in call.replies if isinstance(reply, ReplyError) and is_elsewhere(reply)]
        if elsewhere and (call.may_repeat or len(elsewhere) == call.count):
            if not self._bounced:
                self._failures += 1
                self._failure = str(elsewhere[0])
                self._primary.bounced(elsewhere[0])
            self._bounced.append(call)
        else:
            if not elsewhere:
                self._failures = 0
                self._failure = _NOT_IN_TIME
            submitted_s = call.deadline - self.address.timeout_s
            REDIS_SECONDS.observe(asyncio.get_running_loop().time() - submitted_s)
            if not call.future.done():  # else its caller was cancelled
                call.future.set_result(call.replies)
        if self._bounced and not self._sent and self._connection is not None:
            self._connection.abort()  # its end sends them again, to the primary

    def _checked(self, reply: Reply) -> Reply:
        if isinstance(reply, ReplyError):
            raise translate_reply(reply, self.address.shown) from reply
        return reply

    # -- the connection ---------------------------------------------------------------------------------

    async def _connect(self) -> None:
        before = self._primary.address
        while self._waiting:
            if self._failures:
                # The exponent is bounded: after an hour without a server it would be no float any more.
                await asyncio.sleep(min(RETRY_FIRST_S * 2 ** min(self._failures - 1, 10), RETRY_MOST_S))
            try:
                connection = await open_primary(self._primary, self._on_reply, self._on_lost)
            except UnavailableError as exc:
                self._failures += 1
                self._failure = exc.reason
                if isinstance(exc.__cause__, ReplyError) and not is_elsewhere(exc.__cause__):
                    # A wrong password stays wrong; a server that loads its data will be ready soon.
                    self._drop_all(exc)
                    break
                # Calls that wait for a connection wait no longer than their own deadline.
                if not self._expire():
                    break
            else:
                self._connection = connection
                break
        self._connecting = None
        if self._connection is not None:
            if self._subscriptions is not None and self._primary.address != before:
                self._subscriptions.reconnect()
            self._flush()

    def _on_lost(self, connection: Connection, exc: Exception | None) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        self._drops += 1
        reason = f"the connection dropped before the answer ({exc or 'closed by the server'}); the outcome is unknown"
        again = self._bounced
        self._bounced = []
        for call in again:
            call.replies = []
        for call in self._sent:
            if call.may_repeat and not self._is_closed:
                call.may_repeat = False
                call.replies = []
                again.append(call)
            else:
                call.fail(UnavailableError(self.address.shown, reason))
        self._sent.clear()
        self._waiting.extendleft(reversed(again))
        if self._waiting and not self._is_closed:
            self._flush_soon()

    def _on_timer(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        if self._sent and self._overdue_s() <= loop.time():
            # Answers come in order: whatever was sent after it would be late as well.
            for call in self._sent:
                if call.deadline <= loop.time():
                    call.may_repeat = False
                    call.fail(DeadlineExceededError(self.address.shown, f"no answer in {self.address.timeout_s:g} s"))
            if self._connection is not None:
                self._connection.abort()
        self._expire()
        deadlines = [self._waiting[0].deadline] if self._waiting else []
        if self._sent:
            deadlines.append(self._overdue_s())
        if deadlines:
            self._timer = loop.call_at(max(min(deadlines), loop.time() + 0.01), self._on_timer)

    def _overdue_s(self) -> float:
        """Return when the oldest call that was sent is late.

        A server that answers others meanwhile is there, and this process, or the server, has much to do: to give up
        what it is about to answer, and to ask it all again, would make that worse.
        """
        oldest_s, timeout_s = self._sent[0].deadline, self.address.timeout_s
        return min(max(oldest_s, self._heard_s + timeout_s), oldest_s + _PATIENCE * timeout_s)

    def _expire(self) -> bool:
        """Fail the unsent calls whose deadline is over; tell whether any is left."""
        now = asyncio.get_running_loop().time()
        while self._waiting and self._waiting[0].deadline <= now:
            self._waiting.popleft().fail(DeadlineExceededError(self.address.shown, self._failure))
        return bool(self._waiting)

    def _drop_all(self, error: ClusterError) -> None:
        for call in (*self._bounced, *self._sent, *self._waiting):
            call.fail(error)
        self._bounced.clear()
        self._sent.clear()
        self._waiting.clear()
