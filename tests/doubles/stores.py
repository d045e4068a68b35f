"""The stores of one farm, on memory and on each real Redis, with time that tests can move."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.circuit import BreakerLimits
from cluster.collect.ports import CollectStore
from cluster.config import AuditConfig, Config, RedisConfig, RegistryConfig
from cluster.ports import (
    AuditLog,
    FlightRenewer,
    FlightStore,
    HostLimiter,
    LeaseStore,
    ProgressStore,
    ProofStore,
    RefStore,
)
from cluster.settings import Running
from storage.audit import RedisAudit
from storage.collect import RedisCollectStore
from storage.connect import connect
from storage.farm_file import write_running
from storage.flights import RedisFlightStore
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.limits import RedisHostLimiter
from storage.memory import (
    Memory,
    MemoryFlightRenewer,
    MemoryFlightStore,
    MemoryHostLimiter,
    MemoryLeaseStore,
    MemoryProgressStore,
    MemoryProofStore,
    MemoryRefStore,
)
from storage.memory_audit import MemoryAudit
from storage.memory_collect import MemoryCollectStore
from storage.progress import RedisProgressStore
from storage.proofs import RedisProofStore
from storage.refs import RedisRefStore
from storage.renewer import RedisFlightRenewer
from tests.doubles.redis import RedisServer, redis_binaries, redis_server

#: Requests that the limited host may have under way.
LIMIT = 4
#: A host with a configured rate, and that rate, in requests a second.
RATED_HOST = "rated.example"
RATE = 3.0
#: A host that may be asked once in two seconds.
SLOW_HOST = "slow.example"
SLOW_RATE = 0.5

#: When each host is given up, and for how long.
BREAKER = BreakerLimits(failures=3, open_s=31.0)

#: What the audit stream keeps.
AUDIT = AuditConfig(most_entries=200, retention_s=3600.0)

_BREAKER = {"breaker_failures": BREAKER.failures, "breaker_open_s": BREAKER.open_s}
_REGISTRIES = {
    "default": RegistryConfig(max_concurrency=LIMIT, **_BREAKER),
    RATED_HOST: RegistryConfig(max_concurrency=LIMIT, max_requests_per_s=RATE),
    SLOW_HOST: RegistryConfig(max_concurrency=LIMIT, max_requests_per_s=SLOW_RATE),
}

# Removes everything that a farm has recorded.
REMOVE = """
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':*')) do
  redis.call('UNLINK', key)
end
"""

# Moves everything that a farm has recorded into the past, which is what the passing of time does to it.
AGE = """
local prefix, ms = KEYS[1], tonumber(ARGV[1])
for _, key in ipairs(redis.call('KEYS', prefix .. ':*')) do
  local name = string.sub(key, #prefix + 2)
  local kind = redis.call('TYPE', key).ok
  if kind == 'zset' and not string.find(name, '^refs') then
    local members = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    for i = 1, #members, 2 do
      if members[i + 1] ~= 'inf' then
        redis.call('ZINCRBY', key, -ms, members[i])
      end
    end
  elseif kind == 'hash' then
    for _, field in ipairs({
      'expires', 'not_before', 'halved', 'asked_at', 'failed_at', 'opened_at', 'retry_at',
      'last_at', 'hold_at', 'until_at',
    }) do
      if redis.call('HEXISTS', key, field) == 1 then
        redis.call('HINCRBY', key, field, -ms)
      end
    end
  end
  if string.find(name, '^enough:') then
    local told = redis.call('HGETALL', key)
    for i = 1, #told, 2 do
      local head, at = string.match(told[i + 1], '^(.* )(%d+)$')
      redis.call('HSET', key, told[i], string.format('%s%.0f', head, tonumber(at) - ms))
    end
  end
  if name == 'audit' then
    local entries = redis.call('XRANGE', key, '-', '+')
    local left = redis.call('PTTL', key)
    redis.call('DEL', key)
    for _, entry in ipairs(entries) do
      local at, number = string.match(entry[1], '^(%d+)-(%d+)$')
      redis.call('XADD', key, string.format('%.0f-%s', tonumber(at) - ms, number), unpack(entry[2]))
    end
    redis.call('PEXPIRE', key, left)
  end
  local left = redis.call('PTTL', key)
  if left > 0 then
    redis.call('PEXPIRE', key, left - ms)
  end
end
"""


async def hold_nothing(_resource: str) -> None:
    """Hold nothing: no sweeper is at work."""


class FakeClock:
    """A clock that stands still but for :meth:`advance`."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass(kw_only=True)
class Stores:
    """All ports of one farm over one store."""

    refs: RefStore
    leases: LeaseStore
    flights: FlightStore
    proofs: ProofStore
    limiter: HostLimiter
    progress: ProgressStore
    collect: CollectStore
    audit: AuditLog
    #: Lets seconds pass by the store's clock.
    pass_time: Callable[[float], None]
    new_renewer: Callable[[], FlightRenewer]
    #: Another process's view of the same farm.
    other: Callable[[], Stores]


def memory_stores(memory: Memory, clock: FakeClock) -> Stores:
    """Return the fakes over *memory*."""
    flights, config = MemoryFlightStore(memory, AUDIT), Config(registries=_REGISTRIES)
    return Stores(
        refs=MemoryRefStore(memory, AUDIT),
        leases=MemoryLeaseStore(memory),
        flights=flights,
        proofs=MemoryProofStore(memory),
        limiter=MemoryHostLimiter(
            memory, lambda _host: LIMIT, lambda host: config.registry(host).max_requests_per_s, BREAKER
        ),
        progress=MemoryProgressStore(memory),
        collect=MemoryCollectStore(memory, AUDIT),
        audit=MemoryAudit(memory, AUDIT, by="tests"),
        pass_time=clock.advance,
        new_renewer=lambda: MemoryFlightRenewer(flights),
        other=lambda: memory_stores(memory, clock),
    )


class RedisFarm:
    """One farm in a real Redis, under a name of its own.

    Args:
        config: How the farm reaches it.
        admin: How tests do, where the farm may not do all that they do.
    """

    def __init__(self, config: RedisConfig, admin: RedisConfig | None = None) -> None:
        self.config = config
        self._admin = admin or config
        self.keys = Keys(f"test-{secrets.token_hex(4)}")
        self.links = []

    def stores(self) -> Stores:
        """Return adapters over a client of their own."""
        link = connect(self.config)
        self.links.append(link)
        config = Config(registries=_REGISTRIES)
        audit = RedisAudit(link, self.keys, AUDIT, by="tests")
        return Stores(
            refs=RedisRefStore(link, self.keys, audit),
            leases=RedisLeaseStore(link, self.keys),
            flights=RedisFlightStore(link, self.keys, audit),
            proofs=RedisProofStore(link, self.keys),
            limiter=RedisHostLimiter(link, self.keys, config),
            progress=RedisProgressStore(link, self.keys),
            collect=RedisCollectStore(link, self.keys, audit),
            audit=audit,
            pass_time=self.pass_time,
            new_renewer=lambda: RedisFlightRenewer(self.config, self.keys),
            other=self.stores,
        )

    def pass_time(self, seconds: float) -> None:
        """Age everything of this farm."""
        age_redis(self._admin, self.keys, seconds)

    async def be_away(self, seconds: float) -> None:
        """Let time pass in which nobody can speak to Redis: the last pulse is as old as everything else."""
        self.pass_time(seconds)
        await self.links[0].execute("DECRBY", f"{self.keys.prefix}:pulse", int(seconds * 1000))

    async def close(self) -> None:
        for link in self.links:
            await link.close()

    async def remove(self) -> None:
        """Close its clients, and remove its keys: time passes by looking at every key of the server."""
        await self.close()
        _execute(self._admin, "EVAL", REMOVE, 1, self.keys.prefix)


class FarmOfRedis(RedisFarm):
    """A farm in Redis that commands find by its state directory; nothing else of it runs."""

    def __init__(self, config: RedisConfig, state_dir: Path) -> None:
        super().__init__(config)
        self.state_dir = state_dir
        (state_dir / "logs").mkdir(parents=True)
        write_running(
            state_dir,
            Running(
                farm_id=secrets.token_hex(2),
                farm_name=self.keys.farm,
                redis_url=config.url,
                s3_endpoint="http://127.0.0.1:9",
                s3_region="us-east-1",
                s3_bucket="lazyfarm",
                ray_address="127.0.0.1:9",
            ),
        )


def age_redis(config: RedisConfig, keys: Keys, seconds: float) -> None:
    """Let *seconds* pass for everything of a farm."""
    _execute(config, "EVAL", AGE, 1, keys.prefix, int(seconds * 1000))


def _execute(config: RedisConfig, *command: str | int) -> None:
    from storage.connect import connect_sync  # noqa: PLC0415

    link = connect_sync(config)
    link.execute(*command)
    link.close()


@pytest.fixture(scope="session")
def redis_servers() -> Iterator[Callable[[str], RedisServer]]:
    """Start each server once a session, when first asked for."""
    running: dict[str, object] = {}
    servers: dict[str, RedisServer] = {}

    def get(name: str) -> RedisServer:
        if name not in servers:
            if name not in redis_binaries():
                pytest.skip(f"{name} is not installed")
            running[name] = redis_server(redis_binaries()[name])
            servers[name] = running[name].__enter__()
        return servers[name]

    yield get
    for context in running.values():
        context.__exit__(None, None, None)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.redis) for name in ("redis7", "redis6.2")])
def redis_any(request, redis_servers) -> RedisServer:
    """A real Redis: each version in turn."""
    return redis_servers(request.param)


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.redis) for name in ("redis7", "redis6.2"))])
async def stores(request, redis_servers) -> AsyncIterator[Stores]:
    """The stores of a fresh farm: fakes, and each version of Redis."""
    if request.param == "memory":
        clock = FakeClock()
        yield memory_stores(Memory(clock), clock)
        return
    server = redis_servers(request.param)
    # As a user with no right too many: so that the whole suite says that none is missing.
    farm = RedisFarm(server.farm_config, server.config)
    yield farm.stores()
    await farm.remove()


async def eventually(fact: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Wait until *fact* holds."""
    async with asyncio.timeout(timeout_s):
        while not fact():  # noqa: ASYNC110 - facts about other processes wake nobody
            await asyncio.sleep(0.005)


@pytest.fixture
async def redis_farm(redis_servers) -> AsyncIterator[RedisFarm]:
    """A fresh farm in one real Redis: the system's, or what there is."""
    farm = RedisFarm(redis_servers(next(iter(redis_binaries()))).config)
    yield farm
    await farm.remove()
