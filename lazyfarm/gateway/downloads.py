"""Blobs of an image, straight from S3 to a driver outside the cluster: what an export reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import aiohttp

from cluster import gateway as calls
from cluster.digest import Digest
from cluster.errors import BlobNotFoundError, UnavailableError
from cluster.ports import ByteStream
from cluster.ref import BlobRecord
from lazyfarm.gateway.access import Access
from lazyfarm.gateway.link import GatewayLink

#: Bytes that wait for a slow reader, for each object that is open: aiohttp takes twice as many.
_BUFFER_BYTES = 1024 * 1024
#: Breaks in a row without a byte between them, and seconds between.
_BREAKS = 5
_PAUSE_S = 0.5
#: Seconds that S3 may be silent.
_SILENT_S = 60.0
_OK = (200, 206)
_FORBIDDEN = 403
#: The object is gone, or is another.
_GONE = (404, 412)


class Downloads:
    """The blobs of one image, as an exporter has the content store and its records.

    Made on the loop that :meth:`open`'s readers, which are threads, ask; it runs for as long as they read.

    Args:
        link: The way to the gateway.
        access: Whose certificates count.
        call: Names the image; its layers are present.
    """

    def __init__(self, link: GatewayLink, access: Access, call: calls.RefCall) -> None:
        self._gateway = link
        self._access = access
        self._call = call
        self._loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENT_S, sock_read=_SILENT_S)
        # Blobs are wanted as they are stored, whatever is said of their encoding.
        self._http = aiohttp.ClientSession(timeout=timeout, read_bufsize=_BUFFER_BYTES, auto_decompress=False)
        self._ways: dict[Digest, calls.BlobWay] = {}
        self._urls: dict[str, str] = {}
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    # -- as the records are asked ------------------------------------------------------------------------------

    async def blobs(self, digests: Sequence[Digest]) -> list[BlobRecord | None]:
        """Tell which of the image's blobs are present."""
        if not self._ways:
            await self._ask()
        return [self._ways[digest].blob if digest in self._ways else None for digest in digests]

    async def mark_absent(self, blob: BlobRecord, reason: str) -> bool:  # noqa: ARG002 - the gateway finds its own
        """Have the gateway read a blob that was found damaged, and turn it lazy if it finds the same."""
        return await self._gateway.call(calls.DAMAGED, calls.Named(name=blob.digest))

    async def _ask(self) -> None:
        found = await self._gateway.call(calls.EXPORT, self._call)
        self._ways = {way.blob.digest: way for way in found.ways}
        self._urls = {way.blob.key: way.url for way in found.ways}

    # -- as the store is ---------------------------------------------------------------------------------------

    @contextmanager
    def open(self, key: str) -> Iterator[ByteStream]:
        """Open an object for reading, in a thread.

        Raises:
            From the stream, BlobNotFoundError: it is gone. UnavailableError: S3 doesn't answer.
        """
        download = _Download(self, key)
        try:
            yield download
        finally:
            self._loop.call_soon_threadsafe(download.drop)

    def wait(self, download: _Download, size: int) -> bytes:
        """Return the next bytes of an object; for threads."""
        return asyncio.run_coroutine_threadsafe(download.read(size), self._loop).result()

    async def get(self, key: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """Ask S3 for an object; with a new URL if this one's time is over."""
        url = self._url(key)
        answer = await self._http.get(url, headers=headers, ssl=self._access.trust_of(url))
        if answer.status != _FORBIDDEN:
            return answer
        answer.close()
        async with self._asking:
            if self._urls.get(key) == url:  # else another reader has asked
                await self._ask()
        url = self._url(key)
        return await self._http.get(url, headers=headers, ssl=self._access.trust_of(url))

    def _url(self, key: str) -> str:
        if key not in self._urls:  # it is another upload's by now
            raise BlobNotFoundError(key, "the content store")
        return self._urls[key]


class _Download:
    """An object's bytes in order; goes on after a break, with the same object."""

    def __init__(self, downloads: Downloads, key: str) -> None:
        self._downloads = downloads
        self._key = key
        self._answer: aiohttp.ClientResponse | None = None
        self._etag = ""
        self._next = 0
        self._end: int | None = None
        self._breaks = 0

    def readinto(self, buffer: memoryview) -> int:
        """Read on; see :class:`cluster.ports.ByteStream`."""
        data = self._downloads.wait(self, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    async def read(self, size: int) -> bytes:
        """Return up to *size* bytes; none at the end."""
        while self._end is None or self._next < self._end:
            try:
                if self._answer is None:
                    self._answer = await self._connect()
                data = await self._answer.content.read(size)
                if not data and self._next != self._end:
                    raise ConnectionResetError("the connection ended before the object did")
            except (aiohttp.ClientError, TimeoutError, OSError) as exc:
                self.drop()
                self._breaks += 1
                if self._breaks >= _BREAKS:
                    # By its type where it may name the URL, which opens the way.
                    reason = str(exc) if isinstance(exc, ConnectionError) else type(exc).__name__
                    raise UnavailableError(f"S3's object {self._key}", reason) from None
                await asyncio.sleep(_PAUSE_S)
                continue
            self._breaks = 0
            self._next += len(data)
            return data
        return b""

    async def _connect(self) -> aiohttp.ClientResponse:
        headers = {"accept-encoding": "identity"}
        if self._next:
            headers |= {"range": f"bytes={self._next}-", "if-match": self._etag}
        answer = await self._downloads.get(self._key, headers)
        wanted = _OK[1] if self._next else _OK[0]
        if answer.status != wanted or answer.content_length is None:
            answer.close()
            if answer.status in _GONE:
                raise BlobNotFoundError(self._key, "the content store")
            if answer.status == _FORBIDDEN:
                raise UnavailableError(f"S3's object {self._key}", f"it answered {answer.status}")
            raise ConnectionError(f"it answered {answer.status}")
        self._etag = answer.headers.get("etag", "")
        self._end = self._next + answer.content_length
        return answer

    def drop(self) -> None:
        """Give the connection back, or close it where bytes are left on it."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()
