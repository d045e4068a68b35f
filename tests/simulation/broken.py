"""Broken variants: each leaves out one thing that the design wants. The simulator has to find each by its invariant."""

from __future__ import annotations

from dataclasses import replace

from cluster.digest import hex_of
from cluster.fetch.runner import Unlazier
from cluster.flight.values import Failed, Progressed
from storage.memory import MemoryFlightStore
from tests.simulation.services import VirtualRenewer
from tests.simulation.transfers import Transfer, VirtualTransfers


class FenceNotChecked(MemoryFlightStore):
    """Whoever owned once may write."""

    def _is_owner(self, fence):
        return fence.key in self._memory.flights


class RenewalStopped(VirtualRenewer):
    """Renews nothing; an owner never learns that it has lost."""

    def keep(self, fence, *, ttl_s, on_lost):
        pass


class ReleasedByTimeout(MemoryFlightStore):
    """The end of a flight is not told: those who wait find out when they look."""

    def _publish(self, key, event):
        if isinstance(event, Progressed):
            super()._publish(key, event)


class SharedUploadKey(VirtualTransfers):
    """An object's key is its digest: two uploads of one blob write one object."""

    def new_key(self, digest):
        return f"blobs/sha256/{hex_of(digest)}/shared"


class _Unhashed(Transfer):
    def _check(self, data):
        pass

    async def _read_back(self, info):
        pass


class CommitBeforeHash(VirtualTransfers):
    """What a source gave is committed, whatever it hashes to."""

    transfer = _Unhashed


class ErrorInherited(MemoryFlightStore):
    """Who comes to a flight that has failed gets its error, too."""

    def _end(self, key, event):
        super()._end(key, event)
        if isinstance(event, Failed):
            self._failed = {**getattr(self, "_failed", {}), key: event}

    async def outcome(self, key, fence_number):
        event = getattr(self, "_failed", {}).get(key)
        return await super().outcome(key, fence_number) if event is None else replace(event, fence_number=fence_number)


class FirstLeaseUsed(Unlazier):
    """Whoever joins a flight is pinned in the lease of the caller that began it."""

    def __init__(self, **parts):
        super().__init__(**parts)
        self._first = {}

    async def bring(self, descriptor, caller):
        self._first.setdefault(descriptor.digest, caller)
        return await super().bring(descriptor, caller)

    async def _try_pin(self, caller, digest):
        return await super()._try_pin(self._first[digest], digest)


class SeenAndThenHeld(Unlazier):
    """A blob that is seen in one step is taken to be held by the next."""

    async def _try_pin(self, caller, digest):
        (blob,) = await self._refs.blobs([digest])
        if blob is not None:
            await super()._try_pin(caller, digest)
        return blob
