"""Leases under every order of calls: a machine with a model, and mutants that it must catch.

The machine runs on the fake and on the Lua scripts in a real Redis. The model is written against the
invariants of the design, not against either's code:

- I3: what a live lease holds it goes on holding, and it lives for as long as it was promised;
- I9: what a lease that is over held is held by it no more, also under its name taken again;
- I10: who holds a lease that is over changes nothing.

A broken variant is run with the invariant that must catch it checked alone: it has to be caught by that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from cluster.errors import LeaseLostError
from cluster.lease import LeaseId
from storage.memory import MemoryLeaseStore
from tests.doubles.machines import MemoryWorld, RedisWorld, StoreMachine, assert_caught, break_scripts, run_machine
from tests.doubles.redis import redis_binaries

NAMES = (LeaseId("a"), LeaseId("a:b"))
LEASES = st.sampled_from(NAMES)
RESOURCES = st.lists(st.sampled_from(["ref:x", "blob:y", "image:z"]), min_size=1, max_size=3)
#: Far more than an example takes in a real Redis, whose clock goes on by itself.
TTLS_S = st.sampled_from([1000.0, 2000.0])
ALL = frozenset({"I3", "I9", "I10"})


@dataclass
class Promise:
    """A lease as it was promised."""

    expires_s: float | None
    labels: dict[str, str]
    resources: set[str] = field(default_factory=set)


class LeaseStoreMachine(StoreMachine):
    """Calls a lease store as holders do, those that were long asleep too, and checks every answer."""

    checked = ALL

    def __init__(self):
        super().__init__()
        self.leases = self.world.leases
        self.promised: dict[LeaseId, Promise] = {}

    def live(self, lease_id):
        promise = self.promised.get(lease_id)
        if promise is not None and promise.expires_s is not None and promise.expires_s <= self.now_s:
            del self.promised[lease_id]
            return None
        return promise

    def attempt(self, coroutine):
        """Return whether a call found its lease."""
        try:
            self.world.run(coroutine)
        except LeaseLostError:
            return False
        return True

    # -- rules ----------------------------------------------------------------------------------------

    @rule(lease_id=LEASES, ttl_s=st.sampled_from([None, 1000.0, 1000.0, 2000.0]), label=st.sampled_from(["1", "2"]))
    def create(self, lease_id, ttl_s, label):
        """A lease is made, or renewed by being made again."""
        promise = self.live(lease_id)
        expires_s = None if ttl_s is None else self.now_s + ttl_s
        if promise is None:
            promise = self.promised[lease_id] = Promise(expires_s, {"label": label})
        elif promise.expires_s is not None:
            promise.expires_s = expires_s
        lease = self.world.run(self.leases.create(lease_id, ttl_s=ttl_s, labels={"label": label}))
        self.check(lease_id, lease)

    @rule(lease_id=LEASES, ttl_s=TTLS_S)
    def renew(self, lease_id, ttl_s):
        """Its holder renews it, or somebody who holds it no more tries to."""
        promise = self.live(lease_id)
        was_there = self.attempt(self.leases.renew(lease_id, ttl_s=ttl_s))
        self.expect("I3", was_there or promise is None, f"{lease_id} is live, and can't be renewed")
        self.expect("I10", promise is not None or not was_there, f"{lease_id} is over, and can be renewed")
        if promise is not None and promise.expires_s is not None:
            promise.expires_s = self.now_s + ttl_s

    @rule(lease_id=LEASES, resources=RESOURCES)
    def attach(self, lease_id, resources):
        """Its holder attaches resources, or somebody who holds it no more tries to."""
        promise = self.live(lease_id)
        was_there = self.attempt(self.leases.attach(lease_id, resources))
        self.expect("I3", was_there or promise is None, f"{lease_id} is live, and holds nothing new")
        self.expect("I10", promise is not None or not was_there, f"{lease_id} is over, and holds something new")
        if promise is not None:
            promise.resources.update(resources)

    @rule(lease_id=LEASES)
    def delete(self, lease_id):
        """A lease is deleted."""
        promise = self.live(lease_id)
        was_there = self.world.run(self.leases.delete(lease_id))
        self.promised.pop(lease_id, None)
        self.expect("I3", was_there or promise is None, f"{lease_id} was live, and was not there")
        self.expect("I10", promise is not None or not was_there, f"{lease_id} was over, and was there")

    @rule(seconds=st.sampled_from([10.0, 600.0, 1001.0, 1001.0]))
    def pass_time(self, seconds):
        """Time passes: leases lapse."""
        self.world.pass_time(seconds)
        self.now_s += seconds

    @invariant()
    def holders_are_who_was_promised(self):
        """Each resource is held by the live leases that it was attached to, and by no other."""
        for resource in ("ref:x", "blob:y", "image:z"):
            found = set(self.world.run(self.leases.holders(resource)))
            held = {
                lease_id for lease_id in list(self.promised) if (p := self.live(lease_id)) and resource in p.resources
            }
            self.expect("I3", held <= found, f"{resource} is held by {held}, and {found} are told")
            self.expect("I9", found <= held, f"{resource} is held by {held}, and {found} are told")

    @invariant()
    def leases_are_as_promised(self):
        """Each lease is live exactly as long as promised, with its labels and what it holds."""
        listed = self.world.run(self.leases.leases())
        told = {lease.id: lease for lease in listed}
        for lease_id in NAMES:
            lease = self.world.run(self.leases.get(lease_id))
            self.check(lease_id, lease)
            self.check(lease_id, told.get(lease_id))
        far = [float("inf") if lease.expires_wall_s is None else lease.expires_wall_s for lease in listed]
        self.expect("I3", far == sorted(far), "leases are not listed by expiry")

    def check(self, lease_id, lease):
        promise = self.live(lease_id)
        if promise is None:
            self.expect("I9", lease is None, f"{lease_id} is over, and is {lease}")
            return
        self.expect("I3", lease is not None, f"{lease_id} is live, and not there")
        held = set(lease.resources)
        self.expect("I3", promise.resources <= held, f"{lease_id} holds {held}, not {promise.resources}")
        self.expect("I9", held <= promise.resources, f"{lease_id} holds {held}, not {promise.resources}")
        self.expect("I9", lease.labels == promise.labels, f"{lease_id} has {lease.labels}, not {promise.labels}")
        is_pinned = promise.expires_s is None
        self.expect("I3", not is_pinned or lease.expires_wall_s is None, f"{lease_id} is pinned, and expires")


def test_the_fake_keeps_the_invariants():
    """No order of calls on the fake breaks an invariant."""
    run_machine(LeaseStoreMachine.on(MemoryWorld), examples=200, steps=20)


@pytest.mark.redis
@pytest.mark.parametrize("version", ["redis7", "redis6.2"])
def test_the_scripts_keep_the_invariants(redis_servers, version):
    """No order of calls on the Lua scripts breaks an invariant."""
    machine = LeaseStoreMachine.on(partial(RedisWorld, redis_servers(version).config))

    run_machine(machine, examples=40, steps=20)


# -- mutants of the fake ----------------------------------------------------------------------------------


class LapseIgnoredByRenewal(MemoryLeaseStore):
    async def renew(self, lease_id, *, ttl_s):
        if (lease := self._memory.leases.get(lease_id)) is None:
            raise LeaseLostError(lease_id)
        self._memory.leases[lease_id] = replace(lease, expires_wall_s=self._memory.now_s() + ttl_s)


class LapseIgnoredByReaders(MemoryLeaseStore):
    async def holders(self, resource):
        return sorted(lease.id for lease in self._memory.leases.values() if resource in lease.resources)


class AttachesToAnything(MemoryLeaseStore):
    async def attach(self, lease_id, resources):
        if self._memory.is_live(lease_id):
            await super().attach(lease_id, resources)


class NameHandsDown(MemoryLeaseStore):
    async def create(self, lease_id, *, ttl_s, labels=None):
        before = self._memory.leases.get(lease_id)
        lease = await super().create(lease_id, ttl_s=ttl_s, labels=labels)
        if before is not None:
            self._memory.leases[lease_id] = lease = replace(lease, resources=before.resources)
        return lease


class CreationForgets(MemoryLeaseStore):
    async def create(self, lease_id, *, ttl_s, labels=None):
        lease = await super().create(lease_id, ttl_s=ttl_s, labels=labels)
        self._memory.leases[lease_id] = lease = replace(lease, resources=())
        return lease


class RenewalUnpins(MemoryLeaseStore):
    def _extended(self, lease, expires_s):
        return replace(lease, expires_wall_s=expires_s)


class RenewalDoesNothing(MemoryLeaseStore):
    def _extended(self, lease, expires_s):
        return lease


class AttachReplaces(MemoryLeaseStore):
    async def attach(self, lease_id, resources):
        if self._memory.is_live(lease_id):
            self._memory.leases[lease_id] = replace(self._memory.leases[lease_id], resources=())
        await super().attach(lease_id, resources)


class DeletionTakesOthersAlong(MemoryLeaseStore):
    async def delete(self, lease_id):
        gone = await super().delete(lease_id)
        for other in [name for name in self._memory.leases if name.startswith(lease_id)]:
            del self._memory.leases[other]
        return gone


MUTANTS = {
    LapseIgnoredByRenewal: "I10",
    LapseIgnoredByReaders: "I9",
    AttachesToAnything: "I10",
    NameHandsDown: "I9",
    CreationForgets: "I3",
    RenewalUnpins: "I3",
    RenewalDoesNothing: "I3",
    AttachReplaces: "I3",
    DeletionTakesOthersAlong: "I3",
}


@pytest.mark.parametrize(("mutant", "name"), MUTANTS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_fake_is_caught(mutant, name):
    """Each broken variant of the fake breaks the invariant that it is named for, and the machine sees it."""
    machine = LeaseStoreMachine.on(partial(MemoryWorld, leases=mutant))

    assert_caught(machine, name, examples=1000, steps=20)


# -- mutants of the scripts ------------------------------------------------------------------------------

#: (script or all, what is replaced, by what, the invariant that must catch it).
SCRIPT_MUTANTS = [
    ("lease_renew", "if not lease_is_live(prefix, id, now) then", "if false then", "I10"),
    ("lease_attach", "if not lease_is_live(prefix, id, now) then", "if false then", "I10"),
    ("lease_holders", "if lease_is_live(KEYS[1], id, now) then", "if true then", "I9"),
    ("lease_create", "if not lease_is_live(prefix, id, now) then", "if true then", "I3"),
    ("lease_create", "elseif redis.call('ZSCORE', leases, id) ~= 'inf' then", "else", "I3"),
    ("lease_renew", "if redis.call('ZSCORE', leases, id) ~= 'inf' then", "if true then", "I3"),
    (
        "*",
        "'ZRANGEBYSCORE', prefix .. ':leases', '-inf', lapse_ms(prefix, now),",
        "'ZRANGEBYSCORE', prefix .. ':leases', '-inf', '+inf',",
        "I3",
    ),
    ("lease_delete", "redis.call('SREM', prefix .. ':holders:' .. resource, id)", "", "I9"),
    ("*", "redis.call('SADD', prefix .. ':holders:' .. resource, id)", "", "I3"),
]


@pytest.mark.redis
@pytest.mark.parametrize("mutant", SCRIPT_MUTANTS, ids=lambda mutant: f"{mutant[0]}-{mutant[3]}")
def test_a_broken_script_is_caught(monkeypatch, redis_servers, mutant):
    """Each broken variant of the scripts breaks the invariant that it is named for, and the machine sees it."""
    where, sound, broken, name = mutant
    broken_scripts = break_scripts(monkeypatch, where, sound, broken)
    machine = LeaseStoreMachine.on(partial(RedisWorld, redis_servers(next(iter(redis_binaries()))).config))

    assert_caught(machine, name, examples=1000, steps=20)
    assert broken_scripts
