"""The content store on S3, through boto3's low-level client."""

from __future__ import annotations

import io
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Self, cast
from uuid import uuid4

from cluster import tracing
from cluster.config import S3Config
from cluster.errors import BlobNotFoundError, ClusterError, UnavailableError, UnsafeStoreError
from cluster.metrics import S3_SECONDS
from cluster.ports import ObjectInfo, Part
from cluster.tracing import Span, SpanKind
from storage.s3_errors import translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, CopySourceTypeDef

_CONNECT_S = 10.0
_PROBE_KEY = "doctor/probe-{nonce}"
#: A stream that brought this much since its last break starts its count of tries anew.
_PROGRESS_BYTES = 1024**2
#: S3 copies objects of up to this size at once, larger ones in parts.
_COPY_BYTES = 5 * 1024**3
_COPY_PART_BYTES = 1024**3
_BACKOFF_S = 0.1
_REFUSED = frozenset({401, 403, 429})
_SERVER_ERROR = 500
#: Where botocore's context of a call keeps when the call began.
_STARTED_S = "lazyfarm_started_s"
#: And its span.
_SPAN = "lazyfarm_span"
_BACKOFF_MAX_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCheck:
    """What :meth:`S3ContentStore.check` found; it raises where something is wrong."""

    endpoint: str
    bucket: str
    #: Seconds that writing, reading and deleting one small object took.
    put_s: float
    get_s: float
    delete_s: float


class S3ContentStore:
    """:class:`cluster.ports.ContentStore` on an S3 bucket.

    One client, shared by all threads, with ``config.connections`` connections. boto3 is imported and the
    client made on first use, so that a command that only names the store starts fast. Requests are
    retried by botocore ("standard" mode: exponential, with jitter, under a quota) up to
    ``config.attempts`` tries.

    On plain HTTP botocore signs each body's sha256, which servers check: bytes damaged on the way are
    refused. It costs 5 ms for 8 MiB, in the thread that sends.
    """

    def __init__(self, config: S3Config) -> None:
        self._config = config
        self._shared = _Client(config)

    @property
    def bucket(self) -> str:
        """Return the bucket's name."""
        return self._config.bucket

    def in_bucket(self, bucket: str) -> S3ContentStore:
        """Return a store on another bucket, over the same connections."""
        other = S3ContentStore(replace(self._config, bucket=bucket))
        other._shared = self._shared
        return other

    def __repr__(self) -> str:
        return f"S3ContentStore({self._where})"

    @property
    def _where(self) -> str:
        return f"s3://{self._config.bucket} at {self._config.endpoint or 'AWS'}"

    # -- whole objects ------------------------------------------------------------------------------

    def put(self, key: str, data: bytes | memoryview) -> ObjectInfo:
        """Write an object whole, in one request; see the port."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        with translated(self._where, "write", key):
            answer = self._client.put_object(
                Bucket=self._config.bucket, Key=key, Body=_body_of(view), ContentLength=view.nbytes
            )
        return ObjectInfo(key=key, size_bytes=view.nbytes, etag=_bare(answer["ETag"]))

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of an object, or None where there is none."""
        try:
            with translated(self._where, "look up", key):
                answer = self._client.head_object(Bucket=self._config.bucket, Key=key)
        except BlobNotFoundError:
            return None
        return ObjectInfo(key=key, size_bytes=answer["ContentLength"], etag=_bare(answer["ETag"]))

    def open(self, key: str, offset: int = 0, length: int | None = None) -> S3ObjectStream:
        """Open an object, or *length* bytes of it from *offset*; see the port.

        A range that reaches over the end gives what is there.
        """
        stream = S3ObjectStream(self._client, self._config, self._where, key, offset=offset, length=length)
        stream.connect()
        return stream

    def delete(self, key: str) -> None:
        """Delete an object; does nothing where there is none."""
        try:
            with translated(self._where, "delete", key):
                self._client.delete_object(Bucket=self._config.bucket, Key=key)
        except BlobNotFoundError:
            return

    def copy_from(self, bucket: str, source: ObjectInfo, key: str) -> None:
        """Copy an object of *bucket* here, within S3: no byte of it comes to this process.

        Raises:
            BlobNotFoundError: it is gone, or no longer the one that *source* is.
            UnavailableError: no answer after retries; the copy may or may not be there.
        """
        origin: CopySourceTypeDef = {"Bucket": bucket, "Key": source.key}
        if source.size_bytes <= _COPY_BYTES:
            with translated(self._where, "copy to", key):
                self._client.copy_object(
                    Bucket=self._config.bucket, Key=key, CopySource=origin, CopySourceIfMatch=f'"{source.etag}"'
                )
            return
        upload_id = self.begin_upload(key)
        try:
            parts = []
            for number, start in enumerate(range(0, source.size_bytes, _COPY_PART_BYTES), start=1):
                end = min(start + _COPY_PART_BYTES, source.size_bytes)
                with translated(self._where, "copy to", key):
                    answer = self._client.upload_part_copy(
                        Bucket=self._config.bucket,
                        Key=key,
                        UploadId=upload_id,
                        PartNumber=number,
                        CopySource=origin,
                        CopySourceRange=f"bytes={start}-{end - 1}",
                        CopySourceIfMatch=f'"{source.etag}"',
                    )
                etag = _bare(answer["CopyPartResult"]["ETag"])
                parts.append(Part(number=number, size_bytes=end - start, etag=etag))
            self.complete_upload(key, upload_id, parts)
        except BaseException:
            with suppress(ClusterError):
                self.abort_upload(key, upload_id)
            raise

    def copy(self, source: ObjectInfo, key: str) -> None:
        """Copy an object within the bucket; see the port."""
        self.copy_from(self._config.bucket, source, key)

    def objects(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """List the objects under *prefix*, page by page."""
        with translated(self._where, "list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._config.bucket, Prefix=prefix, StartAfter=after
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    yield ObjectInfo(key=found["Key"], size_bytes=found["Size"], etag=_bare(found["ETag"]))

    # -- multi-part uploads ---------------------------------------------------------------------------

    def begin_upload(self, key: str) -> str:
        """Start a multi-part upload and return its ID."""
        with translated(self._where, "start an upload of", key):
            return self._client.create_multipart_upload(Bucket=self._config.bucket, Key=key)["UploadId"]

    def upload_part(self, key: str, upload_id: str, number: int, data: memoryview) -> Part:
        """Upload part *number* straight from the caller's buffer; see the port."""
        view = data.cast("B")
        with translated(self._where, "upload a part of", key):
            answer = self._client.upload_part(
                Bucket=self._config.bucket,
                Key=key,
                UploadId=upload_id,
                PartNumber=number,
                Body=_body_of(view),
                ContentLength=view.nbytes,
            )
        return Part(number=number, size_bytes=view.nbytes, etag=_bare(answer["ETag"]))

    def presigned(self, key: str, *, upload_id: str = "", number: int = 0, ttl_s: float) -> str:
        """Return a URL to which whoever has it may PUT an object, or a part of an upload, for *ttl_s* seconds."""
        call: str = "put_object"
        params: dict[str, str | int] = {"Bucket": self._config.bucket, "Key": key}
        if upload_id:
            call, params = "upload_part", {**params, "UploadId": upload_id, "PartNumber": number}
        with translated(self._where, "sign", key):
            return self._client.generate_presigned_url(call, Params=params, ExpiresIn=int(ttl_s), HttpMethod="PUT")

    def presigned_read(self, key: str, *, ttl_s: float) -> str:
        """Return a URL at which whoever has it may GET an object, or a range of it, for *ttl_s* seconds."""
        params = {"Bucket": self._config.bucket, "Key": key}
        with translated(self._where, "sign", key):
            return self._client.generate_presigned_url(
                "get_object", Params=params, ExpiresIn=int(ttl_s), HttpMethod="GET"
            )

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """Return the parts that the store has, by number."""
        with translated(self._where, "list the parts of", key):
            pages = self._client.get_paginator("list_parts").paginate(
                Bucket=self._config.bucket, Key=key, UploadId=upload_id
            )
            parts = [
                Part(number=found["PartNumber"], size_bytes=found["Size"], etag=_bare(found["ETag"]))
                for page in pages
                for found in page.get("Parts", ())
            ]
        return sorted(parts, key=lambda part: part.number)

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part]) -> ObjectInfo:
        """Make the object of *parts*; see the port.

        An upload that is gone while an object of that size is there was completed before: by an earlier
        try whose answer was lost, or by an owner that died after it. Keys are unique to an upload, so
        nobody else's object can be there.
        """
        wanted: list[CompletedPartTypeDef] = [
            {"PartNumber": part.number, "ETag": f'"{part.etag}"'}
            for part in sorted(parts, key=lambda part: part.number)
        ]
        size_bytes = sum(part.size_bytes for part in parts)
        try:
            with translated(self._where, "complete the upload of", key):
                etag = self._complete(key, upload_id, wanted)
        except (BlobNotFoundError, UnavailableError) as exc:
            there = self.head(key)
            if there is not None and there.size_bytes == size_bytes:
                return there
            if isinstance(exc, UnavailableError):
                # Ceph 16 says 500 to completing an upload that was aborted: asking for its parts tells.
                self.list_parts(key, upload_id)
            raise
        return ObjectInfo(key=key, size_bytes=size_bytes, etag=etag)

    def _complete(self, key: str, upload_id: str, parts: list[CompletedPartTypeDef]) -> str:
        """Make the object; return its ETag. Swift calls the request invalid where it failed to look a part up."""
        client = self._client
        for attempt in itertools.count(1):
            try:
                answer = client.complete_multipart_upload(
                    Bucket=self._config.bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
                )
            except client.exceptions.ClientError as exc:
                if exc.response["Error"].get("Code") != "InvalidRequest" or attempt >= self._config.attempts:
                    raise
                pause_s = min(_BACKOFF_S * 2**attempt, _BACKOFF_MAX_S)
                time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  # so that many don't ask in step
            else:
                return _bare(answer["ETag"])
        raise AssertionError  # the last attempt raises

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Drop an upload; does nothing where there is none."""
        try:
            with translated(self._where, "abort the upload of", key):
                self._client.abort_multipart_upload(Bucket=self._config.bucket, Key=key, UploadId=upload_id)
        except BlobNotFoundError:
            return

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Return (key, upload ID) of the unfinished uploads under *prefix*."""
        with translated(self._where, "list uploads under", prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._config.bucket, Prefix=prefix
            )
            return [(found["Key"], found["UploadId"]) for page in pages for found in page.get("Uploads", ())]

    # -- the bucket -----------------------------------------------------------------------------------

    def ensure_bucket(self) -> bool:
        """Make the bucket unless it is there; tell whether it was made.

        Raises:
            UnsafeStoreError: S3 refuses, or the bucket belongs to somebody else.
            UnavailableError: no answer after retries.
        """
        bucket, region = self._config.bucket, self._config.region
        with translated(self._where, "make bucket", bucket):
            client = self._client
            try:
                client.head_bucket(Bucket=bucket)
            except client.exceptions.ClientError as exc:
                if exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:  # noqa: PLR2004 - HTTP
                    raise
            else:
                return False
            elsewhere: dict[str, Any] = (
                {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            )
            try:
                client.create_bucket(Bucket=bucket, **elsewhere)
            except client.exceptions.BucketAlreadyOwnedByYou:
                return False  # another process was quicker
        return True

    def check(self) -> StoreCheck:
        """Write, read and delete a small object, for ``lazyfarm doctor``.

        Raises:
            UnsafeStoreError: wrong credentials, no bucket, or not the bytes that were written.
            UnavailableError: no answer after retries.
            ConfigError: the credentials file can't be read.
        """
        key, data = _PROBE_KEY.format(nonce=uuid4().hex), uuid4().bytes
        started = time.monotonic()
        self.put(key, data)
        was_put = time.monotonic()
        buffer = memoryview(bytearray(len(data) + 1))
        with self.open(key) as stream:
            count = stream.readinto(buffer)
        was_read = time.monotonic()
        self.delete(key)
        was_deleted = time.monotonic()
        if bytes(buffer[:count]) != data:
            raise UnsafeStoreError(self._where, "other bytes than were written to it", "use another S3 server")
        return StoreCheck(
            endpoint=self._config.endpoint,
            bucket=self._config.bucket,
            put_s=was_put - started,
            get_s=was_read - was_put,
            delete_s=was_deleted - was_read,
        )

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._shared.close()

    @property
    def _client(self) -> S3Client:
        return self._shared.get()


class _Client:
    """One client, made on first use."""

    def __init__(self, config: S3Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._made: S3Client | None = None

    def get(self) -> S3Client:
        with self._lock:  # boto3's default session is not safe to make clients from at once
            if self._made is None:
                self._made = _make_client(self._config)
            return self._made

    def close(self) -> None:
        with self._lock:
            if self._made is not None:
                self._made.close()
                self._made = None


class S3ObjectStream:
    """An object's bytes in order, read straight into the caller's buffers; resumes after a break.

    Each resumption asks for the rest, of the same object (If-Match). ``config.attempts`` breaks without a
    megabyte between them are the end of it.
    """

    def __init__(
        self, client: S3Client, config: S3Config, where: str, key: str, *, offset: int, length: int | None
    ) -> None:
        self._client = client
        self._config = config
        self._where = where
        self._key = key
        self._next = offset
        self._end = None if length is None else offset + length
        self._etag = ""
        self._body: Any = None
        self._breaks = 0
        self._came_bytes = 0

    def __repr__(self) -> str:
        return f"S3ObjectStream({self._key!r}, next={self._next}, end={self._end})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Ask for what has not been read yet.

        Raises:
            BlobNotFoundError: no such object, or no longer the one that was begun.
            UnavailableError: no answer after retries.
        """
        self.close()
        if self._end is not None and self._next >= self._end:
            return
        wanted: dict[str, Any] = {"Bucket": self._config.bucket, "Key": self._key}
        if self._etag:
            wanted["IfMatch"] = f'"{self._etag}"'
        if self._next or self._end is not None:
            wanted["Range"] = f"bytes={self._next}-{'' if self._end is None else self._end - 1}"
        with translated(self._where, "read", self._key):
            try:
                answer = self._client.get_object(**wanted)
            except self._client.exceptions.ClientError as exc:
                if exc.response.get("Error", {}).get("Code") != "InvalidRange":
                    raise
                self._end = self._next  # begins at or after the end: nothing to read
                return
        self._etag = _bare(answer["ETag"])
        self._end = self._next + answer["ContentLength"]
        self._body = answer["Body"]

    def readinto(self, buffer: memoryview) -> int:
        """Read up to ``len(buffer)`` bytes; 0 at the end; see :class:`cluster.ports.ByteStream`."""
        while True:
            if self._end is not None and self._next >= self._end:
                self.close()
                return 0
            if self._body is None:
                self.connect()
                continue
            try:
                with translated(self._where, "read", self._key):
                    count = self._read_some(buffer)
            except UnavailableError:
                if not self._may_resume():
                    raise
                continue
            self._next += count
            self._came_bytes += count
            return count

    def close(self) -> None:
        """Give the connection back, or drop it where bytes are left on it."""
        body, self._body = self._body, None
        if body is None:
            return
        if self._end is not None and self._next >= self._end:
            body._raw_stream.release_conn()  # noqa: SLF001 - as StreamingBody does after a whole read
        else:
            body.close()

    def _read_some(self, buffer: memoryview) -> int:
        # The http.client response under botocore and urllib3 reads from the socket into the buffer; their
        # own readinto makes a bytes object of each read and copies it.
        count: int = self._body._raw_stream._fp.readinto(buffer)  # noqa: SLF001
        if count == 0 and len(buffer):
            raise ConnectionResetError("the connection ended before the object did")
        return count

    def _may_resume(self) -> bool:
        """Count a break; wait a little and say yes unless it was the last."""
        self.close()
        if self._came_bytes >= _PROGRESS_BYTES:
            self._breaks = 0
        self._came_bytes = 0
        self._breaks += 1
        if self._breaks >= self._config.attempts:
            return False
        time.sleep(random.uniform(0.0, min(_BACKOFF_MAX_S, _BACKOFF_S * 2**self._breaks)))  # noqa: S311 - jitter
        return True


class _ViewBody(io.RawIOBase):
    """A request body over the caller's buffer: no copy, and rewound for a retry.

    botocore takes bytes, bytearray or a file. ``read`` gives the whole rest as one view whatever is asked
    for, so that hashing and sending each are one call that lets other threads run.
    """

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._position = 0

    def __len__(self) -> int:
        return self._view.nbytes

    def read(self, size: int = -1) -> bytes:
        if size == 0 or self._position >= self._view.nbytes:
            return b""
        rest = self._view[self._position :]
        self._position = self._view.nbytes
        return rest  # type: ignore[return-value]  # http.client and hashlib take any buffer

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._view.nbytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position


def _body_of(view: memoryview) -> IO[bytes]:
    return cast("IO[bytes]", _ViewBody(view))


def _make_client(config: S3Config) -> S3Client:
    import boto3  # noqa: PLC0415 - 0.3 s, which commands that need no S3 are spared
    from botocore.config import Config as ClientConfig  # noqa: PLC0415 - likewise
    from botocore.session import Session  # noqa: PLC0415 - likewise

    core = Session()
    if config.credentials_file:
        from storage.s3_credentials import FileProvider  # noqa: PLC0415 - likewise

        # Before all others: what is configured isn't overruled by what some environment has.
        provider = FileProvider(config.credentials_file)
        core.get_component("credential_provider").insert_before("env", provider)
    client = boto3.session.Session(botocore_session=core).client(
        "s3",
        endpoint_url=config.endpoint or None,
        region_name=config.region,
        verify=config.ca_file or None,
        config=ClientConfig(
            connect_timeout=min(_CONNECT_S, config.timeout_s),
            read_timeout=config.timeout_s,
            max_pool_connections=config.connections,
            tcp_keepalive=True,
            # As requests are signed anyway; addresses that are handed out would be in the old way.
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": config.attempts},
            # Ceph refuses the unsigned trailers that newer botocore sends by default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # One address for all buckets, as embedded and on-premises servers have it.
            s3={"addressing_style": "path" if config.endpoint else "auto"},
        ),
    )
    events = client.meta.events
    events.register("before-call.s3", _note_start)
    events.register("after-call.s3", _note_end)
    events.register("after-call-error.s3", _note_end)
    for operation in ("CopyObject", "UploadPartCopy"):
        events.register(f"before-call.s3.{operation}", _say_as_ceph_reads)
    return client


def _say_as_ceph_reads(params: dict[str, Any], **_: object) -> None:
    """Say what a copy's source must be under the name that Ceph looks for, too: it does not know S3's own."""
    headers = params["headers"]
    if condition := headers.get("x-amz-copy-source-if-match"):
        headers["x-amz-copy-if-match"] = condition


def _note_start(event_name: str, context: dict[str, Any], **_: Any) -> None:
    context[_STARTED_S] = time.monotonic()
    # Until the head of the answer, as the histogram is.
    operation = event_name.rpartition(".")[2]
    about = {"rpc.system.name": "aws-api", "rpc.method": f"S3/{operation}"}
    context[_SPAN] = tracing.start(f"S3/{operation}", tracing.current(), about, kind=SpanKind.CLIENT)


def _note_end(
    event_name: str,
    context: dict[str, Any],
    parsed: dict[str, Any] | None = None,
    exception: BaseException | None = None,
    **_: Any,
) -> None:
    """Count a call that has ended: *event_name* ends in its operation, *parsed* is missing where no answer came."""
    status = 0 if parsed is None else parsed["ResponseMetadata"]["HTTPStatusCode"]
    # That there is no such object, or no more of it, is an answer.
    is_failed = status == 0 or status in _REFUSED or status >= _SERVER_ERROR
    S3_SECONDS.observe(
        time.monotonic() - context[_STARTED_S],
        operation=event_name.rpartition(".")[2],
        outcome="failed" if is_failed else "ok",
    )
    span: Span = context[_SPAN]
    if status:
        span.put({"http.response.status_code": status})
    span.end(exception or (UnavailableError("S3", f"HTTP {status}") if is_failed else None))


def _bare(etag: str) -> str:
    """Return an ETag without its quotes: some servers send it without."""
    return etag.strip('"')
