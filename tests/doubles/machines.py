"""What state machines with a model share: invariants checked by name, mutants caught by them, worlds to run in.

A machine says what it expects with the name of the invariant that wants it. A broken variant of what it drives
is run with one invariant checked alone: it has to be caught by that.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

import storage.link
from storage.memory import Memory, MemoryFlightStore, MemoryLeaseStore, MemoryRefStore
from storage.memory_collect import MemoryCollectStore
from storage.scripts import Script
from tests.doubles.stores import FakeClock, RedisFarm


class BrokenInvariantError(AssertionError):
    """What is driven did what the design forbids."""

    def __init__(self, name, story):
        super().__init__(f"{name}: {story}")
        self.name = name


def run_machine(machine, *, examples, steps, explain=True):
    """Run a machine, the same examples each time; *explain* looks for the shortest one that fails."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=False,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink] if explain else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def assert_caught(machine, name, *, examples, steps):
    """Check that a machine finds its invariant *name* broken where it checks no other."""
    with pytest.raises(BrokenInvariantError) as caught:
        run_machine(_variant(machine, checked=frozenset({name})), examples=examples, steps=steps, explain=False)
    assert caught.value.name == name


def _variant(machine, **attributes):
    return type(machine.__name__, (machine,), {"__module__": machine.__module__, **attributes})


# -- machines of stores ---------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """Calls the stores of a farm as their users do, and checks every answer against a model."""

    #: Makes the farm of one example.
    make_world = None
    #: The invariants that are checked.
    checked = frozenset()

    def __init__(self):
        super().__init__()
        self.world = self.make_world()
        self.now_s = 0.0

    @classmethod
    def on(cls, make_world):
        """Return this machine for the worlds that *make_world* makes."""
        return _variant(cls, make_world=staticmethod(make_world))

    def teardown(self):
        self.world.close()

    def expect(self, name, holds, story):
        if holds:
            return
        if name in self.checked:
            raise BrokenInvariantError(name, story)
        assume(False)  # another invariant's affair: this example says nothing of ours


class MemoryWorld:
    """The fakes, or broken ones, driven without an event loop: they never wait."""

    def __init__(self, *, flights=MemoryFlightStore, leases=MemoryLeaseStore, collect=MemoryCollectStore):
        self.clock = FakeClock()
        memory = Memory(self.clock)
        self.flights, self.leases, self.refs = flights(memory), leases(memory), MemoryRefStore(memory)
        self.collect = collect(memory)

    def run(self, coroutine):
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("a fake waits")

    def renew(self, fence, ttl_s):
        return self.flights.renew(fence, ttl_s)

    def pass_time(self, seconds):
        self.clock.advance(seconds)

    def close(self):
        pass


class RedisWorld:
    """The scripts in a real Redis, in a fresh farm."""

    def __init__(self, config):
        self.runner = asyncio.Runner()
        self.farm = RedisFarm(config)
        stores = self.farm.stores()
        self.flights, self.leases, self.refs = stores.flights, stores.leases, stores.refs
        self.collect = stores.collect

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def renew(self, fence, ttl_s):
        call = (fence.key, fence.epoch, fence.number, fence.token, int(ttl_s * 1000))
        return bool(self.run(self.farm.links[0].run("flight_renew", self.farm.keys.prefix, *call)))

    def pass_time(self, seconds):
        self.farm.pass_time(seconds)

    def close(self):
        self.run(self.farm.remove())
        self.runner.close()


def break_scripts(monkeypatch, where, sound, broken):
    """Put *broken* for *sound* in the script named *where* ("*": in all).

    Returns:
        The names of those that got it; filled as they are loaded.
    """
    original = storage.link.script
    broken_scripts = set()

    def mutated(name):
        lua = original(name)
        if where not in {"*", name} or sound not in lua.source:
            return lua
        broken_scripts.add(name)
        return Script.of(name, lua.source.replace(sound, broken))

    monkeypatch.setattr(storage.link, "script", mutated)
    return broken_scripts
