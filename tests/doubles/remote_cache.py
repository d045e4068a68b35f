"""Farms as far as remote caches go: stores in memory, registries and buckets real."""

from __future__ import annotations

import asyncio

from cluster.cache.runner import CacheManager
from cluster.cache_options import CacheSource, CacheTarget
from cluster.config import Config, RegistryConfig
from cluster.descriptor import Descriptor
from cluster.fetch.access import AccessControl
from cluster.fetch.bucket_cache import BucketPlace
from cluster.fetch.cache_export import CacheExporter, RegistryPlace
from cluster.fetch.cache_import import CacheImporter, results_of
from cluster.fetch.push import Pusher
from cluster.fetch.runner import Caller, Unlazier
from cluster.lease import LeaseId
from cluster.provider import DescHandler
from cluster.ref import BlobRecord
from cluster.reference import parse_platform, parse_reference
from cluster.remote_cache import ExportCandidate
from storage.bucket_caches import BucketCaches, Probers
from storage.fetching import StoredBlobs
from storage.memory import (
    Memory,
    MemoryFlightStore,
    MemoryHostLimiter,
    MemoryLeaseStore,
    MemoryProgressStore,
    MemoryProofStore,
    MemoryRefStore,
)
from storage.memory_blobs import MemoryContentStore
from storage.registry.auth import CredentialAuthorizer
from storage.registry.client import RegistryClient
from storage.registry.credentials import CredentialSource
from tests.doubles.fetch import FakeArriving, FakeTransfers, ManualRenewer
from tests.doubles.stores import FakeClock

AMD64 = parse_platform("linux/amd64")
LEASE = LeaseId("job")


class CacheFarm:
    """A farm with stores of its own, as far as caches go: it speaks with real registries, as one caller."""

    def __init__(self, given=None, store=None):
        memory = Memory(FakeClock())
        config = Config(registries={"default": RegistryConfig(timeout_s=5, attempts=2, retry_budget_s=5)})
        self.registry = RegistryClient(config, limiter=MemoryHostLimiter(memory))
        self.authorizer = CredentialAuthorizer(CredentialSource(given or {}), config, identity_key=b"key")
        self.memory, self.refs, self.leases = memory, MemoryRefStore(memory), MemoryLeaseStore(memory)
        self.blobs, self.transfers, flights = store or MemoryContentStore(), FakeTransfers(), MemoryFlightStore(memory)
        self.buckets = BucketCaches(self.blobs)
        self.transfers.holds = False
        self.access = access = AccessControl(
            MemoryProofStore(memory), Probers(self.registry, self.buckets), proof_ttl_s=100.0
        )
        self.cache, self.spawned, progress = CacheManager(self.refs, access), set(), MemoryProgressStore(memory)
        tokens = iter(range(1000))
        self.unlazier = Unlazier(
            worker="w",
            refs=self.refs,
            flights=flights,
            renewer=ManualRenewer(flights),
            progress=progress,
            transfers=self.transfers,
            access=access,
            new_token=lambda: f"t{next(tokens)}",
            ttl_s=6.0,
            poll_s=0.5,
            deadline_s=30.0,
            max_transfers=4,
            clock=memory.now_s,
        )
        self.pusher = Pusher(
            target=self.registry,
            unlazier=self.unlazier,
            refs=self.refs,
            blobs=StoredBlobs(self.blobs),
            arriving=FakeArriving(),
            progress=progress,
            access=access,
            spawn=lambda work: self.spawned.add(asyncio.ensure_future(work)),
        )
        self.exporter = CacheExporter(refs=self.refs, access=access)
        self.importer = CacheImporter(registry=self.registry, buckets=self.buckets, access=access)

    async def pull(self, registry, repository, image):
        """Make lazy refs of an image's layers; return their IDs, lowest first."""
        await self.leases.create(LEASE, ttl_s=None)
        provider = parse_reference(f"{registry.host}/{repository}:1").handle()
        layers = layers_of(image)
        states = await self.cache.get_by_blob(
            layers,
            parent=None,
            handlers=[DescHandler(digest=layer.digest, provider=provider) for layer in layers],
            authorizer=self.authorizer,
            lease_id=LEASE,
        )
        return [state.record.id for state in states]

    def keep(self, image, came_from):
        """Put an image's layers into the content store."""
        for layer in image.layers:
            info = self.blobs.put(f"blobs/{layer.digest}", layer.data)
            self.memory.blobs[layer.digest] = BlobRecord(
                digest=layer.digest,
                key=info.key,
                size_bytes=info.size_bytes,
                etag=info.etag,
                fence=1,
                source=came_from,
            )

    async def export(self, target: CacheTarget, *candidates: ExportCandidate):
        if target.bucket is not None:
            place = BucketPlace(
                target.bucket, buckets=self.buckets, unlazier=self.unlazier, refs=self.refs, access=self.access
            )
        else:
            place = RegistryPlace(self.pusher, self.registry, parse_reference(target.ref))
        caller = Caller(authorizer=self.authorizer, lease_id=LEASE, providers={})
        return await self.exporter.export(place, target, candidates, (), caller)

    async def load(self, source: CacheSource):
        """Import a cache and make the refs of all its results, as a job that uses them would."""
        await self.leases.create(LEASE, ttl_s=None)
        imported = await self.importer.read(source, AMD64, self.authorizer)
        found = {}
        for keys, result, of in results_of(imported):
            states = await self.cache.get_by_blob(
                of.entry.layers, parent=None, handlers=of.handlers, authorizer=self.authorizer, lease_id=LEASE
            )
            assert result.ref == states[-1].record.id
            found.update(dict.fromkeys(keys, states))
        return found, imported.warning

    async def close(self):
        await asyncio.gather(*self.spawned)
        await self.registry.aclose()
        await self.authorizer.aclose()


def layers_of(image):
    """Return the descriptors of an image's layers, with diff IDs."""
    return tuple(
        Descriptor(media_type=layer.media_type, digest=layer.digest, size_bytes=len(layer.data), diff_id=layer.diff_id)
        for layer in image.layers
    )
