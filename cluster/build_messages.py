"""What crosses actor boundaries while a build runs; see :mod:`cluster.messages`."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.digest import Digest
from cluster.lease import LeaseId
from cluster.messages import SessionInfo
from cluster.provider import DescHandler
from cluster.ref import RefId

# -- jobs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitRequest:
    """Build a definition; how it goes and ends is in Redis, under the job's ID."""

    session: SessionInfo
    #: Chosen by the driver, so that a submission may be repeated.
    job: str
    #: Payload of a :class:`cluster.graph.Definition`.
    definition: bytes
    #: Vertices to run afresh, whatever is cached.
    no_cache: tuple[Digest, ...] = ()
    #: Goes on when its driver is gone.
    is_detached: bool = False
    #: For people.
    labels: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitResult:
    """The job is recorded, and will be run."""

    job: str


# -- images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveRequest:
    """Read an image's manifest and config; no ref is made."""

    session: SessionInfo
    image: str
    platform: str | None
    plain_http: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveResult:
    """What an image is at this moment."""

    #: Normalised reference by digest: pulling it gives this very image.
    image: str
    manifest: Digest
    platform: str
    config: bytes
    handlers: tuple[DescHandler, ...]


# -- ops --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunVertexRequest:
    """Run one op over refs."""

    session: SessionInfo
    job: str
    #: Payload of the vertex (:func:`cluster.graph.encode_vertex`).
    vertex: bytes
    name: str
    #: The inputs' refs, in the op's order; None: an empty filesystem.
    inputs: tuple[RefId | None, ...]
    #: Cache keys under which the result is published.
    keys: tuple[Digest, ...]
    #: Providers for the inputs' lazy layers.
    handlers: tuple[DescHandler, ...]
    #: False: a result that is published already will do.
    ignores_cache: bool
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class RunVertexResult:
    """What an op came to."""

    #: None: an empty filesystem.
    ref: RefId | None
    #: Cache record it was published as.
    record: str
    #: True where another's result was found after all.
    was_cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentKeyRequest:
    """Digest what an op reads of one of its inputs."""

    session: SessionInfo
    vertex: bytes
    #: Which input.
    index: int
    ref: RefId | None
    handlers: tuple[DescHandler, ...]
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentKeyResult:
    """The digest of the selected files, not of when they were made."""

    digest: Digest
