"""Redis with replicas: what is known to be replicated, and what a fail-over may and may not undo."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest

from cluster.config import RedisConfig
from cluster.digest import digest_of
from cluster.errors import DeadlineExceededError, StaleFenceError, UnavailableError, UnsafeStoreError
from cluster.flight.values import Fence, Owned, Present, UploadState
from cluster.job import JobId, JobSpec, JobState, JobWarning
from cluster.lease import LeaseId, blob_resource
from cluster.messages import SessionInfo
from cluster.ref import BlobRecord
from storage.connect import check_policy, connect, connect_sync
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.renewer import RedisFlightRenewer
from tests.doubles.redis import (
    ClusterRedis,
    RedisServer,
    SentinelRedis,
    cluster_redis,
    frozen,
    redis_binaries,
    redis_server,
    sentinel_redis,
)
from tests.doubles.stores import RedisFarm, eventually

pytestmark = pytest.mark.redis

BINARY = next(iter(redis_binaries().values()))

DIGEST = digest_of(b"layer")
KEY = blob_resource(DIGEST)
#: Longer than any fail-over here takes.
PATIENT_S = 30.0


@pytest.fixture
def primary():
    """A primary of the test's own."""
    with redis_server(BINARY, "--repl-diskless-sync-delay", "0") as server:
        yield server


@pytest.fixture
def replica(primary):
    """Its replica, which has all that the primary has."""
    with redis_server(BINARY, "--replicaof", "127.0.0.1", str(primary.port)) as server:
        wait_for_replica(primary)
        yield server


def wait_for_replica(primary: RedisServer) -> None:
    """Wait until one replica takes what is written."""
    link = primary.link()
    while not (link.execute("SET", "x", "1") and link.execute("WAIT", 1, 100)):
        pass
    link.close()


@contextlib.asynccontextmanager
async def linked(server: RedisServer | SentinelRedis | ClusterRedis, **settings):
    link = connect(replace(server.config, **settings))
    try:
        yield link
    finally:
        await link.close()


async def _drop(link, server: RedisServer) -> None:
    """Let the server close the link's connection, and the link notice."""
    drops = link.drops
    admin = server.link()
    admin.execute("CLIENT", "KILL", "TYPE", "normal")
    admin.close()
    async with asyncio.timeout(10):
        while link.drops == drops:  # noqa: ASYNC110 - the link has no event for it
            await asyncio.sleep(0.005)


# -- replicated() -------------------------------------------------------------------------------------


async def test_a_write_is_replicated_when_a_replica_has_it(primary, replica):
    """True once the replica has it, False while the replica doesn't answer, and True again when it does."""
    async with linked(primary, wait_replicas=1) as link:
        await link.execute("SET", "a", "1")
        assert await link.replicated(5.0, since=link.drops)
        with frozen(replica):
            await link.execute("SET", "b", "1")
            assert not await link.replicated(0.2, since=link.drops)

        assert await link.replicated(5.0, since=link.drops)
        there = replica.link()
        assert there.execute("GET", "b") == b"1"
        there.close()


async def test_what_another_wrote_is_replicated_too(primary, replica):
    """What was read and is to be acted on counts like what was written, also for who has written nothing."""
    async with linked(primary, wait_replicas=1) as link, linked(primary, wait_replicas=1) as other:
        await other.execute("PING")
        with frozen(replica):
            await link.execute("SET", "a", "1")
            assert await other.execute("GET", "a") == b"1"
            assert not await other.replicated(0.2, since=other.drops)

        assert await other.replicated(5.0, since=other.drops)


async def test_more_replicas_than_there_are_never_have_it(primary, replica):
    """A farm that wants two replicas deletes nothing while there is one."""
    async with linked(primary, wait_replicas=2) as link:
        await link.execute("SET", "a", "1")

        assert not await link.replicated(0.2, since=link.drops)


async def test_a_server_without_replicas_has_it_itself(primary):
    """Where no replica is configured, a write that was acknowledged is all there is."""
    async with linked(primary) as link:
        await link.execute("SET", "a", "1")

        assert await link.replicated(5.0, since=link.drops)


async def test_a_write_before_a_lost_connection_is_not_known_to_be_replicated(primary, replica):
    """Whoever answers after a drop may not be who took the write: it says nothing of it."""
    async with linked(primary, wait_replicas=1) as link:
        since = link.drops
        await link.execute("SET", "a", "1")
        await _drop(link, primary)

        assert not await link.replicated(5.0, since=since)
        await link.execute("SET", "a", "1")
        assert await link.replicated(5.0, since=link.drops)


# -- a restart ------------------------------------------------------------------------------------------


async def test_what_was_acknowledged_outlives_a_kill():
    """With an append-only file: an owner goes on where it was, and leases, uploads and blobs are there."""
    with redis_server(BINARY, "--appendonly", "yes", "--appendfsync", "everysec") as server:
        redis = RedisFarm(replace(server.config, timeout_s=PATIENT_S))
        stores = redis.stores()
        await stores.leases.create(LeaseId("l"), ttl_s=None)
        await stores.leases.attach(LeaseId("l"), [KEY])
        fence = await own(stores, "n0")
        await stores.flights.begin_upload(fence, UploadState(key="blobs/n0", upload_id="u", part_bytes=5 << 20))
        await stores.flights.record_part(fence, 1, "e")

        server.kill()
        server.start()

        await stores.flights.record_part(fence, 2, "f")
        again = await stores.flights.join(KEY, worker="n0", token=fence.token, ttl_s=PATIENT_S)
        assert isinstance(again, Owned)
        assert again.fence == fence
        assert again.upload is not None
        assert again.upload.parts == {1: "e", 2: "f"}
        await stores.flights.commit(fence, blob(fence))
        assert "l" in await stores.leases.holders(KEY)
        await redis.close()


async def test_who_follows_a_job_waits_for_redis(monkeypatch):
    """Away for longer than a command may take: the follower goes on where it was; away for too long, it says so."""
    target = digest_of(b"target")
    spec = JobSpec(
        id=JobId("j"), definition=target, targets=(target,), session=SessionInfo(session_id="s"), is_detached=True
    )
    with redis_server(BINARY, "--appendonly", "yes") as server:
        async with linked(server, timeout_s=0.3) as link:
            jobs, events = RedisJobStore(link, Keys("farm")), RedisJobEvents(link, Keys("farm"))
            await jobs.submit(spec, b"definition")
            (claimed,) = await jobs.claim("scheduler", ttl_s=PATIENT_S, most=1)
            await events.publish(spec.id, [JobWarning(text="one")])
            follower = events.follow(spec.id, deadline_s=PATIENT_S)
            assert (await anext(follower)).text == "one"
            following = asyncio.ensure_future(anext(follower))
            server.kill()
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    await link.execute("PING")
            assert "waiting" in (await following).text
            following = asyncio.ensure_future(anext(follower))
            await asyncio.to_thread(server.start)
            await jobs.end(claimed.claim, JobState.DONE)
            assert (await following).state is JobState.DONE
            await follower.aclose()

            monkeypatch.setattr("storage.job_events._AWAY_S", 0.5)
            follower = events.follow(spec.id, deadline_s=PATIENT_S)
            assert (await anext(follower)).text == "one"
            await follower.aclose()
            other = replace(spec, id=JobId("k"))
            await jobs.submit(other, b"definition")
            follower = events.follow(other.id, deadline_s=PATIENT_S)
            following = asyncio.ensure_future(anext(follower))
            await eventually(lambda: b"cmd=xread" in clients(server))
            server.kill()
            assert "waiting" in (await following).text
            with pytest.raises(UnavailableError, match="Redis at"):
                await anext(follower)


def clients(server: RedisServer) -> bytes:
    with contextlib.closing(server.link()) as link:
        return link.execute("CLIENT", "LIST")


# -- a server that is no primary ------------------------------------------------------------------------


@pytest.mark.parametrize("binary", redis_binaries().values(), ids=redis_binaries())
async def test_writes_wait_for_a_replica_that_takes_over(binary):
    """Behind an address that stays, the server is a replica for a while: no write fails, or happens twice."""
    with redis_server(binary) as primary, redis_server(binary) as server:
        admin = server.link()
        async with linked(server) as link:
            await link.execute("PING")
            admin.execute("REPLICAOF", "127.0.0.1", primary.port)
            writes = [
                link.execute("INCR", "x"),
                link.execute_many([("INCR", "x"), ("INCR", "x")]),
                link.run("lease_create", "lf:{x}", "l", 60_000, "", may_repeat=True),
            ]
            done = asyncio.gather(*writes)
            await eventually(lambda: link.drops > 1)
            admin.execute("REPLICAOF", "NO", "ONE")
            await done

            assert await link.execute("GET", "x") == b"3"
        admin.close()


@pytest.mark.parametrize("binary", redis_binaries().values(), ids=redis_binaries())
async def test_a_write_to_what_stays_a_replica_says_so(binary):
    """By its deadline, by both clients, also where a script is what writes."""
    with redis_server(binary) as primary, redis_server(binary, "--replicaof", "127.0.0.1", str(primary.port)) as server:
        async with linked(server, timeout_s=0.5) as link:
            for write in (
                link.execute("SET", "x", "1"),
                link.run("lease_create", "lf:{x}", "l", 60_000, ""),
            ):
                with pytest.raises(DeadlineExceededError, match="READONLY"):
                    await write
        with contextlib.closing(server.link()) as sync, pytest.raises(UnavailableError, match="READONLY"):
            sync.run_many([("lease_create", ("lf:{x}", "l", 60_000, ""))])


def test_a_replica_that_evicts_is_unsafe(primary, replica):
    """It may take over: then it would drop records, leases and flights."""
    with contextlib.closing(primary.link()) as link, contextlib.closing(replica.link()) as there:
        check_policy(link, Keys("farm"))
        there.execute("CONFIG", "SET", "maxmemory-policy", "volatile-lru")

        with pytest.raises(UnsafeStoreError, match=f"{replica.port}.*volatile-lru"):
            check_policy(link, Keys("farm"))


# -- sentinels ----------------------------------------------------------------------------------------


@pytest.fixture
def watched():
    """A primary and a replica under sentinels."""
    with sentinel_redis(BINARY) as redis:
        yield redis


async def own(stores, worker: str) -> Fence:
    outcome = await stores.flights.join(KEY, worker=worker, token=f"token of {worker}", ttl_s=PATIENT_S)
    assert isinstance(outcome, Owned), outcome
    return outcome.fence


def blob(fence: Fence) -> BlobRecord:
    """Return what an owner commits: an object of its own."""
    return BlobRecord(digest=DIGEST, key=f"blobs/{fence.token}", size_bytes=5, etag='"e"', fence=fence.number)


@contextlib.asynccontextmanager
async def farm(redis: SentinelRedis | ClusterRedis):
    farm = RedisFarm(replace(redis.config, timeout_s=PATIENT_S))
    yield farm
    await farm.close()


async def test_callers_outlive_a_fail_over(watched):
    """Calls, subscriptions, the thread that renews and reading commands go on with the new primary by themselves."""
    keys = Keys("farm")
    lost = threading.Event()
    config = replace(watched.config, timeout_s=PATIENT_S)
    renewer = RedisFlightRenewer(config, keys)
    async with (
        linked(watched, timeout_s=PATIENT_S, wait_replicas=1) as link,
        link.subscribe("channel") as messages,
        contextlib.AsyncExitStack() as stack,
    ):
        stack.callback(renewer.close)
        sync = stack.enter_context(contextlib.closing(connect_sync(config)))
        joined = await link.run("flight_join", keys.prefix, "k", "n0", "t", PATIENT_S * 1000, "epoch", 1, "", "")
        fence = Fence(key="k", epoch=joined[1].decode(), number=int(joined[2]), token="t")
        renewer.keep(fence, ttl_s=PATIENT_S, on_lost=lost.set)
        assert sync.execute("EXISTS", f"{keys.prefix}:flight:k") == 1
        assert await link.replicated(5.0, since=link.drops)

        watched.fail_over()
        calls = [link.execute("SADD", "s", str(number), may_repeat=True) for number in range(200)]
        await asyncio.gather(*calls)

        assert await link.execute("SCARD", "s") == 200
        assert link.address.port == watched.replica.port
        assert sync.execute("EXISTS", f"{keys.prefix}:flight:k", may_repeat=True) == 1
        async with asyncio.timeout(PATIENT_S):
            while not await link.execute("PUBLISH", "channel", "after"):
                pass
            assert await anext(messages) == b"after"
        renewed = await link.execute("HGET", f"{keys.prefix}:flight:k", "expires")
        late = RedisFlightRenewer(config, keys)  # one that starts after it
        stack.callback(late.close)
        late.keep(fence, ttl_s=PATIENT_S, on_lost=lost.set)
        async with asyncio.timeout(PATIENT_S):
            while await link.execute("HGET", f"{keys.prefix}:flight:k", "expires") == renewed:
                pass
        assert not lost.is_set()


async def test_a_stale_owner_can_t_win_by_a_number_that_was_given_again(watched):
    """The fail-over loses an owner with its number, which the next one gets: only that one commits (I10)."""
    async with farm(watched) as redis:
        old, new = redis.stores(), redis.stores()
        await old.flights.join("other", worker="n0", token="t", ttl_s=PATIENT_S)  # draws the epoch
        assert await redis.links[0].replicated(5.0, since=redis.links[0].drops)
        watched.lose_what_is_written_now()
        stale = await own(old, "n0")
        await old.flights.begin_upload(stale, UploadState(key="blobs/n0", upload_id="u", part_bytes=5 << 20))
        watched.fail_over()

        fence = await own(new, "n1")

        assert (fence.epoch, fence.number) == (stale.epoch, stale.number)
        for late in (
            old.flights.commit(stale, blob(stale)),
            old.flights.record_part(stale, 1, "e"),
            old.flights.report(stale, 1, 2),
            old.flights.vacate(stale),
        ):
            with pytest.raises(StaleFenceError):
                await late
        await new.flights.commit(fence, blob(fence))
        with pytest.raises(StaleFenceError):
            await old.flights.commit(stale, blob(stale))
        outcome = await old.flights.join(KEY, worker="n2", token="t", ttl_s=PATIENT_S)
        assert outcome == Present(blob=blob(fence))


async def test_a_commit_that_was_lost_leaves_a_lazy_blob(watched):
    """Who asks for it owns a flight, and fetches it to an object of its own; the lost one's is named nowhere."""
    async with farm(watched) as redis:
        stores = redis.stores()
        await stores.leases.create(LeaseId("l"), ttl_s=None)
        await stores.leases.attach(LeaseId("l"), [KEY])
        assert await redis.links[0].replicated(5.0, since=redis.links[0].drops)
        watched.lose_what_is_written_now()
        first = await own(stores, "n0")
        await stores.flights.commit(first, blob(first))
        assert not await redis.links[0].replicated(0.1, since=redis.links[0].drops)
        watched.fail_over()

        again = await own(stores, "n1")
        assert await stores.leases.holders(KEY) == ["l"]
        assert await stores.flights.outcome(KEY, first.number) is None
        await stores.flights.commit(again, blob(again))

        outcome = await stores.flights.join(KEY, worker="n2", token="t", ttl_s=PATIENT_S)
        assert outcome == Present(blob=blob(again))


async def test_sentinels_need_no_password_where_the_primary_wants_one(watched, tmp_path):
    """They are shown the primary's, may refuse it, and are believed all the same."""
    secret = tmp_path / "password"
    secret.write_text("s3cret")
    with contextlib.closing(watched.primary.link()) as admin:
        admin.execute("CONFIG", "SET", "requirepass", "s3cret")
    async with linked(watched, password_file=str(secret)) as link:
        assert await link.execute("PING") == b"PONG"
        with contextlib.closing(connect_sync(replace(watched.config, password_file=str(secret)))) as sync:
            assert sync.execute("PING") == b"PONG"


async def test_no_sentinel_that_knows_the_name_is_said(watched):
    """A name that none of them knows, and sentinels that aren't there: the deadline's error says which."""
    nobody = "redis+sentinel://127.0.0.1:1"
    places = watched.config.url.removeprefix("redis+sentinel://").partition("/")[0]
    for url, why in (
        (f"{nobody},{places}/other", f"{watched.sentinels[0].port} knows none of that name"),
        (f"{nobody}/{watched.NAME}", "127.0.0.1:1: "),
    ):
        config = RedisConfig(url=url, timeout_s=0.5)
        link = connect(config)
        with pytest.raises(UnavailableError, match=why):
            await link.execute("PING")
        await link.close()
        with contextlib.closing(connect_sync(config)) as sync, pytest.raises(UnavailableError, match=why):
            sync.execute("PING")


# -- a cluster ----------------------------------------------------------------------------------------


@pytest.fixture
def clustered():
    """A cluster whose first node has the farm's keys."""
    with cluster_redis(BINARY, Keys("farm").prefix) as redis:
        yield redis


async def test_callers_outlive_a_fail_over_within_a_cluster(clustered):
    """From any node the one with the farm's keys is found, and when it dies, the one that takes over."""
    keys = Keys("farm")
    prefix = keys.prefix
    elsewhere = ",".join(f"127.0.0.1:{port}" for port in (1, clustered.nodes[2].port))
    config = RedisConfig(url=f"redis+cluster://{elsewhere}", timeout_s=PATIENT_S)
    link, sync = connect(config), connect_sync(config)
    renewer = RedisFlightRenewer(config, keys)
    lost = threading.Event()
    async with link.subscribe("channel") as messages:
        joined = await link.run("flight_join", prefix, "k", "n0", "t", PATIENT_S * 1000, "epoch", 1, "", "")
        fence = Fence(key="k", epoch=joined[1].decode(), number=int(joined[2]), token="t")
        renewer.keep(fence, ttl_s=PATIENT_S, on_lost=lost.set)
        assert sync.run_many([("lease_holders", (prefix, "x"))] * 2) == [[], []]
        check_policy(sync, keys)
        assert {link.address.port, sync.address.port} == {clustered.nodes[0].port}
        with contextlib.closing(clustered.nodes[0].link()) as admin:
            admin.execute("WAIT", 1, 5000)
        clustered.nodes[0].kill()

        calls = [link.execute("SADD", f"{prefix}:s", str(number), may_repeat=True) for number in range(200)]
        await asyncio.gather(*calls)

        assert await link.execute("SCARD", f"{prefix}:s") == 200
        assert link.address.port == clustered.replica.port
        assert sync.run_many([("lease_holders", (prefix, "x"))], may_repeat=True) == [[]]
        async with asyncio.timeout(PATIENT_S):
            while not await link.execute("PUBLISH", "channel", "after"):
                pass
            assert await anext(messages) == b"after"
        await asyncio.to_thread(renewer.close)
        assert not lost.is_set()
    await link.close()
    sync.close()


async def test_a_slot_that_is_on_its_way_is_waited_for(clustered):
    """While a farm's keys are moved one by one no script runs, which would find half of them; then all is there."""
    prefix = Keys("farm").prefix
    source, target = (node.link() for node in clustered.nodes[:2])
    names = [link.execute("CLUSTER", "MYID").decode() for link in (source, target)]
    slot = source.execute("CLUSTER", "KEYSLOT", prefix)
    async with linked(clustered, timeout_s=PATIENT_S) as link:
        for number in range(20):
            await link.run("lease_create", prefix, f"l{number}", "inf", "")
        target.execute("CLUSTER", "SETSLOT", slot, "IMPORTING", names[0])
        source.execute("CLUSTER", "SETSLOT", slot, "MIGRATING", names[1])
        moved = source.execute("CLUSTER", "GETKEYSINSLOT", slot, 10)
        source.execute("MIGRATE", "127.0.0.1", clustered.nodes[1].port, "", 0, 5000, "KEYS", *moved)
        drops = link.drops
        listed = asyncio.create_task(link.run("lease_list", prefix))
        await eventually(lambda: link.drops > drops + 2)
        assert not listed.done()
        with contextlib.closing(connect_sync(clustered.config)) as sync, pytest.raises(UnavailableError, match="ASK"):
            sync.run_many([("lease_list", (prefix,))])
        while moved := source.execute("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.execute("MIGRATE", "127.0.0.1", clustered.nodes[1].port, "", 0, 5000, "KEYS", *moved)
        for server in (target, source):
            server.execute("CLUSTER", "SETSLOT", slot, "NODE", names[1])

        assert len(await listed) == 20
        assert link.address.port == clustered.nodes[1].port
    source.close()
    target.close()
