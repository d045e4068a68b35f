"""Builds while schedulers, op workers and drivers die, and while results vanish: what had run stays done."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import AccessDeniedError, ClusterError, ProcessFailedError
from cluster.job import JobState, JobWarning, VertexEvent, VertexLog, VertexState
from lazyfarm.farm import Farm
from lazyfarm.graph import State, image, merge, scratch
from lazyfarm.job import Job, Result
from storage.snapshots.kernel import mount_points
from tests.doubles.faults import BrokenFarm, eventually
from tests.doubles.registry_faults import RegistryFaultProxy, registry_fault_proxy
from tests.doubles.shell_image import shell_image
from tests.doubles.token_server import TokenRegistry

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.s3,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

ALICE, BOB, MALLORY = ("alice", "wonder-land-2f9c"), ("bob", "build-er-71aa"), ("mallory", "no-thing-0d13")
#: What no two runs of a command write alike.
CHANCE = "head -c 16 /dev/urandom > /chance"
SCHEDULER, OP_WORKER, FETCH_WORKER = "solver-scheduler", "op-worker", "fetch-worker"


@pytest.fixture
def base(lab: BrokenFarm) -> State:
    """An image with a shell that the farm has not seen."""
    tag = secrets.token_hex(8)
    lab.registry.push("shell", tag, shell_image(tag))
    return image(f"{lab.proxy.host}/shell:{tag}", plain_http=True)


@pytest.fixture(autouse=True)
async def _nothing_left(lab: BrokenFarm):
    """After each test: no job goes on, nothing is held for one, no vertex is owned, no container or mount is left."""
    yield

    async def left() -> list[str]:
        jobs = await lab.redis("ZRANGE", f"{lab.prefix}:jobs:held", 0, -1)
        now_ms = int((await lab.redis("TIME"))[0]) * 1000
        leases = await lab.redis("ZRANGEBYSCORE", f"{lab.prefix}:leases", now_ms, "+inf")
        holds = [lease for lease in leases if lease.startswith(b"hold-")]
        flights = [key for key in await lab.live_flights() if "vertex:" in key]
        nodes = lab.running.state_dir / "nodes"
        containers = [str(path) for path in nodes.glob("*/containers/bundles/*")]
        mounts = [str(path) for path in mount_points() if path.is_relative_to(nodes) and path.name.startswith("op-")]
        return [*map(str, jobs), *map(str, holds), *flights, *containers, *mounts]

    last: list[str] = []

    async def nothing() -> bool:
        last[:] = await left()
        return not last

    await eventually(nothing, lambda: f"these to go: {last}", within_s=40)


async def run(job: Job) -> Result:
    """Wait for a job, as a coroutine."""
    return await job


async def said(job: Job, text: str) -> None:
    """Wait until a command of a job has said something."""
    async for event in job.events():
        if isinstance(event, VertexLog) and text in event.text:
            return


async def kill(lab: BrokenFarm, name: str, kind: str) -> None:
    """Kill an actor's process."""
    os.kill((await lab.pids(kind))[name], signal.SIGKILL)


async def read(result: Result, path: str) -> bytes:
    """Read a file of what was built."""
    extracted = await result.ref.extract()
    return await asyncio.to_thread(Path(extracted.path + path).read_bytes)


def ends(events: list[object]) -> dict[str, list[VertexState]]:
    """Return how the vertices of a job ended, by name."""
    found: dict[str, list[VertexState]] = {}
    for event in events:
        if isinstance(event, VertexEvent) and event.state.is_end:
            found.setdefault(event.name, []).append(event.state)
    return found


# -- actors die -----------------------------------------------------------------------------------------------


async def test_a_job_outlives_its_scheduler(lab: BrokenFarm, base: State):
    """Another scheduler, or the same one restarted, goes on; what had run is found by its keys and not run again."""
    first = base.run(CHANCE).named("first")
    second = first.run("echo begun; sleep 3; echo 2 > /second").named("second")
    events: list[object] = []
    async with lab.driver() as driver:
        alone = await driver.solve(first)
        chance = await read(alone, "/chance")
        job = driver.solve(second, on_event=events.append)
        building = asyncio.ensure_future(run(job))
        await said(job, "begun")
        await kill(lab, (await job.record()).owner, SCHEDULER)
        result = await building
        assert await read(result, "/chance") == chance
        assert await read(result, "/second") == b"2\n"
    assert ends(events)["first"][-1] is VertexState.CACHED
    assert ends(events)["second"]


async def test_an_op_outlives_its_worker(lab: BrokenFarm, base: State):
    """Its command is run again where a worker is; nothing of the first one's container is left."""
    async with lab.driver() as driver:
        job = driver.solve(base.run("echo begun; sleep 2; echo done > /done"))
        building = asyncio.ensure_future(run(job))
        await said(job, "begun")
        for name, pid in (await lab.pids(OP_WORKER)).items():
            node = name.removeprefix(f"{OP_WORKER}-").partition("@")[0]
            if list((lab.running.state_dir / "nodes" / node / "containers/bundles").glob("*.lock")):
                os.kill(pid, signal.SIGKILL)
        assert await read(await building, "/done") == b"done\n"
    await lab.assert_whole()


async def test_inputs_are_brought_although_a_fetch_worker_dies(lab: BrokenFarm, base: State):
    """All of them die while layers are on their way: the op waits for what is restarted."""
    lab.proxy.bytes_per_s = 300_000
    async with lab.driver() as driver:
        events: list[object] = []
        building = asyncio.ensure_future(run(driver.solve(base.run("echo 1 > /one"), on_event=events.append)))
        await eventually(lambda: [e for e in events if type(e).__name__ == "VertexLayers"], "layers that move")
        for pid in (await lab.pids(FETCH_WORKER)).values():
            os.kill(pid, signal.SIGKILL)
        lab.proxy.bytes_per_s = None
        assert await read(await building, "/one") == b"1\n"
    await lab.assert_whole()


async def test_a_driver_that_is_killed_takes_no_other_jobs_work_with_it(lab: BrokenFarm, base: State, tmp_path: Path):
    """Its job is cancelled when it has been silent for too long; the other's goes on, and its op ran once."""
    graph = base.run(f"echo begun; sleep 4; {CHANCE}; cat /chance > /copy")
    name = base._step.reference
    script = tmp_path / "driver.py"
    script.write_text(
        "import asyncio\nfrom lazyfarm import Farm\nfrom lazyfarm.graph import image\n"
        "async def main():\n    async with await Farm.connect(credentials={}) as farm:\n"
        f"        job = farm.solve(image({name!r}, plain_http=True).run({graph._step.args[-1]!r}))\n"
        "        async for event in job.events():\n            print(type(event).__name__, job.id, flush=True)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen(  # noqa: ASYNC220 -- one, once
        [sys.executable, str(script)],
        env={**os.environ, "LAZYFARM_STATE_DIR": str(lab.running.state_dir)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        async with lab.driver() as driver:
            while "VertexLog" not in (line := await asyncio.to_thread(process.stdout.readline)):
                assert line, "the driver ended"
            other = await driver.job(line.split()[1])
            events: list[object] = []
            building = asyncio.ensure_future(run(driver.solve(graph, on_event=events.append)))
            await eventually(lambda: events, "the other job's events")
            process.kill()
            result = await building
            assert await read(result, "/chance") == await read(result, "/copy")
            assert "".join(e.text for e in events if isinstance(e, VertexLog)) == "begun\n"

            async def ended() -> bool:
                return (await other.record()).state.is_end

            await eventually(ended, "the killed driver's job to end", within_s=45)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("seed", [1, 2])
async def test_deterministic_ops_come_to_the_same_digests_whatever_dies(lab: BrokenFarm, base: State, seed: int):
    """Schedulers and op workers are killed at moments drawn from a seed: the digests are those of a quiet run."""
    env = {"SOURCE_DATE_EPOCH": "1000000000", "SEED": secrets.token_hex(4)}

    def command(state: State, words: str) -> State:
        return state.run(f"sleep 0.3; {words}", env=env)

    left = command(command(base, "echo 1 > /tmp/one"), "mkdir /tmp/d; cat /tmp/one > /tmp/d/two; rm /tmp/one")
    right = command(base, "echo $SEED > /seed").mkfile("/made", "made\n").mkdir("/directory")
    graph = merge([left, scratch().copy(right, ["/made", "/seed"], "/copied/")])
    dice = random.Random(seed)  # noqa: S311 -- a test that can be repeated

    async def upset() -> None:
        for _ in range(3):
            await asyncio.sleep(dice.uniform(0.2, 1.5))
            kind = dice.choice([SCHEDULER, OP_WORKER])
            if pids := await lab.pids(kind):
                with contextlib.suppress(ProcessLookupError):  # it is dead, and that is not noticed yet
                    os.kill(pids[dice.choice(sorted(pids))], signal.SIGKILL)

    async with lab.driver() as driver:
        upsetting = asyncio.ensure_future(upset())
        rough = await driver.solve(graph)
        await upsetting
        quiet = await driver.solve(graph, no_cache=True)
    assert [layer.record.blob.digest for layer in rough.ref.layers] == [
        layer.record.blob.digest for layer in quiet.ref.layers
    ]
    await lab.assert_whole()


# -- several schedulers -----------------------------------------------------------------------------------------


async def jobs_of_two_schedulers(driver: Farm, graph: State) -> list[Job]:
    """Submit jobs of one graph until two schedulers have some; return them all."""
    jobs = [await driver.solve(graph).submitted() for _ in range(8)]

    async def are_claimed() -> bool:
        return "" not in {(await job.record()).owner for job in jobs}

    await eventually(are_claimed, "every job to be claimed")
    return jobs


async def test_a_vertex_runs_once_for_jobs_of_two_schedulers(lab: BrokenFarm, base: State):
    """Eight jobs of one op, whichever scheduler each came to: all have the one result."""
    graph = base.run(f"sleep 1; {CHANCE}")
    async with lab.driver() as driver:
        jobs = await jobs_of_two_schedulers(driver, graph)
        results = await asyncio.gather(*(run(job) for job in jobs))
    assert len({result.ref.id for result in results}) == 1


async def test_a_failing_command_fails_every_job_that_waits_for_it(lab: BrokenFarm, base: State):
    """Each gets the exit code and the last lines, in whichever scheduler it is."""
    graph = base.run("sleep 1; echo sorry; exit 7")
    async with lab.driver() as driver:
        jobs = await jobs_of_two_schedulers(driver, graph)
        errors = await asyncio.gather(*(run(job) for job in jobs), return_exceptions=True)
    assert {type(error) for error in errors} == {ProcessFailedError}
    assert {error.exit_code for error in errors} == {7}
    assert {error.last_lines for error in errors} == {("sorry",)}


# -- who may ----------------------------------------------------------------------------------------------------


@pytest.fixture
def private(token_registry: TokenRegistry) -> Iterator[RegistryFaultProxy]:
    """A registry that alice and bob may use and mallory may not, behind a proxy."""
    for user, rights in ((ALICE, {"*": {"pull", "push"}}), (BOB, {"*": {"pull"}}), (MALLORY, {})):
        token_registry.tokens.allow(*user, rights)
    with registry_fault_proxy(token_registry.registry.url) as proxy:
        yield proxy


def private_base(token_registry: TokenRegistry, proxy: RegistryFaultProxy) -> State:
    """Push an image that one has to log in for."""
    tag = secrets.token_hex(8)
    token_registry.registry.push("secret/shell", tag, shell_image(tag))
    return image(f"{proxy.host}/secret/shell:{tag}", plain_http=True)


async def test_what_was_built_on_a_private_base_is_closed_to_who_may_not_read_the_base(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy
):
    """All of it is cached: bob, who may, has it without a byte; mallory is refused, by name and by ID."""
    graph = private_base(token_registry, private).run("echo made by alice > /made")
    async with lab.driver(credentials={private.host: ALICE}) as driver:
        result = await driver.solve(graph)
        assert await read(result, "/made") == b"made by alice\n"
    private.forget()
    async with lab.driver(credentials={private.host: BOB}) as driver:
        assert (await driver.solve(graph)).ref.id == result.ref.id
        assert not private.blob_bytes
    async with lab.driver(credentials={private.host: MALLORY}) as driver:
        with pytest.raises(AccessDeniedError):
            await driver.solve(graph)
        with pytest.raises(ClusterError):
            await driver.get(result.ref.id)


async def test_an_imported_cache_is_unlazied_with_the_credentials_of_who_needs_it(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy
):
    """Alice exports a cache; another farm's worth of results is imported by bob after alice lost her rights."""
    chance = secrets.token_hex(8)
    graph = private_base(token_registry, private).run(f"echo {chance}; {CHANCE}").named("the step")
    cache = f"{private.host}/secret/cache:{chance}"
    async with lab.driver(credentials={private.host: ALICE}) as driver:
        made = await driver.solve(graph, cache_to=[f"type=registry,ref={cache},mode=max"])
        chance_made = await read(made, "/chance")
    await forget_results(lab)
    async with lab.driver(credentials={private.host: ALICE}) as driver:
        imported = await driver.solve(graph, cache_from=[cache])
        assert imported.ref.id == made.ref.id
    token_registry.tokens.allow(*ALICE, {})
    events: list[object] = []
    async with lab.driver(credentials={private.host: BOB}) as driver:
        result = await driver.solve(graph.run("cat /chance > /copy"), on_event=events.append)
        assert await read(result, "/copy") == chance_made
    assert ends(events)["the step"] == [VertexState.CACHED]


async def test_a_cache_that_is_gone_is_a_miss_and_a_warning(lab: BrokenFarm, base: State):
    """The build goes on as if it had not been named."""
    events: list[object] = []
    async with lab.driver() as driver:
        source = f"{lab.proxy.host}/nowhere/cache:{secrets.token_hex(4)}"
        result = await driver.solve(base.run("echo 1 > /one"), cache_from=[source], on_event=events.append)
        assert await read(result, "/one") == b"1\n"
    assert source in next(event.text for event in events if isinstance(event, JobWarning))


# -- results vanish -----------------------------------------------------------------------------------------------


async def forget_results(lab: BrokenFarm) -> None:
    """Make the farm forget every cache key."""
    for key in await lab.keys("record:*"):
        await lab.redis("DEL", f"{lab.prefix}:{key}")


async def test_a_result_whose_layer_vanished_is_made_again(lab: BrokenFarm, base: State):
    """Its object is gone from S3 and its snapshot from the nodes: the op runs again, and the build ends well."""
    graph = base.run(CHANCE)
    async with lab.driver() as driver:
        first = await driver.solve(graph)
        top = first.ref.layers[-1].record
        blob = await lab.blob(top.blob.digest)
        assert blob is not None
        await asyncio.to_thread(lab.store.delete, blob.key)
        await lab.redis("DEL", f"{lab.prefix}:blob:{top.blob.digest}")
        events: list[object] = []
        second = await driver.solve(graph.run("cat /chance > /copy"), on_event=events.append)
        assert await read(second, "/copy") == await read(second, "/chance")
    assert second.ref.layers[-2].record.blob.digest != top.blob.digest


# -- large graphs ---------------------------------------------------------------------------------------------------


async def test_a_thousand_vertices_end_once_each(lab: BrokenFarm):
    """Files, and merges of every two of them: each vertex has one end for its job, and its result is there."""
    words = secrets.token_hex(4)
    files = [scratch().mkfile(f"/{words}-{index}", words) for index in range(44)]
    pairs = [merge(pair) for pair in itertools.combinations(files, 2)]
    events: list[VertexEvent] = []

    def see(event: object) -> None:
        if isinstance(event, VertexEvent) and event.state.is_end:
            events.append(event)

    async with lab.driver() as driver:
        result = await driver.solve(pairs, on_event=see)
    assert len({event.vertex for event in events}) == len(events) == 44 + 946
    assert len({ref.id for ref in result.refs}) == 946


async def test_a_job_that_is_cancelled_midway_leaves_nothing(lab: BrokenFarm, base: State):
    """Some of its ops run, some wait: all of them are told to have ended, and the commands are gone."""
    graph = merge([base.run(f"echo begun; sleep 300; echo {index}") for index in range(6)])
    async with lab.driver() as driver:
        job = driver.solve(graph)
        building = asyncio.ensure_future(run(job))
        await said(job, "begun")
        await job.cancel()
        with pytest.raises(ClusterError):
            await building
        assert (await job.record()).state is JobState.CANCELLED
        last = {event.vertex: event.state async for event in job.events() if isinstance(event, VertexEvent)}
    assert all(state.is_end for state in last.values())
