"""What commands outside the cluster look at: calls whose results are values of the face, not of the cluster."""

from __future__ import annotations

from cluster.circuit import GivenUp
from cluster.gateway import EventTold, Method, Named, Nothing, Stream
from cluster.messages import ActorRecord
from lazyfarm.records import JobDetails, RefDetails

ACTORS: Method[Nothing, list[ActorRecord]] = Method("actors", Nothing, list[ActorRecord])
GIVEN_UP: Method[Nothing, list[GivenUp]] = Method("given-up", Nothing, list[GivenUp])
REF_DETAILS = Method("ref-details", Named, RefDetails)


JOBS: Method[Nothing, list[JobDetails]] = Method("jobs", Nothing, list[JobDetails])
JOB_DETAILS = Method("job-details", Named, JobDetails)
#: A payload; empty where it is unknown.
DEFINITION = Method("definition", Named, bytes)
#: What a job's driver was told so far, and no more.
TOLD = Stream("told", Named, EventTold)
