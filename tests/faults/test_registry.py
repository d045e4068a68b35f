"""The registry truncates, resets, lies, refuses, throttles and hangs."""

from __future__ import annotations

import asyncio
import http.client
import time

import pytest

from cluster.errors import DigestMismatchError
from tests.doubles.faults import MIB, BrokenFarm, assert_extracted
from tests.doubles.registry_faults import (
    Fault,
    Hang,
    IgnoreRange,
    Lie,
    RefuseRange,
    RegistryFaultProxy,
    Reset,
    Respond,
    Truncate,
    blobs,
    registry_fault_proxy,
)
from tests.doubles.token_server import TokenRegistry

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        (Truncate(3 * MIB), 2),
        (Reset(3 * MIB), 2),
        (Reset(), 2),
        (Respond(503), 2),
        (Respond(500), 2),
        (RefuseRange(), None),
        (IgnoreRange(), None),
        (Hang(MIB), 1),
        (Hang(), 1),
    ],
    ids=repr,
)
async def test_an_extract_outlives(lab: BrokenFarm, fault: Fault, times: int | None):
    """The registry does that to a few answers, or to all: two nodes get their files, what was read is not read again.

    But for a source that has no ranges: there, going on means reading from the start.
    """
    name, image = lab.image(17 * MIB, 6 * MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        lab.proxy.script(fault, times=times)
        for result in await asyncio.gather(mine.extract("n1"), theirs.extract("n2")):
            assert_extracted(result.path, image)
    if isinstance(fault, Hang):
        fault.proceed.set()
    if times is not None:
        lab.assert_fetched(image, lost_owners=1)
    await lab.assert_whole(image)


async def test_retry_after_is_honoured(lab: BrokenFarm):
    """429 with Retry-After: the farm waits as long as it is told to, all of it, and then succeeds."""
    name, image = lab.image(6 * MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        lab.proxy.script(Respond(429, {"Retry-After": "3"}))
        started_s = time.monotonic()
        for result in await asyncio.gather(mine.extract("n1"), theirs.extract("n2")):
            assert_extracted(result.path, image)
        assert time.monotonic() - started_s >= 3
    assert len(lab.proxy.blob_gets(image.layers[0].digest)) <= 3
    lab.assert_fetched(image)
    await lab.assert_whole(image)


async def test_who_lies_is_left_for_who_does_not(lab: BrokenFarm):
    """One source serves other bytes, a second one the right ones: everybody gets these, and nobody fails (I2)."""
    name, image = lab.image(12 * MIB)
    tag = name.rpartition(":")[2]
    with registry_fault_proxy(lab.registry.url) as honest:
        async with lab.driver() as one, lab.driver() as two:
            await one.pull(f"{honest.host}/app:{tag}", plain_http=True)
            mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
            lab.proxy.script(Lie(), times=None)
            for result in await asyncio.gather(mine.extract("n1"), theirs.extract("n2")):
                assert_extracted(result.path, image)
        assert honest.blob_bytes[image.layers[0].digest] >= len(image.layers[0].data)
    await lab.assert_whole(image)


async def test_wrong_bytes_from_every_source_reach_every_caller_and_are_not_remembered(lab: BrokenFarm):
    """All who wait get DigestMismatchError, which names the digest; who asks afterwards gets a fetch of their own."""
    name, image = lab.image(12 * MIB)
    digest = image.layers[0].digest
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        lab.proxy.script(Lie(), times=None)
        outcomes = await asyncio.gather(mine.extract("n1"), theirs.extract("n2"), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DigestMismatchError] * 2
        assert all(digest in str(outcome) for outcome in outcomes)
        assert await lab.blob(digest) is None
        lab.proxy.forget()
        for result in await asyncio.gather(mine.extract("n1"), theirs.extract("n2")):
            assert_extracted(result.path, image)
    lab.assert_fetched(image)
    await lab.assert_whole(image)


async def test_a_token_that_expires_in_the_middle_is_refreshed(lab: BrokenFarm, token_registry: TokenRegistry):
    """The registry stops taking the token after some ranges: the driver is asked for another, and the fetch goes on."""
    token_registry.tokens.allow("alice", "wonderland", {"*": {"pull"}})
    challenge = _challenge(token_registry)
    with registry_fault_proxy(token_registry.registry.url) as proxy:
        name, image = lab.image(17 * MIB, registry=token_registry.registry)
        name = name.replace(token_registry.registry.host, proxy.host)
        async with lab.driver(credentials={proxy.host: ("alice", "wonderland")}) as one:
            ref = await one.pull(name, plain_http=True)
            expired = Respond(401, {"WWW-Authenticate": challenge})
            seen = 0

            def after_two(request):
                nonlocal seen
                seen += (is_meant := blobs(request) and request.authorization is not None)
                return is_meant and seen > 2

            asked = len(token_registry.tokens.requests)
            proxy.script(expired, of=after_two, times=1)
            assert_extracted((await ref.extract("n1")).path, image)
            assert len(token_registry.tokens.requests) > asked
        assert _expired_once(proxy, image.layers[0].digest)
        assert lab.was_fetched_once(proxy, image)
    await lab.assert_whole(image)


def _challenge(registry: TokenRegistry) -> str:
    connection = http.client.HTTPConnection(registry.registry.host)
    try:
        connection.request("GET", "/v2/app/manifests/none")
        challenge = connection.getresponse().headers["WWW-Authenticate"]
    finally:
        connection.close()
    assert challenge
    return challenge


def _expired_once(proxy: RegistryFaultProxy, digest: str) -> bool:
    tokens = {seen.authorization for seen in proxy.blob_gets(digest)} - {None}
    return len(tokens) >= 2
