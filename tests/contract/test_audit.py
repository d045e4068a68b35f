"""What every AuditLog promises, and what stores note in it: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.audit import AuditEntry, Operation
from cluster.collect.policy import KeepPolicy
from cluster.config import AuditConfig
from cluster.errors import StaleFenceError
from cluster.flight.values import UploadState
from storage.audit import RedisAudit
from storage.connect import connect
from storage.flights import RedisFlightStore
from storage.jobs import RedisJobStore
from tests.contract.test_flights import DIGEST, KEY, TTL_S, blob, join, own
from tests.contract.test_jobs import DEFINITION, J, spec
from tests.doubles.collect import GRACE_S, Bench, chain, layer
from tests.doubles.redis import documented_rights
from tests.doubles.stores import AUDIT


async def told(stores, **wanted):
    """Return what is kept, without times."""
    await asyncio.sleep(0)  # what was noted in this tick goes out at its end
    return [replace(entry, wall_s=0.0) async for entry in stores.audit.entries(**wanted)]


def fetched(fence, outcome="committed"):
    return AuditEntry(
        operation=Operation.FETCH, outcome=outcome, who="driver", by="n0", digest=DIGEST, fence=fence.number
    )


async def test_what_was_noted_is_told_in_its_order(stores):
    """By whom, and with the store's time; by any process of the farm; from the time on that is asked for."""
    stores.audit.note(*(AuditEntry(operation=Operation.UNLAZY, seconds=n, by="" if n else "me") for n in range(3)))
    stores.audit.note()
    await told(stores)
    assert [(e.seconds, e.by) for e in await told(stores.other())] == [(0, "me"), (1, "tests"), (2, "tests")]
    (first, *_) = [entry async for entry in stores.audit.entries()]
    now_s = await stores.collect.now_wall_s()
    assert now_s - 60 < first.wall_s <= now_s
    stores.pass_time(60.0)
    stores.audit.note(AuditEntry(operation=Operation.PULL))
    assert [entry.operation for entry in await told(stores, last_s=30.0)] == ["pull"]


async def test_the_newest_are_read_without_the_others(redis_farm):
    """In their order; then only what came since; and what is too old to be told is not."""
    audit = redis_farm.stores().audit

    async def note(*numbers):
        audit.note(*(AuditEntry(operation="n", fence=number) for number in numbers))
        await asyncio.sleep(0)

    async def newest(most, after=""):
        last, entries = await audit.newest(most, after=after)
        return last, [entry.fence for entry in entries]

    assert await newest(5) == ("", [])
    await note(*range(4))
    last, found = await newest(3)
    assert found == [1, 2, 3]
    assert await newest(3, last) == (last, [])
    await note(4, 5)
    assert (await newest(9, last))[1] == [4, 5]
    redis_farm.pass_time(AUDIT.retention_s + 1)
    assert (await newest(9))[1] == []


async def test_more_than_may_be_kept_is_not(stores):
    """The oldest go, about: Redis cuts whole nodes of a stream, of a hundred."""
    for n in range(5):
        stores.audit.note(*(AuditEntry(operation="n", fence=100 * n + i) for i in range(100)))
        await asyncio.sleep(0)
    kept = [entry.fence for entry in await told(stores)]
    assert AUDIT.most_entries <= len(kept) <= AUDIT.most_entries + 100
    assert kept == list(range(500 - len(kept), 500))


async def test_what_is_too_old_is_neither_shown_nor_kept(stores):
    """Also where it is asked for."""
    stores.audit.note(*(AuditEntry(operation="old", fence=i) for i in range(100)))
    await told(stores)
    stores.pass_time(AUDIT.retention_s + 1)
    assert await told(stores) == await told(stores, last_s=10 * AUDIT.retention_s) == []
    stores.audit.note(*(AuditEntry(operation="new", fence=i) for i in range(5)))
    assert {entry.operation for entry in await told(stores)} == {"new"}


async def test_redis_keeps_no_entry_for_longer_than_it_is_shown(redis_farm):
    """The stream is cut by time as it is written to, and goes as a whole where nobody does any more."""
    stores = redis_farm.stores()
    (link, key) = redis_farm.links[0], redis_farm.keys.audit
    stores.audit.note(*(AuditEntry(operation="old", fence=i) for i in range(150)))
    await told(stores)
    assert 0 < await link.execute("PTTL", key) <= AUDIT.retention_s * 1000
    stores.pass_time(AUDIT.retention_s - 1)
    stores.audit.note(AuditEntry(operation="new"))
    stores.pass_time(2)
    stores.audit.note(AuditEntry(operation="new"))
    assert len(await told(stores)) == 2
    kept = await link.execute("XRANGE", key, "-", "+")
    assert len(kept) < 100
    stores.pass_time(AUDIT.retention_s + 1)
    assert await link.execute("EXISTS", key) == 0


async def test_who_follows_is_told_what_is_kept_and_what_comes(stores):
    """Once each, in order."""
    stores.audit.note(*(AuditEntry(operation="before", fence=i) for i in range(3)))
    await told(stores)
    seen = []

    async def follow():
        async for entry in stores.audit.follow():
            seen.append((entry.operation, entry.fence))
            if len(seen) == 3:
                stores.audit.note(*(AuditEntry(operation="after", fence=i) for i in range(2)))
            if len(seen) == 5:
                return

    async with asyncio.timeout(10):
        await follow()
    assert seen == [("before", 0), ("before", 1), ("before", 2), ("after", 0), ("after", 1)]


async def test_an_owner_s_end_is_noted_with_it_and_a_stale_one_s_is_not(stores):
    """What the stream says of a commit, a failure or a hand-over is so; a repeated commit is noted once."""
    first = await own(stores)
    await stores.flights.fail(first, b"error", entry=fetched(first, "failed"))
    second = await own(stores, token="t2")
    await stores.flights.vacate(second, entry=fetched(second, "vacated"))
    third = await own(stores, token="t3")
    with pytest.raises(StaleFenceError):
        await stores.flights.commit(second, blob(second), entry=fetched(second))
    for _ in range(2):
        await stores.flights.commit(third, blob(third), entry=fetched(third))
    assert await told(stores) == [fetched(first, "failed"), fetched(second, "vacated"), fetched(third)]


@pytest.mark.parametrize("upload", [None, UploadState(key="blobs/x/1", upload_id="u", part_bytes=8 << 20)])
async def test_a_take_over_is_noted_with_both_owners(stores, upload):
    """And whether there was something to go on with. Who owns in its turn, or again, takes nothing over."""
    first = await own(stores)
    await own(stores)
    if upload is not None:
        await stores.flights.begin_upload(first, upload)
    stores.pass_time(TTL_S + 1)
    second = await own(stores, "n1")
    how = "resumed" if upload else "afresh"
    entry = AuditEntry(operation=Operation.TAKE_OVER, outcome=how, by="n1", source="n0", digest=DIGEST)
    assert await told(stores) == [replace(entry, fence=second.number)]
    await stores.flights.vacate(second)
    await join(stores, "n2")
    assert len(await told(stores)) == 1


async def test_a_blob_that_turns_absent_is_noted_once(stores):
    """By whoever found it first."""
    fence = await own(stores)
    await stores.flights.commit(fence, blob(fence))
    for _ in range(2):
        await stores.refs.mark_absent(blob(fence), "gone")
    (entry,) = await told(stores)
    assert (entry.operation, entry.digest, entry.source) == ("absent", DIGEST, blob(fence).key)


async def test_what_is_collected_and_deleted_is_noted(stores):
    """What stays is not; nor is what a dry run would take."""
    bench = Bench(stores)
    await bench.pull("example/app:1", "a", "b")
    await bench.fetch(layer("a").digest)
    await bench.collector.prune(KeepPolicy(includes_shared=True))
    await bench.leave()
    await bench.collector.prune(KeepPolicy(includes_shared=True), is_dry_run=True)
    stores.pass_time(200)
    assert {entry.operation for entry in await told(stores)} <= {"fetch"}
    await bench.collector.prune(KeepPolicy(includes_shared=True))
    stores.pass_time(GRACE_S + 1)
    assert await bench.delete_due()
    found = await told(stores)
    pruned = [entry.ref for entry in found if entry.operation == "prune"]
    assert pruned == [record.id for record in reversed(chain("a", "b"))]
    assert layer("a").digest in {entry.digest for entry in found if entry.operation == "delete"}


@pytest.fixture
def rights_of_before(redis_farm):
    """How a farm logs in whose user of Redis has the rights of a release without an audit stream."""
    config = redis_farm.config
    from storage.connect import connect_sync  # noqa: PLC0415

    link = connect_sync(config)
    rights = documented_rights().replace("{lazyfarm}", "{*}").replace(" +xtrim", "").split(" ")
    link.execute("ACL", "SETUSER", "before", *rights[1:])
    yield replace(config, url=config.url.replace("redis://", "redis://before:PASSWORD@"))
    link.execute("ACL", "DELUSER", "before")
    link.close()


async def test_a_user_of_redis_that_may_not_cut_streams_still_commits(redis_farm, rights_of_before):
    """As an upgrade finds it: the stream is then cut by its length alone."""
    link = connect(rights_of_before)
    try:
        audit = RedisAudit(link, redis_farm.keys, AUDIT)
        flights = RedisFlightStore(link, redis_farm.keys, audit)
        fence = (await flights.join(KEY, worker="n0", token="t", ttl_s=TTL_S)).fence
        await flights.commit(fence, blob(fence), entry=fetched(fence))
        assert [entry.outcome async for entry in audit.entries()] == ["committed"]
    finally:
        await link.close()


async def test_nothing_is_written_where_nothing_is_to_be_kept(redis_farm):
    """``audit.most_entries`` is 0."""
    redis_farm.stores()
    (link, keys) = redis_farm.links[0], redis_farm.keys
    audit = RedisAudit(link, keys, AuditConfig(most_entries=0))
    flights = RedisFlightStore(link, keys, audit)
    await flights.join(KEY, worker="n0", token="t", ttl_s=0.001)
    await asyncio.sleep(0.01)
    fence = (await flights.join(KEY, worker="n1", token="u", ttl_s=TTL_S)).fence
    await flights.commit(fence, blob(fence), entry=fetched(fence))
    audit.note(AuditEntry(operation=Operation.PULL))
    await asyncio.sleep(0)
    assert await link.execute("EXISTS", keys.audit) == 0


async def test_a_job_s_cancellation_is_noted_once(redis_farm):
    """However often it is asked for, with who asked first; that of a job that has ended is none."""
    stores = redis_farm.stores()
    link, keys = redis_farm.links[0], redis_farm.keys
    jobs = [RedisJobStore(link, keys, RedisAudit(link, keys, AUDIT, by=by)) for by in ("first", "second")]
    await jobs[0].submit(spec(), DEFINITION)
    for asking in (*jobs, jobs[0]):
        await asking.request_cancel(J)
    assert [(entry.operation, entry.job, entry.by) for entry in await told(stores)] == [("cancel", J, "first")]
