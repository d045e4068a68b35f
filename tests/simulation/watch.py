"""The invariants, each by name, checked while a simulation runs and when it has ended.

What is checked comes from what the watch itself saw: messages as they were carried out, objects as they are. It asks
no store who owns what, so that a store that is wrong about it is found out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.digest import digest_of
from cluster.flight.values import Aborting, Joined, Owned, Present
from cluster.lease import blob_resource
from cluster.wire import decode_error

#: Seconds that may pass where something is to follow at once, beside those that its messages take.
_SOON_S = 0.4


_REFUSAL = re.compile(r"\(answer (\d+)\)")


def refusal_in(error):
    """Return the number of the registry's answer that an error comes from, if it is one's."""
    found = _REFUSAL.search(str(error))
    return None if found is None else int(found[1])


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that was found broken."""

    name: str
    at_s: float
    story: str

    def __str__(self):
        return f"{self.name} at {self.at_s:.3f} s: {self.story}"


@dataclass(slots=True)
class _Owner:
    """Who owns a flight by what was answered to it."""

    fence: object
    worker: str
    ttl_s: float
    until_s: float


class Watch:
    """Sees everything, and says what breaks which invariant."""

    def __init__(self, loop):
        self.loop = loop
        self.violations = []
        #: True while every message gets through, in time, and nobody is stopped: then bounds on time hold, too.
        self.is_clear = True
        self.soon_s = _SOON_S
        #: Owners of flights, by key, and how often each key was owned.
        self._owners = {}
        self.owned = {}
        self._last_fence = 0
        #: When the last flight of a key ended, and when each refusal of a registry was told as one's end.
        self.ended_s = {}
        self.refused_s = {}
        #: When each process went away: killed, stopped, or cut off.
        self.gone_s = {}
        self.take_overs_s = []
        #: Until when each lease lives, by what was answered.
        self._leases = {}
        #: Lease to what its holder was told that it holds.
        self.promised = {}
        self._keys = {}
        self.redis = self.bucket = None

    def see(self, redis, bucket):
        """Watch these."""
        self.redis, self.bucket = redis, bucket
        bucket.watch = self

    def expect(self, name, holds, story):
        if not holds:
            self.violations.append(Violation(name, self.loop.now_s, story))

    # -- flights (I1, I5, I10) ---------------------------------------------------------------------------------

    def owner(self, key):
        """Return who owns a flight now."""
        owner = self._owners.get(key)
        return owner if owner is not None and owner.until_s > self.redis.memory.now_s() else None

    def owners(self):
        """Return all who own a flight now."""
        return [owner for key in self._owners if (owner := self.owner(key)) is not None]

    def joined(self, key, worker, ttl_s, outcome, *, was_waiting):
        """See what came of a join."""
        held = self.owner(key)
        match outcome:
            case Owned(fence=fence):
                self._took(
                    _Owner(fence, worker, ttl_s, self.redis.memory.now_s() + ttl_s), held, was_waiting=was_waiting
                )
            case Joined() | Aborting():
                self.expect("I5", held is not None, f"{worker} waits for {key}, which nobody owns")
            case Present(blob=blob):
                self.expect("I2", self._keys.get(blob.key) == blob.digest, f"{blob.key} is present, uncommitted")

    def _took(self, owner, held, *, was_waiting):
        key, number = owner.fence.key, owner.fence.number
        if held is not None and held.fence == owner.fence:
            return  # asked again
        self.expect("I1", held is None, f"{owner.worker} owns {key}, which {held and held.worker} owns")
        self.expect("I10", number > self._last_fence, f"fence {number} comes after {self._last_fence}")
        self._last_fence = max(self._last_fence, number)
        former = self._owners.get(key)
        if former is not None and was_waiting and former.worker in self.gone_s:
            took_s = self.loop.now_s - self.gone_s[former.worker]
            self.take_overs_s.append(took_s)
            bound_s = owner.ttl_s + self.soon_s
            self.expect("I5", took_s <= bound_s or not self.is_clear, f"{key} is taken over after {took_s:.3f} s")
        self._owners[key] = owner
        self.owned[key] = self.owned.get(key, 0) + 1

    def renewed(self, fence, ttl_s):
        """See an ownership renewed."""
        owner = self.owner(fence.key)
        is_owner = owner is not None and owner.fence == fence
        self.expect("I10", is_owner, f"fence {fence.number} of {fence.key} is renewed, and owns no more")
        if is_owner:
            owner.until_s = self.redis.memory.now_s() + ttl_s

    def failed(self, fence, error):
        """See a flight end with an error."""
        if (number := refusal_in(decode_error(error))) is not None:
            self.refused_s[number] = self.loop.now_s
        self.wrote("fail", fence)

    def wrote(self, method, fence, blob=None):
        """See a write that was carried out."""
        owner = self.owner(fence.key)
        is_owner = owner is not None and owner.fence == fence
        if method == "commit":
            is_repeated = not is_owner and self._keys.get(blob.key) == blob.digest
            self.expect("I10", is_owner or is_repeated, f"fence {fence.number} commits {fence.key}, and owns no more")
            self._keys[blob.key] = blob.digest
            self._check_blob(self.redis.memory.blobs[blob.digest])
        else:
            self.expect("I10", is_owner, f"fence {fence.number} may {method} {fence.key}, and owns no more")
        if method in ("commit", "fail", "vacate") and is_owner:
            del self._owners[fence.key]
            self.ended_s[fence.key] = self.loop.now_s

    # -- leases (I3, I10) --------------------------------------------------------------------------------------

    def is_live(self, lease_id):
        """Tell whether a lease lives."""
        return self._leases.get(lease_id, 0.0) > self.redis.memory.now_s()

    def kept(self, lease_id, ttl_s):
        """See a lease made or renewed."""
        self._leases[lease_id] = float("inf") if ttl_s is None else self.redis.memory.now_s() + ttl_s

    def used(self, lease_id):
        """See something done under a lease."""
        self.expect("I10", self.is_live(lease_id), f"{lease_id} had lapsed, and is used")

    def released(self, lease_id):
        """See a lease deleted."""
        self._leases.pop(lease_id, None)

    # -- blobs (I2, I3) ----------------------------------------------------------------------------------------

    def object_changed(self, key):
        """See an object written or deleted: what is present must be as it was."""
        digest = self._keys.get(key)
        blob = None if digest is None else self.redis.memory.blobs.get(digest)
        if blob is not None and blob.key == key:
            self._check_blob(blob)

    def _check_blob(self, blob):
        info = self.bucket.store.head(blob.key)
        if info is None:
            self.expect("I2", holds=False, story=f"{blob.digest} is present, and {blob.key} is not in S3")
            return
        with self.bucket.store.open(blob.key) as stream:
            data = bytearray(info.size_bytes)
            stream.readinto(memoryview(data))
        is_whole = (info.size_bytes, info.etag) == (blob.size_bytes, blob.etag)
        self.expect("I2", is_whole, f"{blob.key} is another object than was committed")
        self.expect("I2", digest_of(data) == blob.digest, f"{blob.key} doesn't hash to {blob.digest}")

    def promise(self, lease_id, resource):
        """See a caller told that its lease holds something."""
        self.promised.setdefault(lease_id, set()).add(resource)
        lease = self.redis.memory.leases.get(lease_id)
        is_held = not self.is_live(lease_id) or (lease is not None and resource in lease.resources)
        self.expect("I3", is_held, f"{lease_id} was told that it holds {resource}, and doesn't")

    def promise_blob(self, lease_id, digest):
        """See a caller told that a blob is present, and held by its lease."""
        self.promise(lease_id, blob_resource(digest))
        is_there = not self.is_live(lease_id) or digest in self.redis.memory.blobs
        self.expect("I3", is_there, f"{lease_id} was told that it has {digest}, which is not present")

    def collected(self, resource):
        """See something collected."""
        for lease_id, held in self.promised.items():
            is_kept = resource in held and self.is_live(lease_id)
            self.expect("I3", not is_kept, f"{resource} is collected, and {lease_id} is live")

    def check_at_end(self):
        """Check what must hold of what is left."""
        for blob in self.redis.memory.blobs.values():
            self._check_blob(blob)
        for lease_id, held in self.promised.items():
            if self.is_live(lease_id):
                for resource in sorted(held):
                    self.promise(lease_id, resource)


class WatchedFlights:
    """A flight store whose every answer the watch sees. Its fakes may be broken: the watch is not told how."""

    def __init__(self, watch, redis):
        self._watch = watch
        self._redis = redis
        self._flights = redis.flights

    def __getattr__(self, name):
        return getattr(self._flights, name)

    async def join(self, key, *, worker, token, ttl_s):
        was_waiting = worker in self._redis.memory.waiters.get(key, ())
        outcome = await self._flights.join(key, worker=worker, token=token, ttl_s=ttl_s)
        self._watch.joined(key, worker, ttl_s, outcome, was_waiting=was_waiting)
        return outcome

    async def join_another(self, key, *, worker, ttl_s):
        was_waiting = worker in self._redis.memory.waiters.get(key, ())
        outcome = await self._flights.join_another(key, worker=worker, ttl_s=ttl_s)
        if outcome is not None:
            self._watch.joined(key, worker, ttl_s, outcome, was_waiting=was_waiting)
        return outcome

    def renew(self, fence, ttl_s):
        is_owner = self._flights.renew(fence, ttl_s)
        if is_owner:
            self._watch.renewed(fence, ttl_s)
        return is_owner

    async def abort_if_unwanted(self, fence):
        is_unwanted = await self._flights.abort_if_unwanted(fence)
        self._watch.wrote("abort_if_unwanted", fence)
        return is_unwanted

    async def commit(self, fence, blob, *, entry=None):
        await self._flights.commit(fence, blob, entry=entry)
        self._watch.wrote("commit", fence, blob)

    async def begin_upload(self, fence, upload):
        await self._flights.begin_upload(fence, upload)
        self._watch.wrote("begin_upload", fence)

    async def record_part(self, fence, number, etag):
        await self._flights.record_part(fence, number, etag)
        self._watch.wrote("record_part", fence)

    async def drop_upload(self, fence):
        await self._flights.drop_upload(fence)
        self._watch.wrote("drop_upload", fence)

    async def report(self, fence, current_bytes, total_bytes):
        await self._flights.report(fence, current_bytes, total_bytes)
        self._watch.wrote("report", fence)

    async def fail(self, fence, error, *, entry=None):
        await self._flights.fail(fence, error, entry=entry)
        self._watch.failed(fence, error)

    async def vacate(self, fence, *, entry=None):
        await self._flights.vacate(fence, entry=entry)
        self._watch.wrote("vacate", fence)


class WatchedRefs:
    """A ref store whose answers about leases the watch sees."""

    def __init__(self, watch, redis):
        self._watch = watch
        self._refs = redis.refs

    def __getattr__(self, name):
        return getattr(self._refs, name)

    async def hold_blobs(self, digests, *, lease_id):
        found = await self._refs.hold_blobs(digests, lease_id=lease_id)
        self._watch.used(lease_id)
        return found


class WatchedLeases:
    """A lease store whose every answer the watch sees."""

    def __init__(self, watch, redis):
        self._watch = watch
        self._leases = redis.leases

    def __getattr__(self, name):
        return getattr(self._leases, name)

    async def create(self, lease_id, *, ttl_s, labels=None):
        lease = await self._leases.create(lease_id, ttl_s=ttl_s, labels=labels)
        self._watch.kept(lease_id, ttl_s)
        return lease

    async def renew(self, lease_id, *, ttl_s):
        await self._leases.renew(lease_id, ttl_s=ttl_s)
        self._watch.used(lease_id)
        self._watch.kept(lease_id, ttl_s)

    async def attach(self, lease_id, resources):
        await self._leases.attach(lease_id, resources)
        self._watch.used(lease_id)

    async def delete(self, lease_id):
        was_live = await self._leases.delete(lease_id)
        self._watch.released(lease_id)
        return was_live
