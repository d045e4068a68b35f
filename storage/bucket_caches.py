"""Remote caches in S3 buckets, at the farm's endpoint and with its credentials."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.digest import Digest, hex_of
from cluster.errors import BlobNotFoundError, MalformedManifestError
from cluster.fetch.access import BlobProber
from cluster.ports import Authorizer, ByteStream, ObjectInfo
from cluster.provider import S3_KIND, ProviderHandle
from cluster.ref import BlobRecord
from storage.blobs import S3ContentStore

_CHUNK_BYTES = 256 * 1024


class BucketCaches:
    """Implements :class:`cluster.fetch.bucket_cache.CacheBuckets` on S3; each call is one request in a thread."""

    def __init__(self, store: S3ContentStore) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"<BucketCaches at {self._store!r}>"

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._store.close()

    async def size(self, handle: ProviderHandle, digest: Digest) -> int | None:
        """Return the size of a blob, or None; one HEAD."""
        store, key = self._blob(handle, digest)
        found = await asyncio.to_thread(store.head, key)
        return None if found is None else found.size_bytes

    async def copy(self, blob: BlobRecord, handle: ProviderHandle) -> None:
        """Copy a blob that the farm has; BlobNotFoundError where its object is gone, or another by now."""
        store, key = self._blob(handle, blob.digest)
        source = ObjectInfo(key=blob.key, size_bytes=blob.size_bytes, etag=blob.etag)
        await asyncio.to_thread(store.copy_from, self._store.bucket, source, key)

    async def put_blob(self, handle: ProviderHandle, digest: Digest, data: bytes) -> None:
        """Write a small blob."""
        store, key = self._blob(handle, digest)
        await asyncio.to_thread(store.put, key, data)

    async def put_manifest(self, handle: ProviderHandle, name: str, data: bytes) -> None:
        """Write a manifest, in the place of the one that was there."""
        store, key = self._object(handle, f"manifests/{name}")
        await asyncio.to_thread(store.put, key, data)

    async def read_blob(self, handle: ProviderHandle, digest: Digest, *, max_bytes: int) -> bytes:
        """Return a small blob, unchecked; BlobNotFoundError where there is none."""
        store, key = self._blob(handle, digest)
        return await asyncio.to_thread(_read, store, key, max_bytes)

    async def read_manifest(self, handle: ProviderHandle, name: str, *, max_bytes: int) -> bytes:
        """Return a manifest; BlobNotFoundError where there is none."""
        store, key = self._object(handle, f"manifests/{name}")
        return await asyncio.to_thread(_read, store, key, max_bytes)

    def _object(self, handle: ProviderHandle, name: str) -> tuple[S3ContentStore, str]:
        bucket, _, prefix = handle.repository.partition("/")
        return self._store.in_bucket(bucket), f"{prefix}/{name}"

    def _blob(self, handle: ProviderHandle, digest: Digest) -> tuple[S3ContentStore, str]:
        # Never the key of one of the farm's own objects, whatever a forged handle says: these have a nonce behind.
        return self._object(handle, f"blobs/sha256/{hex_of(digest)}")

    @contextmanager
    def open(self, handle: ProviderHandle, digest: Digest, offset: int, length: int | None) -> Iterator[BucketResponse]:
        """Open a blob, or a range of it, for a thread that reads it.

        Raises:
            BlobNotFoundError: it is not there (any more).
            UnsafeStoreError, UnavailableError: it can't be read; also from the response.
        """
        store, key = self._blob(handle, digest)
        try:
            with store.open(key, offset, length) as stream:
                yield BucketResponse(stream, is_range=offset > 0 or length is not None)
        except BlobNotFoundError as exc:
            raise BlobNotFoundError(digest, handle.source) from exc


class BucketResponse:
    """An object, or a range of it, as it arrives."""

    def __init__(self, stream: ByteStream, *, is_range: bool) -> None:
        self._stream = stream
        #: As a registry's: what was asked for is what comes.
        self.status = 206 if is_range else 200
        self.total_bytes: int | None = None

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes; 0 at the end."""
        return self._stream.readinto(buffer)


class Probers:
    """Asks where a blob is said to be: a registry as the caller, a bucket of caches as the farm itself."""

    def __init__(self, registry: BlobProber, buckets: BucketCaches) -> None:
        self._registry = registry
        self._buckets = buckets

    async def blob_exists(self, handle: ProviderHandle, digest: Digest, authorizer: Authorizer) -> int | None:
        """See :class:`cluster.fetch.access.BlobProber`."""
        if handle.kind == S3_KIND:
            return await self._buckets.size(handle, digest)
        return await self._registry.blob_exists(handle, digest, authorizer)


def _read(store: S3ContentStore, key: str, max_bytes: int) -> bytes:
    data, filled = bytearray(), 0
    with store.open(key, 0, max_bytes + 1) as stream:
        while True:
            data += bytes(_CHUNK_BYTES)
            count = stream.readinto(memoryview(data)[filled:])
            filled += count
            del data[filled:]
            if filled > max_bytes:
                raise MalformedManifestError(key, f"it is larger than {max_bytes} bytes")
            if not count:
                return bytes(data)
