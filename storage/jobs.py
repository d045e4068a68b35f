"""Jobs in Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.audit import AuditEntry, Operation
from cluster.digest import Digest
from cluster.errors import JobEndedError, JobIdTakenError, JobNotFoundError, StaleFenceError
from cluster.job import (
    ClaimedJob,
    ClaimState,
    JobClaim,
    JobEnded,
    JobId,
    JobRecord,
    JobSpec,
    JobState,
    encode_event,
)
from cluster.solver_ports import ATTENDED_S
from storage.audit import RedisAudit, noted
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink

_SPEC: Codec[JobSpec] = Codec("job", JobSpec)
_RESULTS: Codec[dict[Digest, bytes]] = Codec("job-results", dict[Digest, bytes])
_US = 1_000_000


class RedisJobStore:
    """Implements :class:`cluster.solver_ports.JobStore`; each method is one script, so one atomic step."""

    def __init__(self, link: RedisLink, keys: Keys, audit: RedisAudit | None = None) -> None:
        self._link = link
        self._keys = keys
        self._prefix = keys.prefix
        self._audit = audit

    async def submit(self, spec: JobSpec, definition: bytes) -> JobRecord:
        """Record a job with its definition's payload."""
        attended = "" if spec.is_detached else _ms(ATTENDED_S)
        arguments = (spec.id, _SPEC.encode(spec), definition, attended)
        job = await self._link.run("job_submit", self._prefix, *arguments, may_repeat=True)
        if job is None:
            raise JobIdTakenError(spec.id)
        return _job(job)

    async def claim(self, owner: str, *, ttl_s: float, most: int) -> list[ClaimedJob]:
        """Claim jobs that nobody holds."""
        claimed = await self._link.run("job_claim", self._prefix, owner, _ms(ttl_s), most, may_repeat=True)
        return [
            ClaimedJob(
                claim=JobClaim(job=JobId(job_id.decode()), owner=owner, fence=fence),
                record=_job(job),
                definition=definition,
            )
            for job_id, fence, definition, job in claimed
        ]

    async def renew(self, claims: Sequence[JobClaim], *, ttl_s: float) -> list[ClaimState]:
        """Hold claimed jobs for longer."""
        pairs = [part for claim in claims for part in (claim.job, claim.fence)]
        answers = await self._link.run("job_renew", self._prefix, _ms(ttl_s), *pairs, may_repeat=True)
        return [ClaimState(answer.decode()) for answer in answers]

    async def end(
        self, claim: JobClaim, state: JobState, *, error: bytes = b"", results: Mapping[Digest, bytes] | None = None
    ) -> None:
        """End a job."""
        packed = _RESULTS.encode(dict(results)) if results else b""
        _, event = encode_event(JobEnded(state=state, error=error))
        arguments = (claim.job, claim.fence, state.value, error, packed, event)
        answer = (await self._link.run("job_end", self._prefix, *arguments, may_repeat=True)).decode()
        match answer:
            case "ok":
                return
            case "unknown":
                raise JobNotFoundError(claim.job)
            case "stale":
                raise StaleFenceError(f"job:{claim.job}", claim.fence)
            case _:
                raise JobEndedError(claim.job, answer)

    async def request_cancel(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled."""
        _, event = encode_event(JobEnded(state=JobState.CANCELLED))
        noting = noted(self._audit, AuditEntry(operation=Operation.CANCEL, job=job))
        return _state(job, await self._link.run("job_cancel", self._prefix, job, event, *noting, may_repeat=True))

    async def attend(self, job: JobId) -> JobState:
        """Tell that a job's driver is there."""
        return _state(job, await self._link.run("job_attend", self._prefix, job, _ms(ATTENDED_S), may_repeat=True))

    async def get(self, job: JobId) -> JobRecord:
        """Return a job."""
        found = await self._link.run("job_get", self._prefix, job, may_repeat=True)
        if found is None:
            raise JobNotFoundError(job)
        return _job(found)

    async def find(self, start: str, *, most: int = 100) -> list[JobId]:
        """Return the jobs whose IDs begin with *start*."""
        found = await self._link.run("job_find", self._prefix, start, most, may_repeat=True)
        return [JobId(job_id.decode()) for job_id in found]

    async def definition(self, job: JobId) -> bytes:
        """Return the payload of a job's definition."""
        found: bytes | None = await self._link.execute("HGET", self._keys.job(job), "definition", may_repeat=True)
        if found is None:
            raise JobNotFoundError(job)
        return found

    async def jobs(self, *, most: int = 100) -> list[JobRecord]:
        """Return the newest jobs."""
        return [_job(found) for found in await self._link.run("job_list", self._prefix, most, may_repeat=True)]


def _ms(seconds: float) -> int:
    """Return milliseconds, rounded up: nothing lapses sooner than asked for."""
    return -int(-seconds * 1000 // 1)


def _state(job: JobId, found: bytes | None) -> JobState:
    if found is None:
        raise JobNotFoundError(job)
    return JobState(found.decode())


def _job(found: list[Any]) -> JobRecord:
    spec, state, created, ended, owner, cancel, abandoned, error, results = found
    return JobRecord(
        spec=_SPEC.decode(spec),
        state=JobState(state.decode()),
        created_wall_s=int(created) / _US,
        ended_wall_s=int(ended) / _US if ended else None,
        owner=owner.decode(),
        is_cancel_requested=cancel == b"1",
        is_abandoned=bool(abandoned),
        error=error,
        results=_RESULTS.decode(results) if results else {},
    )
