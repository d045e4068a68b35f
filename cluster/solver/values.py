"""The solver's values: results and cache keys, what happens to it (events) and what it wants done (instructions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

from cluster.digest import Digest, digest_of
from cluster.errors import ClusterError
from cluster.graph import Definition, Vertex
from cluster.job import JobId, VertexState

#: Names one thing that the runner was told to do; never used twice.
TaskId = NewType("TaskId", int)
#: Names one use of a vertex: what was loaded or made for it is kept from being collected until it is released.
HoldId = NewType("HoldId", int)


# -- results --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a vertex comes to. Opaque to the solver."""

    #: Top of a chain of layers; None: no layers at all.
    ref: str | None
    #: Image config (JSON) that an image came with; passed on for clients.
    config: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRecord:
    """A result that was published under cache keys; it may be gone, or of no use to a caller, by the time it is wanted.

    Not to be confused with a ref's record.
    """

    id: str
    result: Result
    #: By the store's clock.
    created_wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMap:
    """What an op says of itself before anything is done. To compute one creates no ref."""

    #: Digest of the op by itself: an image's manifest and platform, a directory's tree, else the op.
    key: Digest
    #: Cache opts: whatever loads of this vertex or of those above it may need. They live and die with their job.
    opts: Mapping[str, bytes] = field(default_factory=dict)
    #: Inputs of which the selected content, and not only the definition, may be part of a key; ascending.
    slow_inputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """What an export of a job's cache may say of one of its vertices."""

    vertex: Digest
    #: Keys under which others would find its result; not empty.
    keys: tuple[Digest, ...]
    #: None where nothing needed it: what is above it was cached.
    result: Result | None


# -- cache keys -----------------------------------------------------------------------------------------------


def cache_key(own: Digest, inputs: tuple[Digest, ...]) -> Digest:
    """Return the key of an op over its inputs' keys, or over what :func:`content_key` makes of their content."""
    return digest_of("\n".join(("key", own, *inputs)).encode())


def content_key(content: Digest) -> Digest:
    """Return what stands for an input in a slow key: the digest of the content that is used of it."""
    return digest_of(f"content\n{content}".encode())


#: The key of an input that is an empty filesystem.
SCRATCH_KEY = digest_of(b"scratch")


# -- how jobs end ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobDone:
    """All targets are there, held for the job."""

    #: In the order of the definition's targets.
    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The first error of a vertex that the job needs."""

    error: ClusterError
    #: None where it was no vertex's: the results could not be kept.
    vertex: Digest | None


@dataclass(frozen=True, slots=True)
class JobStopped:
    """It was cancelled. Not to be confused with the event :class:`JobCancelled`."""


JobOutcome = JobDone | JobFailed | JobStopped


# -- events: what happened ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    """A driver wants a definition built."""

    job: JobId
    definition: Definition
    #: Vertices to run afresh, whatever is cached; those that the definition lacks are ignored.
    no_cache: frozenset[Digest] = frozenset()
    #: It shares no vertex with other jobs: what their vertices come to may be closed to it.
    is_apart: bool = False


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """A driver, or who acts for it, wants the job no more. Too late where it has ended."""

    job: JobId


@dataclass(frozen=True, slots=True)
class Mapped:
    """Answers :class:`GetCacheMap`."""

    task: TaskId
    cache_map: CacheMap


@dataclass(frozen=True, slots=True)
class Found:
    """Answers :class:`LookUp`, with nothing as well."""

    task: TaskId
    records: tuple[CacheRecord, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Answers :class:`Load`."""

    task: TaskId
    result: Result


@dataclass(frozen=True, slots=True)
class NotLoadable:
    """Answers :class:`Load`: the record is gone, or of no use to this job. A miss, not an error."""

    task: TaskId


@dataclass(frozen=True, slots=True)
class ContentKeyed:
    """Answers :class:`ComputeContentKey`."""

    task: TaskId
    content: Digest


@dataclass(frozen=True, slots=True)
class Began:
    """A :class:`Run` has its inputs where it runs, and has begun. No answer: that one comes still.

    Changes nothing where the run had begun before, is over, or was told to stop.
    """

    task: TaskId
    #: On which node; "" where that means nothing.
    node: str = ""


@dataclass(frozen=True, slots=True)
class Ran:
    """Answers :class:`Run`: the result is there, held, and published under its keys."""

    task: TaskId
    result: Result
    #: Another's result was found after all.
    was_cached: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Answers :class:`Keep`."""

    task: TaskId


@dataclass(frozen=True, slots=True)
class Failed:
    """Answers anything: it can't be done."""

    task: TaskId
    error: ClusterError


@dataclass(frozen=True, slots=True)
class Stopped:
    """Answers :class:`Stop`: what was under way has come to its end, whatever that was."""

    task: TaskId


Answer = Mapped | Found | Loaded | NotLoadable | ContentKeyed | Ran | Kept | Failed | Stopped
Event = JobSubmitted | JobCancelled | Began | Answer


# -- instructions: what to do ---------------------------------------------------------------------------------
#
# Each with a task ends in exactly one answer that names it.


@dataclass(frozen=True, slots=True)
class GetCacheMap:
    """Ask an op for its cache map, on behalf of *job*."""

    task: TaskId
    job: JobId
    vertex: Vertex


@dataclass(frozen=True, slots=True)
class LookUp:
    """Find the records under any of *keys*."""

    task: TaskId
    keys: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Make sure that a record can be used, and hold what it names."""

    task: TaskId
    job: JobId
    vertex: Vertex
    hold: HoldId
    record: CacheRecord


@dataclass(frozen=True, slots=True)
class ComputeContentKey:
    """Digest what an op uses of one of its inputs."""

    task: TaskId
    job: JobId
    vertex: Vertex
    hold: HoldId
    index: int
    input: Result


@dataclass(frozen=True, slots=True)
class Run:
    """Carry an op out, hold its result and publish it under *keys*."""

    task: TaskId
    job: JobId
    vertex: Vertex
    hold: HoldId
    #: None: an empty filesystem.
    inputs: tuple[Result | None, ...]
    keys: tuple[Digest, ...]
    #: What is published under the keys already won't do.
    ignores_cache: bool


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish a cached result under further keys. Nobody waits for it; may fail."""

    keys: tuple[Digest, ...]
    result: Result


@dataclass(frozen=True, slots=True)
class Keep:
    """Hold a job's results for the job itself: the holds of its vertices go when it ends."""

    task: TaskId
    job: JobId
    results: tuple[tuple[Vertex, Result], ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Cancel a task whose answer nobody waits for any more."""

    task: TaskId


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of what is held for a vertex's use."""

    hold: HoldId


@dataclass(frozen=True, slots=True)
class Report:
    """Tell those who watch a job where one of its vertices stands. Each vertex ends once for each of its jobs."""

    job: JobId
    vertex: Digest
    name: str
    state: VertexState
    error: ClusterError | None = None
    #: As of :class:`Began`, while it runs.
    node: str = ""


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job has ended; nothing of it is remembered, and everything of it has been reported."""

    job: JobId
    outcome: JobOutcome


Instruction = GetCacheMap | LookUp | Load | ComputeContentKey | Run | Publish | Keep | Stop | Release | Report | EndJob
