"""Export: results to a remote cache. What is there stays there, what can be mounted is; only the rest moves."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.cache.runner import usable_providers
from cluster.cache_options import CacheTarget
from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import ClusterError, ContentError, NeedsRemoteProvidersError, first_error
from cluster.fetch.access import AccessControl
from cluster.fetch.push import Pusher, PushTarget
from cluster.fetch.runner import Caller
from cluster.messages import ExportCacheResult, LayerPush
from cluster.ports import RefStore
from cluster.provider import DescHandler, ProviderHandle
from cluster.ref import RefId, RefState
from cluster.reference import ImageReference
from cluster.remote_cache import CacheBuilder, EncodedCache, ExportCandidate, RemoteCache, encode, select


class CachePlace(Protocol):
    """Where one cache goes."""

    async def place_layer(self, layer: Descriptor, caller: Caller, providers: Sequence[ProviderHandle]) -> LayerPush:
        """Bring a layer there, without moving it if that can be.

        Raises:
            ContentError, NeedsRemoteProvidersError: the layer can't be had any more.
            ClusterError: it can't be written there.
        """
        ...

    async def put(self, cache: EncodedCache, layers: Sequence[Descriptor], caller: Caller) -> Digest:
        """Put the cache's documents there, once all its *layers* are; return the digest of its manifest."""
        ...


class RegistryPlace:
    """A tag of a registry."""

    def __init__(
        self, pusher: Pusher, registry: PushTarget, reference: ImageReference, *, plain_http: bool = False
    ) -> None:
        self._pusher = pusher
        self._registry = registry
        self._handle = reference.handle(plain_http=plain_http)
        self._selector = reference.selector

    async def place_layer(self, layer: Descriptor, caller: Caller, providers: Sequence[ProviderHandle]) -> LayerPush:
        """See :meth:`cluster.fetch.push.Pusher.place_layer`."""
        return await self._pusher.place_layer(layer, self._handle, caller, providers)

    async def put(self, cache: EncodedCache, layers: Sequence[Descriptor], caller: Caller) -> Digest:
        """Upload the config unless it is there, then put the manifest."""
        config = cache.config_descriptor
        if await self._registry.blob_exists(self._handle, config.digest, caller.authorizer) is None:
            await self._registry.upload_blob(self._handle, config, lambda: io.BytesIO(cache.config), caller.authorizer)
        return await self._pusher.finish(
            cache.manifest_descriptor,
            cache.manifest,
            self._handle,
            self._selector,
            caller,
            placed=(*layers, config),
        )


class CacheExporter:
    """Exports results to remote caches."""

    def __init__(self, *, refs: RefStore, access: AccessControl) -> None:
        self._refs = refs
        self._access = access

    async def export(
        self,
        place: CachePlace,
        target: CacheTarget,
        candidates: Sequence[ExportCandidate],
        handlers: Sequence[DescHandler],
        caller: Caller,
    ) -> ExportCacheResult:
        """Export what *target*'s mode wants of *candidates*: layers all at once, then config and manifest.

        A result that can't be had any more (its records are gone, or a blob of it that nobody has, or that this
        caller may not have) is left out, and the warning says so. Where none is left, what was exported there
        before stays.

        Args:
            place: Where it goes.
            target: What of it goes there, and whether a failure is a warning.
            candidates: Every vertex that has a result.
            handlers: More ways to get their layers.
            caller: For whom; what it says of providers is not used.

        Raises:
            ClusterError: the cache can't be written there.
        """
        try:
            return await self._export(place, target, candidates, handlers, caller)
        except ClusterError as exc:
            if not target.ignores_error:
                raise
            return ExportCacheResult(target=target.name, digest=None, warning=f"no cache was exported: {exc}")

    async def _export(
        self,
        place: CachePlace,
        target: CacheTarget,
        candidates: Sequence[ExportCandidate],
        handlers: Sequence[DescHandler],
        caller: Caller,
    ) -> ExportCacheResult:
        chains = await self._chains(found.ref for found in candidates if found.is_target)
        selected = select(candidates, target.mode, chains.states.keys())
        chains = await self._chains((found.ref for found in selected), chains)
        providers = await self._providers(chains, handlers, caller)
        # Before a byte moves: one that is too large is as large without what turns out to be lost.
        whole = chains.cache(selected)
        encode(whole, target.name)
        lost, pushed = await self._place(place, whole.layers, replace(caller, providers=providers))
        chains = chains.without(lost)
        cache = chains.cache(selected)
        left_out = sum(found.ref is not None and found.ref not in chains.states for found in selected)
        warning = (
            f"{left_out} of {len(selected)} results can't be had any more and are not in the cache" if left_out else ""
        )
        if not cache.entries:
            return ExportCacheResult(target=target.name, digest=None, left_out=left_out, warning=warning)
        return ExportCacheResult(
            target=target.name,
            digest=await place.put(encode(cache, target.name), cache.layers, caller),
            layers=tuple(pushed),
            results=len(selected) - left_out,
            left_out=left_out,
            warning=warning,
        )

    async def _chains(self, tops: Iterable[RefId | None], known: _Chains | None = None) -> _Chains:
        """Read the records from *tops* down, each once, all of one height at a time."""
        states: dict[RefId, RefState] = dict(known.states) if known is not None else {}
        wanted = {ref for ref in tops if ref is not None} - states.keys()
        while wanted:
            found = [state for state in await self._refs.get(list(wanted)) if state is not None]
            states.update((state.record.id, state) for state in found)
            wanted = {state.record.parent for state in found if state.record.parent is not None} - states.keys()
        return _Chains.of(states)

    async def _providers(
        self, chains: _Chains, handlers: Sequence[DescHandler], caller: Caller
    ) -> Mapping[Digest, Sequence[ProviderHandle]]:
        """Return how this caller may get each layer; nothing for one that can't be had."""
        refused: frozenset[Digest] = frozenset()
        while True:
            # Chains as wholes: what a layer stands on may be what opens it.
            states = list(chains.without(refused).states.values())
            try:
                return await usable_providers(self._access, caller.authorizer, states, handlers)
            except NeedsRemoteProvidersError as exc:
                refused |= frozenset(Digest(digest) for digest in exc.digests)

    async def _place(
        self, place: CachePlace, layers: Sequence[Descriptor], caller: Caller
    ) -> tuple[frozenset[Digest], list[LayerPush]]:
        """Bring all layers there at once; return those that can't be had any more, and how the others got there.

        What may not be fetched is tried all the same: the target may have it.
        """

        async def place_one(layer: Descriptor) -> LayerPush | None:
            try:
                return await place.place_layer(layer, caller, caller.providers.get(layer.digest, ()))
            except (ContentError, NeedsRemoteProvidersError):
                return None

        try:
            async with asyncio.TaskGroup() as group:
                unique = {layer.digest: layer for layer in layers}
                tasks = {digest: group.create_task(place_one(layer)) for digest, layer in unique.items()}
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        done = {digest: task.result() for digest, task in tasks.items()}
        lost = frozenset(digest for digest, result in done.items() if result is None)
        return lost, [result for result in done.values() if result is not None]


@dataclass(frozen=True, slots=True)
class _Chains:
    """Records by ID, each with all below it, parents first."""

    states: Mapping[RefId, RefState]

    @classmethod
    def of(cls, states: Mapping[RefId, RefState], lost: frozenset[Digest] = frozenset()) -> _Chains:
        """Return of *states* those whose chains are whole and without a layer that is *lost*."""
        whole: dict[RefId, RefState] = {}
        for state in sorted(states.values(), key=lambda state: state.record.depth):
            record = state.record
            if record.blob.digest not in lost and (record.parent is None or record.parent in whole):
                whole[record.id] = state
        return cls(whole)

    def without(self, lost: frozenset[Digest]) -> _Chains:
        """Return what is left where these layers, and so all above them, can't be had."""
        return self.of(self.states, lost) if lost else self

    def cache(self, selected: Sequence[ExportCandidate]) -> RemoteCache:
        """Return the cache of what is here of *selected*."""
        builder = CacheBuilder()
        nodes: dict[RefId, int] = {}

        def node_of(ref: RefId) -> int:
            below: list[RefId] = []
            top: RefId | None = ref
            while top is not None and top not in nodes:
                below.append(top)
                top = self.states[top].record.parent
            node = None if top is None else nodes[top]
            for one in reversed(below):
                node = nodes[one] = builder.node(self.states[one].record.blob, node)
            return nodes[ref]

        for found in selected:
            if found.ref is None:
                builder.add(found.keys, None, found.config)
            elif found.ref in self.states:
                builder.add(found.keys, node_of(found.ref), found.config)
        return builder.build()
