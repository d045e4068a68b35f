"""Jobs, and what their drivers see of them: one build of one definition, from its submission to its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from cluster import wire
from cluster.cache_options import CacheSource, CacheTarget
from cluster.digest import Digest, is_digest
from cluster.errors import MalformedPayloadError
from cluster.graph import Definition, image_registries
from cluster.messages import SessionInfo
from cluster.progress import ProgressItem
from cluster.reference import parse_reference

#: Chosen by the driver, so that a submission may be repeated.
JobId = NewType("JobId", str)


# -- jobs -----------------------------------------------------------------------------------------------------


class JobState(Enum):
    """Where a job stands. Every job reaches one of the last three, once, and stays there."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Tell whether a job in this state has ended."""
        return self in _JOB_ENDS


_JOB_ENDS = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a driver asks for; never changes. The definition itself is kept beside it."""

    id: JobId
    #: Of the definition's payload.
    definition: Digest
    #: Vertices whose results are wanted.
    targets: tuple[Digest, ...]
    #: Who answers for credentials, as long as it lives.
    session: SessionInfo
    #: Vertices to run afresh, whatever is cached.
    no_cache: tuple[Digest, ...] = ()
    #: Goes on when its driver is gone.
    is_detached: bool = False
    #: Remote caches that are read before, and written when all is there.
    cache_from: tuple[CacheSource, ...] = ()
    cache_to: tuple[CacheTarget, ...] = ()
    #: For people.
    labels: dict[str, str] = field(default_factory=dict)


def registries_of(
    definition: Definition, cache_from: Iterable[CacheSource], cache_to: Iterable[CacheTarget]
) -> frozenset[str]:
    """Return the hosts of the registries that a job may ask: of its images and its caches."""
    references = [*(cache.ref for cache in cache_from), *(cache.ref for cache in cache_to)]
    return image_registries(definition) | {parse_reference(ref).host for ref in references if ref}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as the store knows it at one moment; all times are the store's."""

    spec: JobSpec
    state: JobState
    created_wall_s: float
    #: None while it has not ended.
    ended_wall_s: float | None = None
    #: The scheduler that has it, or had it last; "" where none ever did.
    owner: str = ""
    #: Somebody asked for it to be cancelled; its owner is to end it.
    is_cancel_requested: bool = False
    #: It is attached, goes on, and its driver has not been heard of for too long.
    is_abandoned: bool = False
    #: Payload of the error (:func:`cluster.wire.encode_error`) that failed it; empty elsewhere.
    error: bytes = b""
    #: What came of each target of a job that is done, as payloads that only the solver reads.
    results: dict[Digest, bytes] = field(default_factory=dict)

    @property
    def id(self) -> JobId:
        """Return the job's ID."""
        return self.spec.id


@dataclass(frozen=True, slots=True, kw_only=True)
class JobClaim:
    """A scheduler's right to a job. A later claim has a greater fence, and makes this one void."""

    job: JobId
    owner: str
    fence: int


class ClaimState(Enum):
    """What the owner of a job is to do with it, as it learns when it renews."""

    HELD = "held"
    #: Somebody asked for it: end it as cancelled.
    CANCEL = "cancel"
    #: Its driver is gone: end it as cancelled.
    ABANDONED = "abandoned"
    #: Another owns it, or it has ended: let go of it, and write no more.
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job, with the right to run it and what to run."""

    claim: JobClaim
    record: JobRecord
    #: Payload of a :class:`cluster.graph.Definition`.
    definition: bytes


# -- what drivers see -------------------------------------------------------------------------------------------


class VertexState(Enum):
    """Where a vertex stands for one job. Every vertex of a job reaches one of the last four."""

    #: Wanted; its inputs are not there yet, or not where it is to run.
    WAITING = "waiting"
    #: The op itself goes on. Where that comes to nothing and is begun anew it waits again before.
    RUNNING = "running"
    CACHED = "cached"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Tell whether a vertex in this state has ended for the job."""
        return self in _VERTEX_ENDS


_VERTEX_ENDS = frozenset({VertexState.CACHED, VertexState.COMPLETED, VertexState.FAILED, VertexState.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class VertexEvent:
    """A vertex has reached a state; a later one of that vertex replaces it."""

    vertex: Digest
    #: What people call it; may be empty.
    name: str
    state: VertexState
    #: Payload of the error (:func:`cluster.wire.encode_error`) of a vertex that failed; empty elsewhere.
    error: bytes = b""
    #: Where it runs; "" for another state, and for what runs on no node.
    node: str = ""
    #: When it was told, by the store's clock; set by the store.
    wall_s: float = 0.0


class LogStream(Enum):
    """Which of a command's outputs."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True, kw_only=True)
class VertexLog:
    """A chunk of what a vertex's command said: whole lines but for the last one, secrets taken out."""

    vertex: Digest
    stream: LogStream
    text: str
    #: As :attr:`VertexEvent.wall_s`.
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VertexLogDropped:
    """From here on lines of this vertex are missing: the job has said more than is kept."""

    vertex: Digest
    #: As :attr:`VertexEvent.wall_s`.
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VertexLayers:
    """A layer moves or is extracted for the sake of a vertex."""

    vertex: Digest
    item: ProgressItem
    #: As :attr:`VertexEvent.wall_s`.
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWarning:
    """Something of the job, and of no vertex of it, is not as it was asked for; it goes on."""

    text: str
    #: As :attr:`VertexEvent.wall_s`.
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    """The job has ended; nothing comes after it."""

    state: JobState
    #: As :attr:`JobRecord.error`.
    error: bytes = b""
    #: As :attr:`VertexEvent.wall_s`.
    wall_s: float = 0.0


_LAYER_STREAM = "job:"


def layer_stream(job: JobId, vertex: Digest) -> str:
    """Return the progress stream ID of a vertex's layers: what is published there is told to the job."""
    return f"{_LAYER_STREAM}{job}:{vertex}"


def parse_layer_stream(stream: str) -> tuple[JobId, Digest] | None:
    """Return what :func:`layer_stream` made a stream ID of; None for any other stream."""
    job, _, vertex = stream.removeprefix(_LAYER_STREAM).rpartition(":sha256:")
    vertex = f"sha256:{vertex}"
    if not stream.startswith(_LAYER_STREAM) or not job or not is_digest(vertex):
        return None
    return JobId(job), Digest(vertex)


JobEvent = VertexEvent | VertexLog | VertexLogDropped | VertexLayers | JobWarning | JobEnded

_EVENT_KINDS: dict[str, type[JobEvent]] = {
    "vertex": VertexEvent,
    "vertex-log": VertexLog,
    "vertex-log-dropped": VertexLogDropped,
    "vertex-layers": VertexLayers,
    "job-warning": JobWarning,
    "job-ended": JobEnded,
}
_KINDS_OF_EVENTS: dict[type[JobEvent], str] = {cls: kind for kind, cls in _EVENT_KINDS.items()}


def encode_event(event: JobEvent) -> tuple[str, bytes]:
    """Return an event as a kind and a payload of it."""
    kind = _KINDS_OF_EVENTS[type(event)]
    return kind, wire.encode(kind, event)


def decode_event(kind: str, data: bytes) -> JobEvent:
    """Return the event in a payload of that kind; raises as :func:`cluster.wire.decode`."""
    if (cls := _EVENT_KINDS.get(kind)) is None:
        raise MalformedPayloadError(kind, "there is no such event of a job")
    return wire.decode(kind, cls, data)
