"""What the page shows, read from the farm's Redis over one connection."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cluster.audit import AuditEntry
from cluster.circuit import GivenUp
from cluster.collect.runner import Collector
from cluster.collect.stock import ImageUse, Kept, RefUse, Stock, Usage
from cluster.digest import Digest
from cluster.graph import Definition
from cluster.job import JobEvent, JobId, JobRecord
from cluster.lease import Lease
from cluster.messages import ActorRecord, NodeRecord
from cluster.ref import RefId, RefState
from cluster.settings import FarmSettings
from cluster.traffic import Traffic
from lazyfarm.jobs import RedisJobs
from lazyfarm.redis_only import connected
from lazyfarm.status import look_at
from lazyfarm.web.blobs import BlobUse, blobs_of
from lazyfarm.web.flights import Flight, FlightRates
from storage.audit import RedisAudit
from storage.circuits import Circuits
from storage.collect import RedisCollectStore
from storage.flights import RedisFlightStore
from storage.leases import RedisLeaseStore
from storage.limits import HostBudget, RedisHostLimiter
from storage.presence import Presence
from storage.refs import RedisRefStore
from storage.traffic import RedisTraffic
from storage.whereabouts import RedisWhereabouts

#: Seconds for which what was read of all refs, or flights, is shown again, at least; and as a multiple of how long
#: reading took.
_FRESH_S = 1.0
_FRESH_TIMES = 10.0
#: Entries of the audit stream that are shown, and looked through, at most: the newest.
TRAIL = 20_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A directory's file system."""

    what: str
    path: Path
    used_bytes: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeNow:
    """A node, and what it does."""

    record: NodeRecord
    actors: int
    #: Ops that run there, and flights that it owns.
    ops: int
    flights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmNow:
    """What runs, and how it is."""

    #: Each as one clause; empty: all is well.
    problems: tuple[str, ...]
    nodes: tuple[NodeNow, ...]
    actors: tuple[ActorRecord, ...]
    #: Names and addresses.
    services: tuple[tuple[str, str], ...]
    redis_bytes: int
    usage: Usage
    lazy_refs: int
    disks: tuple[Disk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stocked:
    """All refs, and what follows from them."""

    stock: Stock
    usage: Usage
    #: Most recently used first.
    refs: Mapping[RefId, RefUse]
    lazy_refs: int
    #: The biggest first.
    blobs: Mapping[Digest, BlobUse]
    #: Those that end first first, and those that never do last.
    leases: Sequence[Lease]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefNow:
    """One ref, and all that is known of it."""

    state: RefState
    use: RefUse
    #: It and all below it, lowest first.
    chain: tuple[RefState, ...]
    kept: Kept
    #: Nodes that have its snapshot.
    nodes: tuple[str, ...]
    images: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNow:
    """A job, what it is to build, and what its driver was told so far."""

    record: JobRecord
    targets: tuple[str, ...]
    #: None: it can't be read by this release.
    definition: Definition | None
    events: tuple[JobEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryNow:
    """What one registry may be asked, and whether the cluster has given it up."""

    budget: HostBudget
    given_up: GivenUp | None

    @property
    def state(self) -> str:
        """Return how it is, in a word."""
        if self.given_up is not None:
            return "failed"
        return "reduced" if self.budget.is_reduced else "ready"


class Fresh(Generic[T]):
    """What is costly to read: read once for all who ask at a time, and not again for a while.

    Args:
        read: Reads it.
        clock: Monotonic seconds.
    """

    def __init__(self, read: Callable[[], Awaitable[T]], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._reading: asyncio.Task[T] | None = None
        self._good_until_s = float("-inf")

    async def get(self) -> T:
        """Return it as it was a short while ago at most; raises what reading raises."""
        reading = self._reading
        if reading is None or (reading.done() and (self._clock() >= self._good_until_s or reading.exception())):
            reading = self._reading = asyncio.ensure_future(self._timed())
        return await asyncio.shield(reading)  # who leaves early leaves the others what they wait for

    async def _timed(self) -> T:
        began_s = self._clock()
        found = await self._read()
        now_s = self._clock()
        self._good_until_s = now_s + max(_FRESH_S, _FRESH_TIMES * (now_s - began_s))
        return found


class FarmReader:
    """Reads one farm. Every method may raise UnavailableError: Redis doesn't answer."""

    def __init__(self, settings: FarmSettings) -> None:
        """Connect when first used; FarmNotRunningError if the settings name no Redis."""
        self.settings = settings
        self._link, keys = connected(settings)
        self._refs = RedisRefStore(self._link, keys)
        self._collect = RedisCollectStore(self._link, keys)
        self._collector = Collector(
            refs=self._refs,
            leases=RedisLeaseStore(self._link, keys),
            store=self._collect,
            grace_s=settings.config.collect.grace_s,
        )
        self._presence = Presence(self._link, keys)
        self._flights = RedisFlightStore(self._link, keys)
        self._rates = FlightRates()
        self._limiter = RedisHostLimiter(self._link, keys, settings.config)
        self._circuits = Circuits(self._link, keys)
        self._traffic = RedisTraffic(self._link, keys)
        self._whereabouts = RedisWhereabouts(self._link, keys)
        self.jobs = RedisJobs.over(self._link, keys)
        self._audit = RedisAudit(self._link, keys, settings.config.audit)
        self._entries: deque[AuditEntry] = deque(maxlen=TRAIL)
        self._last_entry = ""
        self._trail = Fresh(self._read_trail)
        self._stocked = Fresh(self._read_stock)
        self._flying = Fresh(self._read_flights)
        #: Of the jobs that were listed last: each is in its definition, which may be long and never changes.
        self._targets: dict[JobId, tuple[str, ...]] = {}

    async def aclose(self) -> None:
        """Disconnect."""
        await self._link.close()

    async def farm(self) -> FarmNow:
        """Return what runs."""
        nodes, actors, memory, stocked, flights = await asyncio.gather(
            self._presence.nodes(),
            self._presence.actors(),
            self._link.execute("INFO", "memory", may_repeat=True),
            self.stocked(),
            self.flights(),
        )
        ops = await self.ops([node.id for node in nodes])
        working, flying = Counter(actor.node for actor in actors), Counter(flight.node for flight in flights)
        status, disks = await asyncio.to_thread(lambda: (look_at(self.settings, nodes, actors), self._disks()))
        config = self.settings.config
        services = (("Redis", config.redis.url), ("S3", config.s3.endpoint), ("Ray", config.ray.address))
        return FarmNow(
            problems=status.problems,
            nodes=tuple(
                NodeNow(record=node, actors=working[node.id], ops=ops.get(node.id, 0), flights=flying[node.id])
                for node in nodes
            ),
            actors=tuple(actors),
            services=services,
            redis_bytes=_info_number(memory, b"used_memory"),
            usage=stocked.usage,
            lazy_refs=stocked.lazy_refs,
            disks=tuple(disks),
        )

    async def stocked(self) -> Stocked:
        """Return all refs, as they were a moment ago."""
        return await self._stocked.get()

    async def _read_stock(self) -> Stocked:
        stock = await self._collector.stock()
        usage = stock.usage()
        # In order, and counted, once for all who look.
        refs = sorted(usage.refs, key=lambda use: (-use.last_used_wall_s, use.id))
        return Stocked(
            stock=stock,
            usage=usage,
            refs={use.id: use for use in refs},
            lazy_refs=sum(state.is_lazy for state in stock.states.values()),
            blobs=blobs_of(stock, usage),
            leases=sorted(
                stock.leases, key=lambda lease: (lease.expires_wall_s is None, lease.expires_wall_s or 0.0, lease.id)
            ),
        )

    async def ref(self, ref_id: RefId) -> RefNow | None:
        """Return one ref; None if it is unknown."""
        stocked = await self.stocked()
        state = stocked.stock.states.get(ref_id)
        if state is None:
            return None
        nodes = [node.id for node in await self._presence.nodes() if node.alive]
        located = await self._whereabouts.find([state.record.chain], nodes)
        chain: list[RefState] = []
        at: RefId | None = ref_id
        while at is not None and (below := stocked.stock.states.get(at)) is not None:
            chain.insert(0, below)
            at = below.record.parent
        return RefNow(
            state=state,
            use=stocked.refs[ref_id],
            chain=tuple(chain),
            kept=stocked.stock.kept(ref_id),
            nodes=tuple(sorted(located.here[state.record.chain])),
            images=tuple(sorted({image.name for image in stocked.stock.images_of(ref_id)})),
        )

    async def images(self) -> Sequence[ImageUse]:
        """Return every image, by name."""
        return (await self.stocked()).usage.images

    async def blobs(self) -> Mapping[Digest, BlobUse]:
        """Return every blob that is present, or that a ref has, by its digest."""
        return (await self.stocked()).blobs

    async def leases(self) -> Sequence[Lease]:
        """Return the live leases, those that end first first and those that never do last."""
        return (await self.stocked()).leases

    async def trail(self) -> Sequence[AuditEntry]:
        """Return the newest entries of the audit stream, newest first."""
        return await self._trail.get()

    async def _read_trail(self) -> Sequence[AuditEntry]:
        # What was read before is not read again: entries don't change.
        self._last_entry, new = await self._audit.newest(TRAIL, after=self._last_entry)
        self._entries.extendleft(new)
        kept_from_wall_s = await self._collect.now_wall_s() - self.settings.config.audit.retention_s
        while self._entries and self._entries[-1].wall_s < kept_from_wall_s:
            self._entries.pop()
        return list(self._entries)

    async def flights(self) -> list[Flight]:
        """Return what is under way, as it was a moment ago."""
        return await self._flying.get()

    async def _read_flights(self) -> list[Flight]:
        return self._rates.look(await self._flights.under_way(), time.monotonic())

    async def nodes(self) -> list[NodeRecord]:
        """Return the nodes, dead ones too."""
        return await self._presence.nodes()

    async def ops(self, nodes: Sequence[str]) -> dict[str, int]:
        """Return how many ops run, by node."""
        return dict((await self._whereabouts.find([], nodes)).running)

    async def now_wall_s(self) -> float:
        """Return what time it is there."""
        return await self._collect.now_wall_s()

    async def registries(self) -> list[RegistryNow]:
        """Return how it stands with each registry that was asked of late."""
        budgets, circuits = await asyncio.gather(self._limiter.budgets(), self._circuits.given_up())
        given_up = {one.host: one for one in circuits}
        return [RegistryNow(budget=budget, given_up=given_up.get(budget.host)) for budget in budgets]

    async def traffic(self, window_s: float) -> tuple[Traffic, list[tuple[int, Traffic]]]:
        """Return what was moved and avoided in all, and over the last *window_s* seconds."""
        now_wall_s = await self._collect.now_wall_s()
        total, slots = await asyncio.gather(
            self._traffic.total(), self._traffic.since(now_wall_s - window_s, now_wall_s)
        )
        return total, slots

    async def newest_jobs(self) -> list[tuple[JobRecord, tuple[str, ...]]]:
        """Return the last jobs submitted, newest first, each with its targets."""
        records = await self.jobs.newest()
        known = self._targets
        new = [record.id for record in records if record.id not in known]
        found = await asyncio.gather(*(self.jobs.targets(job) for job in new))
        known = {**known, **dict(zip(new, found, strict=True))}
        self._targets = {record.id: known[record.id] for record in records}
        return [(record, known[record.id]) for record in records]

    async def job(self, name: str) -> JobNow:
        """Return one job; raises as :meth:`lazyfarm.jobs.FarmJobs.find`."""
        record = await self.jobs.find(name)
        targets, definition, events = await asyncio.gather(
            self.jobs.targets(record.id), self.jobs.definition(record.id), self.jobs.told(record.id)
        )
        return JobNow(record=record, targets=targets, definition=definition, events=tuple(events))

    def _disks(self) -> list[Disk]:
        config, state_dir = self.settings.config, self.settings.state_dir
        wanted = {"the farm's directory": state_dir, "nodes": Path(config.node.root or state_dir / "nodes")}
        found: dict[int, Disk] = {}
        for what, path in wanted.items():
            try:
                device, (total, used, free) = path.stat().st_dev, shutil.disk_usage(path)
            except OSError:
                continue  # nothing was extracted yet, or it is another machine's
            found.setdefault(device, Disk(what=what, path=path, used_bytes=used, total_bytes=total, free_bytes=free))
        return list(found.values())


def _info_number(text: bytes, name: bytes) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(b":")
        if key == name:
            return int(value)
    return 0
