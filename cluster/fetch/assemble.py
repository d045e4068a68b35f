"""Assemble images of what builds made: documents written and held, the image recorded; no layer moves."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.assemble import assemble_image
from cluster.cache.runner import usable_providers
from cluster.errors import LeaseLostError
from cluster.fetch.access import AccessControl
from cluster.fetch.keep import Keeper
from cluster.lease import LeaseId
from cluster.ports import Authorizer, LeaseStore, RefStore
from cluster.provider import DescHandler
from cluster.ref import ImageRecord, RefId, RefState
from cluster.reference import ImageReference, Platform


class Assembler:
    """Makes images of chains that are recorded."""

    def __init__(
        self, *, refs: RefStore, leases: LeaseStore, access: AccessControl, keeper: Keeper, platform: Platform
    ) -> None:
        self._refs = refs
        self._leases = leases
        self._access = access
        self._keeper = keeper
        #: What images run on that don't say.
        self._platform = platform

    async def assemble(
        self,
        name: ImageReference,
        ref_id: RefId | None,
        config: bytes,
        authorizer: Authorizer,
        *,
        handlers: Sequence[DescHandler],
        lease_id: LeaseId,
        created_s: int | None,
    ) -> ImageRecord:
        """Record an image of the chain *ref_id* (None: without layers) under *name*, in place of one of that name.

        Manifest and config are in the content store then, held by the lease, and for as long as the image's refs
        need them. See :func:`cluster.assemble.assemble_image` for what they say.

        Raises:
            RefNotFoundError: the ref is unknown. LeaseLostError: the lease isn't live.
            NeedsRemoteProvidersError: names every digest of the chain that this caller may not use.
            MalformedManifestError: *config* is no image config.
        """
        chain = await self._held_chain(ref_id, authorizer, handlers, lease_id)
        image = assemble_image(name.name, chain, config, created_s=created_s, platform=self._platform)
        await self._keeper.keep(
            {image.manifest.digest: image.manifest_bytes, image.config.digest: image.config_bytes}, lease_id
        )
        record = await self._refs.put_image(
            ImageRecord(
                name=name.name,
                manifest=image.manifest,
                config=image.config,
                platform=str(image.platform),
                layers=image.layers,
                ref=ref_id,
            ),
            lease_id=lease_id,
        )
        await self._keeper.hold_for_image(image.manifest.digest, image.config.digest, name=name.name)
        return record

    async def _held_chain(
        self, ref_id: RefId | None, authorizer: Authorizer, handlers: Sequence[DescHandler], lease_id: LeaseId
    ) -> Sequence[RefState]:
        """Return the chain, open to the caller and held by the lease."""
        if await self._leases.get(lease_id) is None:
            # Before anything is pinned for an image that then can't be recorded.
            raise LeaseLostError(lease_id)
        if ref_id is None:
            return ()
        chain = await self._refs.chain(ref_id)
        await usable_providers(self._access, authorizer, chain, handlers)
        await self._refs.use([state.record.id for state in chain], lease_id=lease_id)
        return chain
