"""Caches in buckets: at the farm's S3 endpoint, with the farm's own credentials. Told in docs/decisions/0011."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from cluster.cache_options import BucketCache
from cluster.descriptor import MANIFEST_OCI, Descriptor
from cluster.digest import Digest
from cluster.errors import BlobDamagedError, BlobNotFoundError, MalformedManifestError, NotACacheError
from cluster.fetch.access import AccessControl
from cluster.fetch.runner import Caller, Unlazier
from cluster.image import MAX_MANIFEST_BYTES, Index, Manifest, parse_manifest, verify_descriptor
from cluster.messages import LayerPush
from cluster.ports import RefStore
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord
from cluster.remote_cache import MAX_CACHE_CONFIG_BYTES, EncodedCache

#: Copies under way at once: each holds a thread for as long as S3 copies.
_COPIES_AT_ONCE = 8
_TRIES = 2


class CacheBuckets(Protocol):
    """Objects of caches in buckets, by the handle of their bucket and prefix.

    Every method may raise UnavailableError, or UnsafeStoreError: the farm's credentials don't allow it.
    """

    async def size(self, handle: ProviderHandle, digest: Digest) -> int | None:
        """Return the size in bytes of a blob; None where there is none."""
        ...

    async def copy(self, blob: BlobRecord, handle: ProviderHandle) -> None:
        """Copy a blob of the content store within S3; BlobNotFoundError where its object is gone, or another."""
        ...

    async def put_blob(self, handle: ProviderHandle, digest: Digest, data: bytes) -> None:
        """Write a small blob."""
        ...

    async def put_manifest(self, handle: ProviderHandle, name: str, data: bytes) -> None:
        """Write a manifest in the place of the one that was there."""
        ...

    async def read_blob(self, handle: ProviderHandle, digest: Digest, *, max_bytes: int) -> bytes:
        """Return a small blob, unchecked; BlobNotFoundError, or MalformedManifestError where it is larger."""
        ...

    async def read_manifest(self, handle: ProviderHandle, name: str, *, max_bytes: int) -> bytes:
        """Return a manifest; raises as :meth:`read_blob`."""
        ...


class BucketPlace:
    """Implements :class:`cluster.fetch.cache_export.CachePlace`: layers are copied within S3."""

    def __init__(
        self,
        cache: BucketCache,
        *,
        buckets: CacheBuckets,
        unlazier: Unlazier,
        refs: RefStore,
        access: AccessControl,
    ) -> None:
        self._cache = cache
        self._handle = cache.handle
        self._buckets = buckets
        self._unlazier = unlazier
        self._refs = refs
        self._access = access
        self._copies = asyncio.Semaphore(_COPIES_AT_ONCE)

    async def place_layer(self, layer: Descriptor, caller: Caller, providers: Sequence[ProviderHandle]) -> LayerPush:  # noqa: ARG002  # the caller has them
        """Copy a layer unless it is there; fetch it into the content store first where it isn't in that either."""
        if layer.is_foreign:
            return LayerPush(digest=layer.digest, how="foreign", bytes=0)
        if await self._buckets.size(self._handle, layer.digest) == layer.size_bytes:
            return LayerPush(digest=layer.digest, how="exists", bytes=0)
        for _ in range(_TRIES):
            await self._unlazier.unlazy(layer, caller)
            (blob,) = await self._refs.blobs([layer.digest])
            if blob is None:
                continue
            try:
                async with self._copies:
                    await self._buckets.copy(blob, self._handle)
            except BlobNotFoundError as exc:
                # Its object had gone behind our back: it is lazy again, and comes from its provider.
                await self._refs.mark_absent(blob, str(exc))
                continue
            return LayerPush(digest=layer.digest, how="copied", bytes=0)
        raise BlobDamagedError(layer.digest, "it was lost twice while it was being copied")

    async def put(self, cache: EncodedCache, layers: Sequence[Descriptor], caller: Caller) -> Digest:
        """Write the config unless it is there, then the manifest."""
        config, manifest = cache.config_descriptor, cache.manifest_descriptor
        if await self._buckets.size(self._handle, config.digest) != config.size_bytes:
            await self._buckets.put_blob(self._handle, config.digest, cache.config)
        await self._buckets.put_manifest(self._handle, self._cache.name, cache.manifest)
        there = [layer.digest for layer in layers if not layer.is_foreign]
        await asyncio.gather(*(self._refs.add_providers(digest, [self._handle]) for digest in there))
        await self._access.record(caller.authorizer, self._handle, there)
        return manifest.digest


async def read_from_bucket(buckets: CacheBuckets, cache: BucketCache) -> tuple[Manifest, bytes]:
    """Return a cache's manifest and config.

    Raises:
        BlobNotFoundError: one of them is not there.
        NotACacheError: it is an index.
        MalformedManifestError: it is no manifest, or too large.
        DigestMismatchError, SizeMismatchError: the config is another than the manifest's.
    """
    data = await buckets.read_manifest(cache.handle, cache.name, max_bytes=MAX_MANIFEST_BYTES)
    manifest = parse_manifest(data, MANIFEST_OCI, cache.url)
    if isinstance(manifest, Index):
        raise NotACacheError(cache.url, "it is an index")
    if manifest.config.size_bytes > MAX_CACHE_CONFIG_BYTES:
        raise MalformedManifestError(cache.url, f"its config is larger than {MAX_CACHE_CONFIG_BYTES} bytes")
    config = await buckets.read_blob(cache.handle, manifest.config.digest, max_bytes=manifest.config.size_bytes)
    verify_descriptor(config, manifest.config, cache.handle.source)
    return manifest, config
