"""Why things are as they are in a farm, told from its Redis alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self, TypeAlias

from cluster.cache.names import find_ref
from cluster.digest import Digest, is_digest
from cluster.errors import JobNotFoundError, NoLayersError
from cluster.job import JobId, VertexLayers
from cluster.lease import blob_resource
from cluster.ports import FlightStore, RefStore
from cluster.settings import FarmSettings
from cluster.solver_ports import JobEvents, JobStore
from cluster.tree import Tree
from lazyfarm.jobs import FarmJobs
from lazyfarm.miss import Miss, OpenTree, explain_miss
from lazyfarm.redis_only import connection
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


class FarmExplain:
    """Explains one farm. Every method may raise UnavailableError: Redis doesn't answer."""

    def __init__(
        self, refs: RefStore, flights: FlightStore, jobs: JobStore, events: JobEvents, open_tree: OpenTree
    ) -> None:
        self._refs = refs
        self._flights = flights
        self._jobs = jobs
        self._events = events
        self._open_tree = open_tree

    @classmethod
    def over(cls, link: RedisLink, keys: Keys, open_tree: OpenTree) -> Self:
        """Return that of a farm whose Redis a client is connected to; *open_tree* reads what drivers sent to it."""
        return cls(
            RedisRefStore(link, keys),
            RedisFlightStore(link, keys),
            RedisJobStore(link, keys),
            RedisJobEvents(link, keys),
            open_tree,
        )

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
        known = FarmJobs(self._jobs, self._events)
        newest = [] if job else await self._jobs.jobs(most=1)
        if not job and not newest:
            raise JobNotFoundError("")
        wanted = await known.find(job) if job else newest[0]
        other = await known.find(against) if against else None
        return await explain_miss(known, self._open_tree, step, job=wanted, against=other)

    async def wait(self, name: str, *, watch_s: float = 1.0) -> list[LayerWait]:
        """Tell for each layer of a ref or an image, lowest first, or for one blob, what it waits for.

        Args:
            name: A blob's digest, a ref's ID, the first digits of that, or an image.
            watch_s: Seconds, above 0, between two looks at what moves, of which its rate is told.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
            NoLayersError: it names an image without layers.
        """
        digests = await self._digests(name)
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

    async def _digests(self, name: str) -> list[Digest]:
        if is_digest(name) and (
            await self._refs.blobs([Digest(name)]) != [None] or await self._flights.state(_key(name))
        ):
            return [Digest(name)]
        image, ref_id = await find_ref(self._refs, name)
        if ref_id is None:
            raise NoLayersError(image.name if image is not None else name)
        return list(dict.fromkeys(state.record.blob.digest for state in await self._refs.chain(ref_id)))

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

        yield FarmExplain.over(link, keys, open_tree)
