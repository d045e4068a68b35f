"""Blobs into a registry: mounted from another repository where it can be, else uploaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import (
    AccessDeniedError,
    ClusterError,
    DeadlineExceededError,
    RegistryProtocolError,
    SizeMismatchError,
    UnavailableError,
)
from cluster.ports import Authorizer, ByteStream
from cluster.quota import RequestKind
from storage.registry.answers import FORBIDDEN, UNAUTHORIZED, error_detail, of_redirect_target
from storage.registry.calls import ACCEPTED, CREATED, Call, RegistryCalls, expect
from storage.registry.challenge import drop_scope, pull_scope, push_scope
from storage.registry.endpoint import Endpoint, joined, web_address
from storage.registry.pool import AuthorizationPool
from storage.registry.pump import StreamPump
from storage.registry.transport import Answer, Transport, retrying
from storage.to_the_end import to_the_end

#: Seconds without a byte taken by the registry, or read from the stream, until an upload is given up.
_STALL_S = 120.0
#: Seconds that a registry may take to commit a blob whose last byte it has: it may hash or copy it.
_COMMIT_S = 600.0
#: Bytes of one piece of a blob that is forwarded, unless the registry wants larger ones; that much is in memory.
PIECE_BYTES = 8 * 1024**2
#: The largest pieces that a registry may want.
_MOST_PIECE_BYTES = 32 * 1024**2
#: Seconds that dropping a begun upload may take.
_CANCEL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What is to be uploaded, where to, and for whom."""

    endpoint: Endpoint
    descriptor: Descriptor
    #: Opens the blob from its first byte; called in a thread, once for each try.
    open_stream: Callable[[], AbstractContextManager[ByteStream]]
    authorizer: Authorizer
    #: Called on the event loop with the bytes sent so far in this try.
    on_progress: Callable[[int], None]

    @property
    def what(self) -> str:
        """Return its name in messages."""
        return f"upload of blob {self.descriptor.digest} to {self.endpoint.source}"

    @property
    def scopes(self) -> tuple[str, ...]:
        """Return what it needs to be allowed to do."""
        return (push_scope(self.endpoint.repository),)


class Uploader:
    """Puts blobs into registries; see :class:`storage.registry.client.RegistryClient` for what is raised."""

    def __init__(self, *, calls: RegistryCalls, transport: Transport, authorizations: AuthorizationPool) -> None:
        self._calls = calls
        self._transport = transport
        self._authorizations = authorizations

    def __repr__(self) -> str:
        return f"<Uploader over {self._transport!r}>"

    async def mount(self, endpoint: Endpoint, digest: Digest, from_repository: str, authorizer: Authorizer) -> bool:
        """Make a blob of another repository of the same registry appear here; False where that can't be."""
        url = endpoint.upload_url(mount=digest, from_=from_repository)
        call = Call(
            method="POST",
            url=url,
            endpoint=endpoint,
            # Asked for together: with a token for the target alone the registry can't read the other.
            scopes=(push_scope(endpoint.repository), pull_scope(from_repository)),
            authorizer=authorizer,
            what=f"mount of blob {digest} from {from_repository} in {endpoint.source}",
            kind=RequestKind.PUSH,
            data=b"",
        )
        try:
            answer = await self._calls.make(call)
        except AccessDeniedError:
            return False
        if answer.status == ACCEPTED:
            # Not mounted: the registry began an upload instead.
            location = _location(endpoint, url, answer)
            await to_the_end(self._drop(endpoint, location, authorizer))
        return answer.status == CREATED

    async def upload(self, upload: Upload) -> None:
        """Upload a blob in one PUT; from the start again after a transient failure."""

        async def attempt() -> None:
            await self._upload_once(upload)

        await retrying(self._calls.policy(upload.endpoint), attempt)

    async def forward(self, upload: Upload, verified: Callable[[], Awaitable[None]]) -> None:
        """Upload a blob in pieces, each once it is here, and the last once *verified* returns. One try.

        OCI distribution-spec v1.1, "Pushing a blob in chunks". Each piece is a request of its own, and whole in
        memory before that begins: the host's slots are never held by who waits for bytes, which may need a slot of
        the same host, or of one whose slots wait for ours (BuildKit 7153f5a9b).
        """
        begun, location = await self._begin(upload)
        pieces = _Pieces(location)
        try:
            await self._forward_to(upload, pieces, _piece_bytes(upload, begun), verified)
        except BaseException:
            # Cancelled while it drops, too: both happen when the bytes turn out wrong while they are forwarded.
            await to_the_end(self._drop(upload.endpoint, pieces.location, upload.authorizer))
            raise

    async def _forward_to(
        self, upload: Upload, pieces: _Pieces, piece_bytes: int, verified: Callable[[], Awaitable[None]]
    ) -> None:
        size_bytes = upload.descriptor.size_bytes
        async with StreamPump(upload.open_stream) as pump:
            async for chunk in pump.chunks():
                pieces.held.append(chunk)
                if pieces.sent_bytes + pieces.held_bytes > size_bytes:
                    break
                # The last piece is never sent on its own: it goes with the request that makes a blob of them.
                if pieces.held_bytes >= piece_bytes and pieces.sent_bytes + pieces.held_bytes < size_bytes:
                    answer = await self._send_piece(upload, "PATCH", pieces.location, pieces, deadline_s=_STALL_S)
                    expect(answer, ACCEPTED, doing=upload.what)
                    pieces.sent(_location(upload.endpoint, pieces.location, answer))
                    upload.on_progress(pieces.sent_bytes)
        if pieces.sent_bytes + pieces.held_bytes != size_bytes:
            raise SizeMismatchError(
                upload.descriptor.digest, size_bytes, pieces.sent_bytes + pieces.held_bytes, "the stream to upload"
            )
        await verified()
        url = _with_digest(pieces.location, upload.descriptor.digest)
        answer = await self._send_piece(upload, "PUT", url, pieces, deadline_s=_COMMIT_S)
        expect(answer, CREATED, doing=f"ending the {upload.what}")

    async def _send_piece(self, upload: Upload, method: str, url: str, pieces: _Pieces, *, deadline_s: float) -> Answer:
        if not _is_own(upload.endpoint, url):
            # The caller's authorization would go along with each piece.
            raise RegistryProtocolError(upload.what, ACCEPTED, "it takes the blob's bytes at another host")
        first, count = pieces.sent_bytes, pieces.held_bytes
        call = Call(
            method=method,
            url=url,
            endpoint=upload.endpoint,
            scopes=upload.scopes,
            authorizer=upload.authorizer,
            what=upload.what,
            kind=RequestKind.PUSH,
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(count),
                **({"Content-Range": f"{first}-{first + count - 1}"} if count else {}),
            },
            data=pieces.held if count else b"",
            # aiohttp has no limit on writing: the deadline is ours.
            limits=aiohttp.ClientTimeout(total=None, sock_connect=_STALL_S, sock_read=_COMMIT_S),
        )
        try:
            async with asyncio.timeout(deadline_s):
                return await self._calls.once(call)
        except TimeoutError as exc:
            raise DeadlineExceededError(upload.what, f"a piece was not taken in {deadline_s:.0f} s") from exc

    async def _begin(self, upload: Upload) -> tuple[Answer, str]:
        """Begin an upload; return the answer and where its bytes go."""
        url = upload.endpoint.upload_url()
        begun = await self._calls.once(
            Call(
                method="POST",
                url=url,
                endpoint=upload.endpoint,
                scopes=upload.scopes,
                authorizer=upload.authorizer,
                what=upload.what,
                kind=RequestKind.PUSH,
                data=b"",
            )
        )
        expect(begun, ACCEPTED, doing=f"beginning the {upload.what}")
        return begun, _location(upload.endpoint, url, begun)

    async def _upload_once(self, upload: Upload) -> None:
        _begun, location = await self._begin(upload)
        try:
            await self._put(upload, _with_digest(location, upload.descriptor.digest))
        except BaseException:
            # Also when cancelled: an upload that nobody ends stays in the registry's storage for a week.
            await to_the_end(self._drop(upload.endpoint, location, upload.authorizer))
            raise

    async def _put(self, upload: Upload, url: str) -> None:
        # The registry chooses the address; only to itself is the caller's authorization sent along.
        own = _is_own(upload.endpoint, url)
        sent = None
        if own:
            sent = await self._authorizations.header(upload.authorizer, upload.endpoint, upload.scopes)
        async with (
            StreamPump(upload.open_stream) as pump,
            self._calls.slot(upload.endpoint, upload.authorizer, RequestKind.PUSH) as slot,
        ):
            try:
                answer = await self._send(upload, url, sent, pump)
            except ClusterError as exc:
                # What is wrong with the stream to upload is no fault of the registry's.
                if pump.error is not exc:
                    await self._calls.tell(slot, exc if own else of_redirect_target(exc))
                raise
            await self._calls.tell(slot, answer)
        if answer.status == UNAUTHORIZED and own:
            # The token expired between POST and PUT; the next try, from the start, has another.
            await self._authorizations.renew(
                upload.authorizer, upload.endpoint, upload.scopes, challenge=answer.challenge, sent=sent
            )
            raise UnavailableError(upload.what, "the token expired meanwhile")
        if answer.status == FORBIDDEN:
            raise AccessDeniedError(upload.endpoint.repository, upload.endpoint.registry, error_detail(answer.body))
        expect(answer, CREATED, doing=f"ending the {upload.what}")

    async def _send(self, upload: Upload, url: str, authorization: str | None, pump: StreamPump) -> Answer:
        loop = asyncio.get_running_loop()
        size_bytes = upload.descriptor.size_bytes

        async def body() -> AsyncIterator[bytes]:
            total = 0
            async for chunk in pump.chunks():
                total += len(chunk)
                if total > size_bytes:
                    break
                yield chunk
                stall.reschedule(loop.time() + _STALL_S)
                upload.on_progress(total)
            if total != size_bytes:
                pump.error = SizeMismatchError(upload.descriptor.digest, size_bytes, total, "the stream to upload")
                raise pump.error
            stall.reschedule(loop.time() + _COMMIT_S)

        try:
            async with asyncio.timeout(_STALL_S) as stall:
                return await self._transport.exchange(
                    "PUT",
                    url,
                    host=upload.endpoint.registry,
                    what=upload.what,
                    authorization=authorization,
                    headers={"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)},
                    data=body() if size_bytes else b"",
                    # aiohttp has no limit on writing: the timeout above is moved on with every chunk.
                    limits=aiohttp.ClientTimeout(total=None, sock_connect=_STALL_S, sock_read=_COMMIT_S),
                )
        except TimeoutError as exc:
            raise DeadlineExceededError(upload.what, "the registry takes no more bytes") from exc
        except ClusterError as exc:
            if pump.error is not None and pump.error is not exc:
                raise pump.error from exc
            raise

    async def _drop(self, endpoint: Endpoint, location: str, authorizer: Authorizer) -> None:
        """Drop an upload that was begun; best effort, as registries drop them by themselves in the end."""
        if not _is_own(endpoint, location):
            return
        call = Call(
            method="DELETE",
            url=location,
            endpoint=endpoint,
            # A right that not everybody who may push has. Its token is one of its own, so that a refusal here
            # doesn't cost the other.
            scopes=(drop_scope(endpoint.repository),),
            authorizer=authorizer,
            what=f"dropping an upload to {endpoint.source}",
            kind=RequestKind.PUSH,
        )
        with suppress(ClusterError, TimeoutError):
            async with asyncio.timeout(_CANCEL_S):
                await self._calls.once(call)


@dataclass(slots=True)
class _Pieces:
    """How far a blob that is forwarded has come."""

    #: Where the next piece goes: the registry may say another address with each.
    location: str
    sent_bytes: int = 0
    #: What is here and not sent.
    held: list[bytes] = field(default_factory=list)

    @property
    def held_bytes(self) -> int:
        return sum(map(len, self.held))

    def sent(self, location: str) -> None:
        """Note that what was held is there, and where the next piece goes."""
        self.sent_bytes += self.held_bytes
        self.held = []
        self.location = location


def _piece_bytes(upload: Upload, begun: Answer) -> int:
    least = begun.headers.get("OCI-Chunk-Min-Length", "")
    wanted = int(least) if least.isdecimal() else 0
    if wanted > _MOST_PIECE_BYTES:
        raise RegistryProtocolError(upload.what, begun.status, f"it takes no pieces of less than {wanted} bytes")
    return max(PIECE_BYTES, wanted)


def _with_digest(location: str, digest: Digest) -> str:
    return f"{location}{'&' if urlsplit(location).query else '?'}digest={digest}"


def _location(endpoint: Endpoint, url: str, answer: Answer) -> str:
    header = answer.headers.get("Location", "")
    location = joined(url, header)
    if not header or web_address(location) is None:
        raise RegistryProtocolError(f"beginning an upload to {endpoint.source}", answer.status, "no Location")
    # A registry behind a TLS proxy that doesn't know of it names itself with http://.
    if location.startswith(f"http://{endpoint.registry}/") and not endpoint.plain_http:
        location = "https" + location.removeprefix("http")
    return location


def _is_own(endpoint: Endpoint, url: str) -> bool:
    return url.startswith(f"{endpoint.scheme}://{endpoint.registry}/")
