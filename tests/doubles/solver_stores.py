"""The solver's stores of one farm, on memory and on each real Redis, with time that tests can move."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from cluster.ports import ProgressStore
from cluster.solver_ports import JobEvents, JobStore, KeyStore, Whereabouts
from storage.cache_keys import RedisKeyStore
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.memory import Memory, MemoryProgressStore
from storage.memory_solver import (
    MemoryJobEvents,
    MemoryJobStore,
    MemoryKeyStore,
    MemoryPresence,
    MemoryWhereabouts,
    SolverMemory,
)
from storage.presence import Presence
from storage.progress import JobProgress, RedisProgressStore
from storage.whereabouts import RedisWhereabouts
from tests.doubles.stores import FakeClock, RedisFarm

#: What one job's stream keeps here.
LOG_BYTES = 2000
STEPS = 5


@dataclass(kw_only=True)
class SolverStores:
    """The solver's ports of one farm over one store."""

    keys: KeyStore
    jobs: JobStore
    events: JobEvents
    whereabouts: Whereabouts
    presence: Presence | MemoryPresence
    progress: ProgressStore
    #: Lets seconds pass by the store's clock.
    pass_time: Callable[[float], None]


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.redis) for name in ("redis7", "redis6.2"))])
async def solver_stores(request, redis_servers) -> AsyncIterator[SolverStores]:
    """The solver's stores of a fresh farm: fakes, and each version of Redis."""
    if request.param == "memory":
        clock = FakeClock()
        memory = SolverMemory(clock)
        events = MemoryJobEvents(memory, log_bytes=LOG_BYTES, steps=STEPS)
        yield SolverStores(
            keys=MemoryKeyStore(memory),
            jobs=MemoryJobStore(memory),
            events=events,
            whereabouts=MemoryWhereabouts(memory),
            presence=MemoryPresence(memory),
            progress=JobProgress(MemoryProgressStore(Memory(clock)), events),
            pass_time=clock.advance,
        )
        return
    server = redis_servers(request.param)
    farm = RedisFarm(server.farm_config, server.config)
    farm.stores()
    yield redis_solver_stores(farm)
    await farm.remove()


def redis_solver_stores(farm: RedisFarm) -> SolverStores:
    """Return the adapters over the farm's first client."""
    link = farm.links[0]
    events = RedisJobEvents(link, farm.keys, log_bytes=LOG_BYTES, steps=STEPS)
    return SolverStores(
        keys=RedisKeyStore(link, farm.keys),
        jobs=RedisJobStore(link, farm.keys),
        events=events,
        whereabouts=RedisWhereabouts(link, farm.keys),
        presence=Presence(link, farm.keys),
        progress=JobProgress(RedisProgressStore(link, farm.keys), events),
        pass_time=farm.pass_time,
    )
