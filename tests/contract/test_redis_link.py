"""What the Redis clients promise: order, deadlines, cancellation, drops, restarts, clusters, no secrets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time

import pytest

from cluster.config import RedisConfig
from cluster.errors import ConfigError, DeadlineExceededError, InternalError, UnavailableError, UnsafeStoreError
from cluster.flight.values import Fence
from storage.connect import check_policy, connect, connect_sync
from storage.keys import Keys
from storage.renewer import RedisFlightRenewer
from storage.scripts import script, script_names
from tests.doubles.redis import RedisServer, frozen, redis_binaries, redis_server

pytestmark = pytest.mark.redis

BINARY = next(iter(redis_binaries().values()))


@pytest.fixture
def server():
    """A server of the test's own, to be hurt."""
    with redis_server(BINARY) as server:
        yield server


@contextlib.asynccontextmanager
async def linked(server: RedisServer, *, timeout_s: float = 10.0):
    link = connect(RedisConfig(url=server.config.url, timeout_s=timeout_s))
    try:
        yield link
    finally:
        await link.close()


# -- calls --------------------------------------------------------------------------------------------


async def test_each_caller_gets_its_own_answer(redis_any):
    """With thousands of commands under way from many callers, every answer reaches who asked."""
    async with linked(redis_any) as link:

        async def ask(number):
            assert await link.execute("ECHO", str(number)) == str(number).encode()
            assert await link.execute_many([("ECHO", "a"), ("ECHO", str(number))]) == [b"a", str(number).encode()]

        await asyncio.gather(*(ask(number) for number in range(2000)))


async def test_commands_of_one_tick_are_one_write(server):
    """What is submitted before the loop turns goes out together: the server reads it at once."""
    async with linked(server) as link:
        await link.execute("PING")
        before = await _reads(link)
        await asyncio.gather(*(link.execute("PING") for _ in range(200)))

        # One for the pings, one each for asking.
        assert await _reads(link) - before <= 4


async def _reads(link) -> int:
    info = (await link.execute("INFO", "stats")).decode()
    return int(info.partition("total_reads_processed:")[2].partition("\r")[0])


async def test_a_cancelled_call_poisons_nothing(redis_any):
    """A caller that is cancelled between send and answer leaves the connection in order for the others."""
    async with linked(redis_any) as link:
        calls = [asyncio.create_task(link.execute("ECHO", str(number))) for number in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

        assert [await call for call in calls[1::2]] == [str(number).encode() for number in range(1, 100, 2)]
        assert await link.execute("ECHO", "x") == b"x"


async def test_what_was_submitted_happens_though_its_caller_is_cancelled(redis_any):
    """Cancelling a caller doesn't take back what it has submitted."""
    key = f"test:{os.urandom(4).hex()}"
    async with linked(redis_any) as link:
        call = asyncio.create_task(link.execute("SET", key, "1"))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

        assert await link.execute("GET", key) == b"1"


async def test_a_call_ends_by_its_deadline(server):
    """A server that doesn't answer costs one deadline, and the next call works again when it does."""
    async with linked(server, timeout_s=0.3) as link:
        await link.execute("PING")
        with frozen(server):
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError, match="Redis at"):
                await link.execute("GET", "x", may_repeat=True)
            assert time.monotonic() - started < 2

        assert await link.execute("PING") == b"PONG"


async def test_a_server_that_goes_on_answering_is_not_given_up(server):
    """Calls that stand in line for longer than one may take end well, on the connection that they were sent on."""
    async with linked(server, timeout_s=1.0) as link:
        drops = link.drops
        started = time.monotonic()
        # Each holds up what was sent after it, and is answered by itself.
        assert await asyncio.gather(*(link.execute("BLPOP", "nothing", "0.25") for _ in range(8))) == [None] * 8
        assert time.monotonic() - started > 1.5
        assert link.drops == drops


async def test_a_server_that_stops_answering_halfway_is_given_up(server):
    """What it answered before counts for so long only."""
    async with linked(server, timeout_s=0.5) as link:
        calls = [asyncio.create_task(link.execute("BLPOP", "nothing", "0.2")) for _ in range(4)]
        await calls[0]
        with frozen(server):
            for call in calls[1:]:
                with pytest.raises(DeadlineExceededError, match="no answer in"):
                    await asyncio.wait_for(call, 5.0)
        assert await link.execute("PING") == b"PONG"


async def test_nobody_there_is_unavailable():
    """A server that can't be reached is UnavailableError within the deadline."""
    link = connect(RedisConfig(url="redis://127.0.0.1:1/0", timeout_s=0.3))

    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        await link.execute("PING")
    await link.close()
    with pytest.raises(UnavailableError, match="closed"):
        await link.execute("PING")


async def test_a_server_that_was_away_for_long_is_found(server):
    """However often in a row it could not be reached."""
    async with linked(server, timeout_s=5) as link:
        link._failures = 5000
        assert await link.execute("PING") == b"PONG"


async def test_a_command_that_makes_no_sense_is_our_bug(redis_any):
    """An error reply to a wrong command is InternalError; those beside it are not touched."""
    async with linked(redis_any) as link:
        wrong, right = await asyncio.gather(
            link.execute("NO-SUCH-COMMAND"), link.execute("ECHO", "x"), return_exceptions=True
        )

    assert isinstance(wrong, InternalError)
    assert right == b"x"


async def test_a_link_belongs_to_one_loop(redis_any):
    """Using a link from a second event loop is told as what it is."""
    async with linked(redis_any) as link:
        await link.execute("PING")

        def elsewhere():
            with pytest.raises(InternalError, match="two event loops"):
                asyncio.run(link.execute("PING"))

        await asyncio.to_thread(elsewhere)


# -- drops and restarts -----------------------------------------------------------------------------------


async def test_what_may_be_repeated_survives_a_drop(server):
    """A dropped connection is not noticed by a call that may be repeated; any other ends as unknown."""
    async with linked(server) as link:
        await link.execute("PING")
        with frozen(server):
            read = asyncio.create_task(link.execute("ECHO", "x", may_repeat=True))
            write = asyncio.create_task(link.execute("INCR", "x"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            link._connection.abort()
            with pytest.raises(UnavailableError, match="outcome is unknown"):
                await write

        assert await read == b"x"


async def test_a_restart_is_waited_for(server):
    """Calls made while the server is away wait for it, within their deadline."""
    async with linked(server) as link:
        await link.execute("SET", "x", "1")
        server.kill()
        call = asyncio.create_task(link.execute("PING", may_repeat=True))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.start)

        assert await call == b"PONG"


async def test_scripts_outlive_a_restart(redis_any):
    """A server that has forgotten a script is given it again, by either client and also without waiting."""
    prefix = Keys(f"test-{os.urandom(4).hex()}").prefix
    sync = redis_any.link()
    async with linked(redis_any) as link:
        for _ in range(2):
            await link.execute("SCRIPT", "FLUSH")
            assert await link.run("lease_holders", prefix, "x") == []
            await link.execute("SCRIPT", "FLUSH")
            assert sync.run_many([("lease_holders", (prefix, "x"))] * 2) == [[], []]
            await link.execute("SCRIPT", "FLUSH")
            await link.execute("ZADD", f"{prefix}:slots:h", 1, "s")
            link.run_soon("slot_release", prefix, "h", "s")
            async with asyncio.timeout(5):
                while await link.execute("EXISTS", f"{prefix}:slots:h"):
                    pass
    sync.close()


async def test_a_subscription_outlives_a_drop(server):
    """After its connection dropped a subscriber is subscribed again, by itself."""
    async with linked(server) as link, link.subscribe("channel") as messages:
        await link.execute("PUBLISH", "channel", "before")
        assert await anext(messages) == b"before"
        await link.execute("CLIENT", "KILL", "TYPE", "pubsub")
        async with asyncio.timeout(10):
            while not await link.execute("PUBLISH", "channel", "after"):
                pass

            assert await anext(messages) == b"after"


async def test_a_subscription_that_drops_while_it_is_silent_is_made_again(server):
    """Its connection breaks just when it is to be given up for its silence: the subscriber is subscribed again."""
    async with linked(server) as link, link.subscribe("channel") as messages:
        link._subscriptions._heard_at = float("-inf")
        link._subscriptions.reconnect()
        async with asyncio.timeout(10):
            while not await link.execute("PUBLISH", "channel", "after"):
                pass

            assert await anext(messages) == b"after"


async def test_subscribed_means_subscribed(redis_any):
    """Channels that are left and entered again, by several at once, miss nothing once entered."""
    channel = f"test:{os.urandom(4).hex()}"
    async with linked(redis_any) as link:

        async def listen(number):
            for turn in range(20):
                async with link.subscribe(channel) as messages:
                    await link.execute("PUBLISH", channel, f"{number}/{turn}")
                    async with asyncio.timeout(5):
                        while await anext(messages) != f"{number}/{turn}".encode():
                            pass

        await asyncio.gather(*(listen(number) for number in range(5)))

        async with asyncio.timeout(5):
            while await link.execute("PUBLISH", channel, "nobody"):
                pass


async def test_subscribing_has_a_deadline(server):
    """Where nothing answers, subscribing ends by the deadline."""
    async with linked(server, timeout_s=0.3) as link:
        with frozen(server), pytest.raises(UnavailableError):
            async with link.subscribe("channel"):
                pass


# -- the sync client ----------------------------------------------------------------------------------------


def test_the_sync_client_repeats_what_it_may(server):
    """After a restart a call that may be repeated works; any other is UnavailableError, once."""
    link = server.link()
    assert link.execute("PING") == b"PONG"
    server.kill()
    server.start()
    assert link.execute("ECHO", "x", may_repeat=True) == b"x"
    server.kill()
    server.start()
    with pytest.raises(UnavailableError):
        link.execute("INCR", "x")
    assert link.execute("INCR", "x") == 1
    link.close()


def test_the_sync_client_has_a_deadline(server):
    """A server that doesn't answer costs one deadline."""
    link = connect_sync(RedisConfig(url=server.config.url, timeout_s=0.3))
    link.execute("PING")
    with frozen(server), pytest.raises(DeadlineExceededError):
        link.execute("PING", may_repeat=True)
    assert link.execute("PING") == b"PONG"
    link.close()


def test_nobody_there_is_unavailable_at_once():
    """The sync client doesn't wait for a server that refuses connections."""
    link = connect_sync(RedisConfig(url="redis://127.0.0.1:1/0"))
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        link.execute("PING")
    assert time.monotonic() - started < 2


# -- addresses and policies ----------------------------------------------------------------------------------


async def test_passwords_users_databases_and_sockets(tmp_path):
    """URLs with password, user, database or socket path connect, by both clients; a password file wins."""
    socket_path = tmp_path / "redis.sock"
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    with redis_server(BINARY, "--unixsocket", str(socket_path), "--unixsocketperm", "700") as server:
        admin = server.link()
        admin.execute("ACL", "SETUSER", "lazy", "on", ">s3cret", "~*", "&*", "+@all")
        admin.execute("CONFIG", "SET", "requirepass", "s3cret")
        admin.close()
        at = f"127.0.0.1:{server.port}"
        for config in (
            RedisConfig(url=f"redis://:s3cret@{at}/3"),
            RedisConfig(url=f"redis://lazy:s3cret@{at}/3"),
            RedisConfig(url=f"redis://:wrong@{at}/3", password_file=str(secret)),
            RedisConfig(url=f"unix://:s3cret@{socket_path}"),
        ):
            link, sync = connect(config), connect_sync(config)
            assert await link.execute("PING") == b"PONG"
            assert sync.execute("PING") == b"PONG"
            if "/3" in config.url:
                assert b"db=3" in await link.execute("CLIENT", "INFO")
            await link.close()
            sync.close()


async def test_a_password_that_is_exchanged_is_used_without_a_restart(tmp_path, redis_any):
    """By the next connection of either client; a file that is no good just now leaves the password as it was."""
    secret, user = tmp_path / "password", f"rotated-{os.getpid()}"
    admin = redis_any.link()
    admin.execute("ACL", "SETUSER", user, "reset", "on", ">old", "~*", "+@all")
    secret.write_text("old\n")
    config = RedisConfig(url=redis_any.config.url, username=user, password_file=str(secret))
    link, sync = connect(config), connect_sync(config)

    async def ask():
        """Ask by connections of their own: what was open is closed."""
        admin.execute("CLIENT", "KILL", "USER", user)
        assert await link.execute("ECHO", "x", may_repeat=True) == b"x"
        assert sync.execute("ECHO", "x", may_repeat=True) == b"x"

    try:
        await ask()
        admin.execute("ACL", "SETUSER", user, ">new")
        secret.write_text("")
        await ask()
        secret.unlink()
        await ask()
        secret.write_text("new\n")
        admin.execute("ACL", "SETUSER", user, "<old")
        await ask()
    finally:
        await link.close()
        sync.close()
        admin.execute("ACL", "DELUSER", user)
        admin.close()


async def test_a_refusal_is_told_at_once_and_shows_no_password():
    """A wrong password ends in UnavailableError without waiting for the deadline, and is never repeated."""
    with redis_server(BINARY) as server:
        admin = server.link()
        admin.execute("CONFIG", "SET", "requirepass", "s3cret")
        admin.close()
        config = RedisConfig(url=f"redis://:hunter2@127.0.0.1:{server.port}/0")
        link, sync = connect(config), connect_sync(config)
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="WRONGPASS") as caught:
            await link.execute("PING")
        with pytest.raises(UnavailableError, match="WRONGPASS"):
            sync.execute("PING")

        assert time.monotonic() - started < 5
        assert "hunter2" not in f"{caught.value} {link!r} {link.address!r} {sync!r}"
        await link.close()


@pytest.mark.parametrize("url", ["", "http://x:1", "redis://:hunter2@x:port/0", "redis://:hunter2@x:1/db"])
def test_a_url_that_cant_be_meant_is_a_config_error(url):
    """What is wrong with a URL is told by its key, and the URL is not repeated."""
    with pytest.raises(ConfigError, match=r"redis\.url") as caught:
        connect(RedisConfig(url=url))
    assert "hunter2" not in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path):
    """URL and password file are judged together."""
    with pytest.raises(ConfigError) as caught:
        connect_sync(RedisConfig(url="http://x", password_file=str(tmp_path / "none")))
    assert len(caught.value.faults) == 2


def test_a_server_that_evicts_is_unsafe(redis_any):
    """check_policy() accepts noeviction only, without CONFIG."""
    keys = Keys("farm")
    with contextlib.closing(redis_any.link()) as link:
        check_policy(link, keys)
        link.execute("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(UnsafeStoreError, match="allkeys-lru") as caught:
                check_policy(link, keys)
        finally:
            link.execute("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert "noeviction" in caught.value.hint


async def test_a_cluster_s_redirection_is_followed():
    """On Redis Cluster all keys of a farm are on one node, and the client finds it."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000")
    with redis_server(BINARY, *options) as one, redis_server(BINARY, *options) as two:
        first, second = one.link(), two.link()
        second.execute("CLUSTER", "ADDSLOTS", *range(16384))
        first.execute("CLUSTER", "MEET", "127.0.0.1", two.port)
        async with asyncio.timeout(60):
            while not all(b"cluster_state:ok" in node.execute("CLUSTER", "INFO") for node in (first, second)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

        keys = Keys("farm")
        async with linked(one) as link:
            calls = [link.run("lease_holders", keys.prefix, str(number)) for number in range(50)]
            assert await asyncio.gather(*calls) == [[]] * 50
            await link.execute("SET", keys.prefix + ":x", "1")
            assert second.execute("GET", keys.prefix + ":x") == b"1"
            assert link.address.port == two.port
        first.close()
        second.close()


# -- scripts ----------------------------------------------------------------------------------------------------


def test_every_script_states_its_contract():
    """Each script's head says what it does and names its keys, and includes are resolved."""
    for name in script_names():
        source = script(name).source
        assert source.startswith("-- "), name
        assert "-- KEYS[1]" in source, name
        assert "-- include:" not in source, name


def test_every_script_compiles(redis_any):
    """Each script is Lua that both versions of Redis take."""
    link = redis_any.link()
    for name in script_names():
        assert link.execute("SCRIPT", "LOAD", script(name).source).decode() == script(name).sha
    link.close()


# -- the renewer -----------------------------------------------------------------------------------------------


async def test_an_owner_stops_before_another_may_take_over(server):
    """When the store doesn't answer, on_lost comes within the time to live, counted from the last renewal sent."""
    keys = Keys("farm")
    renewer = RedisFlightRenewer(server.config, keys)
    lost = threading.Event()
    async with linked(server) as link:
        epoch, number = (await _join(link, keys, 1000))[1:3]
        fence = Fence(key="blob:x", epoch=epoch.decode(), number=int(number), token="t")
        renewer.keep(fence, ttl_s=1.0, on_lost=lost.set)
        while await link.execute("HGET", f"{keys.prefix}:flight:blob:x", "expires") is None:
            pass
        with frozen(server):
            stopped_at = time.monotonic()
            assert await asyncio.to_thread(lost.wait, 10)
            assert time.monotonic() - stopped_at < 1.1
        renewer.close()


async def test_renewal_doesnt_wait_for_the_event_loop(server):
    """An event loop that is blocked for longer than the time to live loses no ownership."""
    keys = Keys("farm")
    renewer = RedisFlightRenewer(server.config, keys)
    lost = threading.Event()
    async with linked(server) as link:
        epoch, number = (await _join(link, keys, 300))[1:3]
        fence = Fence(key="blob:x", epoch=epoch.decode(), number=int(number), token="t")
        renewer.keep(fence, ttl_s=0.3, on_lost=lost.set)
        time.sleep(1.0)  # noqa: ASYNC251 - blocks the loop on purpose

        assert (await _join(link, keys, 300, token="other"))[0] == b"joined"
        assert not lost.is_set()
    renewer.close()


async def _join(link, keys, ttl_ms, token="t"):
    return await link.run("flight_join", keys.prefix, "blob:x", "n0", token, ttl_ms, "epoch", 1, "", "")
