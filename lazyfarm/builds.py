"""Builds of one driver: what is sent before a job is submitted, and being there for it until it ends."""

from __future__ import annotations

import asyncio
import secrets as random
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from cluster import tracing
from cluster.cache_options import CacheSource, CacheTarget
from cluster.digest import Digest
from cluster.errors import InvalidArgumentError, InvalidOutputError, NotAnImageError
from cluster.graph import Definition, ImageOp, pinned
from cluster.job import JobEvent, JobId, JobRecord, JobState
from cluster.job_result import decode_result
from cluster.ref import RefId, RefState
from cluster.reference import ImageReference, parse_reference
from cluster.tracing import SpanKind
from lazyfarm.graph import Resolved, State, resolve
from lazyfarm.job import EventCallback, Job, Result, read_secrets
from lazyfarm.operation import ProgressCallback
from lazyfarm.outputs import Output, OutputKind, parse_output
from lazyfarm.ref import Ref, RefFarm

if TYPE_CHECKING:
    from lazyfarm.context import ScannedTree
    from lazyfarm.export import Exporter


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

    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return a ref and all below it, lowest first."""
        ...

    async def hold(self, ref_ids: Sequence[RefId]) -> None:
        """Attach refs to this driver's lease."""
        ...


class Builds(ABC):
    """The jobs of one driver."""

    def __init__(self, farm: BuildingFarm) -> None:
        self._farm = farm
        #: By job: what it may ask for, and the config of what is built.
        self._secrets: dict[JobId, Mapping[str, bytes]] = {}
        self._configs: dict[JobId, bytes] = {}

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
        record = await self.find_job(job)
        return Job(self, record.id, submit=None, is_detached=record.spec.is_detached)

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

    @abstractmethod
    async def resolve(self, image: str, *, platform: str | None, plain_http: bool) -> ResolvedImage:
        """Read an image's manifest and config; no ref is made."""

    @abstractmethod
    async def _send(self, trees: Iterable[ScannedTree]) -> None:
        """Send what the farm lacks of local directories."""

    @abstractmethod
    async def _put(self, job: JobId, definition: Definition, options: BuildOptions) -> None:
        """Record a job whose images are pinned, and what it needs sent."""

    # -- meanwhile, for Job ---------------------------------------------------------------------------------------

    @abstractmethod
    def attending_job(
        self, job: JobId, secrets: Mapping[str, bytes] | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Be there for a job while the body runs: answer its scheduler, and tell that its driver lives."""

    @abstractmethod
    def follow_job(self, job: JobId) -> AsyncIterator[JobEvent]:
        """Yield a job's events."""

    @abstractmethod
    async def cancel_job(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled."""

    @abstractmethod
    async def find_job(self, job: str) -> JobRecord:
        """Return the record of the job of an ID, or of the start of one; raises as :meth:`find`."""

    @abstractmethod
    async def get_job(self, job: JobId) -> JobRecord:
        """Return a job's record."""

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

    @abstractmethod
    async def tag(self, result: Result, name: str, *, created_s: int | None) -> Ref:
        """Make an image of a result under a name."""

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

    @abstractmethod
    def _exporting(self, found: Ref) -> AbstractAsyncContextManager[Exporter]:
        """Lend what writes an image to this machine."""
