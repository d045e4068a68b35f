"""Reads present blobs, and nodes' copies, and hashes them: what is not what its record says is told, and repaired."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

from cluster.collect.pace import Pace
from cluster.collect.sweep import QUARANTINE_PREFIX
from cluster.collect.verify import BlobFault, FaultKind, Verified
from cluster.digest import Digest, hex_of
from cluster.errors import BlobNotFoundError, ClusterError
from cluster.faultpoints import FaultPoint, ahit
from cluster.ports import ContentStore, RefStore
from cluster.ref import BlobRecord
from storage.node_cache import NodeCache
from storage.stoppable import StoppedError, in_thread

_CHUNK_BYTES = 1024**2


class Verifier:
    """Verifies blobs against their records.

    A damaged one is repaired so that a crash at any point leaves it either as it was, or lazy: its bytes are copied to
    the quarantine first, and then one step of Redis turns the blob lazy, if it still is that very upload, and gives its
    object to collection.

    Args:
        refs: What is recorded.
        objects: Where it lies.
        threads: For reading; each call takes one.
        grace_s: Seconds until the object of a damaged blob may be deleted: for who reads it at the time.
    """

    def __init__(self, refs: RefStore, objects: ContentStore, *, threads: Executor, grace_s: float) -> None:
        self._refs = refs
        self._objects = objects
        self._threads = threads
        self._grace_s = grace_s

    async def verify(self, digests: Sequence[Digest], *, repair: bool, bytes_per_s: float) -> Verified:
        """Verify the blobs of *digests* that are present, one after the other.

        Args:
            digests: Which ones.
            repair: Turn lazy what is missing or damaged.
            bytes_per_s: How fast to read; 0: as fast as it goes.

        Raises:
            UnavailableError: Redis doesn't answer. What the content store doesn't give is told as a fault.
        """
        pace = Pace(bytes_per_s)
        verified = Verified()
        for digest in digests:
            # One by one: at a slow rate, what was read of all at first would be old when the last one is looked at.
            (blob,) = await self._refs.blobs([digest])
            if blob is not None:
                fault = await self._verify(blob, pace, repair=repair)
                verified += Verified(blobs=1, size_bytes=blob.size_bytes, faults=() if fault is None else (fault,))
        return verified

    async def _verify(self, blob: BlobRecord, pace: Pace, *, repair: bool) -> BlobFault | None:
        found = await self._look(blob, pace)
        if found is not None and found[0] is FaultKind.DAMAGED:
            # Once more: a bit may have turned over on the way here, and not every blob can be had again elsewhere.
            found = await self._look(blob, pace)
        if found is None:
            return None
        kind, reason = found
        (now,) = await self._refs.blobs([blob.digest])
        if now is None or now.key != blob.key:
            return None  # it was collected, or fetched anew, meanwhile
        fault = BlobFault(digest=blob.digest, key=blob.key, size_bytes=blob.size_bytes, kind=kind, reason=reason)
        if not repair or kind is FaultKind.UNREADABLE:
            return fault
        await ahit(FaultPoint.VERIFY_FOUND)
        return await self._repair(blob, fault)

    async def _repair(self, blob: BlobRecord, fault: BlobFault) -> BlobFault:
        quarantine = ""
        if fault.kind is FaultKind.DAMAGED:
            try:
                quarantine = await in_thread(self._threads, lambda _: self._to_quarantine(blob))
            except ClusterError as exc:
                return replace(fault, reason=f"{fault.reason}; not repaired: {exc}")
            await ahit(FaultPoint.VERIFY_QUARANTINED)
        # False where somebody else has found it out at the same time: it is repaired all the same.
        await self._refs.mark_absent(blob, fault.reason, delete_after_s=self._grace_s)
        return replace(fault, is_repaired=True, quarantine=quarantine)

    async def _look(self, blob: BlobRecord, pace: Pace) -> tuple[FaultKind, str] | None:
        return await in_thread(self._threads, lambda stop: self._read(blob, pace, stop))

    def _read(self, blob: BlobRecord, pace: Pace, stop: threading.Event) -> tuple[FaultKind, str] | None:
        """Read an object and hash it; tell what is wrong."""
        hashed = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            with self._objects.open(blob.key) as stream:
                while count := stream.readinto(buffer):
                    hashed.update(buffer[:count])
                    if stop.wait(pace.wait_s(count, time.monotonic())):
                        raise StoppedError
        except BlobNotFoundError:
            return FaultKind.MISSING, f"object {blob.key} is gone"
        except ClusterError as exc:
            return FaultKind.UNREADABLE, str(exc)
        actual = f"sha256:{hashed.hexdigest()}"
        return None if actual == blob.digest else (FaultKind.DAMAGED, f"object {blob.key} hashes to {actual}")

    def _to_quarantine(self, blob: BlobRecord) -> str:
        """Copy a damaged object; return the key of the copy, or "" where the object has gone meanwhile.

        Always to the same key: who was killed after it, and begins again, leaves one copy.
        """
        found = self._objects.head(blob.key)
        if found is None:
            return ""
        key = QUARANTINE_PREFIX + blob.key
        self._objects.copy(found, key)
        return key


async def verify_copies(
    cache: NodeCache, digests: Sequence[Digest], *, node: str, threads: Executor, bytes_per_s: float
) -> Verified:
    """Verify a node's copies of *digests*; a damaged one is dropped, and comes from the content store again."""
    pace = Pace(bytes_per_s)

    def verify(digest: Digest, stop: threading.Event) -> Verified:
        size_bytes = cache.size_of(digest)
        if size_bytes is None:
            return Verified()  # evicted
        is_right = cache.verify(digest)
        if stop.wait(pace.wait_s(size_bytes, time.monotonic())):
            raise StoppedError
        fault = BlobFault(
            digest=digest,
            key=f"{cache.root}/blobs/{hex_of(digest)}",
            size_bytes=size_bytes,
            kind=FaultKind.DAMAGED,
            reason="this node's copy had other bytes and was dropped",
            is_repaired=True,
            node=node,
        )
        return Verified(blobs=1, size_bytes=size_bytes, faults=() if is_right else (fault,))

    verified = Verified()
    for digest in digests:
        verified += await in_thread(threads, partial(verify, digest))
    return verified
