"""Ports of the solver to where its state rests: cache keys, jobs, what drivers see of these, and what is where.

All time is the store's. Every method may raise UnavailableError: no answer, the write may or may not have happened.
Every call ends by the store's own deadline; following has one of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.digest import Digest
from cluster.job import ClaimedJob, ClaimState, JobClaim, JobEvent, JobId, JobRecord, JobSpec, JobState
from cluster.solver.values import CacheRecord, Result

#: Seconds for which the driver of an attached job is taken to be there without saying so.
ATTENDED_S = 30.0


#: Seconds for which it is believed that a node has a snapshot, counted from when it was last noted.
HERE_S = 7 * 24 * 3600.0
#: Seconds for which it is believed that a snapshot is arriving: its node may have died, or given it up.
ARRIVING_S = 900.0


class KeyStore(Protocol):
    """Cache keys and the results known for them: more than :class:`cluster.solver.ports.KeyStore` asks for."""

    async def lookup(self, keys: Sequence[Digest]) -> list[CacheRecord]:
        """Return the records under any of *keys*, each once, most recently published first, in one step.

        That a record is found doesn't mean that its result can still be had.
        """
        ...

    async def publish(self, keys: Sequence[Digest], result: Result) -> CacheRecord:
        """Record *result* under each of *keys*, in one step. May be repeated: it is one record, published later.

        A key keeps its 16 most recent records; keys and records that nobody looks up or publishes for 30 days go.
        """
        ...

    async def forget(self, record: CacheRecord) -> bool:
        """Forget a record whose result has vanished, unless it was published again since *record* was looked up.

        Returns:
            True if this call forgot it.
        """
        ...


class JobStore(Protocol):
    """Jobs, who runs them, and how they end. Each method is one atomic step.

    A job is owned by the scheduler that claimed it last. Ownership is for a time that its owner extends; when it has
    lapsed, anyone may claim the job. Then the former owner's fence is stale, and it can't end the job any more.
    """

    async def submit(self, spec: JobSpec, definition: bytes) -> JobRecord:
        """Record a job with its definition's payload, for a scheduler to claim. May be repeated.

        The driver of an attached one is taken to be there for :data:`ATTENDED_S` seconds.

        Raises:
            JobIdTakenError: another job has that ID.
        """
        ...

    async def claim(self, owner: str, *, ttl_s: float, most: int) -> list[ClaimedJob]:
        """Claim up to *most* jobs that nobody holds, those longest without an owner first; they are running then.

        Where the answer was lost, they come free again after *ttl_s* seconds.
        """
        ...

    async def renew(self, claims: Sequence[JobClaim], *, ttl_s: float) -> list[ClaimState]:
        """Hold claimed jobs until *ttl_s* seconds from now; return what each one's owner is to do.

        A claim that lapsed is renewed all the same as long as nobody else has made one.
        """
        ...

    async def end(
        self, claim: JobClaim, state: JobState, *, error: bytes = b"", results: Mapping[Digest, bytes] | None = None
    ) -> None:
        """End a job, and tell those who follow it (:class:`cluster.job.JobEnded`), in one step. May be repeated.

        Raises:
            JobNotFoundError: it is unknown.
            JobEndedError: it has ended otherwise.
            StaleFenceError: another has claimed it since.
        """
        ...

    async def request_cancel(self, job: JobId) -> JobState:
        """Ask a job's owner to cancel it; one that was never claimed is cancelled at once. May be repeated.

        Returns:
            Its state after that: it may have ended before.

        Raises:
            JobNotFoundError: it is unknown.
        """
        ...

    async def attend(self, job: JobId) -> JobState:
        """Tell that an attached job's driver is there for another :data:`ATTENDED_S` seconds; return its state.

        Raises:
            JobNotFoundError: it is unknown.
        """
        ...

    async def get(self, job: JobId) -> JobRecord:
        """Return a job, until a week after its end; JobNotFoundError if it is unknown."""
        ...

    async def find(self, start: str, *, most: int = 100) -> list[JobId]:
        """Return the IDs that begin with *start* of the last *most* such jobs submitted, newest first."""
        ...

    async def definition(self, job: JobId) -> bytes:
        """Return the payload of a job's definition; JobNotFoundError if it is unknown."""
        ...

    async def jobs(self, *, most: int = 100) -> list[JobRecord]:
        """Return the last *most* jobs submitted, newest first."""
        ...


class JobEvents(Protocol):
    """One stream of events a job: capped, and replayable from its start by anyone who comes late.

    It is capped by leaving out what comes too late, not by forgetting the start: a vertex's states are always kept,
    of logs 16 MiB a job (then :class:`cluster.job.VertexLogDropped` tells it, once a vertex), of layers 20,000 steps
    and every end.

    A layer of a vertex is told once, whatever the number of those who wait for it and tell of it: a step only where it
    takes the layer on, and one end. Who gives up ends a layer too; if it is reached after all, for another, that is
    told. Once it is reached nothing more is told of it, as words of those who waited come late; after it was given up a
    step begins it anew.
    """

    async def publish(self, job: JobId, events: Sequence[JobEvent], *, fence: int | None = None) -> None:
        """Append *events*, together and in order, but for what says nothing new of a layer.

        After the job's end they are dropped, as nobody is to see them.
        Where a connection drops they may be there twice. The event of a job's end comes from :meth:`JobStore.end`.

        Args:
            job: Whose.
            events: At most some hundreds at once.
            fence: That of the publisher's claim, if it speaks as the job's owner.

        Raises:
            JobNotFoundError: it is unknown.
            StaleFenceError: another has claimed it since; nothing was published.
        """
        ...

    async def told(self, job: JobId) -> list[JobEvent]:
        """Return the job's events so far; JobNotFoundError if it is unknown."""
        ...

    def follow(self, job: JobId, *, deadline_s: float) -> AsyncIterator[JobEvent]:
        """Yield the job's events from the first one, then live, until :class:`cluster.job.JobEnded`, the last one.

        Raises:
            JobNotFoundError: it is unknown.
            DeadlineExceededError: it has not ended after *deadline_s* seconds.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """What is known of some snapshots and nodes at one moment."""

    #: Chain ID to the nodes that have its snapshot, of those asked for.
    here: Mapping[Digest, frozenset[str]]
    #: Likewise, to those that are getting it and do not have it.
    arriving: Mapping[Digest, frozenset[str]]
    #: Node to the ops that it runs.
    running: Mapping[str, int]


class Whereabouts(Protocol):
    """Which nodes have, or are getting, which snapshots, and how many ops each runs: hints for placing ops.

    Nothing rests on them but speed: they lapse by themselves, and are lost with the store's memory. Each method is one
    round trip (but for notes of thousands of chains), and may be repeated.
    """

    async def note_arriving(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node is getting the snapshots of *chains*: believed for :data:`ARRIVING_S` seconds."""
        ...

    async def note_here(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node has the snapshots of *chains*, or has used them: believed for :data:`HERE_S` seconds."""
        ...

    async def note_gone(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node has the snapshots of *chains* no more, and is not getting them."""
        ...

    async def forget_node(self, node: str) -> None:
        """Forget all snapshots that the node has or is getting; what is noted later counts."""
        ...

    async def begin_op(self, node: str, run_id: str, *, ttl_s: float) -> None:
        """Say that an op runs on the node, or waits there for its turn, for *ttl_s* > 0 seconds from now at most."""
        ...

    async def end_op(self, node: str, run_id: str) -> None:
        """Say that an op runs there no more; does nothing where it has lapsed."""
        ...

    async def find(self, chains: Sequence[Digest], nodes: Sequence[str]) -> Located:
        """Return what is known of *chains* and *nodes*, each of them, unknown ones too."""
        ...
