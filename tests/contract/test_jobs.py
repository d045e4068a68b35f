"""What every JobStore promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.digest import digest_of
from cluster.errors import JobEndedError, JobIdTakenError, JobNotFoundError, StaleFenceError
from cluster.job import ClaimState, JobId, JobSpec, JobState
from cluster.messages import SessionInfo
from storage.jobs import RedisJobStore
from storage.presence import Presence
from tests.doubles.solver_stores import redis_solver_stores

J, K = JobId("job:1"), JobId("job:2")
DEFINITION = b"\x00definition"
TARGET = digest_of(b"target")


def spec(job=J, **changes):
    return replace(
        JobSpec(
            id=job,
            definition=digest_of(DEFINITION),
            targets=(TARGET,),
            session=SessionInfo(session_id="s", identities={"registry": "hash"}),
            no_cache=(TARGET,),
            labels={"who": "ü"},
        ),
        **changes,
    )


@pytest.fixture
def jobs(solver_stores):
    return solver_stores.jobs


async def claim_one(jobs, owner="scheduler:a", ttl_s=10.0):
    (claimed,) = await jobs.claim(owner, ttl_s=ttl_s, most=1)
    return claimed


async def test_a_job_is_what_was_submitted(jobs):
    """A job is queued as it was asked for, with its definition, and shown so."""
    record = await jobs.submit(spec(), DEFINITION)

    assert record.spec == spec()
    assert record.state is JobState.QUEUED
    assert record.ended_wall_s is None
    assert await jobs.get(J) == record
    assert await jobs.definition(J) == DEFINITION


async def test_a_submission_may_be_repeated(jobs):
    """The same job submitted again is that job, whatever has become of it; another under its ID is refused."""
    first = await jobs.submit(spec(), DEFINITION)
    assert await jobs.submit(spec(), DEFINITION) == first

    claimed = await claim_one(jobs)
    await jobs.end(claimed.claim, JobState.DONE)
    assert (await jobs.submit(spec(), DEFINITION)).state is JobState.DONE

    for other, definition in ((spec(is_detached=True), DEFINITION), (spec(), b"other")):
        with pytest.raises(JobIdTakenError, match=J):
            await jobs.submit(other, definition)
    assert await jobs.claim("scheduler:b", ttl_s=10.0, most=1) == []


async def test_unknown_jobs(jobs):
    """Whatever is asked of a job that is unknown is JobNotFoundError."""
    await jobs.submit(spec(), DEFINITION)
    claim = replace((await claim_one(jobs)).claim, job=K)

    for asked in (jobs.get, jobs.definition, jobs.attend, jobs.request_cancel):
        with pytest.raises(JobNotFoundError, match=K):
            await asked(K)
    with pytest.raises(JobNotFoundError, match=K):
        await jobs.end(claim, JobState.DONE)
    assert await jobs.renew([claim], ttl_s=10.0) == [ClaimState.LOST]


async def test_jobs_are_listed_newest_first(jobs):
    """jobs() lists the last ones submitted, the newest first."""
    for number in range(5):
        await jobs.submit(spec(JobId(f"job:{number}")), DEFINITION)

    assert [job.id for job in await jobs.jobs(most=3)] == ["job:4", "job:3", "job:2"]
    assert len(await jobs.jobs()) == 5


async def test_jobs_are_found_by_how_their_ids_begin(jobs, solver_stores):
    """Newest first, at most as many as asked for, and none that is forgotten; no character is special."""
    for name in ("ab1", "ab2", "a*", "b"):
        await jobs.submit(spec(JobId(name)), DEFINITION)

    assert await jobs.find("ab") == ["ab2", "ab1"]
    assert await jobs.find("a", most=2) == ["a*", "ab2"]
    assert await jobs.find("a*") == ["a*"]
    assert await jobs.find("") == ["b", "a*", "ab2", "ab1"]
    assert await jobs.find("abc") == []
    await jobs.request_cancel(JobId("ab1"))
    solver_stores.pass_time(8 * 86400)
    assert await jobs.find("ab") == ["ab2"]


async def test_a_job_is_claimed_once(jobs):
    """Of schedulers that claim at once each gets other jobs, with what they need to run them."""
    for number in range(6):
        await jobs.submit(spec(JobId(f"job:{number}")), DEFINITION)

    got = await asyncio.gather(*(jobs.claim(f"scheduler:{name}", ttl_s=10.0, most=4) for name in "abc"))

    claimed = [job for each in got for job in each]
    assert sorted(job.claim.job for job in claimed) == [f"job:{number}" for number in range(6)]
    assert len({job.claim.fence for job in claimed}) == 6
    assert {job.definition for job in claimed} == {DEFINITION}
    assert {(job.record.state, job.record.owner == job.claim.owner) for job in claimed} == {(JobState.RUNNING, True)}


async def test_a_dead_schedulers_job_is_taken_over(jobs, solver_stores):
    """A job whose owner stopped renewing goes to the next who claims, with a greater fence."""
    await jobs.submit(spec(), DEFINITION)
    first = await claim_one(jobs, "scheduler:a")
    assert await jobs.claim("scheduler:b", ttl_s=10.0, most=1) == []

    solver_stores.pass_time(11)
    second = await claim_one(jobs, "scheduler:b")

    assert second.claim.fence > first.claim.fence
    assert second.record.spec == first.record.spec
    assert (await jobs.get(J)).owner == "scheduler:b"
    assert await jobs.renew([first.claim, second.claim], ttl_s=10.0) == [ClaimState.LOST, ClaimState.HELD]


async def test_a_renewed_job_is_not_taken_over(jobs, solver_stores):
    """Renewal counts from now; one that was late is as good as long as nobody else has claimed."""
    await jobs.submit(spec(is_detached=True), DEFINITION)
    claimed = await claim_one(jobs)

    for late_s in (8, 8, 15):
        solver_stores.pass_time(late_s)
        assert await jobs.renew([claimed.claim], ttl_s=10.0) == [ClaimState.HELD]
    assert await jobs.claim("scheduler:b", ttl_s=10.0, most=1) == []


async def test_a_stale_scheduler_ends_nothing(jobs, solver_stores):
    """Who lost a job can't end it, before and after its successor has."""
    await jobs.submit(spec(), DEFINITION)
    first = await claim_one(jobs, "scheduler:a")
    solver_stores.pass_time(11)
    second = await claim_one(jobs, "scheduler:b")

    with pytest.raises(StaleFenceError, match=J):
        await jobs.end(first.claim, JobState.FAILED, error=b"mine")
    await jobs.end(second.claim, JobState.DONE, results={TARGET: b"\x01"})
    with pytest.raises(JobEndedError, match="done"):
        await jobs.end(first.claim, JobState.FAILED, error=b"mine")

    ended = await jobs.get(J)
    assert (ended.state, ended.error, ended.results) == (JobState.DONE, b"", {TARGET: b"\x01"})


async def test_a_job_ends_once(jobs):
    """An end may be told twice and changed never; who ended it has lost it."""
    await jobs.submit(spec(), DEFINITION)
    claim = (await claim_one(jobs)).claim

    await jobs.end(claim, JobState.FAILED, error=b"\x00error")
    ended = await jobs.get(J)
    await jobs.end(claim, JobState.FAILED, error=b"\x00error")
    with pytest.raises(JobEndedError, match="failed"):
        await jobs.end(claim, JobState.DONE)

    assert await jobs.get(J) == ended
    assert ended.error == b"\x00error"
    assert ended.ended_wall_s >= ended.created_wall_s
    assert await jobs.renew([claim], ttl_s=10.0) == [ClaimState.LOST]


async def test_an_ended_job_is_never_claimed(jobs, solver_stores):
    """A job that has ended stays so, however much time passes."""
    await jobs.submit(spec(), DEFINITION)
    await jobs.end((await claim_one(jobs)).claim, JobState.DONE)

    solver_stores.pass_time(1000)

    assert await jobs.claim("scheduler:b", ttl_s=10.0, most=1) == []


async def test_the_owner_learns_that_cancel_is_asked_for(jobs, solver_stores):
    """A running job is cancelled by its owner, also by one that took it over after the request."""
    await jobs.submit(spec(), DEFINITION)
    first = await claim_one(jobs)

    assert await jobs.request_cancel(J) is JobState.RUNNING
    assert await jobs.request_cancel(J) is JobState.RUNNING
    assert await jobs.renew([first.claim], ttl_s=10.0) == [ClaimState.CANCEL]

    solver_stores.pass_time(11)
    second = await claim_one(jobs, "scheduler:b")
    assert second.record.is_cancel_requested
    assert await jobs.renew([second.claim], ttl_s=10.0) == [ClaimState.CANCEL]
    await jobs.end(second.claim, JobState.CANCELLED)
    assert await jobs.request_cancel(J) is JobState.CANCELLED


async def test_a_queued_job_is_cancelled_at_once(jobs):
    """What nobody runs yet is over as soon as that is asked for, and never claimed."""
    await jobs.submit(spec(), DEFINITION)

    assert await jobs.request_cancel(J) is JobState.CANCELLED

    assert (await jobs.get(J)).ended_wall_s is not None
    assert await jobs.claim("scheduler:a", ttl_s=10.0, most=1) == []


async def test_a_done_job_cant_be_cancelled(jobs):
    """Who asks too late is told how it ended, and nothing changes."""
    await jobs.submit(spec(), DEFINITION)
    await jobs.end((await claim_one(jobs)).claim, JobState.DONE)
    ended = await jobs.get(J)

    assert await jobs.request_cancel(J) is JobState.DONE
    assert await jobs.get(J) == ended


async def test_a_silent_drivers_job_is_abandoned(jobs, solver_stores):
    """An attached job is abandoned 30 s after its driver was last heard of, and not if it is heard of again."""
    await jobs.submit(spec(), DEFINITION)
    claim = (await claim_one(jobs, ttl_s=1000.0)).claim

    solver_stores.pass_time(29)
    assert await jobs.attend(J) is JobState.RUNNING
    solver_stores.pass_time(29)
    assert await jobs.renew([claim], ttl_s=1000.0) == [ClaimState.HELD]
    solver_stores.pass_time(2)
    assert await jobs.renew([claim], ttl_s=1000.0) == [ClaimState.ABANDONED]
    assert (await jobs.get(J)).is_abandoned

    await jobs.attend(J)
    assert await jobs.renew([claim], ttl_s=1000.0) == [ClaimState.HELD]
    assert not (await jobs.get(J)).is_abandoned


async def test_a_detached_job_is_never_abandoned(jobs, solver_stores):
    """A detached job goes on without anybody, and attending to it doesn't change that."""
    await jobs.submit(spec(is_detached=True), DEFINITION)
    claim = (await claim_one(jobs, ttl_s=1000.0)).claim

    await jobs.attend(J)
    solver_stores.pass_time(100)

    assert await jobs.renew([claim], ttl_s=1000.0) == [ClaimState.HELD]
    assert not (await jobs.get(J)).is_abandoned


async def test_an_ended_job_is_not_abandoned(jobs, solver_stores):
    """Nobody needs to stay for a job that has ended, nor makes it look abandoned by asking again."""
    await jobs.submit(spec(), DEFINITION)
    await jobs.end((await claim_one(jobs)).claim, JobState.DONE)

    assert await jobs.attend(J) is JobState.DONE
    solver_stores.pass_time(100)

    assert not (await jobs.get(J)).is_abandoned


async def test_a_job_is_forgotten_a_week_after_its_end(jobs, solver_stores):
    """Ended jobs are known for a week, others for as long as they go on."""
    await jobs.submit(spec(J), DEFINITION)
    await jobs.end((await claim_one(jobs)).claim, JobState.DONE)
    await jobs.submit(spec(K), DEFINITION)

    solver_stores.pass_time(6.9 * 86400)
    assert {job.id for job in await jobs.jobs()} == {J, K}
    solver_stores.pass_time(0.2 * 86400)
    assert [job.id for job in await jobs.jobs()] == [K]
    with pytest.raises(JobNotFoundError):
        await jobs.get(J)


async def test_forgotten_jobs_leave_nothing(redis_farm):
    """Of a job that is forgotten nothing is left, once others come."""
    redis_farm.stores()
    stores = redis_solver_stores(redis_farm)
    for number in range(4):
        await stores.jobs.submit(spec(JobId(f"job:{number}")), DEFINITION)
        await stores.jobs.end((await claim_one(stores.jobs)).claim, JobState.DONE)
    stores.pass_time(8 * 86400)
    await stores.jobs.submit(spec(K, is_detached=True), DEFINITION)

    left = await redis_farm.links[0].execute("KEYS", f"{redis_farm.keys.prefix}:*")
    names = sorted(key.decode().removeprefix(redis_farm.keys.prefix) for key in left)
    assert names == [":fence", f":job:{K}", ":jobs", ":jobs:held"]
    assert await redis_farm.links[0].execute("ZRANGE", f"{redis_farm.keys.prefix}:jobs", 0, -1) == [K.encode()]


@pytest.mark.redis
async def test_no_driver_is_taken_for_gone_because_redis_was_away(redis_farm):
    """A job stays attended for what was left, and is abandoned when its driver doesn't come back either."""
    redis_farm.stores()
    jobs = RedisJobStore(redis_farm.links[0], redis_farm.keys)
    presence = Presence(redis_farm.links[0], redis_farm.keys)
    await presence.pulse()
    await jobs.submit(spec(), DEFINITION)

    await redis_farm.be_away(600.0)

    assert not (await jobs.get(J)).is_abandoned
    await presence.pulse()
    assert not (await jobs.get(J)).is_abandoned
    redis_farm.pass_time(31.0)
    assert (await jobs.get(J)).is_abandoned
