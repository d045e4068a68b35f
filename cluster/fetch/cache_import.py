"""Import: what a remote cache holds, from its manifest and config; no ref is made, and no layer moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.cache_options import CacheSource
from cluster.digest import Digest
from cluster.errors import ClusterError, InternalError, SessionGoneError
from cluster.fetch.access import AccessControl
from cluster.fetch.bucket_cache import CacheBuckets, read_from_bucket
from cluster.fetch.pull import providers_of
from cluster.image import Manifest
from cluster.messages import ImportCacheResult
from cluster.ports import Authorizer
from cluster.provider import DescHandler
from cluster.reference import ImageReference, Platform, parse_reference
from cluster.remote_cache import MAX_CACHE_CONFIG_BYTES, CacheEntry, RemoteCache, read_cache
from cluster.solver.values import Result


class CacheRegistry(Protocol):
    """Where caches are read: the registry client."""

    async def documents(
        self,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        plain_http: bool = False,
        max_config_bytes: int = ...,
    ) -> tuple[Manifest, bytes]:
        """Read a manifest (through an index, for *platform*) and its config, of whatever kind that is."""
        ...


class CacheImporter:
    """Imports remote caches."""

    def __init__(self, *, registry: CacheRegistry, buckets: CacheBuckets, access: AccessControl) -> None:
        self._registry = registry
        self._buckets = buckets
        self._access = access

    async def read(self, source: CacheSource, platform: Platform, authorizer: Authorizer) -> ImportCacheResult:
        """Read what the cache at *source* holds: a manifest and a config.

        Having read them is recorded as a pull's is: its layers are named to this caller there, and to nobody else.
        Where there is no cache (it was deleted, it is none, it is not for this caller, its registry is away), that
        is a miss: nothing, with a warning.

        Raises:
            SessionGoneError: the caller is not there any more.
        """
        try:
            return await self._read(source, platform, authorizer)
        except (SessionGoneError, InternalError):
            raise
        except ClusterError as exc:
            return ImportCacheResult(cache=RemoteCache(), warning=f"nothing is cached in {source.name}: {exc}")

    async def _read(self, source: CacheSource, platform: Platform, authorizer: Authorizer) -> ImportCacheResult:
        if source.bucket is not None:
            handle = source.bucket.handle
            manifest, config = await read_from_bucket(self._buckets, source.bucket)
        else:
            reference = parse_reference(source.ref)
            handle = reference.handle(plain_http=source.plain_http)
            manifest, config = await self._registry.documents(
                reference,
                platform,
                authorizer,
                plain_http=source.plain_http,
                max_config_bytes=MAX_CACHE_CONFIG_BYTES,
            )
        cache = read_cache(manifest, config, source.name)
        await self._access.record(authorizer, handle, [manifest.descriptor.digest, manifest.config.digest])
        await self._access.record_named(authorizer, handle, list(dict.fromkeys(d.digest for d in cache.layers)))
        return ImportCacheResult(
            cache=cache,
            handlers=tuple(
                DescHandler(digest=layer.digest, provider=provider)
                for layer in cache.layers
                for provider in providers_of(layer, handle)
            ),
        )


# -- what is imported, as the solver finds it ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportedResult:
    """One result of a remote cache: what its refs are made of, when it is loaded."""

    cache: RemoteCache
    #: Index into the cache's entries.
    number: int
    #: Of all the cache's layers, shared by its results.
    known_handlers: Mapping[Digest, tuple[DescHandler, ...]]

    @property
    def entry(self) -> CacheEntry:
        """Return its keys, layers and config."""
        return self.cache.entry(self.number)

    @property
    def handlers(self) -> tuple[DescHandler, ...]:
        """Return the ways to get its layers."""
        layers = dict.fromkeys(layer.digest for layer in self.entry.layers)
        return tuple(handler for digest in layers for handler in self.known_handlers.get(digest, ()))


def results_of(imported: ImportCacheResult) -> Iterator[tuple[tuple[Digest, ...], Result, ImportedResult]]:
    """Yield each result of an imported cache: its keys, what a load of it will come to, and what it is made of."""
    handlers: dict[Digest, tuple[DescHandler, ...]] = {}
    for handler in imported.handlers:
        handlers[handler.digest] = (*handlers.get(handler.digest, ()), handler)
    ids = imported.cache.ref_ids()
    for number, entry in enumerate(imported.cache.entries):
        result = Result(ref=None if entry.node is None else ids[entry.node], config=entry.config)
        yield entry.keys, result, ImportedResult(cache=imported.cache, number=number, known_handlers=handlers)
