"""Models of Redis, S3 and a registry, and each as one process sees it: the verified fakes behind the seeded network."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections import Counter
from contextlib import asynccontextmanager

from cluster.errors import BlobNotFoundError, DeadlineExceededError, UnavailableError
from cluster.flight.values import Fence
from cluster.ports import Slot
from cluster.quota import ANYBODYS
from storage.limits import _ASK_EACH_S, _ASK_FIRST_S, _ASK_MOST_S, _PLACE_TTL_S, SLOT_TTL_S
from storage.memory import (
    Memory,
    MemoryFlightStore,
    MemoryHostLimiter,
    MemoryLeaseStore,
    MemoryProofStore,
    MemoryRefStore,
)
from storage.memory_blobs import MemoryContentStore
from storage.renewer import _ATTEMPTS, _RENEWALS
from tests.simulation.network import Pipe, Service, run_now

#: Redis carries out some hundred thousand scripts a second, one at a time.
REDIS_OPS_PER_S = 100_000.0
#: One script about many things takes less than one about each. Of those that hold blobs (measured, Redis 7.0): 10 µs
#: for one, 22 for 5, 139 for 50; to look at them takes less. So so many more than one are an operation more.
_MANY = 4
#: Bytes are modelled small: one stands for half a mebibyte, so a part of 8 MiB is 16 bytes that can be hashed.
BYTE = 512 * 1024
PART_BYTES = 16
#: Tries of one request to S3, as its client makes them.
_S3_TRIES = 5
#: Seconds until a request for bytes is given up.
_STALL_S = 5.0
#: When Redis was last empty, by its clock.
_EPOCH_S = 1_000_000.0


# -- Redis -----------------------------------------------------------------------------------------------------


class RedisModel:
    """One Redis: the fakes over one memory, each script one operation."""

    def __init__(self, loop, network, *, flights=MemoryFlightStore, refs=MemoryRefStore, limit=12):
        self.loop = loop
        self.network = network
        self.service = Service("redis", ops_per_s=REDIS_OPS_PER_S)
        self.memory = Memory(lambda: _EPOCH_S + loop.now_s)
        self.flights = flights(self.memory)
        self.refs = refs(self.memory)
        self.leases = MemoryLeaseStore(self.memory)
        self.proofs = MemoryProofStore(self.memory)
        self.limiter = MemoryHostLimiter(self.memory, lambda _host: limit)
        #: Slots and places of registry requests by who has them.
        self.slots = {}
        self.listeners = 0

    def disconnect(self, process):
        """Forget the connections of a process that is gone; its slots lapse by themselves."""
        for listeners in self.memory.listeners.values():
            for listener in [each for each in listeners if each.process is process]:
                listeners.discard(listener)
        for slot in [slot for slot, (_, holder, _) in self.slots.items() if holder is process]:
            wait_s = SLOT_TTL_S if self.slots[slot][2] else _PLACE_TTL_S
            self.loop.call_later(wait_s, self.drop_slot, slot)

    def drop_slot(self, slot):
        """Free a slot, or a place in the queue for one."""
        host, _, is_granted = self.slots.pop(slot, (None, None, False))
        if host is not None:
            state = self.limiter._host(host)
            state.circuit.left(slot, self.memory.now_s())
            if is_granted:
                state.slots -= 1
            else:
                state.queue.remove(slot)


class Remote:
    """A store as one process sees it: every call of a method is a call over the network."""

    def __init__(self, redis, process, store):
        self._redis = redis
        self._process = process
        self._store = store

    def __getattr__(self, name):
        method, redis, process = getattr(self._store, name), self._redis, self._process

        async def call(*args, **kwargs):
            def step():
                return run_now(method(*args, **kwargs)), 0.0

            return await redis.network.call(process, redis.service, _keys(args), step)

        setattr(self, name, call)
        return call


class RemoteFlights(Remote):
    """A flight store as one process sees it: it hears of events as they get through."""

    @asynccontextmanager
    async def events(self, key):
        """Subscribe to a flight's events."""
        redis, queue = self._redis, asyncio.Queue()
        redis.listeners += 1
        listener = _Listener(redis, self._process, queue, redis.listeners)
        heard = redis.memory.listeners.setdefault(key, set())

        def subscribe():
            heard.add(listener)
            return None, 0.0

        try:
            await redis.network.call(self._process, redis.service, (key,), subscribe)
            yield _Heard(queue)
        finally:
            redis.loop.call_later(redis.network.delay(redis.service), heard.discard, listener)


class _Listener:
    """One process's end of a subscription, where the fake puts its events."""

    __slots__ = ("_queue", "_redis", "number", "process")

    def __init__(self, redis, process, queue, number):
        self._redis = redis
        self._queue = queue
        self.process = process
        self.number = number

    def __hash__(self):
        # Sets of them are gone through in the same order in each run.
        return self.number

    def put_nowait(self, event):
        self._redis.network.tell(self._redis.service, self.process, self._queue.put_nowait, event)


class _Heard:
    def __init__(self, queue):
        self._queue = queue

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self._queue.get()


class VirtualRenewer:
    """Renews as :class:`storage.renewer.ThreadFlightRenewer` does, in a task that nothing of its process starves."""

    def __init__(self, redis, process):
        self._redis = redis
        self._process = process
        self._kept = {}
        self._changed = asyncio.Event()
        self._task = None

    def keep(self, fence, *, ttl_s, on_lost):
        self._add(fence, _Kept(lambda: self._redis.flights.renew(fence, ttl_s), fence.key, ttl_s, on_lost))

    def keep_waiting(self, key, *, worker, ttl_s):
        self._add(key, _Kept(lambda: self._redis.flights.renew_waiting(key, worker, ttl_s), key, ttl_s, None))

    def drop(self, fence):
        self._kept.pop(fence, None)

    drop_waiting = drop

    def close(self):
        if self._task is not None:
            self._task.cancel()

    def _add(self, name, kept):
        kept.renewed_at = self._redis.loop.now_s
        self._kept[name] = kept
        self._changed.set()
        if self._task is None:
            self._task = self._process.spawn(self._run())

    async def _run(self):
        loop, attempted_at, is_answered = self._redis.loop, -math.inf, True
        while True:
            self._changed.clear()
            if not self._kept:
                await self._changed.wait()
                continue
            now, kept = loop.now_s, self._kept
            round_at = attempted_at + min(one.ttl_s for one in kept.values()) / (
                _RENEWALS if is_answered else _ATTEMPTS
            )
            due = {
                name: one
                for name, one in kept.items()
                if round_at <= now or (is_answered and one.is_new) or one.lost_at <= now
            }
            if not due:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(round_at, *(one.lost_at for one in kept.values()))):
                        await self._changed.wait()
                continue
            is_answered = await self._renew(due, now)
            if round_at <= now or not is_answered:
                attempted_at = now

    async def _renew(self, kept, sent_at):
        loop = self._redis.loop
        due = {name: one for name, one in kept.items() if one.lost_at > sent_at}
        answers = [None] * len(due)
        if due:
            timeout_s = min(min(one.lost_at - sent_at, one.ttl_s / _RENEWALS) for one in due.values())

            def step():
                return [one.renew() for one in due.values()], 0.0

            keys = [one.key for one in due.values()]
            with contextlib.suppress(UnavailableError):
                answers = await self._redis.network.call(
                    self._process, self._redis.service, keys, step, deadline_s=timeout_s
                )
        lost = [name for name in kept if name not in due]
        for (name, one), is_there in zip(due.items(), answers, strict=True):
            if is_there is not None:
                one.is_new = False
            if is_there:
                one.renewed_at = sent_at
            if is_there is False or one.lost_at <= loop.now_s:
                lost.append(name)
        for name in lost:
            if self._kept.get(name) is kept[name]:
                del self._kept[name]
                if kept[name].on_lost is not None:
                    kept[name].on_lost()
        return None not in answers


class _Kept:
    """What is renewed."""

    def __init__(self, renew, key, ttl_s, on_lost):
        self.renew = renew
        self.key = key
        self.ttl_s = ttl_s
        self.on_lost = on_lost
        self.renewed_at = 0.0
        self.is_new = True

    @property
    def lost_at(self):
        return math.inf if self.on_lost is None else self.renewed_at + self.ttl_s


class RemoteLimiter:
    """The cluster's limit a registry host as one process sees it: asks as :class:`storage.limits.RedisHostLimiter`."""

    def __init__(self, redis, process):
        self._redis = redis
        self._process = process

    @asynccontextmanager
    async def slot(self, host, *, deadline_s, budget=ANYBODYS):
        """Hold one of the host's slots."""
        redis, slot = self._redis, secrets.token_hex(8)
        try:
            try:
                async with asyncio.timeout(deadline_s):
                    is_probe = await self._take(host, slot)
            except TimeoutError as exc:
                raise DeadlineExceededError(f"a request slot for {host}", f"none free in {deadline_s:g} s") from exc
            yield Slot(host, slot, is_probe, budget)
        finally:
            redis.service.serve(redis.loop.now_s, (f"slots {host}",))
            redis.loop.call_later(redis.network.delay(redis.service), redis.drop_slot, slot)

    async def _take(self, host, slot):
        redis = self._redis
        state = redis.limiter._host(host)

        def step():
            if slot not in redis.slots:
                redis.slots[slot] = (host, self._process, False)
                state.queue.append(slot)
            if redis.slots[slot][2]:
                return (0, slot == state.circuit.probe), 0.0
            if redis.limiter._is_free(host, state, slot):
                state.queue.remove(slot)
                redis.limiter._ask(host, state)
                state.slots += 1
                redis.slots[slot] = (host, self._process, True)
                return (0, state.circuit.begun(slot, redis.memory.now_s())), 0.0
            return (state.queue.index(slot) + 1, False), 0.0

        while True:
            before, is_probe = await redis.network.call(self._process, redis.service, (f"slots {host}",), step)
            if not before:
                return is_probe
            pause_s = min(_ASK_MOST_S, _ASK_FIRST_S + before * _ASK_EACH_S)
            await asyncio.sleep(pause_s * (1.0 + 0.3 * redis.network.rng.random()))

    async def throttled(self, slot, retry_after_s):
        """Record a 429."""
        await Remote(self._redis, self._process, self._redis.limiter).throttled(slot, retry_after_s)

    async def succeeded(self, slot):
        """Record an answer: nothing is asked where nothing was brought down, as the adapter doesn't either."""
        state = self._redis.limiter._host(slot.host)
        if state.limit is not None or state.circuit.failures:
            await Remote(self._redis, self._process, self._redis.limiter).succeeded(slot)

    async def failed(self, slot, failure):
        """Record a failure."""
        await Remote(self._redis, self._process, self._redis.limiter).failed(slot, failure)


class NoProgress:
    """Progress streams that nobody reads."""

    async def publish(self, streams, item):
        """Drop it."""


def _keys(args):
    """Return what a call is about, one key for each operation that it is to Redis."""
    match args[0] if args else "":
        case Fence(key=key):
            return (key,)
        case str(key):
            return (key,)
        case [_, *_] as many:
            return tuple(str(getattr(one, "id", one)) for one in many[::_MANY])
        case other:
            return (str(getattr(other, "key", other)),)


# -- S3 --------------------------------------------------------------------------------------------------------


class BucketModel:
    """One bucket, and its links: what is asked of it takes the time that its bytes take."""

    def __init__(self, loop, network, *, bytes_per_s, watch=None):
        self.loop = loop
        self.network = network
        self.service = Service("s3")
        self.store = MemoryContentStore()
        self.bytes_out = 0
        self.bytes_in = 0
        self.watch = watch
        self._links = Pipe(bytes_per_s)

    def done_s(self, link, size):
        """Return when *size* modelled bytes that are asked for now have crossed the bucket's links and the node's."""
        now_s = self.loop.now_s
        return max(self._links.take(now_s, size * BYTE), link.take(now_s, size * BYTE))


class Bucket:
    """The bucket as one process sees it: asks again where no answer came, as the client does."""

    def __init__(self, model, process, link):
        self._model = model
        self._process = process
        self._link = link

    async def call(self, method, *args, sent=0, received=0):
        """Call a method of the content store that sends and receives so many modelled bytes."""
        model = self._model

        def step():
            model.bytes_in += sent
            answer = getattr(model.store, method)(*args)
            model.bytes_out += received
            if model.watch is not None and method in ("put", "complete_upload", "delete"):
                model.watch.object_changed(args[0])
            return answer, model.done_s(self._link, sent + received)

        for left in reversed(range(_S3_TRIES)):
            try:
                return await model.network.call(self._process, model.service, (method,), step, deadline_s=_STALL_S)
            except UnavailableError:
                if not left or model.network.is_closed:
                    raise
        raise AssertionError("unreachable")

    async def read(self, key, size):
        """Return an object's bytes."""
        stream = await self.call("open", key, received=size)
        data = bytearray(size + 1)
        return bytes(data[: stream.readinto(memoryview(data))])


# -- a registry ------------------------------------------------------------------------------------------------


class RegistryModel:
    """A registry that serves blobs from its repositories, and counts what it serves."""

    def __init__(self, loop, network, *, bytes_per_s, host="r.example"):
        self.loop = loop
        self.network = network
        self.host = host
        self.service = Service("registry")
        self.blobs = {}
        #: (repository, digest) to what is done to its answers: called for each, raises, or returns other bytes.
        self.faults = {}
        #: Modelled bytes served of each digest; those of answers that were lost or wrong.
        self.served = Counter()
        self.wasted = Counter()
        #: Numbers of the answers that said no, so that an error tells which one it comes from.
        self.refusals = 0
        self._links = Pipe(bytes_per_s)

    async def read(self, process, link, repository, blob_range):
        """Return a range (digest, offset, length) of a blob."""
        digest, offset, length = blob_range
        outcome = {"served": 0, "is_over": False}

        def step():
            right = self.blobs[digest][offset : offset + length]
            fault = self.faults.get((repository, digest))
            data = right if fault is None else fault(right)
            outcome["served"] = len(data)
            self.served[digest] += len(data)
            if data != right or outcome["is_over"]:
                self.wasted[digest] += len(data)
            now_s = self.loop.now_s
            return data, max(self._links.take(now_s, length * BYTE), link.take(now_s, length * BYTE))

        try:
            return await self.network.call(process, self.service, (digest,), step, deadline_s=_STALL_S)
        except UnavailableError:
            self.wasted[digest] += outcome["served"]
            raise
        finally:
            outcome["is_over"] = True

    def refuse(self, repository):
        """Return a fault that says that the blob isn't there, each time with a number of its own."""

        def fault(_data):
            self.refusals += 1
            raise BlobNotFoundError("sha256:?", f"{self.host}/{repository} (answer {self.refusals})")

        return fault
