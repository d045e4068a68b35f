"""Why things are as they are in a farm, told from its Redis alone."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self, TypeAlias

from cluster.audit import AuditEntry, Operation
from cluster.cache.names import find_ref
from cluster.config import AuditConfig
from cluster.digest import Digest, is_digest
from cluster.errors import JobNotFoundError, NoLayersError, RefNotFoundError
from cluster.job import JobId, VertexLayers
from cluster.lease import blob_resource
from cluster.ports import AuditLog, FlightStore, RefStore
from cluster.settings import FarmSettings
from cluster.solver_ports import JobEvents, JobStore
from cluster.tree import Tree
from lazyfarm.jobs import RedisJobs
from lazyfarm.miss import Miss, OpenTree, explain_miss
from lazyfarm.redis_only import connection
from storage.audit import RedisAudit
from storage.flights import RedisFlightStore
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.link import RedisLink
from storage.refs import RedisRefStore

#: What :meth:`cluster.ports.FlightStore.state` tells.
_Flight: TypeAlias = dict[str, str | int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A vertex of a job that waits for a layer."""

    job: JobId
    vertex: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWait:
    """How far one blob is from being in the content store, and on whom that depends."""

    digest: Digest
    #: ``present``, ``lazy`` (nobody fetches it), ``fetching``, or ``stopping`` (nobody waits any more).
    state: str
    #: Worker that fetches it, and seconds within which another takes over if it dies; "" and 0 where none does.
    owner: str = ""
    lease_left_s: float = 0.0
    #: Processes that wait beside the owner's own callers.
    waiters: int = 0
    current_bytes: int = 0
    total_bytes: int = 0
    #: Bytes a second, while this was asked.
    rate: float = 0.0
    #: Vertices of running jobs that wait for it.
    asked_by: tuple[Waiting, ...] = ()

    @property
    def left_s(self) -> float | None:
        """Return the seconds that it takes at this rate; None where that can't be told."""
        return (self.total_bytes - self.current_bytes) / self.rate if self.rate > 0 and self.total_bytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStory:
    """How one blob came into the content store, or why it has not."""

    #: How it stands now; its state is ``gone`` where nothing is known of it but what was noted.
    wait: LayerWait
    #: ``registry/repository`` that its bytes came from, and the fence of who brought them; "" and 0 where they aren't.
    came_from: str = ""
    fence: int = 0
    #: Where it could be fetched from, as far as the farm knows.
    providers: tuple[str, ...] = ()
    #: What the audit stream has of it, oldest first.
    entries: tuple[AuditEntry, ...] = ()

    @property
    def digest(self) -> Digest:
        """Return the blob's digest."""
        return self.wait.digest

    @property
    def asked(self) -> list[AuditEntry]:
        """Return who needed its bytes, and what that came to."""
        return [entry for entry in self.entries if entry.operation == Operation.UNLAZY]

    @property
    def attempts(self) -> list[AuditEntry]:
        """Return owners' attempts to bring it, and take-overs."""
        return [entry for entry in self.entries if entry.operation in (Operation.FETCH, Operation.TAKE_OVER)]

    @property
    def others(self) -> list[AuditEntry]:
        """Return what else became of it: it was pushed, brought to a node, collected and so on."""
        return [entry for entry in self.entries if entry not in self.asked and entry not in self.attempts]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStory:
    """How an image, a ref or a blob was pulled."""

    #: Who pulled or resolved the image, or had the ref extracted, oldest first; none for a blob.
    pulls: tuple[AuditEntry, ...]
    #: Lowest first.
    layers: tuple[LayerStory, ...]


class FarmExplain(ABC):
    """Explains one farm. Every method may raise UnavailableError: Redis, or the gateway, doesn't answer."""

    @abstractmethod
    async def miss(self, step: str, *, job: str = "", against: str = "") -> Miss:
        """Tell why a step of a job was not found in the cache; see :func:`lazyfarm.miss.explain_miss`.

        Args:
            step: A part of its name, or of its digest from the start.
            job: Whose: its ID, or how that begins; "" for the newest.
            against: The earlier job that it is compared with; "" for the nearest.

        Raises:
            JobNotFoundError, AmbiguousJobError: a job's name names none, or several.
            InvalidArgumentError: *step* does.
        """

    @abstractmethod
    async def wait(self, name: str, *, watch_s: float = 1.0) -> list[LayerWait]:
        """Tell for each layer of a ref or an image, lowest first, or for one blob, what it waits for.

        Args:
            name: A blob's digest, a ref's ID, the first digits of that, or an image.
            watch_s: Seconds, above 0, between two looks at what moves, of which its rate is told.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
            NoLayersError: it names an image without layers.
        """

    @abstractmethod
    async def pull(self, name: str, *, watch_s: float = 1.0) -> PullStory:
        """Tell for each layer of a ref or an image, lowest first, or for one blob, how it came here, or why not.

        That is told of what the audit stream has, as far back as it goes, and of the flight where there is one.

        Args:
            name: As of :meth:`wait`; also a blob's that was collected since.
            watch_s: As of :meth:`wait`.

        Raises:
            RefNotFoundError, AmbiguousRefError, NoLayersError: as :meth:`wait`.
        """


class RedisExplain(FarmExplain):
    """That of a farm whose Redis is at hand."""

    def __init__(
        self,
        refs: RefStore,
        flights: FlightStore,
        jobs: JobStore,
        events: JobEvents,
        *,
        audit: AuditLog,
        open_tree: OpenTree,
    ) -> None:
        self._refs = refs
        self._flights = flights
        self._jobs = jobs
        self._events = events
        self._audit = audit
        self._open_tree = open_tree

    @classmethod
    def over(cls, link: RedisLink, keys: Keys, audit: AuditConfig, open_tree: OpenTree) -> Self:
        """Return that of a farm whose Redis a client is connected to; *open_tree* reads what drivers sent to it."""
        return cls(
            RedisRefStore(link, keys),
            RedisFlightStore(link, keys),
            RedisJobStore(link, keys),
            RedisJobEvents(link, keys),
            audit=RedisAudit(link, keys, audit),
            open_tree=open_tree,
        )

    async def miss(self, step: str, *, job: str = "", against: str = "") -> Miss:
        """Tell why a step of a job was not found in the cache; see the base."""
        known = RedisJobs(self._jobs, self._events)
        newest = [] if job else await self._jobs.jobs(most=1)
        if not job and not newest:
            raise JobNotFoundError("")
        wanted = await known.find(job) if job else newest[0]
        other = await known.find(against) if against else None
        return await explain_miss(known, self._open_tree, step, job=wanted, against=other)

    async def wait(self, name: str, *, watch_s: float = 1.0) -> list[LayerWait]:
        """Tell for each layer of a ref or an image, lowest first, or for one blob, what it waits for; see the base."""
        return await self._waits((await self._named(name)).digests, watch_s)

    async def _waits(self, digests: Sequence[Digest], watch_s: float) -> list[LayerWait]:
        before = await self._flights_of(digests)
        if any(before):
            await asyncio.sleep(watch_s)
        now, present, asked = await asyncio.gather(
            self._flights_of(digests), self._refs.blobs(digests), self._asked_by(digests)
        )
        found = []
        for digest, was, flight, blob in zip(digests, before, now, present, strict=True):
            if blob is not None:
                size = blob.size_bytes
                found.append(LayerWait(digest=digest, state="present", current_bytes=size, total_bytes=size))
            elif flight is None:
                found.append(LayerWait(digest=digest, state="lazy", asked_by=asked[digest]))
            else:
                came = _came(was, flight)
                found.append(_flying(digest, flight, rate=came / watch_s if came else 0.0, asked_by=asked[digest]))
        return found

    async def pull(self, name: str, *, watch_s: float = 1.0) -> PullStory:
        """Tell for each layer how it came here, or why not; see the base."""
        try:
            named = await self._named(name)
            waits = await self._waits(named.digests, watch_s)
        except RefNotFoundError:
            if not is_digest(name):
                raise
            named, waits = _Named([Digest(name)]), [LayerWait(digest=Digest(name), state="gone")]
        noted: dict[str, list[AuditEntry]] = {digest: [] for digest in named.digests}
        pulls: list[AuditEntry] = []
        async for entry in self._audit.entries():
            if entry.digest in noted:
                noted[entry.digest].append(entry)
            elif named.is_pulled_by(entry):
                pulls.append(entry)
        if waits[0].state == "gone" and not noted[waits[0].digest]:
            raise RefNotFoundError(name)
        blobs, providers = await asyncio.gather(self._refs.blobs(named.digests), self._refs.providers(named.digests))
        return PullStory(
            pulls=tuple(pulls),
            layers=tuple(
                LayerStory(
                    wait=wait,
                    came_from=blob.source if blob else "",
                    fence=blob.fence if blob else 0,
                    providers=tuple(handle.source for handle in handles),
                    entries=tuple(noted[wait.digest]),
                )
                for wait, blob, handles in zip(waits, blobs, providers, strict=True)
            ),
        )

    async def _named(self, name: str) -> _Named:
        if is_digest(name) and await self._is_known(Digest(name)):
            return _Named([Digest(name)])
        image, ref_id = await find_ref(self._refs, name)
        if ref_id is None:
            raise NoLayersError(image.name if image is not None else name)
        digests = list(dict.fromkeys(state.record.blob.digest for state in await self._refs.chain(ref_id)))
        return _Named(digests, ref_id, image.name if image is not None else "")

    async def _is_known(self, digest: Digest) -> bool:
        """Tell whether it is a blob's: present, on its way, or known to be somewhere."""
        blobs, providers = await asyncio.gather(self._refs.blobs([digest]), self._refs.providers([digest]))
        return blobs != [None] or providers != [()] or await self._flights.state(_key(digest)) is not None

    async def _flights_of(self, digests: Sequence[Digest]) -> list[_Flight | None]:
        return await asyncio.gather(*(self._flights.state(_key(digest)) for digest in digests))

    async def _asked_by(self, digests: Sequence[Digest]) -> dict[Digest, tuple[Waiting, ...]]:
        """Return which vertices of running jobs have a layer under way, by its blob."""
        found: dict[Digest, list[Waiting]] = {digest: [] for digest in digests}
        for job in await self._jobs.jobs():
            if job.state.is_end:
                continue
            under_way: dict[tuple[Digest, str], bool] = {}
            for event in await self._events.told(job.id):
                if isinstance(event, VertexLayers):
                    under_way[event.vertex, event.item.item] = not event.item.phase.is_end
            for (vertex, item), is_moving in under_way.items():
                work, _, digest = item.partition(":")
                if is_moving and work == "fetch" and digest in found:
                    found[Digest(digest)].append(Waiting(job=job.id, vertex=vertex))
        return {digest: tuple(waiting) for digest, waiting in found.items()}


@dataclass(frozen=True, slots=True)
class _Named:
    """What a name stands for."""

    digests: Sequence[Digest]
    ref: str = ""
    image: str = ""

    def is_pulled_by(self, entry: AuditEntry) -> bool:
        """Tell whether somebody got at the image, or at the ref, and at no layer in particular."""
        is_own = bool(self.ref) and (entry.ref == self.ref or entry.image == self.image != "")
        return is_own and entry.operation in (Operation.PULL, Operation.RESOLVE, Operation.UNLAZY, Operation.EXTRACT)


def _came(before: _Flight | None, now: _Flight) -> int:
    """Return the bytes that came between two looks at a flight; 0 where it is another's now."""
    if before is None or before["fence"] != now["fence"]:
        return 0
    return int(now["current_bytes"]) - int(before["current_bytes"])


def _flying(digest: Digest, flight: _Flight, *, rate: float, asked_by: tuple[Waiting, ...]) -> LayerWait:
    return LayerWait(
        digest=digest,
        state="fetching" if flight["state"] == "running" else "stopping",
        owner=str(flight["owner"]),
        lease_left_s=float(flight["lease_remaining_s"]),
        waiters=int(flight["waiters"]),
        current_bytes=int(flight["current_bytes"]),
        total_bytes=int(flight["total_bytes"]),
        rate=rate,
        asked_by=asked_by,
    )


def _key(digest: str) -> str:
    return blob_resource(digest)  # a flight's key is spelled as its blob is


@asynccontextmanager
async def open_explain(settings: FarmSettings) -> AsyncIterator[FarmExplain]:
    """Connect to a farm's Redis for as long as the body runs.

    Raises:
        FarmNotRunningError: the settings name no Redis.
    """
    async with connection(settings) as (link, keys):

        async def open_tree(digest: Digest) -> Tree:
            # Only where a directory differs: S3's client takes a quarter of a second to import.
            from storage.blobs import S3ContentStore  # noqa: PLC0415
            from storage.local_trees import LocalTrees  # noqa: PLC0415

            store = S3ContentStore(settings.config.s3)
            try:
                with ThreadPoolExecutor(1) as threads:
                    return await LocalTrees(link, keys, store, threads=threads).open_tree(digest)
            finally:
                store.close()

        yield RedisExplain.over(link, keys, settings.config.audit, open_tree)
