"""Builds on a real farm of three nodes: what runs, what stays lazy, what is shared, and what survives."""

import asyncio
import json
import os
import secrets
import time
from pathlib import Path

import pytest

from cluster.errors import JobCancelledError, MissingSecretError, ProcessFailedError
from cluster.job import JobState, LogStream, VertexEvent, VertexLayers, VertexLog, VertexState
from cluster.progress import LayerPhase
from lazyfarm.graph import cache, image, local, merge, scratch, secret
from tests.doubles.builds import BuildFarm
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]


@pytest.fixture(autouse=True)
async def _nothing_left(farm):
    """What a build did leaves nothing once it has ended."""
    yield
    await BuildFarm(running=farm).assert_nothing_left()


@pytest.fixture
def base(registry):
    """Push an image with a shell that no farm has seen; return its name."""
    made = shell_image(secrets.token_hex(8))
    registry.push("base", "1", made)
    registry.forget()
    return f"{registry.host}/base:1"


def layer_gets(registry):
    """Count the GETs of blobs since the registry's log was forgotten."""
    return registry.count("GET", "blob", 200)


def states(events, name):
    """Return the states that the vertices called *name* went through."""
    return [e.state for e in events if isinstance(e, VertexEvent) and e.name == name]


def said(events):
    """Return what commands said."""
    return "".join(e.text for e in events if isinstance(e, VertexLog))


async def read_file(ref, path):
    """Return a file of a ref's filesystem."""
    extracted = await ref.extract()
    return await asyncio.to_thread(Path(extracted.path + path).read_text)


async def test_a_command_runs_upon_an_image_and_its_changes_are_a_layer(farm, registry, base):
    """Base layers are fetched once; what the command wrote is one more layer, and reads as it was written."""
    events = []
    async with await farm.connect() as driver:
        graph = image(base, plain_http=True).run("cat /words > /copy; echo done; echo oops >&2").named("the command")
        result = await driver.solve(graph, on_event=events.append)

        assert len(result.ref.layers) == 4
        assert await read_file(result.ref, "/copy") == await read_file(result.ref, "/words")
    assert "done\n" in said(events)
    assert [e.text for e in events if isinstance(e, VertexLog) and e.stream is LogStream.STDERR] == ["oops\n"]
    assert states(events, "the command") == [VertexState.WAITING, VertexState.RUNNING, VertexState.COMPLETED]
    assert json.loads(result.config)["config"]["Labels"]


async def test_an_equal_build_is_cached_and_moves_nothing(farm, registry, base):
    """The second build looks one key up: no blob is asked for, nothing is extracted, no command runs."""
    graph = image(base, plain_http=True).run("echo 1 > /one").run("echo 2 > /two")
    async with await farm.connect() as driver:
        first = await driver.solve(graph)
    registry.forget()
    events = []
    async with await farm.connect() as driver:
        second = await driver.solve(graph, on_event=events.append)

    assert second.ref.id == first.ref.id
    assert layer_gets(registry) == 0
    ends = {e.name: e.state for e in events if isinstance(e, VertexEvent)}
    assert VertexState.COMPLETED not in ends.values()
    assert not [e for e in events if isinstance(e, VertexLayers)]


async def test_layers_show_once_under_the_image_and_ops_wait_for_them(farm, registry, base):
    """Two ops on one image: each layer's fetch ends once, under the image's vertex, and both ops waited."""
    events = []
    start = image(base, plain_http=True).named("the base")
    targets = [start.run("echo a > /a").named("op"), start.run("echo b > /b").named("op")]
    async with await farm.connect() as driver:
        await driver.solve(targets, on_event=events.append)

    owner = {e.vertex for e in events if isinstance(e, VertexEvent) and e.name == "the base"}
    layers = [e for e in events if isinstance(e, VertexLayers)]
    assert {e.vertex for e in layers} == owner
    fetched = [e.item.item for e in layers if e.item.item.startswith("fetch:") and e.item.phase.is_end]
    assert len(fetched) == len(set(fetched)) == 3
    assert [e for e in layers if e.item.item.startswith("extract:") and e.item.phase is LayerPhase.DONE]
    assert states(events, "op").count(VertexState.WAITING) == 2


async def test_one_changed_file_reruns_only_what_depends_on_it(farm, registry, base, tmp_path):
    """A copy whose content is the same is a hit, whatever else of the directory has changed."""
    (tmp_path / "used").write_text("1")
    (tmp_path / "unused").write_text("1")

    def graph():
        sources = local(tmp_path)
        copied = image(base, plain_http=True).copy(sources, "/used", "/used").named("copy")
        return copied.run("cat /used > /result").named("run")

    async def build():
        events = []
        async with await farm.connect() as driver:
            result = await driver.solve(graph(), on_event=events.append)
            return await read_file(result.ref, "/result"), {
                e.name: e.state for e in events if isinstance(e, VertexEvent)
            }

    assert (await build())[0] == "1"
    (tmp_path / "unused").write_text("2")
    text, ends = await build()
    assert (text, ends["copy"], ends["run"]) == ("1", VertexState.CACHED, VertexState.CACHED)
    (tmp_path / "used").write_text("2")
    text, ends = await build()
    assert (text, ends["copy"], ends["run"]) == ("2", VertexState.COMPLETED, VertexState.COMPLETED)


async def test_a_merge_of_lazy_inputs_stays_lazy(farm, registry, base):
    """Layers are put on top of one another by their records alone."""
    other = shell_image(secrets.token_hex(8))
    registry.push("other", "1", other)
    registry.forget()
    async with await farm.connect() as driver:
        result = await driver.solve(
            merge([image(base, plain_http=True), image(f"{registry.host}/other:1", plain_http=True)])
        )
        assert len(result.ref.layers) == 6
        assert all(layer.is_lazy for layer in result.ref.layers)
        assert layer_gets(registry) == 2  # the images' configs


async def test_a_failing_command_says_so(farm, base):
    """Its exit code and last lines come with the error; its vertex has failed, the job too."""
    events = []
    async with await farm.connect() as driver:
        job = driver.solve(
            image(base, plain_http=True).run("echo so long; exit 3").named("fails"), on_event=events.append
        )
        with pytest.raises(ProcessFailedError) as failed:
            await job
        record = await job.record()
    assert failed.value.exit_code == 3
    assert failed.value.last_lines == ("so long",)
    assert states(events, "fails")[-1] is VertexState.FAILED
    assert record.state is JobState.FAILED


async def test_secrets_reach_the_command_and_nothing_else(farm, base):
    """A secret is a file for the command, is taken out of its log, and is no part of the layer or the key."""
    value = secrets.token_hex(16)
    graph = image(base, plain_http=True).run(
        "cat /run/secrets/token; test -s /run/secrets/token && echo ok > /out", mounts=[secret("token", required=True)]
    )
    events = []
    async with await farm.connect() as driver:
        with pytest.raises(MissingSecretError):
            await driver.solve(graph)
        result = await driver.solve(graph, secrets={"token": value}, on_event=events.append)
        assert await read_file(result.ref, "/out") == "ok\n"
    assert value not in said(events)
    async with await farm.connect() as driver:
        assert (await driver.solve(graph, secrets={"token": "another"})).ref.id == result.ref.id


async def test_two_drivers_at_once_run_each_op_once(farm, base, tmp_path):
    """Jobs that share a vertex share its run, and both see its log from the start."""
    graph = image(base, plain_http=True).run("echo started; sleep 2; cat /dev/urandom | head -c 20 > /random")
    events = [[], []]
    async with await farm.connect() as one, await farm.connect() as two:
        first = asyncio.ensure_future(_await(one.solve(graph, on_event=events[0].append)))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(_await(two.solve(graph, on_event=events[1].append)))
        results = await asyncio.gather(first, second)
    assert results[0].ref.id == results[1].ref.id
    assert [said(seen) for seen in events] == ["started\n"] * 2


async def _await(job):
    return await job


async def test_the_job_that_began_a_run_is_cancelled_and_the_other_goes_on(farm, base):
    """Cancelling one of two jobs that share a vertex neither stops nor repeats its run."""
    graph = image(base, plain_http=True).run("echo begun; sleep 10; cat /dev/urandom | head -c 20 > /random")
    events, shared = [], asyncio.Event()

    def see(event):
        events.append(event)
        if isinstance(event, VertexLog):
            shared.set()

    async with await farm.connect() as one, await farm.connect() as two:
        first = one.solve(graph)
        waiting = asyncio.ensure_future(_await(first))
        await _log_of(first, "begun")
        second = asyncio.ensure_future(_await(two.solve(graph, on_event=see)))
        await shared.wait()
        await first.cancel()
        with pytest.raises(JobCancelledError):
            await waiting
        result = await second
    assert said(events) == "begun\n"
    assert len(result.ref.layers) == 4


async def _log_of(job, text):
    async for event in job.events():
        if isinstance(event, VertexLog) and text in event.text:
            return


async def test_cache_mounts_outlive_the_command(farm, base):
    """What one command leaves in a cache mount another finds, on the same node, and no layer has it."""
    mounts = [cache("/cache", id=secrets.token_hex(4))]
    start = image(base, plain_http=True)
    once = start.run("echo kept >> /cache/log; cat /cache/log > /out", mounts=mounts)
    twice = once.run("echo kept >> /cache/log; cat /cache/log > /out", mounts=mounts)
    async with await farm.connect() as driver:
        result = await driver.solve(twice)
        assert await read_file(result.ref, "/out") in ("kept\nkept\n", "kept\n")
        extracted = await result.ref.extract()
        assert not await asyncio.to_thread(Path(f"{extracted.path}/cache/log").exists)


async def test_a_build_from_nothing(farm):
    """Files made on the empty filesystem are one layer, with the same digest wherever it is made."""
    graph = scratch().mkfile("/hello", "hello\n").mkdir("/directory")
    async with await farm.connect() as driver:
        result = await driver.solve(graph)
        assert await read_file(result.ref, "/hello") == "hello\n"


async def test_what_is_built_is_pushed_with_only_its_new_layers(farm, registry, base):
    """To the registry of its base: the base's layers are mounted, one layer is uploaded."""
    async with await farm.connect() as driver:
        result = await driver.solve(image(base, plain_http=True).run("echo new > /new"))
        registry.forget()
        pushed = await driver.push(result, f"{registry.host}/made:1", plain_http=True)
    assert [layer.how for layer in pushed.layers] == ["mounted"] * 3 + ["uploaded"]
    assert layer_gets(registry) == 0


async def test_a_detached_job_goes_on_without_its_driver(farm, base):
    """Its driver leaves at once; another finds it by its ID, and what it came to."""
    graph = image(base, plain_http=True).run("sleep 1; echo detached > /out")
    async with await farm.connect() as driver:
        job = await driver.solve(graph, detached=True).submitted()
    async with await farm.connect() as driver:
        result = await (await driver.job(job.id))
        assert await read_file(result.ref, "/out") == "detached\n"


async def test_a_cancelled_await_cancels_the_job(farm, base):
    """Nobody waits for it: its command is killed."""
    async with await farm.connect() as driver:
        job = driver.solve(image(base, plain_http=True).run("echo begun; sleep 600"))
        waiting = asyncio.ensure_future(_await(job))
        await _log_of(job, "begun")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        began_s = time.monotonic()
        while not (await job.record()).state.is_end:
            assert time.monotonic() - began_s < 30
            await asyncio.sleep(0.1)
        assert (await job.record()).state is JobState.CANCELLED
