"""Refs, images, blobs and providers in Redis."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgpack
import msgspec

from cluster import wire
from cluster.audit import absence
from cluster.digest import Digest, is_digest
from cluster.errors import LeaseLostError, NonAddressableParentError, RefNotFoundError
from cluster.lease import LeaseId
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, ChainUse, ImageRecord, RefId, RefRecord, RefState, RefUsage
from storage.audit import RedisAudit, noted
from storage.codec import Codec
from storage.keys import Keys
from storage.link import RedisLink

REF: Codec[RefRecord] = Codec("ref", RefRecord)
BLOB: Codec[BlobRecord] = Codec("blob", BlobRecord)
PROVIDER: Codec[ProviderHandle] = Codec("provider", ProviderHandle)
IMAGE: Codec[ImageRecord] = Codec("image", ImageRecord)

#: Refs that :meth:`RedisRefStore.find` returns at most.
FIND_LIMIT = 20
#: Values read by one MGET or script call at most: a bound on how long one command keeps the server.
_BATCH = 1000
#: Refs looked up together: few enough that reading some and decoding others overlap.
_GET_BATCH = 125

_HEX = re.compile(r"[0-9a-f]{0,64}\Z")
#: Fields that the store itself sets or merges: first in a record's payload, in this order (lib/ref.lua).
_MERGED = ("image_refs", "created_wall_s", "description", "origins")


class RedisRefStore:
    """Implements :class:`cluster.ports.RefStore`.

    A ref is one packed value at a key of its own, so that many are read by one MGET. Scripts change four
    of its fields without touching the rest. That a blob is present is a key of its own, and so is the set of
    a digest's providers, to which values are only ever added.
    """

    def __init__(self, link: RedisLink, keys: Keys, audit: RedisAudit | None = None) -> None:
        self._link = link
        self._keys = keys
        self._audit = audit
        self._prefix = keys.prefix

    async def get_or_create(
        self,
        records: Sequence[RefRecord],
        providers: Mapping[Digest, Sequence[ProviderHandle]],
        *,
        lease_id: LeaseId,
    ) -> list[RefState]:
        """Make or find the records, attach them to the lease, in one script."""
        packed: list[list[object]] = []
        for record in records:
            head, tail = _split(REF.kind, record, _MERGED)
            parent = record.parent or ""
            own, origins = list(record.image_refs), list(record.origins)
            packed.append([record.id, parent, record.chain, head, tail, own, record.description, origins])
        known = [[digest, [PROVIDER.encode(handle) for handle in handles]] for digest, handles in providers.items()]
        # Redis's cmsgpack knows no bin type: strings and bytes are one to Lua.
        arguments = [msgpack.packb(argument, use_bin_type=False) for argument in (packed, known)]
        reply = await self._link.run("ref_get_or_create", self._prefix, lease_id, *arguments)
        match reply:
            case [b"ok", states]:
                return [_state(state) for state in states]
            case [b"parent", parent]:
                raise NonAddressableParentError(parent.decode())
            case _:
                raise LeaseLostError(lease_id)

    async def get(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        """Look refs up, then the facts around them: two round trips, each of commands that Redis is quick at.

        A script that follows each record to its digest keeps the server twice as long, because it must unpack
        what is decoded here anyway. Batches overlap: while one is decoded, Redis reads the next.
        """
        batches = await asyncio.gather(*(self._get(batch) for batch in _batches(ref_ids, _GET_BATCH)))
        return [state for batch in batches for state in batch]

    async def _get(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        ref, decode = self._keys.ref, REF.decode
        values = await self._link.execute("MGET", *[ref(ref_id) for ref_id in ref_ids], may_repeat=True)
        records = [None if value is None else decode(value) for value in values]
        digests = [record.blob.digest for record in records if record is not None]
        blobs, providers = await asyncio.gather(self.blobs(digests), self.providers(digests))
        facts = zip(blobs, providers, strict=True)
        return [None if record is None else _state_of(record, *next(facts)) for record in records]

    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return the ref and all below it, lowest first."""
        status, found = await self._link.run("ref_chain", self._prefix, ref_id, may_repeat=True)
        if status != b"ok":
            raise RefNotFoundError(found.decode())
        return [_state(state) for state in reversed(found)]

    async def use(self, ref_ids: Sequence[RefId], *, lease_id: LeaseId) -> None:
        """Attach refs to the lease and mark them used."""
        match await self._link.run("ref_use", self._prefix, lease_id, *ref_ids):
            case [b"lease"]:
                raise LeaseLostError(lease_id)
            case [b"missing", ref_id]:
                raise RefNotFoundError(ref_id.decode())

    async def usage(self, ref_id: RefId) -> RefUsage:
        """Return when and how often a ref was used; RefNotFoundError for an unknown one."""
        used, count = await self._link.execute_many(
            [("ZSCORE", self._keys.refs_used, ref_id), ("HGET", self._keys.refs_count, ref_id)], may_repeat=True
        )
        if used is None:
            raise RefNotFoundError(ref_id)
        return RefUsage(last_used_wall_s=int(used) / 1000, usage_count=int(count or 0))

    async def find(self, prefix: str) -> list[RefId]:
        """Return refs by the start of their ID."""
        start = "sha256:" + prefix.removeprefix("sha256:")
        if _HEX.match(start, len("sha256:")) is None:
            return []
        found = await self._link.execute(
            "ZRANGEBYLEX", self._keys.refs, f"[{start}", f"[{start}g", "LIMIT", 0, FIND_LIMIT, may_repeat=True
        )
        return _ref_ids(found)

    async def list_refs(self) -> list[RefId]:
        """Return every ref, most recently used first."""
        return _ref_ids(await self._link.execute("ZREVRANGE", self._keys.refs_used, 0, -1, may_repeat=True))

    async def refs_of_chain(self, chain: Digest) -> list[RefId]:
        """Return the refs with that chain ID, sorted."""
        return sorted(_ref_ids(await self._link.execute("SMEMBERS", self._keys.chain(chain), may_repeat=True)))

    async def uses_of_chains(self, chains: Sequence[Digest]) -> list[ChainUse]:
        """Return who needs chains, by one script a batch."""
        found: list[ChainUse] = []
        for batch in _batches(chains):
            answer = await self._link.run("chains_use", self._prefix, *batch, may_repeat=True)
            found += [
                ChainUse(
                    refs=tuple(sorted(_ref_ids(refs))), holders=tuple(sorted(lease_id.decode() for lease_id in leases))
                )
                for refs, leases in zip(answer[::2], answer[1::2], strict=True)
            ]
        return found

    async def put_image(self, image: ImageRecord, *, lease_id: LeaseId) -> ImageRecord:
        """Record an image and attach it to the lease."""
        head, tail = _split(IMAGE.kind, image, ("created_wall_s",))
        identity = (image.name, image.manifest.digest, image.ref or "")
        stored = await self._link.run("image_put", self._prefix, lease_id, *identity, head, tail, may_repeat=True)
        if stored is None:
            raise LeaseLostError(lease_id)
        return IMAGE.decode(stored)

    async def image(self, name_or_digest: str) -> ImageRecord | None:
        """Return an image by name or manifest digest."""
        table = self._keys.images_by_digest if is_digest(name_or_digest) else self._keys.images
        return _image(await self._link.execute("HGET", table, name_or_digest, may_repeat=True))

    async def images(self) -> list[ImageRecord]:
        """Return every image, by name."""
        found = await self._link.execute("HVALS", self._keys.images, may_repeat=True)
        return sorted((IMAGE.decode(value) for value in found), key=lambda image: image.name)

    async def image_of_ref(self, ref_id: RefId) -> ImageRecord | None:
        """Return the image most recently resolved whose top is that ref."""
        return _image(await self._link.execute("HGET", self._keys.images_by_ref, ref_id, may_repeat=True))

    async def blobs(self, digests: Sequence[Digest]) -> list[BlobRecord | None]:
        """Tell which blobs are present."""
        found: list[BlobRecord | None] = []
        for batch in _batches(digests):
            keys = [self._keys.blob(digest) for digest in batch]
            values = await self._link.execute("MGET", *keys, may_repeat=True)
            found.extend(None if value is None else BLOB.decode(value) for value in values)
        return found

    async def hold_blobs(self, digests: Sequence[Digest], *, lease_id: LeaseId) -> list[BlobRecord | None]:
        """Attach the blobs that are present to the lease, and return them, by one script a batch."""
        found: list[BlobRecord | None] = []
        for batch in _batches(digests):
            values = await self._link.run("blobs_hold", self._prefix, lease_id, *batch, may_repeat=True)
            if values is None:
                raise LeaseLostError(lease_id)
            found.extend(None if value is None else BLOB.decode(value) for value in values)
        return found

    async def providers(self, digests: Sequence[Digest]) -> list[tuple[ProviderHandle, ...]]:
        """Return the providers known for each digest, sorted."""
        found: list[tuple[ProviderHandle, ...]] = []
        for batch in _batches(digests):
            sets = await self._link.run("providers_get", self._prefix, *batch, may_repeat=True)
            found.extend([_handles(values) for values in sets])
        return found

    async def add_providers(self, digest: Digest, providers: Sequence[ProviderHandle]) -> None:
        """Add providers for a digest."""
        if providers:
            packed = [PROVIDER.encode(handle) for handle in providers]
            await self._link.execute("SADD", self._keys.providers(digest), *packed, may_repeat=True)

    async def mark_absent(self, blob: BlobRecord, reason: str, *, delete_after_s: float | None = None) -> bool:
        """Turn a blob lazy again, if it is still that very upload."""
        delete_after_ms = "" if delete_after_s is None else round(delete_after_s * 1000)
        told = (blob.digest, blob.key, reason, delete_after_ms, *noted(self._audit, absence(blob)))
        return bool(await self._link.run("blob_absent", self._prefix, *told))


def _split(kind: str, value: RefRecord | ImageRecord, merged: tuple[str, ...]) -> tuple[bytes, bytes]:
    """Return what comes before and after the fields that a script writes into the payload itself."""
    fields = msgspec.to_builtins(value, builtin_types=(bytes,))
    packer = msgpack.Packer()
    head = wire.header(kind) + packer.pack_map_header(len(fields))
    tail = b"".join(packer.pack(name) + packer.pack(fields[name]) for name in fields if name not in merged)
    return head, tail


def _state(state: list[Any]) -> RefState:
    record, blob, providers = state
    return RefState(
        record=REF.decode(record),
        present=None if blob is None else BLOB.decode(blob),
        providers=_handles(providers),
    )


def _state_of(record: RefRecord, present: BlobRecord | None, providers: tuple[ProviderHandle, ...]) -> RefState:
    return RefState(record=record, present=present, providers=providers)


#: Few handles are known for very many layers.
_handle = lru_cache(maxsize=4096)(PROVIDER.decode)


def _handles(values: Sequence[bytes]) -> tuple[ProviderHandle, ...]:
    if len(values) == 1:
        return (_handle(values[0]),)
    # A set before it is sorted: two releases may encode one handle in two ways.
    return tuple(sorted({_handle(value) for value in values}))


def _image(value: bytes | None) -> ImageRecord | None:
    return None if value is None else IMAGE.decode(value)


def _ref_ids(values: Iterable[bytes]) -> list[RefId]:
    return [RefId(value.decode()) for value in values]


def _batches(items: Sequence[Any], size: int = _BATCH) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
