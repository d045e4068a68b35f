"""S3 fails, is slow, loses an object, or keeps other bytes than it was given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster.errors import BlobNotFoundError, ClusterError, StoreFullError, UnavailableError, UnsafeStoreError
from tests.doubles.faults import MIB, BrokenFarm, assert_extracted
from tests.doubles.registry import docker_registry
from tests.doubles.registry_faults import Respond
from tests.doubles.s3_faults import Answer, Hang, LoseAnswer, ResetAfter, S3FaultProxy, TruncateAfter

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]


def _errors(s3: S3FaultProxy) -> None:
    s3.plan(Answer(503, "SlowDown"), method="PUT", times=2)
    s3.plan(Answer(500, "InternalError"), method="POST", times=2)
    s3.plan(Answer(503, "ServiceUnavailable"), method="GET", times=2)


def _lost_answers(s3: S3FaultProxy) -> None:
    s3.plan(LoseAnswer(), method="POST", target="uploadId=")
    s3.plan(LoseAnswer(), method="PUT", target="partNumber=2")


def _silence(s3: S3FaultProxy) -> None:
    s3.plan(Hang(), method="PUT")
    s3.plan(Hang(), method="GET")


def _half_answers(s3: S3FaultProxy) -> None:
    s3.plan(TruncateAfter(2 * MIB), method="GET", target="blobs/")
    s3.plan(ResetAfter(MIB), method="GET", target="blobs/")


@pytest.mark.parametrize("fault", [_errors, _lost_answers, _silence, _half_answers])
async def test_an_extract_outlives(lab: BrokenFarm, fault: Callable[[S3FaultProxy], None]):
    """S3 answers a few requests with errors, half, not at all, or after the deed: two nodes get their files."""
    name, image = lab.image(12 * MIB, MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        fault(lab.s3_proxy)
        for result in await asyncio.gather(mine.extract("n1"), theirs.extract("n2")):
            assert_extracted(result.path, image)
    lab.assert_fetched(image, lost_owners=1)
    await lab.assert_whole(image)


async def test_i5_every_caller_ends_while_s3_is_down(lab: BrokenFarm):
    """S3 takes nothing: both callers get a typed error in bounded time, and the next call succeeds."""
    name, image = lab.image(6 * MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        for method in ("PUT", "POST"):
            lab.s3_proxy.plan(Answer(503, "ServiceUnavailable"), method=method, times=10_000)
        async with asyncio.timeout(45):
            outcomes = await asyncio.gather(mine.extract("n1"), theirs.extract("n2"), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 2
        lab.s3_back()
        assert_extracted((await mine.extract("n1")).path, image)
    await lab.assert_whole(image)


@pytest.mark.parametrize(
    ("answer", "error"),
    [(Answer(507, "InsufficientStorage"), StoreFullError), (Answer(400, "ExpiredToken"), UnsafeStoreError)],
    ids=["full", "expired"],
)
async def test_i5_every_caller_is_told_why_s3_takes_nothing(lab: BrokenFarm, answer: Answer, error: type[ClusterError]):
    """No room, or keys that have expired: both callers get the error that says what to do, and then it works."""
    name, image = lab.image(6 * MIB)
    async with lab.driver() as one, lab.driver() as two:
        mine, theirs = await one.pull(name, plain_http=True), await two.pull(name, plain_http=True)
        for method in ("PUT", "POST"):
            lab.s3_proxy.plan(answer, method=method, times=10_000)
        async with asyncio.timeout(45):
            outcomes = await asyncio.gather(mine.extract("n1"), theirs.extract("n2"), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [error] * 2
        lab.s3_back()
        assert_extracted((await mine.extract("n1")).path, image)
    await lab.assert_whole(image)


async def test_an_object_that_was_deleted_behind_our_back_is_fetched_again(lab: BrokenFarm):
    """Its ref turns lazy, and the node that needs it brings it from the registry once more (I2)."""
    name, image = lab.image(6 * MIB, MIB)
    async with lab.driver() as one:
        ref = await one.pull(name, plain_http=True)
        await ref.unlazy()
        lost = await lab.blob(image.layers[0].digest)
        assert lost is not None
        lab.store.delete(lost.key)
        for node in ("n0", "n1", "n2"):
            assert_extracted((await ref.extract(node)).path, image)
        found = await lab.blob(image.layers[0].digest)
    assert found is not None
    assert found.key != lost.key
    assert lab.proxy.blob_bytes[image.layers[0].digest] == 2 * len(image.layers[0].data)
    assert lab.proxy.blob_bytes[image.layers[1].digest] == len(image.layers[1].data)
    await lab.assert_whole(image)


async def test_an_object_that_is_lost_at_the_registry_too_is_a_typed_error(lab: BrokenFarm):
    """Neither S3 nor the registry has it any more: who asks is told which blob, and soon."""
    name, image = lab.image(MIB)
    digest = image.layers[0].digest
    async with lab.driver() as one:
        ref = await one.pull(name, plain_http=True)
        await ref.unlazy()
        lost = await lab.blob(digest)
        assert lost is not None
        lab.store.delete(lost.key)
        # The node that fetched it has it on its disk, and may serve that until somebody finds the object gone.
        lab.proxy.script(Respond(404), of=lambda seen: seen.digest == digest, times=None)
        errors = []
        async with asyncio.timeout(45):
            for node in ("n0", "n1", "n2"):
                try:
                    assert_extracted((await ref.extract(node)).path, image)
                except ClusterError as error:
                    errors.append(error)
        assert len(errors) >= 2
        assert all(isinstance(error, BlobNotFoundError) and digest in str(error) for error in errors)
        assert await lab.blob(digest) is None
    await lab.assert_whole(image)


async def test_i2_a_damaged_object_is_never_served(lab: BrokenFarm):
    """Somebody overwrote an object with as many other bytes: no node unpacks them, its ref turns lazy and heals."""
    name, image = lab.image(6 * MIB)
    async with lab.driver() as one:
        ref = await one.pull(name, plain_http=True)
        await ref.unlazy()
        record = await lab.blob(image.layers[0].digest)
        assert record is not None
        lab.store.put(record.key, bytes(byte ^ 0xFF for byte in image.layers[0].data))
        for node in ("n0", "n1", "n2"):
            assert_extracted((await ref.extract(node)).path, image)
    await lab.assert_whole(image)


async def test_a_damaged_object_is_never_pushed(lab: BrokenFarm):
    """A push reads a damaged object: the target gets the right bytes, fetched again, and S3 is healed."""
    name, image = lab.image(6 * MIB)
    digest = image.layers[0].digest
    with docker_registry() as target:
        async with lab.driver() as one:
            ref = await one.pull(name, plain_http=True)
            await ref.unlazy()
            record = await lab.blob(digest)
            assert record is not None
            lab.store.put(record.key, bytes(byte ^ 0xFF for byte in image.layers[0].data))
            await one.push(ref, f"{target.host}/app:t", plain_http=True)
        assert target.call("GET", f"/v2/app/blobs/{digest}")[2] == image.layers[0].data
    await lab.assert_whole(image)
