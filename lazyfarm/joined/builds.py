"""Builds of a driver that has joined the cluster: jobs go into Redis, local directories into S3."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from actors.handles import FetchWorkerHandle, SchedulerHandle
from actors.version import VERSION
from cluster import tracing
from cluster.config import Config
from cluster.digest import digest_of
from cluster.errors import ClusterError, JobIdTakenError
from cluster.graph import Definition, ImageOp, LocalOp, encode_definition
from cluster.job import JobEvent, JobId, JobRecord, JobSpec, JobState, registries_of
from cluster.lease import LeaseId
from cluster.messages import AssembleRequest, ResolveRequest, ResolveResult, SessionInfo
from cluster.ports import RefStore
from cluster.provider import registries_of as provider_registries
from cluster.ref import ImageRecord
from cluster.reference import parse_reference
from cluster.remote_cache import CacheEntry, embed
from lazyfarm.builds import BuildingFarm, BuildOptions, Builds, ResolvedImage
from lazyfarm.job import Result
from lazyfarm.jobs import RedisJobs
from lazyfarm.ref import Ref
from storage.audit import RedisAudit
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.link import RedisLink

if TYPE_CHECKING:
    from lazyfarm.context import ScannedTree
    from lazyfarm.export import Exporter
    from lazyfarm.joined.session import Session

T = TypeVar("T")

#: Ops that only say where something comes from: to run them afresh would come to the same.
_SOURCES = (ImageOp, LocalOp)
_POKE_S = 5.0
#: Threads that read and send local files.
_THREADS = 8


class CallingFarm(BuildingFarm, Protocol):
    """What these builds ask of their farm beside that."""

    @property
    def ref_store(self) -> RefStore:
        """Return where refs are recorded."""
        ...

    async def info(self, registries: Iterable[str]) -> SessionInfo:
        """Return what a call says of its caller."""
        ...

    def lease_id(self) -> LeaseId:
        """Return the lease of this driver, if it is live."""
        ...

    async def on_worker(self, call: Callable[[FetchWorkerHandle], Awaitable[T]]) -> T:
        """Make an idempotent call at any node's worker."""
        ...

    async def hold_resources(self, resources: Sequence[str]) -> None:
        """Attach what is no ref to this driver's lease."""
        ...


class JoinedBuilds(Builds):
    """The jobs of one driver."""

    _farm: CallingFarm

    def __init__(
        self, farm: CallingFarm, config: Config, session: Session, link: RedisLink, audit: RedisAudit | None = None
    ) -> None:
        super().__init__(farm)
        self._config = config
        self._session = session
        self._link = link
        self._keys = Keys(config.farm.name)
        self._store = RedisJobStore(link, self._keys, audit)
        self._jobs = RedisJobs(self._store, RedisJobEvents(link, self._keys))
        self._pokes: set[asyncio.Task[None]] = set()

    # -- before --------------------------------------------------------------------------------------------------

    @tracing.begins("resolve")
    async def resolve(self, image: str, *, platform: str | None, plain_http: bool) -> ResolvedImage:
        """Read an image's manifest and config; no ref is made."""
        reference = parse_reference(image)
        request = ResolveRequest(
            session=await self._farm.info([reference.host]),
            image=reference.name,
            platform=platform,
            plain_http=plain_http,
            lease_id=self._farm.lease_id(),
        )
        found: ResolveResult = await self._farm.on_worker(
            lambda worker: worker.resolve_image(request, timeout_s=self._config.flight.deadline_s)
        )
        digest = found.image.manifest.digest
        return ResolvedImage(
            reference=replace(reference, digest=reference.digest or digest),
            digest=digest,
            platform=found.image.platform,
            config=found.config,
        )

    async def submit(self, job: JobId, definition: Definition, options: BuildOptions) -> None:
        """Submit a job under an ID that its driver chose; what it needs of local directories is sent already.

        May be made again by a driver that didn't hear of the end; raises JobIdTakenError for another's job.
        """
        try:
            await self._put(job, await self._pin(definition), options)
        except JobIdTakenError:
            known = await self._store.get(job)
            if known.spec.session.session_id != self._session.id_of_job(job):
                raise

    async def _put(self, job: JobId, definition: Definition, options: BuildOptions) -> None:
        session = await asyncio.to_thread(
            self._session.info,
            registries_of(definition, options.cache_from, options.cache_to),
            progress=None,
            deadline_s=self._config.flight.deadline_s,
            session_id=self._session.id_of_job(job),
        )
        payload = encode_definition(definition)
        rerun = [] if not options.no_cache else definition.order
        spec = JobSpec(
            id=job,
            definition=digest_of(payload),
            targets=definition.targets,
            session=replace(session, job=job, traceparent=tracing.current().traceparent),
            no_cache=tuple(d for d in rerun if not isinstance(definition.vertices[d].op, _SOURCES)),
            cache_from=tuple(options.cache_from),
            cache_to=tuple(options.cache_to),
            is_detached=options.detached,
            labels=dict(options.labels),
        )
        await self._store.submit(spec, payload)
        # Not waited for: a scheduler that takes the job at once answers when it has read it.
        poke = asyncio.create_task(self._poke(job))
        self._pokes.add(poke)
        poke.add_done_callback(self._pokes.discard)

    async def _send(self, trees: Iterable[ScannedTree]) -> None:
        """Send what the farm lacks of local directories."""
        from storage.blobs import S3ContentStore  # noqa: PLC0415 - what no local directory needs is not imported
        from storage.local_trees import LocalTrees  # noqa: PLC0415 - likewise

        found = list(trees)
        if not found:
            return
        store = S3ContentStore(self._config.s3)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="local") as threads:
            # Held as long as this driver is there: a job of it, once submitted, keeps them by itself.
            sender = LocalTrees(self._link, self._keys, store, threads=threads, hold=self._farm.hold_resources)
            try:
                for tree in found:
                    await sender.send(tree.tree, tree.paths)
            finally:
                await asyncio.to_thread(store.close)

    async def _poke(self, job: JobId) -> None:
        """Say that there is something to do; schedulers look every second anyway."""
        index = int(digest_of(job.encode()).rpartition(":")[2][:8], 16) % self._config.build.schedulers
        scheduler = SchedulerHandle.of_index(index, farm=self._config.farm.name, version=VERSION)
        with contextlib.suppress(ClusterError):
            await scheduler.look_for_jobs(timeout_s=_POKE_S)

    # -- meanwhile, for Job ---------------------------------------------------------------------------------------

    def attending_job(
        self, job: JobId, secrets: Mapping[str, bytes] | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Be there for a job while the body runs: answer its scheduler, and tell that its driver lives."""
        return self._session.attending_job(job, secrets=self._secrets.get(job, {}) if secrets is None else secrets)

    def follow_job(self, job: JobId) -> AsyncIterator[JobEvent]:
        """Yield a job's events."""
        return self._jobs.events(job)

    async def cancel_job(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled."""
        return await self._jobs.cancel(job)

    async def find_job(self, job: str) -> JobRecord:
        """Return the record of the job of an ID, or of the start of one; raises as :meth:`find`."""
        return await self._jobs.find(job)

    async def get_job(self, job: JobId) -> JobRecord:
        """Return a job's record."""
        return await self._store.get(job)

    # -- after ------------------------------------------------------------------------------------------------------

    async def tag(self, result: Result, name: str, *, created_s: int | None) -> Ref:
        """Make an image of a result under a name."""
        ref = result.ref
        ref.raise_if_released()
        config = result.config or b""
        if any(result.inline):
            layers = [state.record.blob for state in ref.layers]
            entries = (
                CacheEntry(keys=each.keys, layers=tuple(layers[: each.layers]), config=each.config)
                for each in result.inline[0]
            )
            config = embed(config or b"{}", layers, entries)
        registries = provider_registries(handle for state in ref.layers for handle in state.may_be_asked)
        request = AssembleRequest(
            session=await self._farm.info(registries),
            name=parse_reference(name).name,
            ref_id=ref.id if ref.layers else None,
            config=config,
            handlers=ref.handlers,
            lease_id=self._farm.lease_id(),
            created_s=created_s,
        )
        record: ImageRecord = await self._farm.on_worker(
            lambda worker: worker.assemble(request, timeout_s=self._config.flight.deadline_s)
        )
        return Ref(self._farm, ref.layers, record, ref.handlers)

    @contextlib.asynccontextmanager
    async def _exporting(self, found: Ref) -> AsyncIterator[Exporter]:  # noqa: ARG002 - the gateway's needs it
        """Lend what writes an image to this machine."""
        from lazyfarm.export import Exporter  # noqa: PLC0415 - S3 and the unpackers, which few drivers need
        from storage.blobs import S3ContentStore  # noqa: PLC0415 - likewise
        from storage.snapshots.limits import LayerLimits  # noqa: PLC0415 - likewise

        store = S3ContentStore(self._config.s3)
        try:
            yield Exporter(store, self._farm.ref_store, LayerLimits.of(self._config.node))
        finally:
            await asyncio.to_thread(store.close)
