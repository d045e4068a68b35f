"""The cluster's flights under every order of calls: a machine with a model, and mutants that it must catch.

The machine runs on the fake and on the Lua scripts in a real Redis. The model is written against the
invariants of the design, not against either's code:

- I1: at most one live owner a key, and what a dead one uploaded is left to the next;
- I2: present means committed under a valid fence;
- I3: what was committed is held until its waiters can hold it;
- I5: every caller ends: where nobody lives who owns, the next to join does;
- I6: a waiter is never aborted under, and nobody inherits the end of a flight that they came too late for;
- I10: who owns no more changes nothing; fences rise.

A broken variant is run with the invariant that must catch it checked alone: it has to be caught by that.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from cluster.digest import digest_of
from cluster.errors import StaleFenceError
from cluster.flight.values import (
    Aborting,
    Committed,
    Failed,
    Fence,
    Joined,
    Owned,
    Present,
    UploadState,
    Vacated,
)
from cluster.lease import LeaseId, blob_resource
from cluster.ref import BlobRecord
from storage.memory import MemoryFlightStore
from tests.doubles.machines import MemoryWorld, RedisWorld, StoreMachine, assert_caught, break_scripts, run_machine
from tests.doubles.redis import redis_binaries

DIGEST = digest_of(b"layer")
KEY = blob_resource(DIGEST)
WORKERS = ("n0", "n1", "n2")
#: Far more than an example takes in a real Redis, whose clock goes on by itself.
TTL_S = 1000.0
OUTCOME_S = 60.0
WRITES = st.sampled_from(["begin", "part", "drop", "report", "commit", "fail", "vacate", "abort", "renew"])
ALL = frozenset({"I1", "I2", "I3", "I5", "I6", "I10"})


class FlightStoreMachine(StoreMachine):
    """Calls a flight store as workers do, dead and sleeping ones too, and checks every answer."""

    checked = ALL

    def __init__(self):
        super().__init__()
        self.flights = self.world.flights
        # The model.
        self.owner: Fence | None = None
        self.expires_s = 0.0
        self.is_aborting = False
        self.waiters: dict[str, float] = {}
        self.upload: UploadState | None = None
        self.blob: BlobRecord | None = None
        self.issued: list[Fence] = []
        self.outcomes: dict[int, tuple[object, float]] = {}
        self.tokens: dict[str, list[str]] = {worker: [] for worker in WORKERS}
        self.nonce = 0

    def fresh(self, what):
        self.nonce += 1
        return f"{what}-{self.nonce}"

    @property
    def has_owner(self):
        return self.owner is not None and self.expires_s > self.now_s

    def waiting(self):
        return {worker for worker, until_s in self.waiters.items() if until_s > self.now_s}

    def seen(self):
        """Return all that a write of somebody who doesn't own must leave as it is."""
        state = self.world.run(self.flights.state(KEY))
        if state is not None:
            del state["lease_remaining_s"]
        outcomes = [self.world.run(self.flights.outcome(KEY, fence.number)) for fence in self.issued]
        blobs = self.world.run(self.world.refs.blobs([DIGEST]))
        return state, outcomes, blobs, self.world.run(self.world.leases.holders(KEY))

    # -- rules ----------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS), reuse=st.booleans())
    def join(self, worker, reuse):
        """A worker joins, by a fresh token, or (a repeated call, a careless one) by the last it had."""
        if not reuse or not self.tokens[worker]:
            self.tokens[worker].append(self.fresh("token"))
        token = self.tokens[worker][-1]
        outcome = self.world.run(self.flights.join(KEY, worker=worker, token=token, ttl_s=TTL_S))
        if self.blob is not None:
            self.expect("I2", outcome == Present(blob=self.blob), f"{outcome} of a committed blob")
        elif self.has_owner:
            self.join_flight(worker, token, outcome)
        else:
            self.expect("I5", isinstance(outcome, Owned), f"nobody owns, yet {worker} gets {outcome}")
            self.take_over(worker, outcome)

    def join_flight(self, worker, token, outcome):
        if self.is_aborting:
            self.expect("I6", isinstance(outcome, Aborting), f"{outcome} of an aborting flight")
        elif token == self.owner.token:
            self.expect("I1", outcome == Owned(fence=self.owner, upload=self.upload), f"the owner gets {outcome}")
        else:
            self.expect("I1", isinstance(outcome, Joined), f"{self.owner} owns, yet {worker} gets {outcome}")
            self.expect("I6", outcome.fence_number == self.owner.number, f"{outcome} of {self.owner}")
            self.waiters[worker] = self.now_s + TTL_S

    def take_over(self, worker, outcome):
        numbers = [fence.number for fence in self.issued]
        self.expect("I10", outcome.fence.number > max(numbers, default=0), f"{outcome.fence} after {numbers}")
        self.expect("I1", outcome.upload == self.upload, f"{outcome.upload} was left as {self.upload}")
        if self.owner is not None:  # it died
            self.outcomes[self.owner.number] = (Vacated(fence_number=self.owner.number), self.now_s)
        self.owner, self.expires_s, self.is_aborting = outcome.fence, self.now_s + TTL_S, False
        self.issued.append(outcome.fence)
        self.waiters.pop(worker, None)

    @precondition(lambda self: self.has_owner)
    @rule(what=WRITES)
    def owner_writes(self, what):
        """The owner writes."""
        try:
            self.do(what, self.owner, is_owner=True)
        except StaleFenceError:
            self.expect("I5", holds=False, story=f"the owner may not {what}")

    @precondition(lambda self: self.issued)
    @rule(data=st.data(), what=WRITES, forged=st.sampled_from(["", "", "epoch", "number", "token"]))
    def stranger_writes(self, data, what, forged):
        """Somebody writes who owned once, or whose fence differs from one that was given in one part."""
        fence = data.draw(st.sampled_from([*self.issued, self.issued[-1]]), label="fence")
        if forged == "number":
            fence = replace(fence, number=fence.number + 1)
        elif forged:
            fence = replace(fence, **{forged: "forged"})
        if self.has_owner and fence == self.owner:
            return
        before = self.seen()
        try:
            answer = self.do(what, fence, is_owner=False)
        except StaleFenceError:
            pass
        else:
            name = "I2" if what == "commit" else "I10"
            self.expect(name, answer == "repeated", f"{fence} may {what}, though {self.owner} owns")
        self.expect("I10", self.seen() == before, f"{fence} changed something by {what}")

    def do(self, what, fence, *, is_owner):
        return getattr(self, f"do_{what}")(fence, is_owner=is_owner)

    def do_begin(self, fence, *, is_owner):
        upload = UploadState(key=self.fresh("key"), upload_id=self.fresh("upload"), part_bytes=5)
        self.world.run(self.flights.begin_upload(fence, upload))
        if is_owner:
            self.upload = upload

    def do_part(self, fence, *, is_owner):
        if is_owner and self.upload is None:
            return  # no owner records a part of nothing
        number = self.nonce % 3 + 1
        self.world.run(self.flights.record_part(fence, number, "etag"))
        if is_owner:
            self.upload = replace(self.upload, parts=dict(sorted({**self.upload.parts, number: "etag"}.items())))

    def do_drop(self, fence, *, is_owner):
        self.world.run(self.flights.drop_upload(fence))
        if is_owner:
            self.upload = None

    def do_report(self, fence, *, is_owner):
        self.world.run(self.flights.report(fence, self.nonce, 100))

    def do_commit(self, fence, *, is_owner):
        blob = BlobRecord(digest=DIGEST, key=self.fresh("key"), size_bytes=5, etag="", fence=fence.number)
        is_repeated = not is_owner and self.blob is not None and self.blob.fence == fence.number
        if is_repeated:
            blob = self.blob
        self.world.run(self.flights.commit(fence, blob))
        if is_repeated:
            return "repeated"
        if is_owner:
            self.blob, self.upload = blob, None
            self.end(Committed(fence_number=fence.number, blob=blob))
            self.waiters.clear()
            self.expect("I2", self.world.run(self.world.refs.blobs([DIGEST])) == [blob], "committed, and not present")
            holders = self.world.run(self.world.leases.holders(KEY))
            self.expect("I3", holders == [LeaseId(f"flight:{DIGEST}")], f"committed, and held by {holders}")
        return None

    def do_fail(self, fence, *, is_owner):
        self.world.run(self.flights.fail(fence, b"error"))
        if is_owner:
            self.end(Failed(fence_number=fence.number, error=b"error"))
            self.waiters.clear()

    def do_vacate(self, fence, *, is_owner):
        self.world.run(self.flights.vacate(fence))
        if is_owner:
            self.end(Vacated(fence_number=fence.number))

    def do_abort(self, fence, *, is_owner):
        aborts = self.world.run(self.flights.abort_if_unwanted(fence))
        if is_owner:
            unwanted = self.is_aborting or not self.waiting()
            self.expect("I6", unwanted or not aborts, f"{self.waiting()} wait, yet it aborts")
            self.expect("I5", aborts or not unwanted, "nobody waits, yet it doesn't abort")
            self.is_aborting = aborts

    def do_renew(self, fence, *, is_owner):
        if not self.world.renew(fence, TTL_S):
            raise StaleFenceError(fence.key, fence.number)
        if is_owner:
            self.expires_s = self.now_s + TTL_S

    def end(self, event):
        self.outcomes[self.owner.number] = (event, self.now_s)
        self.owner, self.is_aborting = None, False

    @rule(worker=st.sampled_from(WORKERS))
    def leave(self, worker):
        """A worker stops waiting, or was not waiting anyway."""
        is_last = self.world.run(self.flights.leave(KEY, worker=worker))
        self.waiters.pop(worker, None)
        self.expect("I6", is_last or self.waiting(), "nobody waits, yet somebody is said to")
        self.expect("I5", not is_last or not self.waiting(), f"{self.waiting()} wait, yet nobody is said to")

    @rule(seconds=st.sampled_from([20.0, 400.0, 1001.0, 1001.0]))
    def pass_time(self, seconds):
        """Time passes: outcomes are forgotten, holds and waiters lapse."""
        self.world.pass_time(seconds)
        self.now_s += seconds

    @rule()
    def lose_the_blob(self):
        """The object is gone from S3: the blob turns lazy, and may be fetched again."""
        if self.blob is not None:
            self.world.run(self.world.refs.mark_absent(self.blob, "gone"))
            self.blob = None

    @rule()
    def ask_for_outcomes(self):
        """Everybody who ever waited or owned asks how it ended."""
        for fence in self.issued:
            event, at_s = self.outcomes.get(fence.number, (None, 0.0))
            wanted = event if self.now_s - at_s < OUTCOME_S else None
            answer = self.world.run(self.flights.outcome(KEY, fence.number))
            self.expect("I6", answer == wanted, f"{answer} is told as the end of {fence}, which is {wanted}")


def test_the_fake_keeps_the_invariants():
    """No order of calls on the fake breaks an invariant."""
    run_machine(FlightStoreMachine.on(MemoryWorld), examples=300, steps=30)


@pytest.mark.redis
@pytest.mark.parametrize("version", ["redis7", "redis6.2"])
def test_the_scripts_keep_the_invariants(redis_servers, version):
    """No order of calls on the Lua scripts breaks an invariant."""
    machine = FlightStoreMachine.on(partial(RedisWorld, redis_servers(version).config))

    run_machine(machine, examples=60, steps=30)


# -- mutants of the fake ----------------------------------------------------------------------------------


def _same(*parts):
    """Return an ownership check that compares only these parts of a fence."""

    def is_owner(self, fence):
        flight = self._memory.flights.get(fence.key)
        return (
            flight is not None
            and self._is_live(flight)
            and all(getattr(flight.fence, part) == getattr(fence, part) for part in parts)
        )

    return is_owner


class NumberNotCompared(MemoryFlightStore):
    _is_owner = _same("epoch", "token")


class TokenNotCompared(MemoryFlightStore):
    _is_owner = _same("epoch", "number")


class EpochNotCompared(MemoryFlightStore):
    _is_owner = _same("number", "token")


class LapseIgnoredByWrites(MemoryFlightStore):
    def _is_owner(self, fence):
        flight = self._memory.flights.get(fence.key)
        return flight is not None and flight.fence == fence


class LapseIgnoredByJoin(MemoryFlightStore):
    def _is_live(self, flight):
        return True


class LapseTakenForGranted(MemoryFlightStore):
    async def join(self, key, *, worker, token, ttl_s):
        if (flight := self._memory.flights.get(key)) is not None and flight.owner == worker:
            flight.expires_s = 0.0  # "it is my own old hold": its former process may be alive
        return await super().join(key, worker=worker, token=token, ttl_s=ttl_s)


class FenceGivenAgain(MemoryFlightStore):
    def _next_fence(self):
        return max(1, super()._next_fence() // 2)


class CommitUnchecked(MemoryFlightStore):
    async def commit(self, fence, blob):
        self._memory.blobs[blob.digest] = blob
        if self._is_owner(fence):
            await super().commit(fence, blob)


class CommitUnheld(MemoryFlightStore):
    async def commit(self, fence, blob):
        await super().commit(fence, blob)
        self._memory.leases.clear()


class OutcomeInherited(MemoryFlightStore):
    def _end(self, key, event):
        self._settle(key, event)
        # Whoever owns next finds the end of the last one waiting for it.
        self._memory.outcomes[key, event.fence_number + 1] = self._memory.outcomes[key, event.fence_number]
        del self._memory.flights[key]


class FailureKeepsFlying(MemoryFlightStore):
    async def fail(self, fence, error):
        self._owned(fence)
        self._settle(fence.key, Failed(fence_number=fence.number, error=error))


class AbortsUnderWaiters(MemoryFlightStore):
    def _is_awaited(self, key):
        return False


class JoinsWhileAborting(MemoryFlightStore):
    async def abort_if_unwanted(self, fence):
        aborts = await super().abort_if_unwanted(fence)
        self._memory.flights[fence.key].is_aborting = False
        return aborts


class UploadLostWithItsOwner(MemoryFlightStore):
    def _settle(self, key, event):
        self._memory.uploads.pop(key, None)
        super()._settle(key, event)


MUTANTS = {
    NumberNotCompared: "I10",
    TokenNotCompared: "I10",
    EpochNotCompared: "I10",
    LapseIgnoredByWrites: "I10",
    LapseIgnoredByJoin: "I5",
    LapseTakenForGranted: "I1",
    FenceGivenAgain: "I10",
    CommitUnchecked: "I2",
    CommitUnheld: "I3",
    OutcomeInherited: "I6",
    FailureKeepsFlying: "I5",
    AbortsUnderWaiters: "I6",
    JoinsWhileAborting: "I6",
    UploadLostWithItsOwner: "I1",
}


@pytest.mark.parametrize(("mutant", "name"), MUTANTS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_fake_is_caught(mutant, name):
    """Each broken variant of the fake breaks the invariant that it is named for, and the machine sees it."""
    machine = FlightStoreMachine.on(partial(MemoryWorld, flights=mutant))

    assert_caught(machine, name, examples=1500, steps=30)


# -- mutants of the scripts ------------------------------------------------------------------------------

#: (script or all, what is replaced, by what, the invariant that must catch it).
SCRIPT_MUTANTS = [
    ("*", "held[2] == fence and", "", "I10"),
    ("*", "held[1] == epoch and", "", "I10"),
    ("*", "held[3] == token and", "", "I10"),
    ("*", "and tonumber(held[4]) > now", "", "I10"),
    ("flight_join", "if left > 0 then", "if last then", "I5"),
    ("flight_join", "if left > 0 then", "if left > 700000 then", "I1"),
    ("flight_join", "redis.call('INCR', prefix .. ':fence')", "1", "I10"),
    ("flight_join", "if held[5] == '1' then", "if false then", "I6"),
    ("flight_join", "flight_settle(prefix, key, last, vacated)", "", "I6"),
    ("flight_commit", "return present and cmsgpack.unpack(present)[3].key == ARGV[5] and 1 or 0", "", "I2"),
    ("flight_commit", "lease_hold(prefix, lease, key)", "", "I3"),
    ("flight_end", "redis.call('DEL', flight_key(prefix, key))", "", "I5"),
    ("flight_end", "flight_settle(prefix, key, ARGV[3], ARGV[5])", "flight_settle(prefix, key, 1, ARGV[5])", "I6"),
    (
        "flight_end",
        "redis.call('DEL', flight_key(prefix, key))",
        "redis.call('DEL', flight_key(prefix, key)) upload_forget(prefix, key)",
        "I1",
    ),
    ("flight_abort", "if flight_waiters(prefix, key, now) > 0 then", "if false then", "I6"),
]


@pytest.mark.redis
@pytest.mark.parametrize("mutant", SCRIPT_MUTANTS, ids=lambda mutant: f"{mutant[0]}-{mutant[3]}")
def test_a_broken_script_is_caught(monkeypatch, redis_servers, mutant):
    """Each broken variant of the scripts breaks the invariant that it is named for, and the machine sees it."""
    where, sound, broken, name = mutant
    broken_scripts = break_scripts(monkeypatch, where, sound, broken)
    machine = FlightStoreMachine.on(partial(RedisWorld, redis_servers(next(iter(redis_binaries()))).config))

    assert_caught(machine, name, examples=1500, steps=30)
    assert broken_scripts
