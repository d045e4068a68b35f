"""What a driver may have done through the gateway: each call of :mod:`cluster.gateway`, made at its farm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cluster import gateway as calls
from cluster.audit import AuditEntry, AuditFilter
from cluster.digest import Digest, parse_digest
from cluster.errors import (
    BlobDamagedError,
    BlobNotFoundError,
    InvalidArgumentError,
    NotAnImageError,
    RefNotFoundError,
    UnavailableError,
)
from cluster.gateway import AnyMethod, AnyStream, Method, Nothing, RefView, Stream
from cluster.graph import decode_definition, encode_definition
from cluster.job import JobEvent, JobId, encode_event
from cluster.lease import LeaseId
from cluster.ports import Part
from cluster.ref import BlobRecord, RefId
from cluster.tree import decode_tree
from lazyfarm.builds import BuildOptions
from lazyfarm.gateway import reads
from lazyfarm.gateway.lookups import Lookups
from lazyfarm.gateway.views import view_of
from lazyfarm.job import Result
from lazyfarm.joined.farm import JoinedFarm
from lazyfarm.records import FarmRecords
from lazyfarm.ref import Ref
from storage.blobs import S3ContentStore
from storage.fetching import checked
from storage.local_trees import LocalTrees, Packed, part_bytes_of

Q = TypeVar("Q")
R = TypeVar("R")
T = TypeVar("T")

#: Seconds for which a way to S3 is open.
_WAY_S = 3600.0
_CHUNK_BYTES = 1024 * 1024
#: What leases that drivers make by themselves are called.
_USER = "user-"


class Uploads:
    """Objects that one driver sends straight to S3, and which then are recorded.

    Args:
        trees: Local directories, held by the driver's lease.
        store: The bucket, as the farm reaches it.
        outside: The same, as drivers do.
    """

    def __init__(self, trees: LocalTrees, store: S3ContentStore, outside: S3ContentStore) -> None:
        self._trees = trees
        self._store = store
        self._outside = outside
        #: By key, what is being sent: the upload's ID, "" for an object that is put whole, and its length.
        self._open: dict[str, tuple[str, int]] = {}

    async def lacking(self, call: calls.TreeCall) -> calls.Digests:
        """Return which contents of a directory the farm lacks."""
        return calls.Digests(digests=tuple(await self._trees.lacking(decode_tree(call.tree))))

    async def begin(self, call: calls.UploadCall) -> calls.UploadWay:
        """Open the way for one object."""
        part_bytes = part_bytes_of(call.size_bytes)
        parts = max(1, -(-call.size_bytes // part_bytes))
        if call.size_bytes < 0 or call.parts != parts:
            raise InvalidArgumentError("parts", str(call.parts), f"{call.size_bytes} bytes go in {parts}")
        key = await self._trees.new_object()
        return await asyncio.to_thread(self._way, key, call.size_bytes, parts)

    def _way(self, key: str, size_bytes: int, parts: int) -> calls.UploadWay:
        upload_id = self._store.begin_upload(key) if parts > 1 else ""
        urls = tuple(
            self._outside.presigned(key, upload_id=upload_id, number=number, ttl_s=_WAY_S)
            for number in range(1, parts + 1)
        )
        self._open[key] = upload_id, size_bytes
        return calls.UploadWay(key=key, urls=urls)

    async def end(self, call: calls.UploadedCall) -> Nothing:
        """Record what an object holds, once it is there; what its bytes are is found out by who reads them."""
        if call.key not in self._open:
            raise UnavailableError(f"upload {call.key}", "it was begun at another gateway: send it again")
        upload_id, size_bytes = self._open[call.key]
        places: dict[Digest, Packed] = {}
        for each in call.contents:
            if each.offset < 0 or each.size_bytes < 0 or each.offset + each.size_bytes > size_bytes:
                raise InvalidArgumentError("content", each.digest, f"the object has {size_bytes} bytes")
            places[each.digest] = Packed(key=call.key, offset=each.offset, size_bytes=each.size_bytes)
        await asyncio.to_thread(self._complete, call.key, upload_id, size_bytes, call.etags)
        await self._trees.record(call.key, size_bytes, places)
        del self._open[call.key]
        return Nothing()

    def _complete(self, key: str, upload_id: str, size_bytes: int, etags: tuple[str, ...]) -> None:
        if upload_id:
            part_bytes = part_bytes_of(size_bytes)
            parts = [
                Part(number=number, size_bytes=min(part_bytes, size_bytes - at), etag=etag)
                for number, (at, etag) in enumerate(zip(range(0, size_bytes, part_bytes), etags, strict=False), 1)
            ]
            self._store.complete_upload(key, upload_id, parts)
        there = self._store.head(key)
        if there is None or there.size_bytes != size_bytes:
            raise UnavailableError(f"upload {key}", "S3 doesn't have all of it: send it again")

    async def sent(self, call: calls.TreeCall) -> Nothing:
        """Record a directory all of whose contents are there."""
        await self._trees.put_tree(decode_tree(call.tree))
        return Nothing()

    def drop(self) -> None:
        """Abort what was not ended; blocks. What it fails to, the sweeper does."""
        for key, (upload_id, _) in self._open.items():
            if upload_id:
                self._store.abort_upload(key, upload_id)
        self._open.clear()


class Exports:
    """Blobs that one driver reads straight from S3.

    Args:
        farm: The driver's, with its session.
        store: The bucket, as the farm reaches it.
        outside: The same, as drivers do.
    """

    def __init__(self, farm: JoinedFarm, store: S3ContentStore, outside: S3ContentStore) -> None:
        self._farm = farm
        self._store = store
        self._outside = outside

    async def ways(self, call: calls.RefCall) -> calls.ExportWays:
        """Open the ways to an image's blobs, for a driver that may have all of them."""
        ref = Ref(self._farm, call.ref.layers, call.ref.image, call.ref.handlers)
        if ref.record is None:
            raise NotAnImageError(ref.id)
        # Proves that this driver may have the chain, and holds it. What else it says of the image isn't believed.
        await ref.unlazy()
        image = await self._farm.ref_store.image(ref.record.manifest.digest)
        if image is None or image.ref != (ref.id if ref.layers else None):
            raise RefNotFoundError(ref.record.manifest.digest)
        wanted = dict.fromkeys((image.manifest.digest, image.config.digest, *(layer.digest for layer in image.layers)))
        present = [blob for blob in await self._farm.ref_store.blobs(list(wanted)) if blob is not None]
        return await asyncio.to_thread(self._signed, present)

    def _signed(self, blobs: Sequence[BlobRecord]) -> calls.ExportWays:
        signed = (calls.BlobWay(blob=blob, url=self._outside.presigned_read(blob.key, ttl_s=_WAY_S)) for blob in blobs)
        return calls.ExportWays(ways=tuple(signed))

    async def damaged(self, call: calls.Named) -> bool:
        """Read a blob that a driver found damaged; turn it lazy if it is. A driver's word alone takes nothing away."""
        (blob,) = await self._farm.ref_store.blobs([parse_digest(call.name)])
        if blob is None:
            return False
        reason = await asyncio.to_thread(self._fault, blob)
        return bool(reason) and await self._farm.ref_store.mark_absent(blob, reason)

    def _fault(self, blob: BlobRecord) -> str:
        """Return what is wrong with a blob's object; "" for nothing."""
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            with checked(self._store, blob) as stream:
                while stream.readinto(buffer):
                    pass
        except BlobNotFoundError:
            return f"object {blob.key} is gone"
        except BlobDamagedError as exc:
            return exc.reason
        return ""


class Surface:
    """The calls of one driver, by name.

    Args:
        farm: The driver's, with its session.
        uploads: What it sends.
        exports: What it reads.
        lookups: What it looks at.
        close: Ends its session.
    """

    def __init__(
        self,
        farm: JoinedFarm,
        uploads: Uploads,
        exports: Exports,
        lookups: Lookups,
        close: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._farm = farm
        self._close = close
        self.methods: dict[str, tuple[AnyMethod, Callable[[Any], Awaitable[Any]]]] = {}
        self.streams: dict[str, tuple[AnyStream, Callable[[Any], AsyncIterator[Any]]]] = {}
        builds = farm.builds
        self._on(calls.PULL, self._pull)
        self._on(calls.GET, self._get)
        self._on(calls.GET_BY_BLOB, self._get_by_blob)
        self._on(calls.RESOLVE, self._resolve)
        self._on(calls.REFS, lambda _: farm.refs())
        self._on(calls.IMAGES, lambda _: farm.images())
        self._on(calls.STATES, lambda call: farm.states(call.ids))
        self._on(calls.CHAIN, lambda call: farm.chain(RefId(call.name)))
        self._on(calls.HOLD, lambda call: _done(farm.hold(call.ids)))
        self._on(calls.UNLAZY, lambda call: farm.unlazy_chain(self._ref(call.ref), self._stream(call.stream)))
        self._on(
            calls.EXTRACT, lambda call: farm.extract_chain(self._ref(call.ref), call.node, self._stream(call.stream))
        )
        self._on(calls.PUSH, self._push)
        self._on(calls.END_STREAM, self._end_stream)
        self._streams(calls.FOLLOW, lambda call: farm.follow(self._stream(call.name)))
        self._on(calls.NODES, lambda _: farm.nodes())
        self._on(calls.PAGE, self._page)
        self._on(calls.LEASES, lambda _: farm.leases())
        leases = farm.lease_store
        self._on(calls.LEASE_CREATE, lambda call: leases.create(_own(call.id), ttl_s=call.ttl_s, labels=call.labels))
        self._on(calls.LEASE_RENEW, lambda call: _done(leases.renew(_own(call.id), ttl_s=call.ttl_s or 0.0)))
        self._on(calls.LEASE_ATTACH, lambda call: _done(leases.attach(_own(call.id), call.resources)))
        self._on(calls.LEASE_DELETE, lambda call: leases.delete(_own(call.id)))
        self._on(calls.PIN, lambda call: farm.pin(self._ref(call.ref), ttl_s=call.ttl_s, labels=call.labels))
        self._on(calls.UNPIN, lambda call: _done(farm.unpin(LeaseId(call.name))))
        self._on(calls.DU, lambda _: farm.du())
        self._on(calls.KEPT, lambda call: farm.kept(call.name))
        self._streams(calls.PRUNE, self._prune)
        self._on(calls.NODE_USAGE, lambda call: farm.node_usage(call.node))
        self._on(calls.NODE_PRUNE, self._prune_nodes)
        self._streams(calls.VERIFY, self._verify)
        self._streams(calls.AUDIT, self._audit)
        self._streams(calls.DRAIN, self._drain)
        self._on(calls.UNDRAIN, lambda call: _done(farm.undrain(call.name)))
        self._on(calls.SUBMIT, self._submit)
        self._on(calls.ATTEND, self._attend)
        self._on(calls.JOB, lambda call: builds.get_job(JobId(call.name)))
        self._on(calls.FIND_JOB, lambda call: builds.find_job(call.name))
        self._streams(calls.FOLLOW_JOB, self._follow_job)
        self._on(calls.CANCEL_JOB, lambda call: builds.cancel_job(JobId(call.name)))
        self._on(calls.TAG, self._tag)
        self._on_s3(uploads, exports)
        self._on_lookups(lookups)
        self._on(calls.CLOSE, lambda call: _done(self._close(call.discard)))

    def _on_s3(self, uploads: Uploads, exports: Exports) -> None:
        self._on(calls.TREE_LACKS, uploads.lacking)
        self._on(calls.TREE_UPLOAD, uploads.begin)
        self._on(calls.TREE_UPLOADED, uploads.end)
        self._on(calls.TREE_SENT, uploads.sent)
        self._on(calls.EXPORT, exports.ways)
        self._on(calls.DAMAGED, exports.damaged)

    def _on_lookups(self, lookups: Lookups) -> None:
        records, leases, explain = lookups.records, lookups.leases, lookups.explain
        self._on(reads.STATUS, lambda _: lookups.status())
        self._on(reads.ACTORS, lambda _: records.actors())
        self._on(reads.GIVEN_UP, lambda _: records.given_up())
        self._on(reads.NOW, lambda _: lookups.now())
        self._on(reads.QUARANTINED, lambda _: lookups.quarantined())
        self._on(reads.REF_DETAILS, lambda call: records.ref(call.name))
        self._on(reads.LEASE, lambda call: leases.get(LeaseId(call.name)))
        self._on(reads.PIN_NAMED, lambda call: leases.pin_named(call.name, ttl_s=call.ttl_s, labels=call.labels))
        self._on(reads.LEAKS, lambda _: leases.leaks())
        self._on(reads.JOBS, lambda _: records.jobs())
        self._on(reads.JOB_DETAILS, lambda call: records.job(call.name))
        self._on(reads.DEFINITION, lambda call: _definition(records, JobId(call.name)))
        self._streams(reads.TOLD, lambda call: _told_so_far(records, JobId(call.name)))
        self._on(reads.WAIT, lambda call: explain.wait(call.name, watch_s=call.watch_s))
        self._on(reads.PULL_STORY, lambda call: explain.pull(call.name, watch_s=call.watch_s))
        self._on(reads.MISS, lambda call: explain.miss(call.step, job=call.job, against=call.against))

    def _on(self, method: Method[Q, R], handle: Callable[[Q], Awaitable[R]]) -> None:
        self.methods[method.name] = method, handle

    def _streams(self, method: Stream[Q, R], handle: Callable[[Q], AsyncIterator[R]]) -> None:
        self.streams[method.name] = method, handle

    # -- refs --------------------------------------------------------------------------------------------------

    def _ref(self, view: RefView) -> Ref:
        return Ref(self._farm, view.layers, view.image, view.handlers)

    def _stream(self, name: Any) -> Any:
        """Return a progress stream's name, or None; it is one of this driver's."""
        if name is not None and not name.startswith(f"{self._farm.session_id}-"):
            raise InvalidArgumentError("stream", repr(name), "it is another driver's")
        return name

    async def _pull(self, call: calls.PullCall) -> RefView:
        stream = self._stream(call.stream)
        return view_of(await self._farm.pull_told(call.image, call.platform, stream, plain_http=call.plain_http))

    async def _get(self, call: calls.Named) -> RefView:
        return view_of(await self._farm.get(call.name))

    async def _get_by_blob(self, call: calls.GetByBlobCall) -> RefView:
        parent = None if call.parent is None else self._ref(call.parent)
        lease_id = self._farm.lease_id() if call.lease_id is None else _own(call.lease_id)
        return view_of(
            await self._farm.get_by_blob_under(lease_id, call.descriptor, parent, call.handlers, call.image_ref)
        )

    async def _resolve(self, call: calls.ResolveCall) -> calls.Resolution:
        found = await self._farm.resolve(call.image, platform=call.platform, plain_http=call.plain_http)
        return calls.Resolution(
            reference=found.reference.name, digest=found.digest, platform=found.platform, config=found.config
        )

    async def _push(self, call: calls.PushCall) -> Any:
        stream = self._stream(call.stream)
        return await self._farm.push_told(self._ref(call.ref), call.target, stream, plain_http=call.plain_http)

    async def _end_stream(self, call: calls.Named) -> Nothing:
        self._farm.end_stream(self._stream(call.name))
        return Nothing()

    # -- the store ---------------------------------------------------------------------------------------------

    async def _prune(self, call: calls.PruneCall) -> AsyncIterator[calls.PruneTold]:
        def prune(tell: Callable[[calls.PruneTold], None]) -> Awaitable[Any]:
            return self._farm.prune(
                everything=call.everything,
                keep_bytes=call.keep_bytes,
                keep_duration_s=call.keep_duration_s,
                filters=call.filters,
                dry_run=call.dry_run,
                on_removed=lambda item: tell(calls.PruneTold(removed=item)),
            )

        async for told in _told(prune, lambda pruned: calls.PruneTold(result=pruned)):
            yield told

    async def _prune_nodes(self, call: calls.PruneCall) -> Any:
        return await self._farm.prune_nodes(
            call.node,
            keep_bytes=call.keep_bytes,
            keep_duration_s=call.keep_duration_s,
            filters=call.filters,
            dry_run=call.dry_run,
        )

    async def _verify(self, call: calls.VerifyCall) -> AsyncIterator[calls.VerifyTold]:
        def verify(tell: Callable[[calls.VerifyTold], None]) -> Awaitable[Any]:
            return self._farm.verify(
                *call.refs,
                repair=call.repair,
                bytes_per_s=call.bytes_per_s,
                on_verified=lambda so_far: tell(calls.VerifyTold(verified=so_far)),
            )

        async for told in _told(verify, lambda all_: calls.VerifyTold(verified=all_, is_end=True)):
            yield told

    async def _audit(self, call: calls.AuditCall) -> AsyncIterator[AuditEntry]:
        wanted = AuditFilter(job=call.job, digest=call.digest, operation=call.operation)
        log = self._farm.audit_reader
        async for entry in log.follow(last_s=call.last_s) if call.follow else log.entries(last_s=call.last_s):
            if wanted.matches(entry):
                yield entry

    # -- the cluster -------------------------------------------------------------------------------------------

    async def _page(self, _: Nothing) -> calls.PageLink:
        link = urlsplit(await self._farm.page())
        return calls.PageLink(path=f"{link.path}?{link.query}")

    async def _drain(self, call: calls.DrainCall) -> AsyncIterator[calls.DrainTold]:
        def drain(tell: Callable[[calls.DrainTold], None]) -> Awaitable[Any]:
            return self._farm.drain(
                call.node, timeout_s=call.timeout_s, on_left=lambda left: tell(calls.DrainTold(left=left))
            )

        async for told in _told(drain, lambda left: calls.DrainTold(left=left, is_end=True)):
            yield told

    # -- jobs --------------------------------------------------------------------------------------------------

    async def _submit(self, call: calls.SubmitCall) -> Nothing:
        options = BuildOptions(
            no_cache=call.no_cache,
            labels=call.labels,
            cache_from=call.cache_from,
            cache_to=call.cache_to,
            detached=call.detached,
        )
        await self._farm.builds.submit(call.job, decode_definition(call.definition), options)
        return Nothing()

    async def _attend(self, call: calls.AttendCall) -> Nothing:
        async with self._farm.builds.attending_job(call.job, call.secrets):
            await asyncio.Event().wait()
        return Nothing()

    async def _follow_job(self, call: calls.Named) -> AsyncIterator[calls.EventTold]:
        async for event in self._farm.builds.follow_job(JobId(call.name)):
            yield _event(event)

    async def _tag(self, call: calls.TagCall) -> RefView:
        result = Result(call.job, (self._ref(call.ref),), call.config, call.inline)
        return view_of(await self._farm.tag(result, call.name, created_s=call.created_s))


def _event(event: JobEvent) -> calls.EventTold:
    kind, payload = encode_event(event)
    return calls.EventTold(kind=kind, payload=payload)


async def _told_so_far(records: FarmRecords, job: JobId) -> AsyncIterator[calls.EventTold]:
    for event in await records.events(job):
        yield _event(event)


async def _definition(records: FarmRecords, job: JobId) -> bytes:
    definition = await records.definition(job)
    return b"" if definition is None else encode_definition(definition)


async def _done(work: Awaitable[None]) -> Nothing:
    await work
    return Nothing()


def _own(lease_id: LeaseId) -> LeaseId:
    """Return the ID of a lease that a driver made; those of the farm and of drivers themselves are not for it."""
    if not lease_id.startswith(_USER):
        raise InvalidArgumentError("lease", repr(lease_id), f"leases that a driver makes begin with {_USER}")
    return lease_id


async def _told(work: Callable[[Callable[[T], None]], Awaitable[R]], last: Callable[[R], T]) -> AsyncIterator[T]:
    """Yield what *work* tells while it runs, and *last* of what it comes to."""
    told: asyncio.Queue[T | None] = asyncio.Queue()
    task = asyncio.ensure_future(work(told.put_nowait))
    task.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (item := await told.get()) is not None:
            yield item
        yield last(task.result())
    finally:
        task.cancel()
        await asyncio.wait([task])
