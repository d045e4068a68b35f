"""A build as its driver sees it: submitted once, cancelled with who awaits it unless it is detached, and replayed."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from cluster.digest import digest_of
from cluster.errors import (
    InternalError,
    InvalidArgumentError,
    JobCancelledError,
    JobNotFoundError,
    ProcessFailedError,
    UnavailableError,
)
from cluster.job import JobEnded, JobId, JobSpec, JobState, JobWarning
from cluster.messages import SessionInfo
from cluster.wire import encode_error
from lazyfarm.job import Job, Result, read_secrets
from lazyfarm.ref import Ref
from storage.memory_solver import MemoryJobEvents, MemoryJobStore, SolverMemory
from tests.doubles.stores import FakeClock, eventually

JOB = JobId("j1")
V = digest_of(b"v")


class Farm:
    """What a job asks of its farm, over a store of jobs in memory."""

    def __init__(self):
        self.memory = SolverMemory(FakeClock())
        self.jobs, self.stream = MemoryJobStore(self.memory), MemoryJobEvents(self.memory)
        self.attending = 0
        self.was_attended = False
        self.submissions = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error = None
        self.is_detached = False

    async def submit(self):
        self.submissions += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        session = SessionInfo(session_id="s")
        spec = JobSpec(id=JOB, definition=V, targets=(V,), session=session, is_detached=self.is_detached)
        await self.jobs.submit(spec, b"")

    async def end(self, state=JobState.DONE, *, error=b""):
        """Have a scheduler build it."""
        (claimed,) = await self.jobs.claim("s0", ttl_s=10, most=1)
        await self.stream.publish(JOB, [JobWarning(text="built")])
        await self.jobs.end(claimed.claim, state, error=error, results={V: b""} if state is JobState.DONE else None)

    # -- what a job asks --

    @asynccontextmanager
    async def attending_job(self, job):
        self.attending += 1
        self.was_attended = True
        try:
            yield
        finally:
            self.attending -= 1

    def follow_job(self, job):
        return self.stream.follow(job, deadline_s=10)

    async def cancel_job(self, job):
        return await self.jobs.request_cancel(job)

    async def get_job(self, job):
        return await self.jobs.get(job)

    async def job_result(self, record):
        assert self.attending or not self.was_attended
        return Result(record.id, (Ref(self, (), None),))


@pytest.fixture
def farm():
    return Farm()


def job_of(farm, **more):
    options = {"submit": farm.submit, "is_detached": farm.is_detached} | more
    return Job(farm, JOB, **options)


async def awaiting(job):
    return await job


async def start(farm, job):
    """Await a job until it is submitted and looked at."""
    task = asyncio.create_task(awaiting(job))
    await eventually(lambda: JOB in farm.memory.jobs)
    return task


async def stop(task):
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


# -- results -----------------------------------------------------------------------------------------------------------


async def test_a_job_is_submitted_when_it_is_awaited(farm):
    """Once, however many await it, and attended until its result is held; not before anybody does."""
    job = job_of(farm)
    assert (farm.submissions, repr(job), job.id) == (0, "<Job j1>", JOB)
    tasks = [await start(farm, job), await start(farm, job)]
    await farm.end()
    for task in tasks:
        assert (await task).job == JOB
    assert (await job).job == JOB
    assert (farm.submissions, farm.attending, farm.was_attended) == (1, 0, True)


async def test_who_looks_on_sees_all_of_it(farm):
    """A callback gets every event to the last one; the record says how it stands."""
    events = []
    job = job_of(farm, on_event=events.append)
    task = await start(farm, job)
    assert (await job.record()).state is JobState.QUEUED
    await farm.end()
    await task
    assert [type(event) for event in events] == [JobWarning, JobEnded]


async def test_a_failed_job_raises_what_it_failed_with(farm):
    """As it was raised where the op ran."""
    task = await start(farm, job_of(farm))
    await farm.end(JobState.FAILED, error=encode_error(ProcessFailedError(("make",), 2, ("oops",))))
    with pytest.raises(ProcessFailedError) as caught:
        await task
    assert caught.value.exit_code == 2


async def test_a_job_that_was_cancelled_by_another_says_so(farm):
    """It is no cancellation of who awaits it."""
    job = job_of(farm)
    task = await start(farm, job)
    assert await job.cancel() is JobState.CANCELLED
    with pytest.raises(JobCancelledError):
        await task
    assert await job.cancel() is JobState.CANCELLED


async def test_a_submission_that_fails_is_the_error(farm):
    """Of all who wait for it, and nothing is attended."""
    farm.error = UnavailableError("redis", "gone")
    job = job_of(farm)
    for ask in (awaiting(job), job.submitted()):
        with pytest.raises(UnavailableError):
            await ask
    assert not farm.was_attended


async def test_events_that_end_without_an_end_are_a_bug(farm):
    """Never a result."""

    async def nothing(job):
        return
        yield

    farm.follow_job = nothing
    with pytest.raises(InternalError):
        await job_of(farm)


# -- cancelled awaits --------------------------------------------------------------------------------------------------


async def test_who_stops_awaiting_an_attached_job_cancels_it(farm):
    """Nobody is there for it any more."""
    await stop(await start(farm, job_of(farm)))
    assert (await farm.jobs.get(JOB)).state is JobState.CANCELLED
    assert farm.attending == 0


async def test_who_stops_awaiting_a_detached_job_lets_it_go_on(farm):
    """It was submitted to do so; it is not attended either."""
    farm.is_detached = True
    await stop(await start(farm, job_of(farm)))
    assert (await farm.jobs.get(JOB)).state is JobState.QUEUED
    assert not farm.was_attended


async def test_who_only_looks_on_cancels_nothing(farm):
    """The job is another's: neither attended nor cancelled by who found it."""
    await farm.submit()
    await stop(await start(farm, job_of(farm, submit=None)))
    assert (await farm.jobs.get(JOB)).state is JobState.QUEUED
    assert not farm.was_attended


async def test_a_job_that_can_t_be_cancelled_hinders_nobody(farm):
    """Redis is away: who awaits it is cancelled all the same. The farm will miss the driver."""

    async def away(job):
        raise UnavailableError("redis", "gone")

    farm.cancel_job = away
    await stop(await start(farm, job_of(farm)))
    assert (await farm.jobs.get(JOB)).state is JobState.QUEUED


async def test_a_job_that_is_cancelled_before_it_is_submitted_never_is(farm):
    """Its files were being sent: they would be sent, and built, for nobody."""
    farm.gate.clear()
    job = job_of(farm)
    task = asyncio.create_task(awaiting(job))
    await eventually(lambda: farm.submissions)
    await stop(task)
    farm.gate.set()
    assert len(asyncio.all_tasks()) == 1
    with pytest.raises(JobNotFoundError):
        await farm.jobs.get(JOB)


async def test_who_awaits_beside_who_is_cancelled_learns_that_the_job_is(farm):
    """Also while it is submitted: that is no cancellation of theirs. Awaited again, it is submitted again."""
    farm.gate.clear()
    job = job_of(farm)
    leaves, stays = (asyncio.create_task(awaiting(job)) for _ in range(2))
    await eventually(lambda: farm.submissions)
    await stop(leaves)
    with pytest.raises(JobCancelledError):
        await stays
    farm.gate.set()
    again = await start(farm, job)
    await farm.end()
    assert (await again).job == JOB


async def test_a_detached_job_is_submitted_whoever_stops_waiting_for_that(farm):
    """From there on it goes on by itself: one that stops waiting takes it from no other."""
    farm.is_detached = True
    farm.gate.clear()
    job = job_of(farm)
    leaves, stays = (asyncio.create_task(job.submitted()) for _ in range(2))
    await eventually(lambda: farm.submissions)
    await stop(leaves)
    farm.gate.set()
    assert await stays is job
    assert (await farm.jobs.get(JOB)).state is JobState.QUEUED


# -- events ------------------------------------------------------------------------------------------------------------


async def test_events_are_replayed_to_who_comes_late(farm):
    """From the first one to the end, as often as they are asked for; who asks first submits it, and is there for it."""
    job = job_of(farm)
    seen = []

    async def look():
        async for event in job.events():
            assert farm.attending
            seen.append(event)

    looking = asyncio.create_task(look())
    await eventually(lambda: JOB in farm.memory.jobs)
    await farm.end()
    await looking
    assert [event async for event in job.events()] == seen
    assert [type(event) for event in seen] == [JobWarning, JobEnded]
    assert (farm.submissions, farm.attending) == (1, 0)


async def test_who_stops_looking_cancels_nothing(farm):
    """The job may be awaited yet."""
    job = job_of(farm)
    looking = job.events()
    nothing_yet = asyncio.create_task(anext(looking))
    await eventually(lambda: JOB in farm.memory.jobs)
    await stop(nothing_yet)
    await looking.aclose()
    assert (farm.attending, (await job.record()).state) == (0, JobState.QUEUED)


# -- values ------------------------------------------------------------------------------------------------------------


def test_only_one_target_is_the_result(farm):
    """Of several, or of none, each has to be named."""
    ref = Ref(farm, (), None)
    assert Result(JOB, (ref,)).ref is ref
    for refs in ((), (ref, ref)):
        with pytest.raises(InvalidArgumentError, match=f"{len(refs)} targets"):
            assert Result(JOB, refs).ref


def test_secrets_are_read_where_the_driver_runs(tmp_path):
    """Bytes as they are, text in UTF-8, files by what is in them."""
    path = tmp_path / "token"
    path.write_bytes(b"\xff\n")
    given = {"bytes": b"\x00", "array": bytearray(b"a"), "text": "ü", "file": path}
    assert read_secrets(given) == {"bytes": b"\x00", "array": b"a", "text": "ü".encode(), "file": b"\xff\n"}


def test_a_secret_that_cant_be_read_is_named(tmp_path):
    """By its ID and where it was looked for; a directory is no secret."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InvalidArgumentError) as caught:
            read_secrets({"good": b"secret-value", "token": path})
        assert "token" in caught.value.name
        assert caught.value.value == str(path)
        assert "secret-value" not in str(caught.value)


def test_a_secret_is_small_enough_to_rest_nowhere():
    """What Ray would keep in its object store is refused; the value is not in the error."""
    assert len(read_secrets({"token": b"x" * 65536})["token"]) == 65536
    with pytest.raises(InvalidArgumentError, match="65537 bytes") as caught:
        read_secrets({"token": b"x" * 65537})
    assert "xx" not in str(caught.value)
