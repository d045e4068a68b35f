"""What the solver asks of the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.digest import Digest
from cluster.graph import Vertex
from cluster.job import JobId, VertexEvent
from cluster.solver.values import CacheMap, CacheRecord, Exportable, HoldId, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class OpResult:
    """What carrying an op out came to."""

    result: Result
    #: Another's result was found after all.
    was_cached: bool = False


class VertexUse(Protocol):
    """One use of a vertex, for as long as something is done for it."""

    @property
    def vertex(self) -> Vertex:
        """Return what it is of."""
        ...

    @property
    def job(self) -> JobId:
        """Return the job on whose behalf this is done; it may end before this does."""
        ...

    @property
    def hold(self) -> HoldId:
        """Name what is held for this use; the same for all that is done for it, until :meth:`OpRunner.release`."""
        ...

    def beneficiaries(self) -> tuple[JobId, ...]:
        """Return the jobs that this is done for now: any one's session will do. Empty once it is to stop."""
        ...

    def began(self, node: str = "") -> None:
        """Say that a run has its inputs where it runs, and has begun: until then its vertex is shown as waiting.

        *node* is where; "" where that means nothing. May be repeated, and come too late. A run that says nothing
        ends all the same.
        """
        ...


class OpRunner(Protocol):
    """Carries ops out.

    Every call may raise any ClusterError. One whose ``needed_opts`` are not empty is answered by a second
    call with those of these cache opts that the job's vertices have published; *opts* is empty the first time.
    A call is cancelled when nobody waits for it any more.
    """

    def try_cache_map(self, vertex: Vertex) -> CacheMap | None:
        """Return an op's cache map where that follows from the op alone; else None: :meth:`cache_map` is to be asked.

        Not cancelled, and given no opts.
        """
        ...

    async def cache_map(self, job: JobId, vertex: Vertex) -> CacheMap:
        """Return an op's cache map, with the job's own access. Creates no ref."""
        ...

    async def load(self, use: VertexUse, record: CacheRecord, opts: Mapping[str, bytes]) -> Result | None:
        """Hold what a record names, lazily; None where it is gone or of no use to the job.

        An error is a miss too: the vertex can be run.
        """
        ...

    async def content_key(self, use: VertexUse, index: int, source: Result, opts: Mapping[str, bytes]) -> Digest:
        """Return the digest of what the op uses of the content of its input *index*."""
        ...

    async def run(
        self,
        use: VertexUse,
        inputs: Sequence[Result | None],
        keys: Sequence[Digest],
        opts: Mapping[str, bytes],
        *,
        ignores_cache: bool,
    ) -> OpResult:
        """Carry an op out, hold its result and publish it under *keys* before returning.

        Args:
            use: What for; is told when the op itself begins (:meth:`VertexUse.began`).
            inputs: In the op's order, held; None: an empty filesystem.
            keys: Where another has published a result under one of them meanwhile, that will do.
            opts: See above.
            ignores_cache: It won't.
        """
        ...

    async def keep(self, job: JobId, vertex: Vertex, result: Result, opts: Mapping[str, bytes]) -> None:
        """Hold a target's result for the job itself, for as long as the job's lease says. May be repeated."""
        ...

    async def finish(self, job: JobId, exportables: Sequence[Exportable]) -> None:
        """Do what is to be done once a job's results are there and kept, before it ends: exports of its cache.

        Called once a job, and not again with opts. What is in *exportables* stays held until it returns.

        Args:
            job: Its cache opts can still be had.
            exportables: All its vertices, each after its inputs.
        """
        ...

    async def release(self, hold: HoldId) -> None:
        """Let go of all that is held under *hold*; nothing comes under it any more."""
        ...


class KeyStore(Protocol):
    """Results by cache keys, of all jobs of the farm."""

    async def lookup(self, keys: Sequence[Digest]) -> Sequence[CacheRecord]:
        """Return the records under any of *keys*, each once, in any order."""
        ...

    async def publish(self, keys: Sequence[Digest], result: Result) -> CacheRecord:
        """Record a result under *keys*, and return its one record. May be repeated."""
        ...


class JobEvents(Protocol):
    """What drivers see of their jobs."""

    async def publish(self, job: JobId, events: Sequence[VertexEvent]) -> None:
        """Append events to a job's stream, in order."""
        ...
