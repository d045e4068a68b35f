"""Builds of a driver outside the cluster: local directories go straight to S3, all else over the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from cluster import gateway as calls
from cluster.config import NodeConfig
from cluster.digest import Digest
from cluster.errors import TreeLostError, UnavailableError, first_error
from cluster.graph import Definition, encode_definition
from cluster.job import JobEvent, JobId, JobRecord, JobState, decode_event
from cluster.reference import parse_reference
from cluster.tree import encode_tree
from lazyfarm.builds import BuildingFarm, BuildOptions, Builds, ResolvedImage
from lazyfarm.context import ScannedTree
from lazyfarm.gateway.access import Access
from lazyfarm.gateway.downloads import Downloads
from lazyfarm.gateway.link import GatewayLink
from lazyfarm.gateway.views import view_of
from lazyfarm.job import Result
from lazyfarm.ref import Ref
from storage.local_trees import SEND_TRIES, LocalFile, packs, part_bytes_of

if TYPE_CHECKING:
    from lazyfarm.export import Exporter

#: Objects on their way at once: what sending takes of memory is this many times a part.
_TRANSFERS = 4
#: Times that a part is put, and seconds between.
_PUTS = 4
_PAUSE_S = 0.5
#: Seconds that S3 may be silent.
_SILENT_S = 60.0
_ERROR = 400
_SERVER_ERROR = 500


class GatewayBuilds(Builds):
    """The jobs of one driver; what is done before one is submitted is done here as everywhere."""

    def __init__(self, farm: BuildingFarm, link: GatewayLink, access: Access) -> None:
        super().__init__(farm)
        self._gateway = link
        self._access = access

    async def find_job(self, job: str) -> JobRecord:
        """Return the record of the job of an ID, or of the start of one."""
        return await self._gateway.call(calls.FIND_JOB, calls.Named(name=job))

    async def get_job(self, job: JobId) -> JobRecord:
        """Return a job's record."""
        return await self._gateway.call(calls.JOB, calls.Named(name=job))

    async def cancel_job(self, job: JobId) -> JobState:
        """Ask for a job to be cancelled."""
        return await self._gateway.call(calls.CANCEL_JOB, calls.Named(name=job))

    async def follow_job(self, job: JobId) -> AsyncIterator[JobEvent]:
        """Yield a job's events."""
        async for told in self._gateway.stream(calls.FOLLOW_JOB, calls.Named(name=job)):
            yield decode_event(told.kind, told.payload)

    @contextlib.asynccontextmanager
    async def attending_job(self, job: JobId, secrets: Mapping[str, bytes] | None = None) -> AsyncIterator[None]:
        """Be there for a job while the body runs, by way of the gateway."""
        given = self._secrets.get(job, {}) if secrets is None else secrets
        call = calls.AttendCall(job=job, secrets=dict(given))
        attending = asyncio.create_task(self._gateway.call(calls.ATTEND, call))
        try:
            yield
        finally:
            attending.cancel()
            await asyncio.wait([attending])
            if not attending.cancelled():
                attending.exception()  # who follows the job hears of it

    async def resolve(self, image: str, *, platform: str | None, plain_http: bool) -> ResolvedImage:
        """Read an image's manifest and config; no ref is made."""
        call = calls.ResolveCall(image=image, platform=platform, plain_http=plain_http)
        found = await self._gateway.call(calls.RESOLVE, call)
        return ResolvedImage(
            reference=parse_reference(found.reference),
            digest=found.digest,
            platform=found.platform,
            config=found.config,
        )

    async def tag(self, result: Result, name: str, *, created_s: int | None) -> Ref:
        """Make an image of a result under a name."""
        ref = result.ref
        ref.raise_if_released()
        call = calls.TagCall(
            job=result.job, ref=view_of(ref), config=result.config, inline=result.inline, name=name, created_s=created_s
        )
        made = await self._gateway.call(calls.TAG, call)
        return Ref(self._farm, made.layers, made.image, made.handlers)

    @contextlib.asynccontextmanager
    async def _exporting(self, found: Ref) -> AsyncIterator[Exporter]:
        """Lend what writes an image to this machine, whose blobs come straight from S3."""
        from lazyfarm.export import Exporter  # noqa: PLC0415 - the unpackers, which few drivers need
        from storage.snapshots.limits import LayerLimits  # noqa: PLC0415 - likewise

        downloads = Downloads(self._gateway, self._access, calls.RefCall(ref=view_of(found), stream=None))
        try:
            # This machine has no configuration of the farm's: the limits are those of a node that was told nothing.
            yield Exporter(downloads, downloads, LayerLimits.of(NodeConfig()))
        finally:
            await downloads.close()

    async def _put(self, job: JobId, definition: Definition, options: BuildOptions) -> None:
        await self._gateway.call(
            calls.SUBMIT,
            calls.SubmitCall(
                job=job,
                definition=encode_definition(definition),
                no_cache=options.no_cache,
                detached=options.detached,
                labels=dict(options.labels),
                cache_from=tuple(options.cache_from),
                cache_to=tuple(options.cache_to),
            ),
        )

    # -- local directories -------------------------------------------------------------------------------------

    async def _send(self, trees: Iterable[ScannedTree]) -> None:
        found = list(trees)
        if not found:
            return
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENT_S, sock_read=_SILENT_S)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            for tree in found:
                await self._send_tree(http, tree)

    async def _send_tree(self, http: aiohttp.ClientSession, scanned: ScannedTree) -> None:
        call = calls.TreeCall(tree=encode_tree(scanned.tree))
        for left in reversed(range(SEND_TRIES)):
            lacking = await self._gateway.call(calls.TREE_LACKS, call)
            if not lacking.digests:
                break
            try:
                await self._send_files(http, {one: scanned.paths[one] for one in lacking.digests})
            except UnavailableError:
                if not left:
                    raise  # else it may have been begun at a gateway that is gone
        else:
            raise TreeLostError(lacking.digests[0], "it was sent, and is gone again")
        await self._gateway.call(calls.TREE_SENT, call)

    async def _send_files(self, http: aiohttp.ClientSession, paths: Mapping[Digest, Path]) -> None:
        slots = asyncio.Semaphore(_TRANSFERS)

        async def put(files: Sequence[LocalFile]) -> None:
            async with slots:
                await self._put_object(http, files)

        planned = await asyncio.to_thread(lambda: list(packs(paths)))
        try:
            async with asyncio.TaskGroup() as group:
                for files in planned:
                    group.create_task(put(files))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def _put_object(self, http: aiohttp.ClientSession, files: Sequence[LocalFile]) -> None:
        """Send some files as one object: each part is read, hashed and put, one after the other."""
        size_bytes = sum(file.size_bytes for file in files)
        part_bytes = part_bytes_of(size_bytes)
        parts = max(1, -(-size_bytes // part_bytes))
        way = await self._gateway.call(calls.TREE_UPLOAD, calls.UploadCall(size_bytes=size_bytes, parts=parts))
        etags: list[str] = []
        chunks = _parts(files, part_bytes)
        for url in way.urls:
            content = await asyncio.to_thread(next, chunks, b"")
            etags.append(await self._put_part(http, url, content))
        # The last file was its digest's content only if nothing comes after the last part.
        await asyncio.to_thread(lambda: [None for _ in chunks])
        placed, at = [], 0
        for file in files:
            placed.append(calls.PlacedContent(digest=file.digest, offset=at, size_bytes=file.size_bytes))
            at += file.size_bytes
        await self._gateway.call(
            calls.TREE_UPLOADED,
            calls.UploadedCall(key=way.key, etags=tuple(etags) if parts > 1 else (), contents=tuple(placed)),
        )

    async def _put_part(self, http: aiohttp.ClientSession, url: str, content: bytes) -> str:
        """PUT bytes to a URL; return the ETag."""
        where = f"S3 at {url.partition('?')[0]}"  # what comes after it opens the way
        for left in reversed(range(_PUTS)):
            try:
                async with http.put(url, data=io.BytesIO(content), ssl=self._access.trust_of(url)) as answer:
                    if answer.status < _ERROR:
                        return answer.headers.get("etag", "").strip('"')
                    reason = f"it answered {answer.status}"
                    if answer.status < _SERVER_ERROR:
                        raise UnavailableError(where, reason)
            except (aiohttp.ClientError, TimeoutError, OSError) as exc:
                reason = type(exc).__name__
            if left:
                await asyncio.sleep(_PAUSE_S)
        raise UnavailableError(where, reason)


def _parts(files: Sequence[LocalFile], part_bytes: int) -> Iterator[bytes]:
    """Yield the contents of files as parts of one length, but for the last.

    Raises:
        FileChangedError, ScanError: a file is not what it was, or can't be read.
    """
    part = bytearray()
    for file in files:
        for chunk in file.chunks(part_bytes, threading.Event()):
            part += chunk
            if len(part) >= part_bytes:
                yield bytes(part[:part_bytes])
                del part[:part_bytes]
    if part:
        yield bytes(part)
