"""A farm's leases, over its Redis alone: listed, pinned, released, and looked through for leaks."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Self

from cluster.cache.names import find_ref
from cluster.collect.leaks import Leak, Witnesses, find_leaks
from cluster.config import CacheConfig
from cluster.digest import Digest
from cluster.errors import InvalidArgumentError, JobNotFoundError, LeaseNotFoundError, NoLayersError
from cluster.job import JobId
from cluster.lease import Lease, LeaseId, blob_resource, image_resource, ref_resource
from cluster.ports import LeaseStore, RefStore
from cluster.ref import ImageRecord, RefId
from cluster.settings import FarmSettings
from cluster.solver_ports import JobStore
from lazyfarm.redis_only import connection
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.link import RedisLink
from storage.refs import RedisRefStore


class FarmLeases(ABC):
    """Leases of one farm. Every method may raise UnavailableError: Redis, or the gateway, doesn't answer."""

    @abstractmethod
    async def get(self, lease_id: LeaseId) -> Lease:
        """Return a live lease; LeaseNotFoundError where there is none of that ID."""

    @abstractmethod
    async def pin_named(
        self, name: str, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None
    ) -> Lease:
        """Pin a ref by its ID, the first digits of that, or the image that it is the top of.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
            NoLayersError: it names an image without layers.
            InvalidArgumentError: *ttl_s* is not above 0.
        """

    @abstractmethod
    async def release(self, lease_id: LeaseId) -> None:
        """Delete a lease: what it alone held may be collected. LeaseNotFoundError where there is none of that ID."""

    @abstractmethod
    async def leaks(self) -> list[Leak]:
        """Return the leases that should not be there any more."""


class RedisLeases(FarmLeases):
    """Those of a farm whose Redis is at hand."""

    def __init__(self, leases: LeaseStore, refs: RefStore, jobs: JobStore, config: CacheConfig) -> None:
        self._leases = leases
        self._refs = refs
        self._jobs = jobs
        self._config = config

    @classmethod
    def over(cls, link: RedisLink, keys: Keys, config: CacheConfig) -> Self:
        """Return those of a farm whose Redis a client is connected to."""
        return cls(RedisLeaseStore(link, keys), RedisRefStore(link, keys), RedisJobStore(link, keys), config)

    async def get(self, lease_id: LeaseId) -> Lease:
        """Return a live lease; see the base."""
        lease = await self._leases.get(lease_id)
        if lease is None:
            raise LeaseNotFoundError(lease_id)
        return lease

    async def pin(
        self, ref_ids: Sequence[RefId], *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None
    ) -> Lease:
        """Keep refs, and all that they stand on, until *ttl_s* seconds from now; None: until it is released.

        A lazy ref stays lazy: nothing moves.

        Raises:
            RefNotFoundError: one of them is unknown; nothing is pinned.
            InvalidArgumentError: *ttl_s* is not above 0.
        """
        if ttl_s is not None and not ttl_s > 0:
            raise InvalidArgumentError("ttl_s", f"{ttl_s:g}", "a lease lives for more than 0 seconds")
        lease_id = LeaseId(f"pin-{secrets.token_hex(8)}")
        told = {**(labels or {}), "owner": "user", "host": socket.gethostname()}
        await self._leases.create(lease_id, ttl_s=ttl_s, labels=told)
        try:
            await self._refs.use(ref_ids, lease_id=lease_id)
            return await self.get(lease_id)
        except BaseException:
            await asyncio.shield(self._leases.delete(lease_id))
            raise

    async def pin_named(
        self, name: str, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None
    ) -> Lease:
        """Pin a ref by its ID, the first digits of that, or the image that it is the top of; see the base."""
        image, ref_id = await find_ref(self._refs, name)
        if ref_id is None:
            raise NoLayersError(image.name if image is not None else name)
        return await self.pin([ref_id], ttl_s=ttl_s, labels=labels)

    async def release(self, lease_id: LeaseId) -> None:
        """Delete a lease: what it alone held may be collected; see the base."""
        if not await self._leases.delete(lease_id):
            raise LeaseNotFoundError(lease_id)

    async def leaks(self) -> list[Leak]:
        """Return the leases that should not be there any more."""
        leases = await self._leases.leases()
        images = await self._refs.images()
        resources, jobs = await asyncio.gather(
            self._existing({resource for lease in leases for resource in lease.resources}, images),
            self._ends({lease.labels["job"] for lease in leases if lease.labels.get("job")}),
        )
        witnesses = Witnesses(
            manifests=frozenset(image.manifest.digest for image in images), resources=resources, jobs=jobs
        )
        kept_s = self._config.keep_s + self._config.lease_ttl_s
        return find_leaks(leases, witnesses, now_wall_s=time.time(), kept_s=kept_s)

    async def _existing(self, resources: set[str], images: Sequence[ImageRecord]) -> frozenset[str]:
        named = [resource.partition(":") for resource in resources]
        refs = [RefId(name) for kind, _, name in named if kind == "ref"]
        blobs = [Digest(name) for kind, _, name in named if kind == "blob"]
        states, records = await asyncio.gather(self._refs.get(refs), self._refs.blobs(blobs))
        return frozenset(
            [ref_resource(ref) for ref, state in zip(refs, states, strict=True) if state is not None]
            + [blob_resource(blob) for blob, record in zip(blobs, records, strict=True) if record is not None]
            + [image_resource(image.name) for image in images]
        )

    async def _ends(self, jobs: set[str]) -> dict[str, float | None]:
        async def end(job: str) -> tuple[str, float | None] | None:
            try:
                record = await self._jobs.get(JobId(job))
            except JobNotFoundError:
                return None
            return job, record.ended_wall_s

        return dict(found for found in await asyncio.gather(*map(end, jobs)) if found is not None)


@asynccontextmanager
async def open_leases(settings: FarmSettings) -> AsyncIterator[FarmLeases]:
    """Connect to a farm's Redis for as long as the body runs.

    Raises:
        FarmNotRunningError: the settings name no Redis.
    """
    async with connection(settings) as (link, keys):
        yield RedisLeases.over(link, keys, settings.config.cache)
