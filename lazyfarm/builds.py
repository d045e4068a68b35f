"""Builds of one driver: what is sent before a job is submitted, and being there for it until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import secrets as random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

from actors.handles import FetchWorkerHandle, SchedulerHandle
from actors.version import VERSION
from cluster import tracing
from cluster.cache_options import CacheSource, CacheTarget
from cluster.config import Config
from cluster.digest import Digest, digest_of
from cluster.errors import ClusterError, InvalidArgumentError, InvalidOutputError, JobIdTakenError, NotAnImageError
from cluster.graph import Definition, ImageOp, LocalOp, encode_definition, pinned
from cluster.job import JobEvent, JobId, JobRecord, JobSpec, JobState, registries_of
from cluster.job_result import decode_result
from cluster.lease import LeaseId
from cluster.messages import AssembleRequest, ResolveRequest, ResolveResult, SessionInfo
from cluster.ports import RefStore
from cluster.provider import registries_of as provider_registries
from cluster.ref import ImageRecord, RefId, RefState
from cluster.reference import ImageReference, parse_reference
from cluster.remote_cache import CacheEntry, embed
from cluster.tracing import SpanKind
from lazyfarm.graph import Resolved, State, resolve
from lazyfarm.job import EventCallback, Job, Result, read_secrets
from lazyfarm.jobs import FarmJobs
from lazyfarm.operation import ProgressCallback
from lazyfarm.outputs import Output, OutputKind, parse_output
from lazyfarm.ref import Ref, RefFarm
from storage.audit import RedisAudit
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.link import RedisLink

if TYPE_CHECKING:
    from lazyfarm.context import ScannedTree
    from lazyfarm.export import Exporter
    from lazyfarm.session import Session

T = TypeVar("T")

#: Ops that only say where something comes from: to run them afresh would come to the same.
_SOURCES = (ImageOp, LocalOp)
_POKE_S = 5.0
#: Threads that read and send local files.
_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedImage:
    """An image of a registry, as it is now."""

    #: With its digest, so that it stays what it is whatever becomes of its tag.
    reference: ImageReference
    #: Of its manifest for the platform.
    digest: Digest
    #: ``os/architecture[/variant]``.
    platform: str
    #: Image config (JSON).
    config: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How something is built."""

    config: bytes | None = None
    no_cache: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    cache_from: Sequence[CacheSource] = ()
    cache_to: Sequence[CacheTarget] = ()
    detached: bool = False


class BuildingFarm(RefFarm, Protocol):
    """What builds ask of their farm."""

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

    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return a ref and all below it, lowest first."""
        ...

    async def hold_resources(self, resources: Sequence[str]) -> None:
        """Attach what is no ref to this driver's lease."""
        ...

    async def hold(self, ref_ids: Sequence[RefId]) -> None:
        """Attach refs to this driver's lease."""
        ...


class Builds:
    """The jobs of one driver."""

    def __init__(
        self, farm: BuildingFarm, config: Config, session: Session, link: RedisLink, audit: RedisAudit | None = None
    ) -> None:
        self._farm = farm
        self._config = config
        self._session = session
        self._link = link
        self._keys = Keys(config.farm.name)
        self._store = RedisJobStore(link, self._keys, audit)
        self._jobs = FarmJobs(self._store, RedisJobEvents(link, self._keys))
        #: By job: what it may ask for, and the config of what is built.
        self._secrets: dict[JobId, Mapping[str, bytes]] = {}
        self._configs: dict[JobId, bytes] = {}
        self._pokes: set[asyncio.Task[None]] = set()

    # -- before --------------------------------------------------------------------------------------------------

    def solve(
        self,
        graph: State | Sequence[State] | Resolved | Definition,
        options: BuildOptions,
        *,
        secrets: Mapping[str, bytes | str | Path],
        on_event: EventCallback | None,
    ) -> Job:
        """Return the job that builds *graph*, to be submitted."""
        if options.detached and secrets:
            reason = "nobody is there to give them while the job runs; leave `detached` out"
            raise InvalidArgumentError("secrets", "given to a detached job", reason)
        job = JobId(random.token_hex(8))
        self._secrets[job] = read_secrets(secrets)
        if options.config is not None:
            self._configs[job] = options.config
        return Job(
            self,
            job,
            submit=lambda: self._traced_submit(job, graph, options),
            is_detached=options.detached,
            on_event=on_event,
        )

    async def find(self, job: str) -> Job:
        """Return the job of an ID, or of the start of one, whoever submitted it.

        Raises:
            JobNotFoundError, AmbiguousJobError: there is none, or there are several.
        """
        record = await self._jobs.find(job)
        return Job(self, record.id, submit=None, is_detached=record.spec.is_detached)

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

    async def _traced_submit(
        self, job: JobId, graph: State | Sequence[State] | Resolved | Definition, options: BuildOptions
    ) -> None:
        """Submit a job: all that is done for it is a part of this span's trace."""
        with tracing.beginning("submit", {tracing.JOB: job}, kind=SpanKind.PRODUCER):
            await self._submit(job, graph, options)

    async def _submit(
        self, job: JobId, graph: State | Sequence[State] | Resolved | Definition, options: BuildOptions
    ) -> None:
        trees: Mapping[Digest, ScannedTree] = {}
        if isinstance(graph, Definition):
            definition = graph
        else:
            states = [graph] if isinstance(graph, State) else graph
            found = states if isinstance(states, Resolved) else await asyncio.to_thread(resolve, states)
            definition, trees = found.definition, found.trees
        definition, _ = await asyncio.gather(self._pin(definition), self._send(trees.values()))
        await self._put(job, definition, options)

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

    async def _pin(self, definition: Definition) -> Definition:
        """Name every image by what its tag stands for now, so that all of the job, and later ones, mean the same."""
        ops = {
            vertex.op
            for vertex in definition.vertices.values()
            if isinstance(vertex.op, ImageOp) and parse_reference(vertex.op.reference).digest is None
        }

        async def pin(op: ImageOp) -> tuple[ImageOp, ImageOp]:
            found = await self.resolve(op.reference, platform=op.platform or None, plain_http=op.plain_http)
            return op, replace(op, reference=found.reference.name)

        return pinned(definition, dict(await asyncio.gather(*(pin(op) for op in ops))))

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

    async def job_result(self, record: JobRecord) -> Result:
        """Return what a job came to, held by this driver's lease."""
        found = [decode_result(record.results[target]) for target in record.spec.targets]
        refs = []
        for result in found:
            if result.ref is None:
                refs.append(Ref(self._farm, (), None))
                continue
            chain = await self._farm.chain(result.ref)
            await self._farm.hold([state.record.id for state in chain])
            refs.append(Ref(self._farm, chain, None))
        config = self._configs.get(record.id) or next((r.config for r in found if r.config is not None), None)
        return Result(record.id, tuple(refs), config, tuple(result.inline for result in found))

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

    async def export(
        self,
        result: Result | Ref,
        output: str | Output,
        *,
        names: Sequence[str],
        stdout: BinaryIO | None,
        progress: ProgressCallback | None,
    ) -> None:
        """Write a result or image to this machine."""
        wanted = parse_output(output) if isinstance(output, str) else output
        if wanted.kind is OutputKind.IMAGE:
            raise InvalidOutputError(str(output), "it names no file or directory: tag or push images of the farm")
        wanted = replace(wanted, names=wanted.names or tuple(parse_reference(name).name for name in names))
        if isinstance(result, Result):
            # The farm needs a name for every image; a reader of the layout is told of none that the user didn't give.
            found = await self.tag(result, f"localhost/lazyfarm/build:{result.job}", created_s=None)
        else:
            found = result
        if found.record is None:
            raise NotAnImageError(found.id)
        record = replace(found.record, name="") if isinstance(result, Result) else found.record
        await found.unlazy(progress=progress)
        async with self._exporting(found) as exporter:
            await exporter.export(record, wanted, stdout=stdout or sys.stdout.buffer, progress=progress)

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
