"""Layers that show in their jobs' events: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.digest import digest_of
from cluster.job import JobEnded, JobId, JobSpec, JobState, VertexLayers, layer_stream
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem

V, W = digest_of(b"v"), digest_of(b"w")
J, K = JobId("job:1"), JobId("job:2")
END = ProgressItem(item="", phase=LayerPhase.DONE)


def item(phase, current=9):
    return ProgressItem(item="fetch:d", phase=phase, current_bytes=current, total_bytes=9)


async def submit(solver_stores, job):
    spec = JobSpec(id=job, definition=V, targets=(V,), session=SessionInfo(session_id="s"), is_detached=True)
    await solver_stores.jobs.submit(spec, b"definition")


async def events(solver_stores, job):
    """End a job, and return all that was told of it but its end."""
    assert await solver_stores.jobs.request_cancel(job) is JobState.CANCELLED
    told = [replace(e, wall_s=0.0) async for e in solver_stores.events.follow(job, deadline_s=20.0)]
    assert told.pop() == JobEnded(state=JobState.CANCELLED)
    return told


async def test_a_layer_shows_in_every_job_that_wants_it(solver_stores):
    """Under the vertex that the stream names, in each job, and in other streams as ever."""
    for job in (J, K):
        await submit(solver_stores, job)
    streams = ["s", layer_stream(J, V), layer_stream(J, W), layer_stream(K, V)]
    await solver_stores.progress.publish(streams, item(LayerPhase.DONE))
    await solver_stores.progress.publish(["s"], END)

    assert [i async for i in solver_stores.progress.follow("s")] == [item(LayerPhase.DONE)]
    done = [VertexLayers(vertex=vertex, item=item(LayerPhase.DONE)) for vertex in (V, W)]
    assert await events(solver_stores, J) == done
    assert await events(solver_stores, K) == done[:1]


async def test_a_layer_that_many_wait_for_shows_once(solver_stores):
    """Every one of them tells of it in the same stream."""
    await submit(solver_stores, J)
    stream = layer_stream(J, V)
    for phase in (LayerPhase.WAITING, LayerPhase.FETCHING, LayerPhase.DONE, LayerPhase.JOINED, LayerPhase.PRESENT):
        await asyncio.gather(*(solver_stores.progress.publish([stream], item(phase, 5)) for _ in range(3)))

    phases = [event.item.phase for event in await events(solver_stores, J)]
    assert phases == [LayerPhase.WAITING, LayerPhase.FETCHING, LayerPhase.DONE]


@pytest.mark.parametrize("is_over", [True, False])
async def test_a_job_that_is_over_or_unknown_fails_nothing(solver_stores, is_over):
    """Nobody's work hangs on progress; the other streams get it all the same."""
    if is_over:
        await submit(solver_stores, J)
        await events(solver_stores, J)
    await solver_stores.progress.publish([layer_stream(J, V), "s"], item(LayerPhase.DONE))
    await solver_stores.progress.publish(["s"], END)

    assert [i async for i in solver_stores.progress.follow("s")] == [item(LayerPhase.DONE)]
