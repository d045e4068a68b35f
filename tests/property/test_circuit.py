"""The circuit breaker under every order of outcomes and times, in the fake and in a real Redis, and broken variants.

The model is written against what a breaker is for, not against either's code:

- SPARES: a host that failed so often in a row, those of one burst counted once, is asked by one probe at a time, and
  by that only now and then; what comes back from any other request changes nothing of it;
- SERVES: nobody else is refused: not before, not once a probe was answered, nor because one left without an outcome.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import storage.memory
from cluster.circuit import MOVES, BreakerLimits, Circuit, HostCircuit
from cluster.config import RegistryConfig
from cluster.errors import CircuitOpenError
from storage.memory import Memory, MemoryHostLimiter
from tests.doubles.machines import RedisWorld, StoreMachine, assert_caught, break_scripts, run_machine
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import AGE, BREAKER, LIMIT, FakeClock

HOST = "registry.example:5000"
ALL = frozenset({"SPARES", "SERVES"})


class MemoryBreaker:
    """The fake, in an event loop: it waits for its turn there."""

    def __init__(self):
        self.clock, self.runner = FakeClock(), asyncio.Runner()
        self.limiter = MemoryHostLimiter(Memory(self.clock), lambda _host: LIMIT, breaker=BREAKER)

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def now_s(self):
        return self.clock.now_s

    def pass_time(self, seconds):
        self.clock.advance(seconds)

    def check(self):
        for host in self.limiter._hosts.values():
            host.circuit.validate()

    def close(self):
        self.runner.close()


class RedisBreaker(RedisWorld):
    """The scripts in a real Redis, whose clock goes on by itself."""

    def __init__(self, config):
        super().__init__(config)
        self.limiter = self.farm.stores().limiter
        self.passed_s = 0.0

    def now_s(self):
        seconds, micros = self.run(self.farm.links[0].execute("TIME"))
        return int(seconds) + int(micros) / 1e6 + self.passed_s

    def pass_time(self, seconds):
        # Not as others do, by a connection of its own each time: examples are nearly all of this.
        self.run(self.farm.links[0].execute("EVAL", AGE, 1, self.farm.keys.prefix, int(seconds * 1000)))
        self.passed_s += seconds

    def check(self):
        pass


class BreakerMachine(StoreMachine):
    """Makes requests to one host, ends them in any order, and checks who may make the next."""

    checked = ALL

    def __init__(self):
        super().__init__()
        self.limiter = self.world.limiter
        #: Requests under way, in the order in which they began.
        self.under_way = []
        self.probe = None
        self.is_given_up = False
        self.failures, self.counted_s = 0, float("-inf")
        self.retry_s = 0.0

    # -- rules ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.under_way) < 3)
    @rule()
    def ask(self):
        """Somebody wants to ask the host."""
        now_s = self.world.now_s()
        may = not self.is_given_up or now_s >= self.retry_s
        context = self.limiter.slot(HOST, deadline_s=10.0)
        try:
            slot = self.world.run(context.__aenter__())
        except CircuitOpenError as exc:
            self.expect("SERVES", not may, f"refused: {exc}")
            return
        self.expect("SPARES", may, "asked a host that is given up")
        self.expect("SPARES", slot.is_probe or not self.is_given_up, "asked a host that is given up, and by no probe")
        self.expect("SERVES", self.is_given_up or not slot.is_probe, "a probe of a host that is not given up")
        self.under_way.append((context, slot))
        if self.is_given_up:
            self.probe, self.retry_s = slot, now_s + BREAKER.open_s

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 2), outcome=st.sampled_from(["failed", "failed", "failed", "answered", "left"]))
    def end(self, which, outcome):
        """A request ends, as it likes."""
        context, slot = self.under_way.pop(which % len(self.under_way))
        is_probe, now_s = self.is_given_up and slot == self.probe, self.world.now_s()
        match outcome:
            case "failed":
                self.world.run(self.limiter.failed(slot, "HTTP 500"))
                self.note_failure(now_s, is_probe=is_probe)
            case "answered":
                self.world.run(self.limiter.succeeded(slot))
                self.note_answer(is_probe=is_probe)
            case "left" if is_probe:
                self.probe, self.retry_s = None, now_s
        self.world.run(context.__aexit__(None, None, None))
        self.world.check()

    @precondition(lambda self: not self.is_given_up and len(self.under_way) < 3)
    @rule()
    def go_down(self):
        """Nothing but failures for a while."""
        while not self.is_given_up:
            self.ask()
            self.end(len(self.under_way) - 1, "failed")
            self.wait(2.0)

    @rule(pause_s=st.sampled_from([2.0, 2.0, BREAKER.open_s + 1.0]))
    def wait(self, pause_s):
        """Time passes."""
        self.world.pass_time(pause_s)

    def teardown(self):
        for context, _ in self.under_way:
            self.world.run(context.__aexit__(None, None, None))
        super().teardown()

    # -- the model ------------------------------------------------------------------------------------

    def note_failure(self, now_s, *, is_probe):
        if is_probe:
            self.probe, self.retry_s = None, now_s + BREAKER.open_s
        elif not self.is_given_up and now_s - self.counted_s >= 1.0:
            self.failures, self.counted_s = self.failures + 1, now_s
            if self.failures == BREAKER.failures:
                self.is_given_up, self.retry_s = True, now_s + BREAKER.open_s

    def note_answer(self, *, is_probe):
        if is_probe:
            self.is_given_up, self.probe = False, None
        if not self.is_given_up:
            self.failures, self.counted_s = 0, float("-inf")


def test_the_fake_keeps_the_promises():
    """The decision itself, as the fake performs it."""
    run_machine(BreakerMachine.on(MemoryBreaker), examples=60, steps=25)


@pytest.mark.redis
def test_the_scripts_keep_the_promises(redis_servers):
    """The same in a real Redis."""
    config = redis_servers(next(iter(redis_binaries()))).config
    run_machine(BreakerMachine.on(partial(RedisBreaker, config)), examples=20, steps=25)


def test_every_state_is_left_again():
    """Whatever a host did, the table leads back to asking it."""
    for state in Circuit:
        reached, before = {state}, set()
        while reached != before:
            before = set(reached)
            reached |= {after for (known, _), after in MOVES.items() if known in reached}
        assert Circuit.CLOSED in reached


@pytest.mark.parametrize(("away_s", "refused_s"), [(3.0, 0.0), (60.0, RegistryConfig().breaker_open_s)])
def test_the_defaults_forgive_a_restart(away_s, refused_s):
    """Busy callers find a registry that was away for 3 s as soon as it is back, another as soon as it is tried."""
    config = RegistryConfig()
    circuit = HostCircuit(BreakerLimits(failures=config.breaker_failures, open_s=config.breaker_open_s))
    now_s = 0.0
    while now_s < away_s:
        name = f"at {now_s}"
        if circuit.admits(name, now_s):
            circuit.begun(name, now_s)
            circuit.failed(name, "HTTP 503", now_s)
        now_s += 0.05
    while not circuit.admits("back", now_s):
        now_s += 0.05

    assert now_s - away_s <= refused_s + 0.1


# -- broken variants -------------------------------------------------------------------------------------


class CountsEachOfABurst(HostCircuit):
    """Gives a host up for requests that failed together."""

    def _counted(self, reason, now_s):
        self._failed_s = float("-inf")
        return super()._counted(reason, now_s)


class NeverForgetsAFailure(HostCircuit):
    """Counts failures, not those in a row."""

    def answered(self, slot):
        failures = self.failures
        was_probe = super().answered(slot)
        self.failures = self.failures if was_probe else failures
        return was_probe


class LateAnswersOpenIt(HostCircuit):
    """Takes the answer to any request for the probe's."""

    def answered(self, slot):
        return super().answered(self.probe if self.state is Circuit.HALF_OPEN else slot)


class LateFailuresPutItOff(HostCircuit):
    """Takes the failure of any request for the probe's."""

    def failed(self, slot, reason, now_s):
        return super().failed(self.probe if self.state is Circuit.HALF_OPEN else slot, reason, now_s)


class ProbesTogether(HostCircuit):
    """Lets all ask once it is time for a probe."""

    def begun(self, slot, now_s):
        is_probe = super().begun(slot, now_s)
        self.retry_s = now_s if is_probe else self.retry_s
        return is_probe


class WaitsForALostProbe(HostCircuit):
    """Waits out a probe that nobody makes any more."""

    def left(self, slot, now_s):
        pass


MUTANTS = {
    CountsEachOfABurst: "SERVES",
    NeverForgetsAFailure: "SERVES",
    LateAnswersOpenIt: "SPARES",
    LateFailuresPutItOff: "SERVES",
    ProbesTogether: "SPARES",
    WaitsForALostProbe: "SERVES",
}


@pytest.mark.parametrize(("mutant", "name"), MUTANTS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_circuit_is_caught(monkeypatch, mutant, name):
    """Each broken variant of the decision breaks the promise that it is named for, and the machine sees it."""
    monkeypatch.setattr(storage.memory, "HostCircuit", mutant)

    assert_caught(BreakerMachine.on(MemoryBreaker), name, examples=1000, steps=25)


#: (script or all, what is replaced, by what, the promise that must catch it).
SCRIPT_MUTANTS = [
    ("host_failed", "now - circuit.failed_at < burst_ms", "false", "SERVES"),
    ("host_failed", "circuit.failures + 1 < limit", "true", "SPARES"),
    ("host_succeeded", "if is_probe or", "if", "SERVES"),
    ("host_succeeded", "return circuit.state == 'half_open' and circuit.probe == slot", "return true", "SPARES"),
    ("slot_take", "now >= circuit.retry_at", "circuit.state == 'open'", "SPARES"),
    ("slot_release", "host_set(prefix, host, 'retry_at', now)", "", "SERVES"),
]


@pytest.mark.redis
@pytest.mark.parametrize("mutant", SCRIPT_MUTANTS, ids=lambda mutant: f"{mutant[0]}-{mutant[3]}")
def test_a_broken_script_is_caught(monkeypatch, redis_servers, mutant):
    """Each broken variant of the scripts breaks the promise that it is named for, and the machine sees it."""
    where, sound, broken, name = mutant
    broken_scripts = break_scripts(monkeypatch, where, sound, broken)
    machine = BreakerMachine.on(partial(RedisBreaker, redis_servers(next(iter(redis_binaries()))).config))

    assert_caught(machine, name, examples=1000, steps=25)
    assert broken_scripts
