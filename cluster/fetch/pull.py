"""Pull: read an image's manifest and config, make lazy refs of its layers; no layer moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import BlobDamagedError, ClusterError, DeadlineExceededError, StaleFenceError
from cluster.faultpoints import FaultPoint, ahit
from cluster.fetch.access import AccessControl
from cluster.flight.values import Owned, Present
from cluster.image import ResolvedImage
from cluster.lease import LeaseId, blob_resource
from cluster.messages import PullResult
from cluster.ports import Authorizer, FlightRenewer, FlightStore, LeaseStore, ObjectInfo, RefStore
from cluster.provider import DescHandler, ProviderHandle
from cluster.ref import BlobRecord, ImageRecord, RefState
from cluster.reference import ImageReference, Platform

_KEEP_DEADLINE_S = 60.0
_KEEP_PAUSE_S = 0.1


class Manifests(Protocol):
    """Where manifests come from: the registry client."""

    async def resolve(
        self,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        plain_http: bool = False,
        have: Callable[[Digest], Awaitable[bytes | None]] | None = None,
    ) -> ResolvedImage:
        """Read the manifest (through an index, for *platform*) and the config."""
        ...


class SmallBlobs(Protocol):
    """Small blobs of the content store, read and written whole: manifests and configs."""

    async def read(self, blob: BlobRecord) -> bytes:
        """Return the bytes, checked against the digest; BlobDamagedError where they are gone or wrong."""
        ...

    async def write(self, digest: Digest, data: bytes) -> ObjectInfo:
        """Write the bytes under a key of this call's own."""
        ...


class GetByBlob(Protocol):
    """Makes refs: the cache shard of the chain."""

    async def __call__(
        self,
        descriptors: Sequence[Descriptor],
        handlers: Sequence[DescHandler],
        *,
        authorizer: Authorizer,
        lease_id: LeaseId,
        image_ref: str,
    ) -> Sequence[RefState]:
        """See :meth:`cluster.cache.runner.CacheManager.get_by_blob`."""
        ...


class Puller:
    """Resolves images."""

    def __init__(
        self,
        *,
        worker: str,
        manifests: Manifests,
        access: AccessControl,
        refs: RefStore,
        leases: LeaseStore,
        flights: FlightStore,
        renewer: FlightRenewer,
        small: SmallBlobs,
        get_by_blob: GetByBlob,
        new_token: Callable[[], str],
        flight_ttl_s: float,
    ) -> None:
        self._worker = worker
        self._manifests = manifests
        self._access = access
        self._refs = refs
        self._leases = leases
        self._flights = flights
        self._renewer = renewer
        self._small = small
        self._get_by_blob = get_by_blob
        self._new_token = new_token
        self._flight_ttl_s = flight_ttl_s

    async def pull(
        self,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        plain_http: bool,
        lease_id: LeaseId,
    ) -> PullResult:
        """Resolve *reference* and record it: one manifest read (two through an index), the config at most once.

        The manifest that was just read opens every layer it names to this caller, as far as
        :class:`cluster.fetch.access.AccessControl` takes its word for it; else the repository is asked for the layer.

        Raises:
            RegistryError: the registry says no; UnavailableError: it says nothing.
            NeedsRemoteProvidersError: the manifest names layers that the farm has from elsewhere, and that the
                repository doesn't have.
            LeaseLostError: the lease isn't live.
        """
        handle = reference.handle(plain_http=plain_http)
        image = await self._manifests.resolve(
            reference, platform, authorizer, plain_http=plain_http, have=lambda digest: self._have(digest, handle)
        )
        await ahit(FaultPoint.PULL_RESOLVED)
        handlers = [
            DescHandler(digest=layer.digest, provider=provider)
            for layer in image.layers
            for provider in providers_of(layer, handle)
        ]
        await self._access.record(authorizer, handle, [image.manifest.digest, image.config.digest])
        await self._access.record_named(authorizer, handle, list(dict.fromkeys(d.digest for d in image.layers)))
        # Held before they are written, and for as long as the image's refs need them: collection ends it.
        own = LeaseId(f"image:{image.manifest.digest}")
        await self._leases.create(own, ttl_s=None, labels={"kind": "image", "image": reference.name})
        await self._leases.attach(own, [blob_resource(image.manifest.digest), blob_resource(image.config.digest)])
        await asyncio.gather(
            self._keep(image.manifest.digest, image.manifest_bytes, lease_id),
            self._keep(image.config.digest, image.config_bytes, lease_id),
        )
        layers: Sequence[RefState] = ()
        if image.layers:
            layers = await self._get_by_blob(
                image.layers, handlers, authorizer=authorizer, lease_id=lease_id, image_ref=reference.name
            )
        await ahit(FaultPoint.PULL_RECORDED)
        record = await self._refs.put_image(
            ImageRecord(
                name=reference.name,
                manifest=image.manifest,
                config=image.config,
                platform=str(image.platform),
                layers=image.layers,
                ref=layers[-1].record.id if layers else None,
            ),
            lease_id=lease_id,
        )
        await self._refs.add_providers(image.manifest.digest, [handle])
        await self._refs.add_providers(image.config.digest, [handle])
        return PullResult(image=record, layers=tuple(layers))

    async def _have(self, digest: Digest, handle: ProviderHandle) -> bytes | None:
        """Return a manifest or config that is in the content store, if it was once read from this very repository.

        A manifest may name any other's config: from a repository that never showed it, it must be read.
        """
        (blob,), (known,) = await asyncio.gather(self._refs.blobs([digest]), self._refs.providers([digest]))
        if blob is None or all(provider.source != handle.source for provider in known):
            return None
        try:
            return await self._small.read(blob)
        except BlobDamagedError as exc:
            await self._refs.mark_absent(blob, exc.reason)
            return None

    async def _keep(self, digest: Digest, data: bytes, lease_id: LeaseId) -> None:
        """Put a manifest or config into the content store, unless it is there, and pin it."""
        try:
            async with asyncio.timeout(_KEEP_DEADLINE_S):
                await self._write_once(digest, data)
        except TimeoutError as exc:
            raise DeadlineExceededError(f"storing {digest}", f"not done after {_KEEP_DEADLINE_S:.0f} s") from exc
        await self._leases.attach(lease_id, [blob_resource(digest)])

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


def providers_of(layer: Descriptor, handle: ProviderHandle) -> tuple[ProviderHandle, ...]:
    """Return where a layer is to be had: its repository, and a foreign layer's own addresses before it."""
    if not layer.urls:
        return (handle,)
    own = ProviderHandle(kind="urls", registry=handle.registry, repository=handle.repository, urls=layer.urls)
    return (own, handle)
