"""What commands outside the cluster look at: calls whose results are values of the face, not of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.circuit import GivenUp
from cluster.collect.leaks import Leak
from cluster.gateway import EventTold, Method, Named, Nothing, Stream
from cluster.lease import Lease
from cluster.messages import ActorRecord
from cluster.ports import ObjectInfo
from lazyfarm.explain import LayerWait, PullStory
from lazyfarm.miss import Miss
from lazyfarm.now import Now
from lazyfarm.records import JobDetails, RefDetails
from lazyfarm.status import FarmStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class PinNamedCall:
    """Pin what a name stands for."""

    name: str
    ttl_s: float | None
    labels: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchCall:
    """Tell what layers wait for, or how they came."""

    name: str
    #: Seconds between two looks at what moves.
    watch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MissCall:
    """Tell why a step was not found in the cache; as :meth:`lazyfarm.explain.FarmExplain.miss`."""

    step: str
    job: str
    against: str


STATUS = Method("status", Nothing, FarmStatus)
ACTORS: Method[Nothing, list[ActorRecord]] = Method("actors", Nothing, list[ActorRecord])
GIVEN_UP: Method[Nothing, list[GivenUp]] = Method("given-up", Nothing, list[GivenUp])
NOW = Method("now", Nothing, Now)
REF_DETAILS = Method("ref-details", Named, RefDetails)

QUARANTINED: Method[Nothing, list[ObjectInfo]] = Method("quarantined", Nothing, list[ObjectInfo])

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

WAIT: Method[WatchCall, list[LayerWait]] = Method("wait", WatchCall, list[LayerWait])
PULL_STORY = Method("pull-story", WatchCall, PullStory)
MISS = Method("miss", MissCall, Miss)
