"""What every HostLimiter promises of hosts that fail: memory, Redis 7 and Redis 6.2 alike.

Every order of outcomes and times is in ``tests/property/test_circuit.py``.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from cluster.circuit import BURST_S
from cluster.errors import CircuitOpenError
from cluster.ports import Slot
from lazyfarm import doctor
from lazyfarm.settings import load_settings
from storage.circuits import Circuits
from tests.contract.test_limits import calls
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import BREAKER, LIMIT, FarmOfRedis

HOST = "registry.example:5000"
FAILURE = "registry.example:5000: Connection refused"
LONG_S = 20.0


async def fail(stores, host=HOST, times=BREAKER.failures):
    """Fail *times* in a row, not in one burst."""
    for _ in range(times):
        async with stores.limiter.slot(host, deadline_s=LONG_S) as slot:
            await stores.limiter.failed(slot, FAILURE)
        stores.pass_time(2 * BURST_S)


async def ask(stores, host=HOST) -> Slot:
    """Ask, and be answered."""
    async with stores.limiter.slot(host, deadline_s=LONG_S) as slot:
        await stores.limiter.succeeded(slot)
        return slot


async def test_a_host_that_fails_again_and_again_is_given_up(stores):
    """At once, for all of the cluster, with an error that says which, for how long, why, and until when."""
    await fail(stores)

    for each in (stores, stores.other()):
        with pytest.raises(CircuitOpenError, match=HOST) as caught:
            await ask(each)
        assert caught.value.last_failure == FAILURE
        assert caught.value.failing_s == pytest.approx(2 * BURST_S, abs=1.0)
        assert caught.value.retry_in_s == pytest.approx(BREAKER.open_s - 2 * BURST_S, abs=1.0)
    assert not (await ask(stores, "other.example")).is_probe


async def test_one_failure_less_is_forgiven(stores):
    """What counts is failures in a row."""
    for _ in range(2):
        await fail(stores, times=BREAKER.failures - 1)
        assert not (await ask(stores)).is_probe


async def test_failures_at_once_are_one(stores):
    """Requests that were under way together and fail together say no more than one of them."""
    async with AsyncExitStack() as held:
        for _ in range(LIMIT):
            slot = await held.enter_async_context(stores.limiter.slot(HOST, deadline_s=LONG_S))
            await stores.limiter.failed(slot, FAILURE)

    assert not (await ask(stores)).is_probe


async def test_who_waits_for_a_slot_is_told_too(stores):
    """A host is given up while others wait for its slots: they wait no longer."""
    async with AsyncExitStack() as held:
        slots = [await held.enter_async_context(stores.limiter.slot(HOST, deadline_s=LONG_S)) for _ in range(LIMIT)]
        waiting = asyncio.create_task(ask(stores))
        for slot in slots[: BREAKER.failures]:
            await stores.limiter.failed(slot, FAILURE)
            stores.pass_time(2 * BURST_S)

        with pytest.raises(CircuitOpenError):
            await waiting


async def test_one_probe_opens_it_to_all(stores):
    """When its time has come, one request is made and all others are refused; its answer is good for all."""
    await fail(stores)
    stores.pass_time(BREAKER.open_s)

    async with stores.limiter.slot(HOST, deadline_s=LONG_S) as probe:
        assert probe.is_probe
        with pytest.raises(CircuitOpenError, match="being tried just now"):
            await ask(stores)
        await stores.limiter.succeeded(probe)
        assert not (await ask(stores.other())).is_probe


async def test_a_429_is_an_answer(stores):
    """A probe that is told to come again later has found the host."""
    await fail(stores)
    stores.pass_time(BREAKER.open_s)
    async with stores.limiter.slot(HOST, deadline_s=LONG_S) as probe:
        await stores.limiter.throttled(probe, 0.0)
    stores.pass_time(2.0)

    assert not (await ask(stores)).is_probe


async def test_a_probe_that_fails_puts_it_off(stores):
    """Then the host is left alone as long again, and what it did last is told."""
    await fail(stores)
    stores.pass_time(BREAKER.open_s)
    async with stores.limiter.slot(HOST, deadline_s=LONG_S) as probe:
        await stores.limiter.failed(probe, "HTTP 502")

    with pytest.raises(CircuitOpenError, match="HTTP 502") as caught:
        await ask(stores)
    assert caught.value.failing_s >= BREAKER.open_s
    stores.pass_time(BREAKER.open_s)
    assert (await ask(stores)).is_probe


async def test_a_probe_that_takes_long_does_not_hold_up_another(stores):
    """A probe that hangs, or whose process died, gives way after as long; it alone counts no more."""
    await fail(stores)
    stores.pass_time(BREAKER.open_s)
    async with stores.limiter.slot(HOST, deadline_s=LONG_S) as stuck:
        stores.pass_time(BREAKER.open_s)
        async with stores.limiter.slot(HOST, deadline_s=LONG_S) as probe:
            assert probe.is_probe
            await stores.limiter.failed(stuck, FAILURE)
            await stores.limiter.succeeded(probe)

    assert not (await ask(stores)).is_probe


async def test_a_cancelled_probe_holds_up_nobody(stores):
    """A probe that ends without an outcome leaves the next one to whoever asks."""
    await fail(stores)
    stores.pass_time(BREAKER.open_s)
    async with stores.limiter.slot(HOST, deadline_s=LONG_S):
        pass

    assert (await ask(stores)).is_probe


async def test_hosts_that_are_given_up_are_listed(redis_farm):
    """For `lazyfarm status`: since when, why, and until when; nothing of those that are back."""
    stores = redis_farm.stores()
    circuits = Circuits(redis_farm.links[0], redis_farm.keys)
    assert await circuits.given_up() == []
    await fail(stores)
    await fail(stores, "b.example")
    redis_farm.pass_time(BREAKER.open_s)
    await ask(stores, "b.example")

    (told,) = await circuits.given_up()
    assert (told.host, told.last_failure) == (HOST, FAILURE)
    assert told.failing_s == pytest.approx(BREAKER.open_s + 4 * 2 * BURST_S, abs=3.0)


async def test_doctor_names_what_is_given_up(redis_servers, tmp_path):
    """A warning, as the farm itself is well; nothing where all hosts are asked."""
    farm = FarmOfRedis(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    settings = load_settings(farm.state_dir, None, {})

    def findings():
        return list(doctor._registries(settings))

    stores = farm.stores()
    assert await asyncio.to_thread(findings) == []
    await fail(stores)
    (found,) = await asyncio.to_thread(findings)
    await farm.close()

    assert found.ok == "warn"
    assert HOST in found.detail
    assert FAILURE in found.detail
    assert found.advice


async def test_success_costs_nothing_where_nothing_failed(redis_farm):
    """Redis is told of an answer after a failure, and then no more."""
    stores, link = redis_farm.stores(), redis_farm.links[0]
    await fail(stores, times=1)
    told = []
    for _ in range(3):
        async with stores.limiter.slot(HOST, deadline_s=LONG_S) as slot:
            before = await calls(link)
            await stores.limiter.succeeded(slot)
            told.append(await calls(link) - before)

    assert told == [1, 0, 0]
