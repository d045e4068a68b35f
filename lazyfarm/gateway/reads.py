"""What commands outside the cluster look at: calls whose results are values of the face, not of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.circuit import GivenUp
from cluster.collect.leaks import Leak
from cluster.gateway import EventTold, Method, Named, Nothing, Stream
from cluster.lease import Lease
from cluster.messages import ActorRecord
from lazyfarm.records import JobDetails, RefDetails


@dataclass(frozen=True, slots=True, kw_only=True)
class PinNamedCall:
    """Pin what a name stands for."""

    name: str
    ttl_s: float | None
    labels: dict[str, str]


ACTORS: Method[Nothing, list[ActorRecord]] = Method("actors", Nothing, list[ActorRecord])
GIVEN_UP: Method[Nothing, list[GivenUp]] = Method("given-up", Nothing, list[GivenUp])
REF_DETAILS = Method("ref-details", Named, RefDetails)


LEASE = Method("lease", Named, Lease)
#: Each makes a lease.
PIN_NAMED = Method("pin-named", PinNamedCall, Lease, may_repeat=False)
LEAKS: Method[Nothing, list[Leak]] = Method("leaks", Nothing, list[Leak])

JOBS: Method[Nothing, list[JobDetails]] = Method("jobs", Nothing, list[JobDetails])
JOB_DETAILS = Method("job-details", Named, JobDetails)
#: A payload; empty where it is unknown.
DEFINITION = Method("definition", Named, bytes)
#: What a job's driver was told so far, and no more.
TOLD = Stream("told", Named, EventTold)
