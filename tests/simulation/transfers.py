"""Transfers in virtual time: the steps of :class:`storage.transfer.BlobTransfer`, each part one timed step.

The plan (parts, what is missing, which source, when to give up) is the real one; only threads and sockets are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from typing import assert_never

from cluster.digest import digest_of, hex_of
from cluster.errors import (
    BlobNotFoundError,
    ClusterError,
    DigestMismatchError,
    NeedsRemoteProvidersError,
    SessionGoneError,
    StaleFenceError,
    UnavailableError,
)
from cluster.fetch.plan import GiveUp, NextSource, SourceState, StartOver, TryAgain, missing_parts, parts_of
from cluster.fetch.runner import Fetched
from cluster.flight.values import UploadState
from cluster.ref import BlobRecord
from storage.transfer import _REPORT_EVERY_S
from tests.simulation.loop import all_or_nothing
from tests.simulation.services import PART_BYTES

#: As configured by default: 24 and 32 MiB.
_WHOLE_UP_TO_BYTES = 3 * PART_BYTES
_PARALLEL_FROM_BYTES = 4 * PART_BYTES
RANGES = 3
_ATTEMPTS = 5
_RETRY_BUDGET_S = 120.0
_SLOT_DEADLINE_S = 600.0


class _StartOverError(Exception):
    """What was fetched is dropped, and fetched anew."""


class Transfer:
    """One run."""

    def __init__(self, owner, descriptor, sources, fence, report):
        self._owner = owner
        self._flights = owner._flights
        self._bucket = owner._bucket
        self._descriptor = descriptor
        self._sources = sources
        self._state = SourceState(len(sources), attempts=_ATTEMPTS, budget_s=_RETRY_BUDGET_S)
        self._fence = fence
        self._report = report
        self._upload = None
        self._contributors = set()
        self._fetched_bytes = self._arrived_bytes = 0
        self._reported_s = float("-inf")
        self._uploads_gone = 0

    async def run(self, resume):
        while True:
            self._contributors.clear()
            try:
                return await self._attempt(resume)
            except _StartOverError as exc:
                await self._undo_upload()
                if isinstance(exc.__cause__, BlobNotFoundError) and resume is None:
                    self._uploads_gone += 1
                    if self._uploads_gone >= _ATTEMPTS:
                        raise UnavailableError("the content store", "it loses uploads") from exc
                resume = None

    async def _attempt(self, resume):
        size = self._descriptor.size_bytes
        if size <= _WHOLE_UP_TO_BYTES and resume is None:
            return await self._attempt_whole(size)
        parts = parts_of(size, PART_BYTES)
        if resume is None:
            self._upload, stored = await self._begin_upload(), {}
        else:
            self._upload = resume
            try:
                listed = await self._bucket.call("list_parts", resume.key, resume.upload_id)
            except BlobNotFoundError as exc:
                return await self._take_over_object(resume, exc)
            stored = {part.number: part for part in listed}
        todo = missing_parts(parts, {part.number: part.size_bytes for part in stored.values()})
        self._arrived_bytes = size - sum(part.length_bytes for part in todo)
        data = bytearray(size)
        await self._transfer_parts(todo, stored, data)
        upload = self._upload
        try:
            info = await self._bucket.call(
                "complete_upload", upload.key, upload.upload_id, [stored[part.number] for part in parts]
            )
        except BlobNotFoundError as exc:
            raise _StartOverError from exc
        if len(todo) < len(parts):
            await self._read_back(info)
        else:
            await self._check_whole(data)
        return self._fetched(info, is_all_ours=len(todo) == len(parts))

    async def _take_over_object(self, upload, gone):
        """Use the object that an earlier owner completed before it died."""
        info = await self._bucket.call("head", upload.key)
        if info is None or info.size_bytes != self._descriptor.size_bytes:
            raise _StartOverError from gone
        await self._read_back(info)
        return self._fetched(info, is_all_ours=False)

    async def _attempt_whole(self, size):
        self._arrived_bytes = 0
        data = await self._read(0, size)
        self._check(data)
        info = await self._bucket.call("put", self._owner.new_key(self._descriptor.digest), data, sent=size)
        return self._fetched(info, is_all_ours=True)

    async def _begin_upload(self):
        key = self._owner.new_key(self._descriptor.digest)
        upload = UploadState(key=key, upload_id=await self._bucket.call("begin_upload", key), part_bytes=PART_BYTES)
        self._upload = upload
        await self._flights.begin_upload(self._fence, upload)
        return upload

    async def _undo_upload(self):
        upload, self._upload = self._upload, None
        if upload is None:
            return
        await self._flights.drop_upload(self._fence)
        with contextlib.suppress(ClusterError):
            await self._bucket.call("abort_upload", upload.key, upload.upload_id)
            await self._bucket.call("delete", upload.key)

    async def _check_whole(self, data):
        try:
            self._check(data)
        except (_StartOverError, ClusterError):
            await self._undo_upload()
            raise

    def _check(self, data):
        """Blame the source where the bytes are not the digest's."""
        actual = digest_of(data)
        if actual == self._descriptor.digest:
            return
        index = self._state.index
        if self._contributors - {index}:
            raise _StartOverError
        error = DigestMismatchError(self._descriptor.digest, actual, self._sources[index].source)
        decision = self._state.failed(error, draw=0.0)
        if isinstance(decision, GiveUp):
            raise decision.error
        raise _StartOverError

    async def _read_back(self, info):
        if digest_of(await self._bucket.read(info.key, info.size_bytes)) != self._descriptor.digest:
            raise _StartOverError

    def _fetched(self, info, *, is_all_ours):
        origins = {self._sources[index].source for index in self._contributors}
        blob = BlobRecord(
            digest=self._descriptor.digest,
            key=info.key,
            size_bytes=info.size_bytes,
            etag=info.etag,
            fence=self._fence.number,
            source=origins.pop() if is_all_ours and len(origins) == 1 else "",
        )
        source = self._sources[self._state.index].source
        return Fetched(blob=blob, bytes_fetched=self._fetched_bytes, source=source)

    # -- parts -------------------------------------------------------------------------------------------------

    async def _transfer_parts(self, todo, stored, data):
        waiting = deque(todo)
        readers = RANGES if self._descriptor.size_bytes >= _PARALLEL_FROM_BYTES else 1

        async def read():
            while waiting:
                part = waiting.popleft()
                data[part.offset : part.end] = got = await self._read(part.offset, part.length_bytes)
                await self._store(part, got, stored)

        await all_or_nothing(read() for _ in range(min(readers, len(todo))))

    async def _store(self, part, data, stored):
        upload = self._upload
        try:
            done = await self._bucket.call(
                "upload_part", upload.key, upload.upload_id, part.number, memoryview(data), sent=part.length_bytes
            )
        except BlobNotFoundError as exc:
            raise _StartOverError from exc
        await self._flights.record_part(self._fence, done.number, done.etag)
        stored[done.number] = done

    async def _read(self, offset, length):
        """Read a range, from whichever source gives it."""
        owner = self._owner
        while True:
            index = self._state.index
            try:
                async with owner._limiter.slot(owner._registry.host, deadline_s=_SLOT_DEADLINE_S):
                    data = await owner._registry.read(
                        owner._process,
                        owner._link,
                        self._sources[index].repository,
                        (self._descriptor.digest, offset, length),
                    )
            except ClusterError as exc:
                await self._failed(exc, index)
                continue
            self._state.progressed()
            self._contributors.add(index)
            self._fetched_bytes += length
            self._arrived_bytes += length
            await self._tell()
            return data

    async def _tell(self):
        """Tell how far it is, now and then."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._reported_s < _REPORT_EVERY_S:
            return
        self._reported_s = now_s
        current, total = self._arrived_bytes, self._descriptor.size_bytes
        self._report(current, total)
        try:
            await self._flights.report(self._fence, current, total)
        except StaleFenceError:
            raise
        except UnavailableError:
            pass  # progress is a courtesy

    async def _failed(self, error, index):
        if index != self._state.index:
            return
        decision = self._state.failed(error, draw=self._owner._rng.random())
        match decision:
            case TryAgain(delay_s=delay_s):
                await asyncio.sleep(delay_s)
            case NextSource():
                pass
            case StartOver():
                raise _StartOverError from error
            case GiveUp(error=final):
                raise final from error
            case _:
                assert_never(decision)


class VirtualTransfers:
    """:class:`cluster.fetch.runner.Transfers` of one process."""

    transfer = Transfer

    def __init__(self, *, process, link, flights, bucket, registry, limiter, rng):
        self._process = process
        self._link = link
        self._flights = flights
        self._bucket = bucket
        self._registry = registry
        self._limiter = limiter
        self._rng = rng
        self._numbers = itertools.count()

    async def fetch(self, descriptor, callers, fence, upload, report):
        """See :class:`cluster.fetch.runner.Transfers`."""
        live = [caller for caller in callers() if caller.is_live()]
        if not live:
            raise SessionGoneError("of every caller")
        sources = [handle for caller in live for handle in caller.providers.get(descriptor.digest, ())]
        if not sources:
            raise NeedsRemoteProvidersError((descriptor.digest,))
        return await self.transfer(self, descriptor, sources, fence, report).run(upload)

    def settle(self, fetched, *, committed):
        """Do nothing: what is on the node's disk is not modelled."""

    def new_key(self, digest):
        """Return an object key that no other upload has."""
        return f"blobs/sha256/{hex_of(digest)}/{self._process.name}-{next(self._numbers)}"
