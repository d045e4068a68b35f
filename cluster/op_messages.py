"""What schedulers and op workers tell each other: ops, by what they are over and for whom. No layer bytes."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.digest import Digest
from cluster.job import JobId
from cluster.lease import LeaseId
from cluster.messages import SessionInfo
from cluster.ref import RefId


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOpRequest:
    """Carry an op out on the called node, and publish what comes of it under its keys.

    The snapshots of all inputs are on the node already, and held by *lease_id* with their records.
    """

    #: Answers for secrets.
    session: SessionInfo
    #: Names this run, for :class:`WatchOpRequest`.
    run_id: str
    #: Payload of a :class:`cluster.graph.Vertex`.
    vertex: bytes
    #: Top refs of the inputs, in the op's order; None: an empty filesystem.
    inputs: tuple[RefId | None, ...]
    keys: tuple[Digest, ...]
    #: Image config that the result is published with (:class:`cluster.solver.values.Result`).
    config: bytes | None
    #: Holds what is made.
    lease_id: LeaseId
    #: Whose streams of events get what the op says.
    jobs: tuple[JobId, ...]
    timeout_s: float
    #: By what the layer that is made is open (:mod:`cluster.origin`); none: to nobody.
    origins: tuple[str, ...] = ()
    #: Seconds for which it may wait for room on the node's disk; None: ``node.disk_wait_s``.
    disk_wait_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOpResult:
    """What an op came to."""

    #: Top of the result's chain; None: an empty filesystem.
    ref: RefId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOpRequest:
    """Tell a further job what an op that runs says, from its start."""

    run_id: str
    job: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentKeyRequest:
    """Digest what an op uses of the content of one of its inputs, whose snapshot is on the called node."""

    session: SessionInfo
    vertex: bytes
    #: Which input.
    index: int
    #: Its top ref; None: an empty filesystem.
    input: RefId | None
    lease_id: LeaseId
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentKeyResult:
    """The digest of what is used."""

    digest: Digest
