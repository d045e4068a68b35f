"""Pull: read an image's manifest and config, make lazy refs of its layers; no layer moves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import BlobDamagedError
from cluster.faultpoints import FaultPoint, ahit
from cluster.fetch.access import AccessControl
from cluster.fetch.keep import Keeper, SmallBlobs
from cluster.image import ResolvedImage
from cluster.lease import LeaseId
from cluster.messages import PullResult
from cluster.ports import Authorizer, RefStore
from cluster.provider import DescHandler, ProviderHandle
from cluster.ref import ImageRecord, RefId, RefState
from cluster.reference import ImageReference, Platform


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """An image whose manifest and config are in the content store, and how each of its layers can be had."""

    image: ResolvedImage
    handlers: tuple[DescHandler, ...]

    def record(self, ref: RefId | None) -> ImageRecord:
        """Return the record of the image with *ref* on top."""
        return ImageRecord(
            name=self.image.reference.name,
            manifest=self.image.manifest,
            config=self.image.config,
            platform=str(self.image.platform),
            layers=self.image.layers,
            ref=ref,
        )


class Puller:
    """Resolves images."""

    def __init__(
        self,
        *,
        manifests: Manifests,
        access: AccessControl,
        refs: RefStore,
        small: SmallBlobs,
        keeper: Keeper,
        get_by_blob: GetByBlob,
    ) -> None:
        self._manifests = manifests
        self._access = access
        self._refs = refs
        self._small = small
        self._keeper = keeper
        self._get_by_blob = get_by_blob

    async def resolve(
        self,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        plain_http: bool,
        lease_id: LeaseId,
    ) -> Resolved:
        """Read and keep manifest and config: one manifest read (two through an index), the config at most once.

        They are held by the caller's lease, and by nothing else: no ref is made, no image recorded. The manifest
        that was just read opens every layer it names to this caller, as far as
        :class:`cluster.fetch.access.AccessControl` takes its word for it; else the repository is asked for the layer.

        Raises:
            RegistryError: the registry says no; UnavailableError: it says nothing.
            LeaseLostError: the lease isn't live.
        """
        resolved = await self._read(reference, platform, authorizer, plain_http=plain_http)
        await self._keep(resolved.image, lease_id)
        await self._note_source(resolved.image, reference.handle(plain_http=plain_http))
        return resolved

    async def pull(
        self,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        plain_http: bool,
        lease_id: LeaseId,
    ) -> PullResult:
        """Resolve *reference*, make refs of its layers, and record it.

        Raises:
            RegistryError: the registry says no; UnavailableError: it says nothing.
            NeedsRemoteProvidersError: the manifest names layers that the farm has from elsewhere, and that the
                repository doesn't have.
            LeaseLostError: the lease isn't live.
        """
        resolved = await self._read(reference, platform, authorizer, plain_http=plain_http)
        image = resolved.image
        await self._keep(image, lease_id)
        layers: Sequence[RefState] = ()
        if image.layers:
            layers = await self._get_by_blob(
                image.layers, resolved.handlers, authorizer=authorizer, lease_id=lease_id, image_ref=reference.name
            )
        await ahit(FaultPoint.PULL_RECORDED)
        top = layers[-1].record.id if layers else None
        record = await self._refs.put_image(resolved.record(top), lease_id=lease_id)
        await self._keeper.hold_for_image(image.manifest.digest, image.config.digest, name=reference.name)
        await self._note_source(image, reference.handle(plain_http=plain_http))
        return PullResult(image=record, layers=tuple(layers))

    async def _read(
        self, reference: ImageReference, platform: Platform, authorizer: Authorizer, *, plain_http: bool
    ) -> Resolved:
        """Read manifest and config, and record what this caller has seen by that."""
        handle = reference.handle(plain_http=plain_http)
        image = await self._manifests.resolve(
            reference, platform, authorizer, plain_http=plain_http, have=lambda digest: self._have(digest, handle)
        )
        await ahit(FaultPoint.PULL_RESOLVED)
        await self._access.record(authorizer, handle, [image.manifest.digest, image.config.digest])
        await self._access.record_named(authorizer, handle, list(dict.fromkeys(d.digest for d in image.layers)))
        return Resolved(
            image=image,
            handlers=tuple(
                DescHandler(digest=layer.digest, provider=provider)
                for layer in image.layers
                for provider in providers_of(layer, handle)
            ),
        )

    async def _keep(self, image: ResolvedImage, lease_id: LeaseId) -> None:
        await self._keeper.keep(
            {image.manifest.digest: image.manifest_bytes, image.config.digest: image.config_bytes}, lease_id
        )

    async def _note_source(self, image: ResolvedImage, handle: ProviderHandle) -> None:
        """Note that this repository showed manifest and config: the next time they need not be read there."""
        await self._refs.add_providers(image.manifest.digest, [handle])
        await self._refs.add_providers(image.config.digest, [handle])

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


def providers_of(layer: Descriptor, handle: ProviderHandle) -> tuple[ProviderHandle, ...]:
    """Return where a layer is to be had: its repository, and a foreign layer's own addresses before it."""
    if not layer.urls:
        return (handle,)
    own = ProviderHandle(kind="urls", registry=handle.registry, repository=handle.repository, urls=layer.urls)
    return (own, handle)
