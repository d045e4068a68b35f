"""Keep: manifests and configs into the content store, each written once, and held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.digest import Digest
from cluster.errors import ClusterError, DeadlineExceededError, StaleFenceError
from cluster.flight.values import Owned, Present
from cluster.lease import LeaseId, blob_resource
from cluster.ports import FlightRenewer, FlightStore, LeaseStore, ObjectInfo
from cluster.ref import BlobRecord

_KEEP_DEADLINE_S = 60.0
_KEEP_PAUSE_S = 0.1


class SmallBlobs(Protocol):
    """Small blobs of the content store, read and written whole: manifests and configs."""

    async def read(self, blob: BlobRecord) -> bytes:
        """Return the bytes, checked against the digest; BlobDamagedError where they are gone or wrong."""
        ...

    async def write(self, digest: Digest, data: bytes) -> ObjectInfo:
        """Write the bytes under a key of this call's own."""
        ...


class Keeper:
    """Puts the documents of images into the content store."""

    def __init__(
        self,
        *,
        worker: str,
        leases: LeaseStore,
        flights: FlightStore,
        renewer: FlightRenewer,
        small: SmallBlobs,
        new_token: Callable[[], str],
        flight_ttl_s: float,
    ) -> None:
        self._worker = worker
        self._leases = leases
        self._flights = flights
        self._renewer = renewer
        self._small = small
        self._new_token = new_token
        self._flight_ttl_s = flight_ttl_s

    async def hold_for_image(self, manifest: Digest, config: Digest, *, name: str) -> None:
        """Hold an image's documents for as long as its refs need them: collection ends it with the image's record.

        Called when that is there, and while the caller's lease holds image and documents: earlier, a collection of what
        was recorded before could end the new hold, and a caller that dies would leave one that nothing ends.
        """
        own = LeaseId(f"image:{manifest}")
        await self._leases.create(own, ttl_s=None, labels={"kind": "image", "image": name})
        await self._leases.attach(own, [blob_resource(manifest), blob_resource(config)])

    async def keep(self, documents: Mapping[Digest, bytes], lease_id: LeaseId) -> None:
        """Put documents into the content store, unless they are there, and hold them by the caller's lease.

        Raises:
            LeaseLostError: the lease isn't live.
            DeadlineExceededError, UnavailableError: one of the stores does not answer.
        """
        await asyncio.gather(*(self._keep(digest, data, lease_id) for digest, data in documents.items()))

    async def _keep(self, digest: Digest, data: bytes, lease_id: LeaseId) -> None:
        # Held first: what is there already, and held by nobody, could be collected before it is.
        await self._leases.attach(lease_id, [blob_resource(digest)])
        try:
            async with asyncio.timeout(_KEEP_DEADLINE_S):
                await self._write_once(digest, data)
        except TimeoutError as exc:
            raise DeadlineExceededError(f"storing {digest}", f"not done after {_KEEP_DEADLINE_S:.0f} s") from exc

    async def _write_once(self, digest: Digest, data: bytes) -> None:
        key = f"blob:{digest}"
        while True:
            outcome = await self._flights.join(
                key, worker=self._worker, token=self._new_token(), ttl_s=self._flight_ttl_s
            )
            if isinstance(outcome, Present):
                return
            if isinstance(outcome, Owned):
                self._renewer.keep(outcome.fence, ttl_s=self._flight_ttl_s, on_lost=lambda: None)
                try:
                    info = await self._small.write(digest, data)
                    blob = BlobRecord(
                        digest=digest,
                        key=info.key,
                        size_bytes=len(data),
                        etag=info.etag,
                        fence=outcome.fence.number,
                    )
                    await self._flights.commit(outcome.fence, blob)
                except StaleFenceError:
                    continue  # another owns it by now: look again
                except BaseException:
                    with contextlib.suppress(ClusterError):
                        await asyncio.shield(self._flights.vacate(outcome.fence))
                    raise
                finally:
                    self._renewer.drop(outcome.fence)
                return
            # Another process writes the same few kilobytes at this moment: look again soon.
            try:
                await asyncio.sleep(_KEEP_PAUSE_S)
            finally:
                with contextlib.suppress(ClusterError):
                    await asyncio.shield(self._flights.leave(key, worker=self._worker))
