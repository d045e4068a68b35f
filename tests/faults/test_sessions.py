"""Drivers with credentials of their own, on one private image; and drivers that die."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.attending import POLL_S
from actors.session_host import SESSION_GRACE_S
from cluster.errors import (
    AccessDeniedError,
    ClusterError,
    NeedsRemoteProvidersError,
    RegistryError,
    SessionGoneError,
)
from lazyfarm.ref import Ref
from tests.doubles.faults import MIB, BrokenFarm, assert_extracted, eventually
from tests.doubles.registry import Image
from tests.doubles.registry_faults import RegistryFaultProxy, registry_fault_proxy
from tests.doubles.token_server import TokenRegistry

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]

ALICE, BOB, MALLORY = ("alice", "wonder-land-2f9c"), ("bob", "build-er-71aa"), ("mallory", "no-thing-0d13")


@pytest.fixture
def private(token_registry: TokenRegistry) -> Iterator[RegistryFaultProxy]:
    """A registry that alice and bob may read from and mallory may not, behind a proxy."""
    for user, rights in ((ALICE, {"*": {"pull", "push"}}), (BOB, {"*": {"pull"}}), (MALLORY, {})):
        token_registry.tokens.allow(*user, rights)
    with registry_fault_proxy(token_registry.registry.url) as proxy:
        yield proxy


def _image(lab: BrokenFarm, registry: TokenRegistry, proxy: RegistryFaultProxy, *sizes: int) -> tuple[str, Image]:
    name, image = lab.image(*sizes, registry=registry.registry)
    return name.replace(registry.registry.host, proxy.host), image


async def test_who_has_no_rights_gets_nothing_that_is_present(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy
):
    """Every blob is present, and mallory knows the refs, their IDs and their handlers: refused, on every way in.

    A cached private layer is never a way around its registry; bob, who may, is served, and asks for no byte more.
    """
    name, image = _image(lab, token_registry, private, 6 * MIB, MIB)
    async with (
        lab.driver(credentials={private.host: ALICE}) as alice,
        lab.driver(credentials={private.host: MALLORY}) as mallory,
        lab.driver() as nobody,
        lab.driver(credentials={private.host: BOB}) as bob,
    ):
        ref = await alice.pull(name, plain_http=True)
        await ref.extract("n1")
        for intruder in (mallory, nobody):
            with pytest.raises(RegistryError):
                await intruder.pull(name, plain_http=True)
            with pytest.raises(NeedsRemoteProvidersError) as refused:
                await intruder.get(ref.id)
            assert set(refused.value.digests) == {layer.digest for layer in image.layers}
            with pytest.raises(NeedsRemoteProvidersError):
                await intruder.get_by_blob(ref.layers[0].record.blob, handlers=ref.handlers)
            stolen = Ref(intruder, ref.layers, ref.record, ref.handlers)
            with pytest.raises(NeedsRemoteProvidersError):
                await stolen.unlazy()
            with pytest.raises(NeedsRemoteProvidersError):
                await stolen.extract("n1")
            with pytest.raises(ClusterError):
                await intruder.push(stolen, f"{lab.proxy.host}/stolen:t", plain_http=True)
        assert lab.registry.call("GET", "/v2/stolen/manifests/t")[0] == 404
        assert_extracted((await (await bob.get(ref.id)).extract("n2")).path, image)
    assert lab.was_fetched_once(private, image)
    await lab.assert_whole(image)


async def test_who_has_no_rights_may_not_join_a_flight(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy
):
    """While alice's fetch is under way, mallory is refused at once, on the same node and on another."""
    name, image = _image(lab, token_registry, private, 8 * MIB)
    private.bytes_per_s = 3 * MIB
    async with (
        lab.driver(credentials={private.host: ALICE}) as alice,
        lab.driver(credentials={private.host: MALLORY}) as mallory,
    ):
        ref = await alice.pull(name, plain_http=True)
        running = asyncio.ensure_future(_extract(ref, "n1"))
        await eventually(lambda: private.blob_bytes[image.layers[0].digest] > MIB, "a MiB")
        for node in ("n1", "n2"):
            with pytest.raises(NeedsRemoteProvidersError):
                await Ref(mallory, ref.layers, ref.record, ref.handlers).extract(node)
        assert not running.done()
        assert_extracted((await running).path, image)
    assert lab.was_fetched_once(private, image)
    await lab.assert_whole(image)


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["same-node", "another-node"])
async def test_i6_killing_the_driver_whose_fetch_it_is_fails_nobody(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy, tmp_path: Path, node: str
):
    """Alice's driver is killed in the middle of the fetch that it began; bob, who waits, gets it all the same.

    No new range can be asked for as alice once she is gone: it goes on as bob.
    """
    name, image = _image(lab, token_registry, private, 17 * MIB)
    private.bytes_per_s = 1.2 * MIB
    async with lab.driver(credentials={private.host: BOB}) as bob:
        ref = await bob.pull(name, plain_http=True)
        with _driver(lab, tmp_path, "extract", name, "--node", "n1", host=private.host, user=ALICE) as alice:
            await eventually(lambda: private.blob_bytes[image.layers[0].digest] > MIB, "a MiB", within_s=40)
            waiting = asyncio.ensure_future(_extract(ref, node))
            await eventually(lambda: private.blob_bytes[image.layers[0].digest] > 3 * MIB, "three MiB")
            alice.kill()
        private.bytes_per_s = 3 * MIB
        assert_extracted((await waiting).path, image)
    await lab.assert_whole(image)


async def test_the_work_of_a_driver_that_was_killed_stops(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy, tmp_path: Path
):
    """Nobody else waits: within the session's grace the fetch is over, its flight given up, and its lease lapses."""
    name, image = _image(lab, token_registry, private, 24 * MIB)
    digest = image.layers[0].digest
    private.bytes_per_s = 0.3 * MIB
    async with lab.driver(credentials={private.host: ALICE}) as before:
        await before.pull(name, plain_http=True)
    with _driver(lab, tmp_path, "extract", name, "--node", "n1", host=private.host, user=ALICE) as alice:
        await eventually(lambda: private.blob_bytes[digest] > MIB, "a MiB", within_s=40)
        assert await lab.owner_of(digest) == "n1"
        alice.kill()

    async def is_given_up() -> bool:
        return await lab.owner_of(digest) is None

    await eventually(is_given_up, "the flight to be given up", within_s=POLL_S + SESSION_GRACE_S + 8)
    served = private.blob_bytes[digest]
    assert served < len(image.layers[0].data)
    await eventually(lambda: not lab.staged(), "its staging file to go")
    private.bytes_per_s = None
    async with lab.driver(credentials={private.host: BOB}) as bob:
        assert_extracted((await (await bob.pull(name, plain_http=True)).extract("n2")).path, image)
    await lab.assert_whole(image)


async def test_a_session_that_falls_silent_never_hangs_its_call(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy
):
    """The one session there was can't answer any more, though its call is open: a typed error, in bounded time."""
    name, image = _image(lab, token_registry, private, 24 * MIB)
    private.bytes_per_s = 0.3 * MIB
    async with lab.driver(credentials={private.host: ALICE}) as alice:
        ref = await alice.pull(name, plain_http=True)
        running = asyncio.ensure_future(_extract(ref, "n1"))
        await eventually(lambda: private.blob_bytes[image.layers[0].digest] > MIB // 2, "half a MiB")
        with _silent(alice):
            started_s = time.monotonic()
            with pytest.raises((SessionGoneError, NeedsRemoteProvidersError)):
                await running
            assert time.monotonic() - started_s < POLL_S + SESSION_GRACE_S + 8
    await lab.assert_whole()


async def test_credentials_that_are_taken_away_count_when_they_are_used(
    lab: BrokenFarm, token_registry: TokenRegistry, private: RegistryFaultProxy
):
    """A lazy ref outlives its driver's rights: who unlazies it answers with what holds then, and is refused."""
    name, image = _image(lab, token_registry, private, 6 * MIB)
    async with (
        lab.driver(credentials={private.host: ALICE}) as alice,
        lab.driver(credentials={private.host: BOB}) as bob,
    ):
        await alice.pull(name, plain_http=True)
        ref = await bob.pull(name, plain_http=True)
        token_registry.tokens.rights["bob"] = {}
        token_registry.tokens.passwords["bob"] = "another"
        async with lab.driver(credentials={private.host: BOB}) as late:
            with pytest.raises((AccessDeniedError, NeedsRemoteProvidersError)):
                await Ref(late, ref.layers, ref.record, ref.handlers).unlazy()
        assert await lab.blob(image.layers[0].digest) is None
        assert_extracted((await (await alice.pull(name, plain_http=True)).extract("n1")).path, image)
    await lab.assert_whole(image)


async def _extract(ref, node):
    return await ref.extract(node)


@contextlib.contextmanager
def _driver(
    lab: BrokenFarm, directory: Path, *arguments: str, host: str, user: tuple[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command line as a driver process of that user; killed in the end."""
    config = {"auths": {host: {"auth": base64.b64encode(":".join(user).encode()).decode()}}}
    (directory / "config.json").write_text(json.dumps(config))
    environ = {
        **os.environ,
        "DOCKER_CONFIG": str(directory),
        "LAZYFARM_STATE_DIR": str(lab.running.state_dir),
    }
    program = [sys.executable, "-m", "lazyfarm"]
    process = subprocess.Popen(
        [*program, *arguments], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _silent(farm) -> Iterator[None]:
    """Make a driver's session thread stand still: alive, and answering nobody."""
    go_on = threading.Event()
    farm._session._loop.call_soon_threadsafe(go_on.wait, 90)
    try:
        yield
    finally:
        go_on.set()
