"""Remote caches of a scheduler's jobs: read before a job begins, written before it ends, by fetch workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from actors.job_sessions import JobSessions
from actors.workers import Workers
from cluster.cache.runner import CacheManager
from cluster.cache_options import CacheKind, CacheMode, CacheSource, CacheTarget
from cluster.digest import Digest
from cluster.errors import ClusterError, first_error
from cluster.fetch.cache_import import ImportedResult, results_of
from cluster.job import JobEvent, JobId, JobSpec, JobWarning
from cluster.job_result import InlineEntry
from cluster.lease import LeaseId
from cluster.messages import ExportCacheRequest, ExportCacheResult, ImportCacheRequest, ImportCacheResult
from cluster.ports import Authorizer, RefStore
from cluster.provider import DescHandler
from cluster.ref import RefId
from cluster.remote_cache import ExportCandidate
from cluster.solver.imported import ImportedKeys
from cluster.solver.values import CacheRecord, Exportable, Result

log = structlog.get_logger()


class RemoteCaches:
    """Reads and writes the caches that jobs name.

    Args:
        keys: Where what is read can be looked up.
        cache: Makes refs of what is loaded.
        refs: What is known of them.
        sessions: Who answers for jobs.
        workers: Who speaks with registries.
        tell: Tells who watches a job.
        deadline_s: Seconds that reading or writing one may take.
    """

    def __init__(
        self,
        *,
        keys: ImportedKeys[ImportedResult],
        cache: CacheManager,
        refs: RefStore,
        sessions: JobSessions,
        workers: Workers,
        tell: Callable[[JobId, Sequence[JobEvent]], Awaitable[None]],
        deadline_s: float,
    ) -> None:
        self._keys = keys
        self._cache = cache
        self._refs = refs
        self._sessions = sessions
        self._workers = workers
        self._tell = tell
        self._deadline_s = deadline_s
        self._specs: dict[JobId, JobSpec] = {}
        #: Layers that were imported for live jobs, with the ways to get them.
        self._handlers: dict[JobId, dict[Digest, tuple[DescHandler, ...]]] = {}
        #: By job, what an inline cache of each of its targets is to say.
        self._inline: dict[JobId, dict[RefId, tuple[InlineEntry, ...]]] = {}

    # -- before --------------------------------------------------------------------------------------------------

    async def read(self, spec: JobSpec) -> None:
        """Read the caches that a job names. One that can't be read is a miss, with a warning."""
        self._specs[spec.id] = spec
        await self._warn(spec.id, await asyncio.gather(*(self._read(spec.id, source) for source in spec.cache_from)))

    async def _warn(self, job: JobId, warnings: Sequence[str]) -> None:
        if told := [JobWarning(text=text) for text in warnings if text]:
            log.warning("cache.warning", job=job, warnings=[warning.text for warning in told])
            await self._tell(job, told)

    async def _read(self, job: JobId, source: CacheSource) -> str:
        session = self._sessions.asking(lambda: [job])
        request = ImportCacheRequest(session=session.info, source=source)
        try:
            imported: ImportCacheResult = await self._workers.on_any(
                lambda worker: session.calling(worker, worker.import_cache(request, timeout_s=self._deadline_s))
            )
        except ClusterError as exc:
            return f"the cache {source.name} is not used: {exc}"
        known = self._handlers.setdefault(job, {})
        for handler in imported.handlers:
            known[handler.digest] = (*known.get(handler.digest, ()), handler)
        left_out = self._keys.add(job, results_of(imported))
        if left_out:
            return f"the cache {source.name} is too large: {left_out} results of it are not used"
        return imported.warning

    # -- meanwhile -----------------------------------------------------------------------------------------------

    def handlers(self, jobs: Sequence[JobId], digests: Sequence[Digest]) -> tuple[DescHandler, ...]:
        """Return the ways to get layers that jobs imported."""
        found: dict[DescHandler, None] = {}
        for job in jobs:
            known = self._handlers.get(job, {})
            found |= dict.fromkeys(handler for digest in digests for handler in known.get(digest, ()))
        return tuple(found)

    def is_imported(self, record: CacheRecord) -> bool:
        """Tell whether a record is of a cache that a job named."""
        return self._keys.is_imported(record)

    async def load(self, record: CacheRecord, authorizer: Authorizer, lease_id: LeaseId) -> Result | None:
        """Make the refs of an imported result, lazily, and record it as the farm's own; None where it is gone.

        Raises:
            NeedsRemoteProvidersError: the caller may not read some of its layers where they are.
        """
        imported = self._keys.imported(record)
        if imported is None:
            return None
        entry = imported.source.entry
        if entry.layers:
            await self._cache.get_by_blob(
                entry.layers, parent=None, handlers=imported.source.handlers, authorizer=authorizer, lease_id=lease_id
            )
        await self._keys.publish(entry.keys, record.result)
        return record.result

    # -- after -----------------------------------------------------------------------------------------------------

    async def write(
        self, job: JobId, exportables: Sequence[Exportable], handlers: Sequence[DescHandler], lease_id: LeaseId
    ) -> None:
        """Write the caches that a job names.

        Raises:
            ClusterError: one can't be written, and its failure is not to be ignored.
        """
        spec = self._specs.get(job)
        if spec is None or not spec.cache_to:
            return
        wants_all = any(target.mode is CacheMode.MAX for target in spec.cache_to)
        candidates = await self._candidates(spec, exportables, lease_id, wants_all=wants_all)
        if any(target.kind is CacheKind.INLINE for target in spec.cache_to):
            self._inline[spec.id] = await self._inline_entries(candidates)
        targets = [target for target in spec.cache_to if target.kind is not CacheKind.INLINE]
        passed = (*handlers, *(h for known in self._handlers.get(spec.id, {}).values() for h in known))
        try:
            # Where one fails the job has failed, and with it goes all that is under way for it.
            async with asyncio.TaskGroup() as group:
                writes = [
                    group.create_task(self._write(spec, target, candidates, passed, lease_id)) for target in targets
                ]
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        results = [write.result() for write in writes]
        await self._warn(job, [f"{result.target}: {result.warning}" for result in results if result.warning])

    async def _write(
        self,
        spec: JobSpec,
        target: CacheTarget,
        candidates: Sequence[ExportCandidate],
        handlers: Sequence[DescHandler],
        lease_id: LeaseId,
    ) -> ExportCacheResult:
        session = self._sessions.asking(lambda: [spec.id])
        request = ExportCacheRequest(
            session=session.info,
            target=target,
            candidates=tuple(candidates),
            handlers=tuple(dict.fromkeys(handlers)),
            lease_id=lease_id,
        )
        try:
            result: ExportCacheResult = await self._workers.on_any(
                lambda worker: session.calling(worker, worker.export_cache(request, timeout_s=self._deadline_s))
            )
        except ClusterError as exc:
            if not target.ignores_error:
                raise
            # What the exporter itself fails at it has turned into a warning.
            return ExportCacheResult(target=target.name, digest=None, warning=f"no cache was exported: {exc}")
        log.info("cache.exported", job=spec.id, target=target.name, results=result.results, digest=result.digest or "")
        return result

    async def _candidates(
        self, spec: JobSpec, exportables: Sequence[Exportable], lease_id: LeaseId, *, wants_all: bool
    ) -> list[ExportCandidate]:
        """Return what may be exported: also what nothing needed, where the farm or a cache that was read has it."""
        targets = set(spec.targets)
        found = []
        for each in exportables:
            result = each.result
            if result is None and wants_all:
                result = await self._cached(spec, each, lease_id)
            if result is not None:
                ref = None if result.ref is None else RefId(result.ref)
                found.append(
                    ExportCandidate(keys=each.keys, ref=ref, config=result.config, is_target=each.vertex in targets)
                )
        return found

    async def _cached(self, spec: JobSpec, each: Exportable, lease_id: LeaseId) -> Result | None:
        for record in await self._keys.lookup(each.keys):
            if not self._keys.is_imported(record):
                return record.result
            try:
                # Else a build that is all cached would leave out of its cache what it was spared.
                return await self.load(record, self._sessions.authorizer([spec.id]), lease_id)
            except ClusterError as exc:
                log.info("cache.not_passed_on", job=spec.id, record=record.id, error=str(exc))
        return None

    async def _inline_entries(self, candidates: Sequence[ExportCandidate]) -> dict[RefId, tuple[InlineEntry, ...]]:
        """Return for each target what of its layers is the result of which keys."""
        found: dict[RefId, tuple[InlineEntry, ...]] = {}
        for top in {candidate.ref for candidate in candidates if candidate.is_target and candidate.ref is not None}:
            heights = {state.record.id: height for height, state in enumerate(await self._refs.chain(top), 1)}
            found[top] = tuple(
                InlineEntry(keys=each.keys, layers=heights[each.ref], config=each.config)
                for each in candidates
                if each.ref is not None and each.ref in heights
            )
        return found

    def inline(self, job: JobId, ref: RefId) -> tuple[InlineEntry, ...]:
        """Return what an inline cache of one of a job's targets says; nothing where none was asked for."""
        return self._inline.get(job, {}).get(ref, ())

    def forget(self, job: JobId) -> None:
        """Forget what was read for a job that has ended."""
        self._keys.drop(job)
        self._specs.pop(job, None)
        self._handlers.pop(job, None)
        self._inline.pop(job, None)
