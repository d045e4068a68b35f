"""What every JobEvents promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.digest import digest_of
from cluster.errors import DeadlineExceededError, InternalError, JobNotFoundError, StaleFenceError
from cluster.job import (
    JobEnded,
    JobId,
    JobSpec,
    JobState,
    LogStream,
    VertexEvent,
    VertexLayers,
    VertexLog,
    VertexLogDropped,
    VertexState,
)
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem
from tests.doubles.solver_stores import STEPS

J = JobId("job:1")
V, W = digest_of(b"v"), digest_of(b"w")
SPEC = JobSpec(id=J, definition=V, targets=(V,), session=SessionInfo(session_id="s"), is_detached=True)
DONE = JobEnded(state=JobState.DONE)


def state(to, vertex=V, **fields):
    return VertexEvent(vertex=vertex, name="compile ü", state=to, **fields)


def log(text, vertex=V):
    return VertexLog(vertex=vertex, stream=LogStream.STDOUT, text=text)


def layer(current, phase=LayerPhase.FETCHING, *, vertex=V, item="fetch:d"):
    return VertexLayers(vertex=vertex, item=ProgressItem(item=item, phase=phase, current_bytes=current))


@pytest.fixture
async def claim(solver_stores):
    """A job that runs."""
    await solver_stores.jobs.submit(SPEC, b"definition")
    (claimed,) = await solver_stores.jobs.claim("scheduler:a", ttl_s=1000.0, most=1)
    return claimed.claim


@pytest.fixture
def events(solver_stores):
    return solver_stores.events


def timeless(event):
    return replace(event, wall_s=0.0)


async def read(events, deadline_s=20.0):
    return [timeless(event) async for event in events.follow(J, deadline_s=deadline_s)]


async def test_who_comes_late_gets_it_all(solver_stores, events, claim):
    """A job's events are replayed from the first one, in order, each in its own class, up to the job's end."""
    told = [state(VertexState.WAITING), layer(3), log("a\nb\n"), state(VertexState.FAILED, error=b"\x00")]
    await events.publish(J, told[:1])
    await events.publish(J, told[1:])
    await solver_stores.jobs.end(claim, JobState.FAILED, error=b"\x00")

    for _ in range(2):
        assert await read(events) == [*told, JobEnded(state=JobState.FAILED, error=b"\x00")]


async def test_what_was_told_so_far_is_read_without_waiting(solver_stores, events, claim):
    """All of it, however much, whether the job has ended or not."""
    assert await events.told(J) == []
    for _ in range(3):
        await events.publish(J, [state(VertexState.WAITING)] * 400)
    assert len(await events.told(J)) == 1200
    await solver_stores.jobs.end(claim, JobState.DONE)

    told = await events.told(J)

    assert [timeless(event) for event in told] == [state(VertexState.WAITING)] * 1200 + [DONE]
    assert told == [event async for event in events.follow(J, deadline_s=20.0)]


async def test_who_follows_gets_it_live(solver_stores, events, claim):
    """Who follows before there is anything gets each event when it comes, and the end as the last one."""
    got = asyncio.Queue()

    async def follow():
        async for event in events.follow(J, deadline_s=20.0):
            got.put_nowait(timeless(event))

    following = asyncio.create_task(follow())
    async with asyncio.timeout(20):
        for to in (VertexState.WAITING, VertexState.RUNNING, VertexState.COMPLETED):
            await events.publish(J, [state(to)])
            assert await got.get() == state(to)
        await solver_stores.jobs.end(claim, JobState.DONE)
        assert await got.get() == DONE
        await following


async def test_events_have_the_stores_time(solver_stores, events, claim):
    """Each event is at the time it was told by the store's clock, whatever its publisher says."""
    created_s = (await solver_stores.jobs.get(J)).created_wall_s
    await events.publish(J, [state(VertexState.WAITING, wall_s=5.0), log("x")])
    await solver_stores.jobs.end(claim, JobState.DONE)

    times = [event.wall_s async for event in events.follow(J, deadline_s=20.0)]

    assert times == sorted(times)
    assert times[0] == pytest.approx(created_s, abs=100.0)


async def test_the_end_is_the_last(solver_stores, events, claim):
    """What is told after a job's end is dropped."""
    await solver_stores.jobs.end(claim, JobState.DONE)
    await events.publish(J, [state(VertexState.COMPLETED), log("late")])

    assert await read(events) == [DONE]


async def test_cancelling_a_queued_job_ends_its_stream(solver_stores, events):
    """Who follows a job that never ran is told of its end too."""
    await solver_stores.jobs.submit(SPEC, b"definition")
    following = asyncio.create_task(read(events))
    await solver_stores.jobs.request_cancel(J)

    assert await following == [JobEnded(state=JobState.CANCELLED)]


async def test_logs_are_capped_and_say_so(solver_stores, events, claim):
    """Over its limit a job's logs are dropped, with a marker for each vertex that lost lines, and nothing else."""
    kept, lost = log("k" * 100), log("x" * 5000)
    await events.publish(J, [kept, lost, log("after")])
    await events.publish(J, [log("after")])
    await events.publish(J, [log("small", W), log("y" * 5000, W), state(VertexState.COMPLETED)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    dropped = [VertexLogDropped(vertex=V), log("small", W), VertexLogDropped(vertex=W)]
    assert await read(events) == [kept, *dropped, state(VertexState.COMPLETED), DONE]


async def test_many_lines_are_capped(solver_stores, events, claim):
    """The limit is on all of a job's logs together, however short each chunk."""
    for _ in range(4):
        await events.publish(J, [log("line\n") for _ in range(25)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    told = await read(events)
    assert 2 < len(told) < 30
    assert told[-2:] == [VertexLogDropped(vertex=V), DONE]


async def test_steps_of_layers_are_capped_and_ends_are_not(solver_stores, events, claim):
    """Over the limit the steps of layers are dropped, but how each ended is always told."""
    steps = [layer(current) for current in range(STEPS + 3)]
    ended = layer(9, LayerPhase.DONE)
    await events.publish(J, [*steps, ended, state(VertexState.COMPLETED)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*steps[:STEPS], ended, state(VertexState.COMPLETED), DONE]


async def test_a_layer_ends_once(solver_stores, events, claim):
    """Those who come later for the same layer find it there: nobody is told of that again."""
    told = [layer(0, LayerPhase.WAITING), layer(5), layer(9, LayerPhase.DONE)]
    await events.publish(J, told)
    for end in (LayerPhase.PRESENT, LayerPhase.JOINED, LayerPhase.DONE, LayerPhase.CANCELLED, LayerPhase.FAILED):
        await events.publish(J, [layer(9, end)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*told, DONE]


async def test_a_layer_that_is_there_is_told_once(solver_stores, events, claim):
    """Of each vertex and each item: what one has says nothing of another."""
    told = [
        layer(9, LayerPhase.PRESENT, vertex=vertex, item=item)
        for vertex in (V, W)
        for item in ("fetch:d", "fetch:e", "extract:n0:d")
    ]
    await events.publish(J, [*told, *told])
    await events.publish(J, told)
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*told, DONE]


async def test_a_layer_never_goes_back_while_it_moves(solver_stores, events, claim):
    """Each of those who wait tells of each step: only what takes the layer on is told."""
    told = [layer(0, LayerPhase.WAITING), layer(0), layer(3)]
    await events.publish(J, [told[0], told[0], told[1], told[1]])
    await events.publish(J, [told[2], layer(1), told[2], layer(0, LayerPhase.WAITING)])
    unpacking = layer(0, LayerPhase.EXTRACTING)
    await events.publish(J, [unpacking, layer(9, LayerPhase.JOINED)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*told, unpacking, layer(9, LayerPhase.JOINED), DONE]


@pytest.mark.parametrize("again", [layer(0, LayerPhase.WAITING), layer(0), layer(0, LayerPhase.EXTRACTING)])
async def test_a_layer_that_was_given_up_begins_anew(solver_stores, events, claim, again):
    """A step after such an end is a fresh start, and has an end of its own."""
    told = [layer(9), layer(0, LayerPhase.FAILED), again, layer(9, LayerPhase.PRESENT)]
    await events.publish(J, told)
    await events.publish(J, [layer(9, LayerPhase.PRESENT)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*told, DONE]


@pytest.mark.parametrize("late", [layer(0, LayerPhase.WAITING), layer(5), layer(0, LayerPhase.EXTRACTING)])
async def test_late_words_of_a_layer_that_is_there_are_dropped(solver_stores, events, claim, late):
    """Who waited for it may tell of its way when another has told of its end."""
    told = [layer(9), layer(9, LayerPhase.DONE)]
    await events.publish(J, [*told, late, layer(9, LayerPhase.JOINED)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*told, DONE]


async def test_who_gives_a_layer_up_does_not_hide_that_it_comes(solver_stores, events, claim):
    """One who waited was cancelled: that is an end, until the layer comes for another."""
    told = [layer(3), layer(0, LayerPhase.CANCELLED), layer(9, LayerPhase.JOINED)]
    await events.publish(J, [*told[:2], layer(0, LayerPhase.FAILED), layer(0, LayerPhase.CANCELLED)])
    await events.publish(J, [told[2], layer(0, LayerPhase.CANCELLED), layer(9, LayerPhase.DONE)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*told, DONE]


async def test_a_layer_that_could_not_begin_anew_does_not_end_anew(solver_stores, events, claim):
    """Over the limit of steps what is told of each layer stays whole."""
    steps = [layer(current) for current in range(STEPS)]
    await events.publish(J, [*steps, layer(0, LayerPhase.FAILED), layer(0), layer(0, LayerPhase.FAILED)])
    await solver_stores.jobs.end(claim, JobState.DONE)

    assert await read(events) == [*steps, layer(0, LayerPhase.FAILED), DONE]


async def test_a_stale_owner_tells_nothing(solver_stores, events, claim):
    """An owner's events come with its fence: from one that has lost the job they are refused."""
    await events.publish(J, [state(VertexState.RUNNING)], fence=claim.fence)
    solver_stores.pass_time(1001)
    (successor,) = await solver_stores.jobs.claim("scheduler:b", ttl_s=1000.0, most=1)

    with pytest.raises(StaleFenceError, match=J):
        await events.publish(J, [state(VertexState.CANCELLED)], fence=claim.fence)
    await events.publish(J, [log("from a worker")])
    await solver_stores.jobs.end(successor.claim, JobState.DONE)

    assert await read(events) == [state(VertexState.RUNNING), log("from a worker"), DONE]


async def test_unknown_jobs_have_no_events(events):
    """A job that is unknown is neither told of nor waited for."""
    with pytest.raises(JobNotFoundError, match=J):
        await events.publish(J, [log("x")])
    with pytest.raises(JobNotFoundError, match=J):
        await read(events)


async def test_only_who_ends_a_job_tells_its_end(events, claim):
    """The marker of the end is written with the end, and by nobody else."""
    with pytest.raises(InternalError):
        await events.publish(J, [DONE])


async def test_following_has_a_deadline(events, claim):
    """Who follows a job that doesn't end gets what there is, and then DeadlineExceededError."""
    await events.publish(J, [log("x")])
    following = events.follow(J, deadline_s=1.0)

    assert timeless(await anext(following)) == log("x")
    with pytest.raises(DeadlineExceededError, match=J):
        await anext(following)


async def test_leaving_early_is_fine(events, claim):
    """Who stops following leaves nothing behind."""
    await events.publish(J, [log("x")])
    following = events.follow(J, deadline_s=20.0)

    assert timeless(await anext(following)) == log("x")
    await following.aclose()
