"""Blobs into a registry: mounted from another repository where it can be, else uploaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

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
from storage.registry.answers import FORBIDDEN, UNAUTHORIZED, error_detail
from storage.registry.calls import ACCEPTED, CREATED, Call, RegistryCalls, expect
from storage.registry.challenge import drop_scope, pull_scope, push_scope
from storage.registry.endpoint import Endpoint
from storage.registry.pool import AuthorizationPool
from storage.registry.pump import StreamPump
from storage.registry.transport import Answer, Transport, retrying

#: Seconds without a byte taken by the registry, or read from the stream, until an upload is given up.
_STALL_S = 120.0
#: Seconds that a registry may take to commit a blob whose last byte it has: it may hash or copy it.
_COMMIT_S = 600.0
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
            data=b"",
        )
        try:
            answer = await self._calls.make(call)
        except AccessDeniedError:
            return False
        if answer.status == ACCEPTED:
            # Not mounted: the registry began an upload instead.
            location = _location(endpoint, url, answer)
            await self._drop(endpoint, location, authorizer)
        return answer.status == CREATED

    async def upload(self, upload: Upload) -> None:
        """Upload a blob in one PUT; from the start again after a transient failure."""

        async def attempt() -> None:
            await self._upload_once(upload)

        await retrying(self._calls.policy(upload.endpoint), attempt)

    async def _upload_once(self, upload: Upload) -> None:
        url = upload.endpoint.upload_url()
        begun = await self._calls.once(
            Call(
                method="POST",
                url=url,
                endpoint=upload.endpoint,
                scopes=upload.scopes,
                authorizer=upload.authorizer,
                what=upload.what,
                data=b"",
            )
        )
        expect(begun, ACCEPTED, doing=f"beginning the {upload.what}")
        location = _location(upload.endpoint, url, begun)
        try:
            await self._put(
                upload, f"{location}{'&' if urlsplit(location).query else '?'}digest={upload.descriptor.digest}"
            )
        except BaseException:
            # Also when cancelled: an upload that nobody ends stays in the registry's storage for a week.
            await asyncio.shield(self._drop(upload.endpoint, location, upload.authorizer))
            raise

    async def _put(self, upload: Upload, url: str) -> None:
        # The registry chooses the address; only to itself is the caller's authorization sent along.
        own = _is_own(upload.endpoint, url)
        sent = None
        if own:
            sent = await self._authorizations.header(upload.authorizer, upload.endpoint, upload.scopes)
        try:
            async with StreamPump(upload.open_stream) as pump, self._calls.slot(upload.endpoint):
                answer = await self._send(upload, url, sent, pump)
        except ClusterError as exc:
            await self._calls.tell_limiter(upload.endpoint, exc)
            raise
        await self._calls.tell_limiter(upload.endpoint, None)
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
        )
        with suppress(ClusterError, TimeoutError):
            async with asyncio.timeout(_CANCEL_S):
                await self._calls.once(call)


def _location(endpoint: Endpoint, url: str, answer: Answer) -> str:
    header = answer.headers.get("Location", "")
    if not header:
        raise RegistryProtocolError(f"beginning an upload to {endpoint.source}", answer.status, "no Location")
    location = urljoin(url, header)
    # A registry behind a TLS proxy that doesn't know of it names itself with http://.
    if location.startswith(f"http://{endpoint.registry}/") and not endpoint.plain_http:
        location = "https" + location.removeprefix("http")
    return location


def _is_own(endpoint: Endpoint, url: str) -> bool:
    return url.startswith(f"{endpoint.scheme}://{endpoint.registry}/")
