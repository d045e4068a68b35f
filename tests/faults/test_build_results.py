"""What builds came to: who may have it, where caches bring it from, what is done where it vanished, large graphs."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import AccessDeniedError, JobCancelledError, NeedsRemoteProvidersError
from cluster.job import JobEvent, JobState, JobWarning, VertexEvent, VertexState
from cluster.ref import RefRecord
from lazyfarm.graph import State, image, merge, scratch
from lazyfarm.job import Result
from tests.doubles.builds import log_of, states, wait_for
from tests.doubles.faults import BrokenFarm
from tests.doubles.registry_faults import RegistryFaultProxy, registry_fault_proxy
from tests.doubles.shell_image import shell_image
from tests.doubles.token_server import TokenRegistry

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.s3,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.usefixtures("builds"),
]

ALICE, BOB, MALLORY = ("alice", "wonder-land-2f9c"), ("bob", "build-er-71aa"), ("mallory", "no-thing-0d13")
#: What no two runs of a command write alike.
CHANCE = "head -c 16 /dev/urandom > /chance"


async def read(result: Result, path: str) -> bytes:
    """Read a file of what was built."""
    extracted = await result.ref.extract()
    return await asyncio.to_thread(Path(extracted.path + path).read_bytes)


async def forget_results(lab: BrokenFarm) -> None:
    """Make the farm forget every cache key."""
    for key in await lab.keys("record:*"):
        await lab.redis("DEL", f"{lab.prefix}:{key}")


async def remove_object(lab: BrokenFarm, layer: RefRecord, *, is_known: bool) -> None:
    """Remove a layer's bytes from S3, and from the nodes' caches; *is_known*: the farm knows that they are gone."""
    digest = layer.blob.digest
    blob = await lab.blob(digest)
    assert blob is not None
    await asyncio.to_thread(lab.store.delete, blob.key)
    for cached in (lab.running.state_dir / "nodes").glob(f"*/cache/**/*{digest.rpartition(':')[2]}*"):
        cached.unlink()
    if is_known:
        await lab.redis("DEL", f"{lab.prefix}:blob:{digest}")


# -- who may ----------------------------------------------------------------------------------------------------


@pytest.fixture
def private(token_registry: TokenRegistry) -> Iterator[RegistryFaultProxy]:
    """A registry that alice and bob may use and mallory may not, behind a proxy."""
    for user, rights in ((ALICE, {"*": {"pull", "push"}}), (BOB, {"*": {"pull"}}), (MALLORY, {})):
        token_registry.tokens.allow(*user, rights)
    with registry_fault_proxy(token_registry.registry.url) as proxy:
        yield proxy


@pytest.fixture
def private_base(token_registry: TokenRegistry, private: RegistryFaultProxy) -> str:
    """Push an image that one has to log in for; return its name at the proxy, by digest."""
    tag = secrets.token_hex(8)
    digest = token_registry.registry.push("secret/shell", tag, shell_image(tag))
    return f"{private.host}/secret/shell@{digest}"


async def test_what_was_built_on_a_private_base_is_closed_to_who_may_not_read_the_base(
    lab: BrokenFarm, private: RegistryFaultProxy, private_base: str
):
    """All of it is cached: bob, who may, has it without a byte. Mallory and nobody are refused, by graph and by ID.

    Also where the graph only copies from what is private, and nothing of that is in the image that comes of it.
    """
    made = image(private_base, plain_http=True).run(CHANCE)
    copied = scratch().copy(made, "/chance", "/copy")
    async with lab.driver(credentials={private.host: ALICE}) as alice:
        result = await alice.solve([made, copied])
        assert [len(ref.layers) for ref in result.refs] == [4, 1]
    private.forget()
    async with lab.driver(credentials={private.host: BOB}) as bob:
        again = await bob.solve([made, copied])
        assert [ref.id for ref in again.refs] == [ref.id for ref in result.refs]
        assert (await bob.get(result.refs[1].id)).id == result.refs[1].id
        assert not private.blob_bytes
    for credentials in ({private.host: MALLORY}, {}):
        async with lab.driver(credentials=credentials) as intruder:
            for graph in (made, copied, made.run("cat /made"), merge([scratch().mkfile("/own", "1"), made])):
                with pytest.raises(AccessDeniedError):
                    await intruder.solve(graph)
            for ref in result.refs:
                with pytest.raises(NeedsRemoteProvidersError):
                    await intruder.get(ref.id)
    assert not private.blob_bytes


async def test_what_was_copied_out_of_a_public_base_is_everybodys(lab: BrokenFarm, base: str):
    """By graph, without a new run, and by the ref's ID: whoever asks may read the base, and need not say so."""
    copied = scratch().copy(image(base, plain_http=True).run(CHANCE), "/chance", "/copy")
    async with lab.driver() as first:
        result = await first.solve(copied)
    async with lab.driver() as second:
        assert (await second.get(result.ref.id)).id == result.ref.id
        assert (await second.solve(copied)).ref.id == result.ref.id


async def test_a_lazy_base_is_fetched_as_who_runs_something_upon_it(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy, private_base: str
):
    """Alice's job leaves it lazy and she loses her rights; bob's looks the same refs up, and fetches as bob, once."""
    start = image(private_base, plain_http=True)
    lazy = merge([start, scratch().mkfile("/marker", secrets.token_hex(4))])
    async with lab.driver(credentials={private.host: ALICE}) as alice:
        result = await alice.solve(lazy)
        assert [layer.is_lazy for layer in result.ref.layers] == [True] * 3 + [False]
    layers = [layer.record.blob for layer in result.ref.layers[:3]]
    assert not any(private.blob_bytes[layer.digest] for layer in layers)
    token_registry.tokens.rights["alice"] = {}
    token_registry.tokens.requests.clear()
    events: list[JobEvent] = []
    async with lab.driver(credentials={private.host: BOB}) as bob:
        made = await bob.solve([lazy.named("lazy"), lazy.run("cat /marker > /copy")], on_event=events.append)
        assert made.refs[0].id == result.ref.id
        assert states(events, "lazy")[-1] is VertexState.CACHED
    assert {request.user for request in token_registry.tokens.requests} == {"bob"}
    for layer in layers:
        assert 0 <= private.blob_bytes[layer.digest] - layer.size_bytes < 8192  # the bodies of a few 401s


# -- remote caches ------------------------------------------------------------------------------------------------


async def test_an_imported_cache_is_fetched_as_who_needs_it(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy, private_base: str, base: str
):
    """Alice imports it, leaves and loses her rights; bob builds the same, and its layer comes as bob asks for it.

    The farm's own copy is gone meanwhile: the layer is in the cache's repository and nowhere else.
    """
    start = image(private_base, plain_http=True)
    step = start.run(CHANCE).named("the step")
    cache = f"{private.host}/secret/cache:{secrets.token_hex(4)}"
    async with lab.driver(credentials={private.host: ALICE}) as alice:
        made = await alice.solve(step, cache_to=[f"type=registry,ref={cache},mode=max"])
        chance = await read(made, "/chance")
        layer = made.ref.layers[-1].record
    await forget_results(lab)
    await remove_object(lab, layer, is_known=True)
    private.forget()
    async with lab.driver(credentials={private.host: ALICE}) as alice:
        imported = await alice.solve(step, cache_from=[cache])
        assert imported.ref.id == made.ref.id
        assert imported.ref.layers[-1].is_lazy
    assert not private.blob_bytes[layer.blob.digest]
    token_registry.tokens.rights["alice"] = {}
    token_registry.tokens.requests.clear()
    events: list[JobEvent] = []
    async with lab.driver(credentials={private.host: BOB}) as bob:
        # Upon another base, where no node has it unpacked.
        upon = merge([image(base, plain_http=True), step.diff(start)]).run("cat /chance > /copy")
        result = await bob.solve(upon, cache_from=[cache], on_event=events.append)
        assert await read(result, "/copy") == chance
    assert states(events, "the step")[-1] is VertexState.CACHED
    assert {request.user for request in token_registry.tokens.requests} == {"bob"}
    assert 0 <= private.blob_bytes[layer.blob.digest] - layer.blob.size_bytes < 8192


async def test_a_cache_that_was_deleted_is_a_miss_and_a_warning(lab: BrokenFarm, base: str):
    """Its manifest is gone: the build runs what it would have brought, and says that it was not there."""
    tag = secrets.token_hex(4)
    cache = f"{lab.proxy.host}/shell/cache:{tag}"
    graph = image(base, plain_http=True).run(CHANCE).named("the step")
    events: list[JobEvent] = []
    async with lab.driver() as driver:
        first = await driver.solve(graph, cache_to=[f"type=registry,ref={cache}"])
        _, headers, _ = lab.registry.call(
            "HEAD", f"/v2/shell/cache/manifests/{tag}", headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}
        )
        assert lab.registry.call("DELETE", f"/v2/shell/cache/manifests/{headers['Docker-Content-Digest']}")[0] == 202
        await forget_results(lab)
        second = await driver.solve(graph, cache_from=[cache], on_event=events.append)
    assert states(events, "the step")[-1] is VertexState.COMPLETED
    assert second.ref.id != first.ref.id
    (warning,) = (event.text for event in events if isinstance(event, JobWarning))
    assert cache in warning


@pytest.mark.parametrize("mode", ["min", "max"])
async def test_a_cache_has_what_its_mode_says(lab: BrokenFarm, base: str, mode: str):
    """A stage of which only a file is copied is in a cache of mode max, and not in one of mode min."""
    cache = f"{lab.proxy.host}/shell/cache:{secrets.token_hex(4)}"
    stage = image(base, plain_http=True).run(CHANCE).named("stage")
    last = scratch().copy(stage, "/chance", "/out").named("last")
    events: list[JobEvent] = []
    async with lab.driver() as driver:
        made = await driver.solve([stage, last])
        await driver.solve(last, cache_to=[f"type=registry,ref={cache},mode={mode}"])
        await forget_results(lab)
        found = await driver.solve(last, cache_from=[cache])
        await forget_results(lab)
        await driver.solve(stage, cache_from=[cache], on_event=events.append)
        assert found.ref.id == made.refs[1].id
    assert states(events, "stage")[-1] is (VertexState.CACHED if mode == "max" else VertexState.COMPLETED)


async def test_an_image_brings_its_own_cache(lab: BrokenFarm, base: str):
    """An inline cache is pushed with the image, and a farm that forgot all builds from it without a byte."""
    name = f"{lab.proxy.host}/shell:{secrets.token_hex(4)}"
    first = image(base, plain_http=True).run(CHANCE).named("first")
    second = first.run("cat /chance > /copy").named("second")
    events: list[JobEvent] = []
    async with lab.driver() as driver:
        made = await driver.solve(second, cache_to=["type=inline"])
        await driver.push(made, name, plain_http=True)
        await forget_results(lab)
        lab.proxy.forget()
        found = await driver.solve(second, cache_from=[name], on_event=events.append)
        assert found.ref.id == made.ref.id
    assert states(events, "second")[-1] is VertexState.CACHED
    assert VertexState.RUNNING not in states(events, "first")
    assert not any(lab.proxy.blob_bytes[layer.record.blob.digest] for layer in made.ref.layers)


# -- results vanish -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "behind-its-back"])
async def test_a_result_whose_layer_vanished_is_made_again(lab: BrokenFarm, base: str, is_known: bool):
    """Its object is gone from S3, and no node has it for what is built: the op runs again, and the build ends well."""
    start, other = image(base, plain_http=True), scratch().mkfile("/other", secrets.token_hex(4))
    step = start.run(CHANCE).named("the step")
    async with lab.driver() as driver:
        first = await driver.solve(step)
        layer = first.ref.layers[-1].record
        await remove_object(lab, layer, is_known=is_known)
        events: list[JobEvent] = []
        # Upon another base, where no node has it unpacked.
        graph = [step, merge([start, other, step.diff(start)]).run("cat /chance > /copy")]
        second = await driver.solve(graph, on_event=events.append)
        assert second.refs[1].layers[-2].record.blob.digest != layer.blob.digest
        assert second.refs[0].layers[-1].record.blob.digest != layer.blob.digest
        extracted = await second.refs[1].extract()
        copies = [Path(extracted.path, name) for name in ("copy", "chance")]
        assert len({await asyncio.to_thread(copy.read_bytes) for copy in copies}) == 1
    assert states(events, "the step")[-1] is VertexState.COMPLETED


# -- large graphs ---------------------------------------------------------------------------------------------------


async def test_each_vertex_of_diamonds_runs_once_and_ends_once(lab: BrokenFarm, base: str):
    """Whatever the number of ways to it: of each pair of ways from one level to the next, both see the same result."""
    top = image(base, plain_http=True).run(f"{CHANCE}; cat /chance > /0").named("level 0")
    levels = [top]
    for number in range(1, 4):
        left = levels[-1].run(f"cat /{number - 1} > /left").named(f"left {number}")
        right = levels[-1].run(f"cat /{number - 1} > /right").named(f"right {number}")
        joined = merge([left, right.diff(levels[-1])])
        levels.append(joined.run(f"cat /left /right > /{number}").named(f"level {number}"))
    events: list[JobEvent] = []
    async with lab.driver() as driver:
        result = await driver.solve(levels, on_event=events.append)
        extracted = await result.refs[-1].extract()
        chance = await asyncio.to_thread(Path(extracted.path, "chance").read_bytes)
        assert await asyncio.to_thread(Path(extracted.path, "3").read_bytes) == chance * 8
    ends = [event for event in events if isinstance(event, VertexEvent) and event.state.is_end]
    assert len({event.vertex for event in ends}) == len(ends)
    for name in (*(f"level {n}" for n in range(4)), *(f"{side} {n}" for side in ("left", "right") for n in (1, 2, 3))):
        assert states(events, name).count(VertexState.COMPLETED) == 1


def _thousand() -> list[State]:
    """Return files, and merges of every two of them."""
    words = secrets.token_hex(4)
    files = [scratch().mkfile(f"/{words}-{index}", words) for index in range(45)]
    return [merge(pair) for pair in itertools.combinations(files, 2)]


async def test_a_thousand_vertices_end_once_each(lab: BrokenFarm):
    """Each has one end for its job, and its result is there."""
    ended: list[VertexEvent] = []

    def see(event: JobEvent) -> None:
        if isinstance(event, VertexEvent) and event.state.is_end:
            ended.append(event)

    async with lab.driver() as driver:
        result = await driver.solve(_thousand(), on_event=see)
    assert len({event.vertex for event in ended}) == len(ended) == 45 + 990
    assert len({ref.id for ref in result.refs}) == 990


async def test_a_thousand_vertices_are_cancelled_midway(lab: BrokenFarm, base: str):
    """Some have ended, some run, most wait: each of them is told to have ended, and the commands are gone."""
    start = image(base, plain_http=True)
    commands = [start.run(f"echo begun; sleep 600; echo {index}") for index in range(6)]
    async with lab.driver() as driver:
        job = driver.solve([*_thousand(), merge(commands)])
        waiting = asyncio.ensure_future(wait_for(job))
        await log_of(job, "begun")
        await job.cancel()
        with pytest.raises(JobCancelledError):
            await waiting
        assert (await job.record()).state is JobState.CANCELLED
        ends = [e async for e in job.events() if isinstance(e, VertexEvent) and e.state.is_end]
        told = {e.vertex async for e in job.events() if isinstance(e, VertexEvent)}
    assert len({event.vertex for event in ends}) == len(ends)
    assert {event.vertex for event in ends} == told
    assert VertexState.CANCELLED in {event.state for event in ends}
