"""Redis with replicas: what is known to be replicated, and what a fail-over may and may not undo."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cluster.config import RedisConfig
from storage.connect import connect
from tests.doubles.redis import RedisServer, frozen, redis_binaries, redis_server

pytestmark = pytest.mark.redis

BINARY = next(iter(redis_binaries().values()))


@pytest.fixture
def primary():
    """A primary of the test's own."""
    with redis_server(BINARY, "--repl-diskless-sync-delay", "0") as server:
        yield server


@pytest.fixture
def replica(primary):
    """Its replica, which has all that the primary has."""
    with redis_server(BINARY, "--replicaof", f"127.0.0.1 {primary.port}") as server:
        wait_for_replica(primary)
        yield server


def wait_for_replica(primary: RedisServer) -> None:
    """Wait until one replica takes what is written."""
    link = primary.link()
    while not (link.execute("SET", "x", "1") and link.execute("WAIT", 1, 100)):
        pass
    link.close()


@contextlib.asynccontextmanager
async def linked(server: RedisServer, **settings):
    link = connect(RedisConfig(url=server.config.url, **settings))
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
