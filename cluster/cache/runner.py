"""The cache manager: refs by blob and by ID, with access proven. DESIGN §3, BuildKit's ``cache/manager.go``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import LeaseRequiredError, NonAddressableParentError, RefNotFoundError
from cluster.fetch.access import AccessControl, Wanted, origins_of
from cluster.lease import LeaseId
from cluster.ports import Authorizer, RefStore
from cluster.provider import FARM, DescHandler, ProviderHandle
from cluster.ref import RefId, RefRecord, RefState


class CacheManager:
    """Makes and finds refs. Moves no layer byte."""

    def __init__(self, refs: RefStore, access: AccessControl) -> None:
        self._refs = refs
        self._access = access

    async def get_by_blob(
        self,
        descriptors: Sequence[Descriptor],
        *,
        parent: RefId | None,
        handlers: Sequence[DescHandler],
        authorizer: Authorizer,
        lease_id: LeaseId,
        image_ref: str | None = None,
    ) -> list[RefState]:
        """Make or find the refs of *descriptors*, lowest first, on top of *parent*, lazily.

        Every blob concerned, each layer's and each lazy ancestor's, must have a provider that the caller
        may use: a layer's digest says nothing of its parents, as A→B→C and A→D→C are two chains. A layer that a
        build made is open by its record's origins and by what the build put it on: in a chain that no build recorded
        it needs another provider, and where it counts the present ancestors are proven too.

        Returns:
            One state a descriptor, in order.

        Raises:
            LeaseRequiredError: no lease was given. LeaseLostError: it isn't live.
            InvalidDescriptorError: a descriptor has no diff ID.
            NonAddressableParentError: *parent* or one below it is unknown.
            NeedsRemoteProvidersError: names every digest without a usable provider; nothing has changed.
        """
        if not lease_id:
            raise LeaseRequiredError("get_by_blob")
        below = await self._parent_chain(parent)
        records: list[RefRecord] = []
        top = below[-1].record if below else None
        for descriptor in descriptors:
            top = RefRecord.over(descriptor, top, image_ref)
            records.append(top)
        passed = _by_digest(handlers)
        blobs = {record.blob.digest: record.blob for record in records}
        digests = list(blobs)
        stored, present = await asyncio.gather(self._refs.providers(digests), self._refs.blobs(digests))
        providers, here = dict(zip(digests, stored, strict=True)), dict(zip(digests, present, strict=True))
        origins = await self._origins(records, providers)
        layers = [
            _wanted(
                RefState(
                    record=replace(record, origins=origins.get(record.id, ())),
                    present=here[record.blob.digest],
                    providers=providers[record.blob.digest],
                ),
                passed,
            )
            for record in records
        ]
        is_built = any(layer.ways_in for layer in layers)
        ancestors = [_wanted(state, passed) for state in below if state.is_lazy or is_built]
        await self._access.prove(authorizer, [*ancestors, *layers])
        return await self._refs.get_or_create(
            records, {d: passed.get(d, ()) for d in digests if d in passed}, lease_id=lease_id
        )

    async def get(
        self,
        ref_id: RefId,
        *,
        handlers: Sequence[DescHandler],
        authorizer: Authorizer,
        lease_id: LeaseId,
    ) -> list[RefState]:
        """Look up a ref and all below it, lowest first, and attach them to the lease.

        Raises:
            RefNotFoundError: it is unknown.
            NeedsRemoteProvidersError: names every digest of the chain that this caller may not use.
            LeaseLostError: the lease isn't live.
        """
        if not lease_id:
            raise LeaseRequiredError("get")
        chain = await self._refs.chain(ref_id)
        await usable_providers(self._access, authorizer, chain, handlers)
        await self._refs.use([state.record.id for state in chain], lease_id=lease_id)
        return chain

    async def _origins(
        self, records: Sequence[RefRecord], providers: Mapping[Digest, tuple[ProviderHandle, ...]]
    ) -> dict[RefId, tuple[str, ...]]:
        """Return the origins of those of *records* that are recorded already, in the chain that a build put them in.

        In any other chain a layer that a build made opens nothing: whoever knows its digest and diff ID could else put
        it on nothing, and be asked for nothing.
        """
        built = [record.id for record in records if FARM in providers[record.blob.digest]]
        known = await self._refs.get(built) if built else ()
        return {state.record.id: state.record.origins for state in known if state is not None}

    async def _parent_chain(self, parent: RefId | None) -> list[RefState]:
        if parent is None:
            return []
        try:
            return await self._refs.chain(parent)
        except RefNotFoundError as exc:
            raise NonAddressableParentError(parent) from exc


async def usable_providers(
    access: AccessControl, authorizer: Authorizer, chain: Sequence[RefState], handlers: Sequence[DescHandler]
) -> Mapping[Digest, Sequence[ProviderHandle]]:
    """Return, for every blob of *chain*, the providers this caller may use; raises as :meth:`AccessControl.prove`."""
    passed = _by_digest(handlers)
    return await access.prove(authorizer, [_wanted(state, passed) for state in chain])


def _wanted(state: RefState, passed: Mapping[Digest, tuple[ProviderHandle, ...]]) -> Wanted:
    return Wanted(
        blob=state.record.blob,
        passed=passed.get(state.record.blob.digest, ()),
        stored=state.providers,
        came_from=None if state.present is None else state.present.source,
        origins=origins_of(state.record.origins, passed),
    )


def _by_digest(handlers: Sequence[DescHandler]) -> dict[Digest, tuple[ProviderHandle, ...]]:
    """Return what a caller passed, without what only the farm itself may say: it would be kept for all."""
    found: dict[Digest, tuple[ProviderHandle, ...]] = {}
    for handler in handlers:
        if not handler.provider.is_farm:
            found[handler.digest] = (*found.get(handler.digest, ()), handler.provider)
    return found
