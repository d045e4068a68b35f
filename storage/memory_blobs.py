"""The content store in memory: a verified fake, for tests of what is above it."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self
from uuid import uuid4

from cluster.errors import BlobNotFoundError
from cluster.ports import ObjectInfo, Part


class MemoryContentStore:
    """:class:`cluster.ports.ContentStore` in a dictionary; passes the same contract suite as S3."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._uploads: dict[tuple[str, str], dict[int, tuple[bytes, str]]] = {}

    def __repr__(self) -> str:
        return f"MemoryContentStore(objects={len(self._objects)}, uploads={len(self._uploads)})"

    def put(self, key: str, data: bytes | memoryview) -> ObjectInfo:
        """Write an object whole."""
        copy = bytes(data)
        with self._lock:
            self._objects[key] = (copy, _etag(copy))
        return ObjectInfo(key=key, size_bytes=len(copy), etag=_etag(copy))

    def begin_upload(self, key: str) -> str:
        """Start a multi-part upload and return its ID."""
        upload_id = uuid4().hex
        with self._lock:
            self._uploads[key, upload_id] = {}
        return upload_id

    def upload_part(self, key: str, upload_id: str, number: int, data: memoryview) -> Part:
        """Upload part *number*."""
        copy = bytes(data)
        with self._lock:
            self._upload(key, upload_id)[number] = (copy, _etag(copy))
        return Part(number=number, size_bytes=len(copy), etag=_etag(copy))

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """Return the parts, by number."""
        with self._lock:
            parts = sorted(self._upload(key, upload_id).items())
        return [Part(number=number, size_bytes=len(data), etag=etag) for number, (data, etag) in parts]

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part]) -> ObjectInfo:
        """Make the object of *parts*; idempotent."""
        size_bytes = sum(part.size_bytes for part in parts)
        with self._lock:
            if (key, upload_id) not in self._uploads:
                there = self._objects.get(key)
                if there is None or len(there[0]) != size_bytes:
                    raise BlobNotFoundError(key, "memory")
                return ObjectInfo(key=key, size_bytes=size_bytes, etag=there[1])
            have = self._upload(key, upload_id)
            wanted = sorted(parts, key=lambda part: part.number)
            if any(part.number not in have or have[part.number][1] != part.etag for part in wanted):
                raise BlobNotFoundError(key, "memory")
            data = b"".join(have[part.number][0] for part in wanted)
            self._objects[key] = (data, _etag(data))
            del self._uploads[key, upload_id]
        return ObjectInfo(key=key, size_bytes=size_bytes, etag=_etag(data))

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Drop an upload."""
        with self._lock:
            self._uploads.pop((key, upload_id), None)

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Return the unfinished uploads under *prefix*."""
        with self._lock:
            return sorted(upload for upload in self._uploads if upload[0].startswith(prefix))

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of an object."""
        with self._lock:
            there = self._objects.get(key)
        return None if there is None else ObjectInfo(key=key, size_bytes=len(there[0]), etag=there[1])

    def open(self, key: str, offset: int = 0, length: int | None = None) -> MemoryStream:
        """Open an object or a range of it."""
        with self._lock:
            there = self._objects.get(key)
        if there is None:
            raise BlobNotFoundError(key, "memory")
        return MemoryStream(there[0][offset : None if length is None else offset + length])

    def delete(self, key: str) -> None:
        """Delete an object."""
        with self._lock:
            self._objects.pop(key, None)

    def copy(self, source: ObjectInfo, key: str) -> None:
        """Copy an object."""
        with self._lock:
            there = self._objects.get(source.key)
            if there is None or there[1] != source.etag:
                raise BlobNotFoundError(source.key, "memory")
            self._objects[key] = there

    def objects(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """List the objects under *prefix*."""
        with self._lock:
            found = sorted((key, len(data), etag) for key, (data, etag) in self._objects.items())
        for key, size_bytes, etag in found:
            if key.startswith(prefix) and key > after:
                yield ObjectInfo(key=key, size_bytes=size_bytes, etag=etag)

    def _upload(self, key: str, upload_id: str) -> dict[int, tuple[bytes, str]]:
        if (key, upload_id) not in self._uploads:
            raise BlobNotFoundError(key, "memory")
        return self._uploads[key, upload_id]


class MemoryStream:
    """Bytes in memory as a :class:`cluster.ports.ByteStream`."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes; 0 at the end."""
        return self._file.readinto(buffer)

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
