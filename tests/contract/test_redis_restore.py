"""A backup of Redis that is put back: what a farm finds that has gone on since, as docs/operations.md tells it."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cluster.collect.pace import Pace
from cluster.digest import digest_of
from cluster.errors import StaleFenceError
from cluster.flight.values import Owned
from cluster.lease import LeaseId, blob_resource
from cluster.ref import BlobRecord
from storage.fetching import new_key
from storage.memory_blobs import MemoryContentStore
from storage.presence import Presence
from storage.sweeper import due_sweep, make_missing_lazy, sweep
from tests.doubles.redis import RedisServer, free_port, redis_binaries, redis_server
from tests.doubles.stores import RedisFarm

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(shutil.which("redis-cli") is None, reason="redis-cli is not installed"),
]

#: How old the backup is when it is put back.
_AGE_S = 3600.0
_STRAY_S = 600.0


def cli(server, *arguments):
    """Run redis-cli, as an operator does."""
    command = ["redis-cli", "-p", str(server.port), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def restore(binary: str, backup: Path, directory: Path) -> RedisServer:
    """Start a new server upon a backup, by the steps in docs/operations.md."""
    shutil.copy(backup, directory / "dump.rdb")
    server = RedisServer(binary, str(directory), free_port())
    server.start()  # --appendonly no: else it would not look at dump.rdb
    cli(server, "CONFIG", "SET", "appendonly", "yes")
    deadline_s = time.monotonic() + 30
    while "aof_rewrite_in_progress:0" not in (told := cli(server, "INFO", "persistence")) or (
        "aof_rewrite_scheduled:0" not in told
    ):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    cli(server, "SHUTDOWN")
    server.process.wait(30)
    (directory / "dump.rdb").unlink()
    server.arguments = ("--appendonly", "yes")
    server.start()
    return server


@pytest.fixture(params=redis_binaries().values(), ids=redis_binaries())
def binary(request):
    return request.param


class Past:
    """A farm as it was, a backup of that, and what it was to go back to."""

    def __init__(self, binary, directory, farm):
        self.binary = binary
        self.directory = directory
        self.farm = farm
        self.stores = farm.stores()
        self.back = None

    async def own(self, name, token):
        """Own the flight of a blob that has an upload of its own."""
        owned = await self.stores.flights.join(
            blob_resource(digest_of(name)), worker=f"n0/{token}", token=token, ttl_s=60.0
        )
        assert isinstance(owned, Owned)
        return owned.fence

    async def fetch(self, name, bucket, token):
        """Make a blob present, with an object of its own."""
        return await self.commit(await self.own(name, token), name, bucket)

    async def commit(self, fence, name, bucket):
        digest = digest_of(name)
        blob = BlobRecord(digest=digest, key=new_key(digest), size_bytes=len(name), etag="e", fence=fence.number)
        bucket.put(blob.key, name)
        await self.stores.flights.commit(fence, blob)
        return blob

    def save(self):
        cli(self.server, "ACL", "SETUSER", "backup", "on", ">PASSWORD", "+sync", "+replconf")
        login = ("--user", "backup", "--pass", "PASSWORD", "--no-auth-warning")
        cli(self.server, *login, "--rdb", str(self.directory / "backup.rdb"))

    async def go_back(self):
        """Lose the server, and start another upon the backup, an hour later."""
        await self.farm.close()
        self.server.kill()
        (self.directory / "new").mkdir()
        self.back = restore(self.binary, self.directory / "backup.rdb", self.directory / "new")
        keys, self.farm = self.farm.keys, RedisFarm(self.back.config)
        self.farm.keys = keys
        self.stores = self.farm.stores()
        await self.farm.be_away(_AGE_S)

    async def present(self, *names):
        return [blob is not None for blob in await self.stores.refs.blobs([digest_of(name) for name in names])]


@pytest.fixture
async def past(binary, tmp_path):
    with redis_server(binary, "--repl-diskless-sync-delay", "0") as server:
        found = Past(binary, tmp_path, RedisFarm(server.config))
        found.server = server
        yield found
        await found.farm.close()
        if found.back is not None:
            found.back.kill()


async def test_a_number_that_is_given_again_makes_no_stale_owner_win(past):
    """Fences and epoch are those of the backup: only the token tells who owned before from who owns now."""
    bucket = MemoryContentStore()
    before = await past.own(b"before", "t-1")
    past.save()
    lost = await past.own(b"layer", "t-2")
    await past.go_back()

    with pytest.raises(StaleFenceError):
        await past.commit(before, b"before", bucket)
    again = await past.own(b"layer", "t-3")
    assert (again.epoch, again.number) == (lost.epoch, lost.number)
    with pytest.raises(StaleFenceError):
        await past.commit(lost, b"layer", bucket)
    with pytest.raises(StaleFenceError):
        await past.stores.flights.fail(lost, b"error")
    blob = await past.commit(again, b"layer", bucket)
    assert await past.stores.refs.blobs([digest_of(b"layer")]) == [blob]


async def test_what_was_held_is_held_for_as_long_as_it_had_left(past):
    """The time between counts for no lease, so that nothing is collected before its holder could be back."""
    presence = Presence(past.farm.links[0], past.farm.keys)
    await presence.pulse()
    await past.stores.leases.create(LeaseId("driver-1"), ttl_s=120.0)
    await past.stores.leases.create(LeaseId("pin-1"), ttl_s=None)
    past.save()
    await past.go_back()
    assert await Presence(past.farm.links[0], past.farm.keys).pulse() > _AGE_S - 60
    assert {lease.id for lease in await past.stores.leases.leases()} == {"driver-1", "pin-1"}
    past.farm.pass_time(121.0)
    await Presence(past.farm.links[0], past.farm.keys).pulse()
    assert {lease.id for lease in await past.stores.leases.leases()} == {"pin-1"}


async def test_what_is_in_the_bucket_alone_goes_and_what_is_in_redis_alone_turns_lazy(past, monkeypatch):
    """What was collected since the backup is lazy when it is looked for; what was fetched since is swept."""
    monkeypatch.setattr("storage.sweeper._SURE_S", 0.0)
    bucket = MemoryContentStore()
    kept = await past.fetch(b"kept", bucket, "t-1")
    collected = await past.fetch(b"collected", bucket, "t-2")
    past.save()
    bucket.delete(collected.key)
    fetched = await past.fetch(b"fetched since", bucket, "t-3")
    await past.go_back()

    assert await past.present(b"kept", b"collected", b"fetched since") == [True, True, False]
    wanted = [digest_of(b"kept"), digest_of(b"collected")]
    assert await make_missing_lazy(past.stores.refs, bucket, wanted, pace=Pace(0.0)) == 1
    assert await past.present(b"kept", b"collected") == [True, False]

    async def swept():
        current = await due_sweep(past.stores.collect, every_s=0.0)
        return await sweep(past.stores.collect, bucket, current, stray_s=_STRAY_S, pace=Pace(0.0))

    assert await swept() == 0
    past.farm.pass_time(_STRAY_S + 1)
    assert await swept() == 1
    (doomed,) = await past.stores.collect.due(10)
    assert doomed.key == fetched.key != kept.key
