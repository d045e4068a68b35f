"""The models keep the contracts of the stores: the suites of the ports, run through the simulated network."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import random
from types import SimpleNamespace

import pytest

from storage.memory import MemoryProgressStore
from storage.memory_solver import MemoryJobEvents, MemoryJobStore, MemoryKeyStore, SolverMemory
from tests.contract import test_cache_keys, test_flights, test_jobs, test_leases, test_limits, test_proofs, test_refs
from tests.doubles.stores import memory_stores
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Network, Weather
from tests.simulation.services import RedisModel, Remote, RemoteFlights, RemoteLimiter, VirtualRenewer

_SUITES = (test_cache_keys, test_flights, test_jobs, test_leases, test_limits, test_proofs, test_refs)
#: What can't be asked of a model: the name of its thread, and what is measured by this machine's clock.
_NOT_MODELLED = {
    "test_a_lost_ownership_is_told_once",
    "test_a_429_sets_half_the_rate_of_late",
    "test_successes_lift_the_rate",
}


def _cases():
    """Return each test of the suites that asks for a store only, with its parameters."""
    for suite in _SUITES:
        for name, test in sorted(vars(suite).items()):
            wanted = inspect.signature(test).parameters if name.startswith("test_") else ()
            marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
            asked = set(wanted) - {mark.args[0] for mark in marks}
            if (
                name in _NOT_MODELLED
                or not asked
                or not asked <= {"stores", "solver_stores", "jobs", "keys", "renewer"}
            ):
                continue
            for values in itertools.product(*(mark.args[1] for mark in marks)):
                given = dict(zip((mark.args[0] for mark in marks), values, strict=True))
                told = ", ".join(str(getattr(value, "__name__", value)) for value in values)
                yield pytest.param(test, given, id=f"{name}[{told}]" if told else name)


class _Time:
    """The stores' time: that of the loop, and what a test lets pass."""

    def __init__(self, loop):
        self._loop = loop
        self._passed_s = 1_000_000.0

    def __call__(self):
        return self._loop.now_s + self._passed_s

    def advance(self, seconds):
        self._passed_s += seconds


class _Model:
    """One farm's stores, as processes of a simulation see them."""

    def __init__(self, loop):
        self._loop = loop
        self._time = _Time(loop)
        network = Network(loop, random.Random(1), Weather())
        self._redis = RedisModel(loop, network)
        self._redis.memory.now_s = self._time
        self._redis.limiter = memory_stores(self._redis.memory, self._time).limiter
        self._memory = SolverMemory(self._time)
        self._numbers = itertools.count()

    def stores(self):
        """Return what :class:`tests.doubles.stores.Stores` has, for a process of its own."""
        redis, process = self._redis, self._loop.process(f"process-{next(self._numbers)}")
        return SimpleNamespace(
            refs=Remote(redis, process, redis.refs),
            leases=Remote(redis, process, redis.leases),
            flights=RemoteFlights(redis, process, redis.flights),
            proofs=Remote(redis, process, redis.proofs),
            limiter=RemoteLimiter(redis, process),
            progress=MemoryProgressStore(redis.memory),
            pass_time=self._time.advance,
            new_renewer=lambda: VirtualRenewer(redis, process),
            other=self.stores,
        )

    def solver_stores(self):
        """Return what :class:`tests.doubles.solver_stores.SolverStores` has of jobs and keys."""
        process = self._loop.process(f"process-{next(self._numbers)}")
        return SimpleNamespace(
            jobs=Remote(self._redis, process, MemoryJobStore(self._memory)),
            keys=Remote(self._redis, process, MemoryKeyStore(self._memory)),
            events=MemoryJobEvents(self._memory),
            pass_time=self._time.advance,
        )


@pytest.mark.parametrize(("test", "given"), list(_cases()))
def test_a_model_keeps_its_contract(test, given):
    """What holds of the fakes and of a real Redis holds of them across the network."""
    loop = VirtualLoop()

    async def run():
        model = _Model(loop)
        stores, solver_stores = model.stores(), model.solver_stores()
        fixtures = {
            "stores": stores,
            "solver_stores": solver_stores,
            "jobs": solver_stores.jobs,
            "keys": solver_stores.keys,
            "renewer": stores.new_renewer(),
        }
        if test.__module__ == test_refs.__name__:  # as a fixture does for each of these
            await stores.leases.create(test_refs.L, ttl_s=60.0)
        outcome = test(
            **given, **{name: fixtures[name] for name in inspect.signature(test).parameters if name not in given}
        )
        if asyncio.iscoroutine(outcome):
            await outcome

    loop.run(run())
