"""Builds whose schedulers, workers and drivers are killed: they go on, and what had run is not run again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
from dataclasses import dataclass

import pytest

from cluster.errors import ProcessFailedError
from cluster.job import JobEvent, JobState, VertexState
from lazyfarm.farm import Farm
from lazyfarm.graph import State, image, merge, scratch
from lazyfarm.job import Result
from tests.doubles.builds import BuildFarm, Gate, cgroups_of, log_of, state_of, states, wait_for
from tests.doubles.faults import BrokenFarm, eventually

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.s3,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

#: Another one each time: what it made shows whether it was run again.
_RANDOM = "head -c 20 /dev/urandom >> /random"
#: When an attached job is taken for abandoned, and a few renewals until its scheduler has ended it.
_ABANDONED_WITHIN_S = 30.0 + 10.0


# -- schedulers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_alone", [False, True], ids=["another-takes-over", "none-is-left"])
async def test_a_job_outlives_its_scheduler_in_the_middle_of_an_op(
    lab: BrokenFarm, builds: BuildFarm, base: str, is_alone: bool
):
    """Its scheduler is killed while a command runs, or all are: whoever claims the job next ends it.

    What had completed is looked up, not run again: another driver saw its result before, and it is the same.
    """
    gate, events = Gate(builds), []
    first = image(base, plain_http=True).run(_RANDOM).named("first")
    second = first.run(f"{gate.command}; {_RANDOM}", mounts=[gate.mount]).named("second")
    async with lab.driver() as driver, lab.driver() as witness:
        job = driver.solve([first, second.run(_RANDOM).named("third")], on_event=events.append)
        waiting = asyncio.ensure_future(wait_for(job))
        await log_of(job, "at the gate")
        before = await witness.solve(first)
        killed = await builds.of_kind("solver-scheduler") if is_alone else [await builds.owner_of(job)]
        await builds.kill(*killed)
        result = await gate.open_until(waiting)
        assert result.refs[0].id == before.ref.id
        assert result.refs[1].layers[3].record.id == before.ref.id
        assert len(result.refs[1].layers) == 6
    assert states(events, "first")[-1] is VertexState.CACHED
    assert states(events, "third")[-1] is VertexState.COMPLETED
    await builds.are_back(*killed)


async def test_a_job_outlives_its_schedulers_between_ops(lab: BrokenFarm, builds: BuildFarm, base: str):
    """All are killed when the first op has completed, and again: each op's result is the first one it came to."""
    events = []
    steps = [image(base, plain_http=True).run(_RANDOM).named("step 0")]
    for number in range(1, 4):
        steps.append(steps[-1].run(_RANDOM).named(f"step {number}"))
    async with lab.driver() as driver, lab.driver() as witness:
        job = driver.solve(steps, on_event=events.append)
        waiting = asyncio.ensure_future(wait_for(job))
        for number in (0, 2):
            await state_of(job, f"step {number}", VertexState.COMPLETED)
            killed = await eventually(lambda: builds.of_kind("solver-scheduler"), "a scheduler")
            await builds.kill(*killed)
            await builds.are_back(*killed)
        result = await waiting
        again = await witness.solve(steps)
    assert [ref.id for ref in again.refs] == [ref.id for ref in result.refs]
    for number in range(4):
        told = states(events, f"step {number}")
        # A scheduler may die between the end of an op and telling of it: its successor finds it in the cache.
        assert told[-1] in (VertexState.COMPLETED, VertexState.CACHED)
        assert told.count(VertexState.COMPLETED) <= 1
        assert number not in (0, 2) or VertexState.COMPLETED in told


# -- workers ----------------------------------------------------------------------------------------------------


async def test_an_op_outlives_its_worker(lab: BrokenFarm, builds: BuildFarm, base: str):
    """Its worker is killed while its command runs: it is done again, and nothing of the dead one is left."""
    gate, events = Gate(builds), []
    graph = image(base, plain_http=True).run(f"{gate.command}; {_RANDOM}", mounts=[gate.mount]).named("op")
    async with lab.driver() as driver:
        job = driver.solve(graph.run(_RANDOM), on_event=events.append)
        waiting = asyncio.ensure_future(wait_for(job))
        await log_of(job, "at the gate")
        ((node, containers),) = builds.containers().items()
        victim = await builds.worker("op-worker", node)
        await builds.kill(victim)
        await eventually(lambda: gate.came() == 2, "the op to be done again", within_s=30)
        result = await gate.open_until(waiting)
        assert len(result.ref.layers) == 5
    assert states(events, "op")[-1] is VertexState.COMPLETED
    await builds.are_back(victim)
    await builds.assert_nothing_left()
    for container in containers:
        assert not cgroups_of(container)


async def test_an_op_outlives_the_fetch_worker_that_brings_its_inputs(lab: BrokenFarm, builds: BuildFarm, base: str):
    """It is killed in the middle of a layer: the layer is fetched to its end, and the op runs, once."""
    gate = Gate(builds)
    lab.proxy.bytes_per_s = 512 * 1024
    graph = image(base, plain_http=True).run(f"{gate.command}; {_RANDOM}", mounts=[gate.mount])
    async with lab.driver() as driver:
        waiting = asyncio.ensure_future(wait_for(driver.solve(graph)))

        async def fetching() -> str | None:
            for digest, fetched in lab.proxy.blob_bytes.items():
                if fetched >= 256 * 1024 and (owner := await lab.owner_of(digest)):
                    return owner
            return None

        victim = await builds.worker("fetch-worker", await eventually(fetching, "a fetch"))
        await builds.kill(victim)
        lab.proxy.bytes_per_s = None
        result = await gate.open_until(waiting)
    assert len(result.ref.layers) == 4
    assert gate.came() == 1
    await builds.are_back(victim)
    await lab.assert_whole()


@dataclass
class _Shared:
    """A job of a graph that others build, too."""

    owner: str
    result: asyncio.Future[Result]
    events: list[JobEvent]


async def _in_both(builds: BuildFarm, driver: Farm, graph: State, owners: set[str]) -> list[_Shared]:
    """Begin jobs until both schedulers have some, *owners* counted in, and all of them have come to "shared"."""
    found: list[_Shared] = []
    while len(owners) < 2 or not found:
        assert len(found) < 20, "one scheduler takes every job"
        events: list[JobEvent] = []
        job = driver.solve(graph, on_event=events.append)
        result = asyncio.ensure_future(wait_for(job))
        await eventually(lambda seen=events: states(seen, "shared"), "it to come there")
        found.append(_Shared((await job.record()).owner, result, events))
        owners.add(found[-1].owner)

    async def is_waited_for() -> bool:
        return bool(await builds.keys("waiters:vertex:*"))

    await eventually(is_waited_for, "the other scheduler to wait")
    return found


# -- drivers ----------------------------------------------------------------------------------------------------

_DRIVER = """
import asyncio, sys
from lazyfarm.farm import Farm
from lazyfarm.graph import cache, image
state_dir, base, gate, command, own = sys.argv[1:]
async def main():
    start = image(base, plain_http=True)
    shared = start.run(command, mounts=[cache("/gate", id=gate)])
    async with await Farm.connect(state_dir, credentials={}) as farm:
        job = await farm.solve([shared, start.run(own)]).submitted()
        print(job.id, flush=True)
        await job
asyncio.run(main())
"""


async def test_a_job_whose_driver_was_killed_is_cancelled_and_no_other(lab: BrokenFarm, builds: BuildFarm, base: str):
    """Within the time that a driver may be silent its job has ended, and its own command is gone.

    Another driver's jobs share a vertex with it, whose run the killed one's job began, one of them in the other
    scheduler: it goes on, and is not run again.
    """
    gate = Gate(builds)
    command = f"{gate.command}; {_RANDOM}"
    arguments = [str(builds.running.state_dir), base, gate.name, command, "echo mine; sleep 600"]
    program = [sys.executable, "-c", _DRIVER, *arguments]
    process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    try:
        async with lab.driver() as driver:
            assert process.stdout is not None
            theirs = await driver.job((await process.stdout.readline()).decode().strip())
            await asyncio.gather(log_of(theirs, "at the gate"), log_of(theirs, "mine"))
            shared = image(base, plain_http=True).run(command, mounts=[gate.mount]).named("shared")
            mine = await _in_both(builds, driver, shared, {(await theirs.record()).owner})
            waiting = asyncio.gather(*(job.result for job in mine))
            process.kill()

            async def is_cancelled() -> bool:
                return (await theirs.record()).state is JobState.CANCELLED

            await eventually(is_cancelled, "the job to be cancelled", within_s=_ABANDONED_WITHIN_S)
            await eventually(lambda: sum(map(len, builds.containers().values())) == 1, "its command to be gone")
            assert not waiting.done()
            results = await gate.open_until(waiting)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert len({result.ref.id for result in results}) == 1
    assert gate.came() == 1


# -- at random moments --------------------------------------------------------------------------------------------


def _deterministic(base: str, salt: str) -> State:
    """Return a graph of ops that come to the same whenever and wherever they run."""
    env = {"SOURCE_DATE_EPOCH": "1700000000"}
    start = image(base, plain_http=True)
    left = start.run(f"echo {salt} > /left; mkdir /d; ln /left /d/hard", env=env)
    right = start.run(f"sleep 1; cat /words > /right; rm /first; echo {salt} >> /right", env=env)
    files = scratch().mkfile("/made", salt).copy(left, "/d", "/copied/")
    joined = merge([left, right.diff(start), files])
    return joined.run("sleep 1; cat /left /right /made /copied/hard > /all", env=env).mkfile("/last", salt)


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_build_that_is_broken_at_random_ends_as_one_that_is_not(
    lab: BrokenFarm, builds: BuildFarm, base: str, seed: int
):
    """Schedulers and op workers are killed at moments that a seed says: the layers are those of a quiet build."""
    dice = random.Random(seed)  # noqa: S311 -- what is killed when, not secrets
    graph = _deterministic(base, f"salt {seed}")
    killed = []
    async with lab.driver() as driver:
        waiting = asyncio.ensure_future(wait_for(driver.solve(graph)))
        for _ in range(3):
            await asyncio.wait([waiting], timeout=dice.uniform(0.2, 1.5))  # the moment itself
            if waiting.done():
                break
            victims = [a for a in await builds.actors() if a.kind in ("solver-scheduler", "op-worker")]
            victim = dice.choice(sorted(victims, key=lambda actor: actor.name))
            if victim.pid not in [each.pid for each in killed]:
                await builds.kill(victim)
                killed.append(victim)
        broken = await waiting
        assert len(killed) > 1
        await builds.are_back(*killed)
        quiet = await driver.solve(graph, no_cache=True)
    assert [layer.record.blob.digest for layer in broken.ref.layers] == [
        layer.record.blob.digest for layer in quiet.ref.layers
    ]
    assert broken.config == quiet.config


# -- several schedulers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["completes", "fails"])
async def test_schedulers_run_a_vertex_that_their_jobs_share_once(
    lab: BrokenFarm, builds: BuildFarm, base: str, fails: bool
):
    """Jobs that two schedulers have wait for one run of a vertex, and share what it comes to, be it a failure."""
    gate = Gate(builds)
    graph = image(base, plain_http=True)
    graph = graph.run(f"{gate.command}; {_RANDOM}; exit {3 if fails else 0}", mounts=[gate.mount]).named("shared")
    async with lab.driver() as driver:
        mine = await _in_both(builds, driver, graph, set())
        results = await gate.open_until(asyncio.gather(*(job.result for job in mine), return_exceptions=True))
    assert gate.came() == 1
    if fails:
        assert {(type(result), result.exit_code) for result in results} == {(ProcessFailedError, 3)}
        return
    assert len({result.ref.id for result in results}) == 1
    ends = {job.owner: states(job.events, "shared")[-1] for job in mine}
    assert set(ends.values()) == {VertexState.COMPLETED, VertexState.CACHED}
