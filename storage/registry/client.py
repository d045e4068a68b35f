"""The registry client: manifests and configs in, blobs and manifests out. Control traffic, asynchronous.

Follows the OCI distribution-spec v1.1. Bytes of layers that come *in* go another way, see
:mod:`storage.registry.blob`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, TypeVar

import structlog

from cluster.config import Config
from cluster.descriptor import Descriptor
from cluster.digest import Digest, digest_of, is_digest
from cluster.errors import (
    BlobNotFoundError,
    ContentError,
    DigestMismatchError,
    InternalError,
    ManifestNotFoundError,
    RegistryError,
    RegistryProtocolError,
    UnavailableError,
)
from cluster.image import (
    ACCEPTED_MANIFESTS,
    MAX_MANIFEST_BYTES,
    Index,
    Manifest,
    ResolvedImage,
    assemble,
    choose,
    parse_manifest,
    verify,
    verify_descriptor,
)
from cluster.ports import Authorizer, ByteStream, HostLimiter
from cluster.provider import ProviderHandle
from cluster.quota import RequestKind
from cluster.reference import ImageReference, Platform
from storage.registry.answers import NOT_FOUND
from storage.registry.calls import CREATED, OK, Call, RegistryCalls, expect
from storage.registry.challenge import pull_scope, push_scope
from storage.registry.endpoint import Endpoint, endpoints, origin
from storage.registry.pool import AuthorizationPool
from storage.registry.transport import Answer, Transport
from storage.registry.upload import Upload, Uploader

T = TypeVar("T")

_OF_MANIFESTS = {"Accept": ", ".join(ACCEPTED_MANIFESTS)}

#: Returns the bytes of a digest where the caller has them already, else None.
Have = Callable[[Digest], Awaitable[bytes | None]]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Documents:
    """A platform's manifest and config as they were read."""

    manifest: Manifest
    manifest_bytes: bytes
    config_bytes: bytes
    #: The platform under which an index lists the manifest; None where there is no index.
    listed: Platform | None


class RegistryClient:
    """Speaks with registries for many callers at once; belongs to one event loop.

    Each call names the authorizer that it is made for, and what one caller may do never serves another.
    Transient failures are retried under the registry's ``attempts`` and ``retry_budget_s``; what is
    raised then, and what is raised at once, is:

    * UnavailableError (RateLimitedError for 429): no usable answer within the budget;
    * AccessDeniedError: 401 with fresh credentials, or 403;
    * RegistryProtocolError: any other answer that the specification doesn't provide for;
    * UntrustedCertificateError, InsecureRegistryError: no connection that may be used;
    * SessionGoneError, and what else the authorizer raises.
    """

    def __init__(self, config: Config, *, limiter: HostLimiter) -> None:
        self._config = config
        #: Shared with the byte path, so that a pull's one token serves its layers too.
        self.authorizations = AuthorizationPool()
        self._transport = Transport(config)
        self._calls = RegistryCalls(
            config, limiter=limiter, transport=self._transport, authorizations=self.authorizations
        )
        self._uploader = Uploader(calls=self._calls, transport=self._transport, authorizations=self.authorizations)

    def __repr__(self) -> str:
        return f"<RegistryClient {self._transport!r} {self.authorizations!r}>"

    async def aclose(self) -> None:
        """Close every connection."""
        await self._transport.aclose()

    def endpoints(self, handle: ProviderHandle) -> list[Endpoint]:
        """Return where to read from, in order: see :func:`storage.registry.endpoint.endpoints`."""
        return endpoints(self._config, handle)

    async def _read(
        self,
        method: Literal["GET", "HEAD"],
        url: str,
        endpoint: Endpoint,
        authorizer: Authorizer,
        *,
        what: str,
        kind: RequestKind = RequestKind.BLOB,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = 0,
    ) -> Answer:
        """Ask for something of the endpoint's repository, as one who may pull from it.

        The caller judges the answer's status, and its body, of which at most *max_bytes* are wanted: none of HEAD.
        """
        return await self._calls.make(
            Call(
                method=method,
                url=url,
                endpoint=endpoint,
                scopes=(pull_scope(endpoint.repository),),
                authorizer=authorizer,
                what=what,
                kind=kind,
                headers=headers or {},
                max_bytes=max_bytes,
            )
        )

    # -- pull --------------------------------------------------------------------------------------------

    async def resolve(
        self,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        plain_http: bool = False,
        have: Have | None = None,
    ) -> ResolvedImage:
        """Read an image's manifest and config; no layer.

        One GET for what the reference names, one for the platform's manifest where that is an index, one
        for the config. The first is always made, also for a digest that the caller has: having read it is
        what proves the caller's access. Mirrors are tried first and left at their first failure.

        Args:
            reference: What to resolve.
            platform: For which platform; see :attr:`Platform.also_runs`.
            authorizer: Who asks.
            plain_http: The caller allows plain HTTP.
            have: Supplies the config and the platform's manifest where the caller has them; what doesn't
                hash to its digest is read anew.

        Raises:
            ManifestNotFoundError: there is no such tag or digest.
            BlobNotFoundError: the manifest is there and its config is not.
            UnsupportedManifestError, MalformedManifestError, PlatformNotFoundError: see :mod:`cluster.image`.
            DigestMismatchError, SizeMismatchError: the registry served something else.
        """

        async def read(endpoint: Endpoint) -> ResolvedImage:
            found = await self._documents_at(endpoint, reference, platform, authorizer, have=have)
            return assemble(
                reference,
                found.manifest,
                manifest_bytes=found.manifest_bytes,
                config_bytes=found.config_bytes,
                wanted=platform,
                listed=found.listed,
            )

        return await self._at_first(self.endpoints(reference.handle(plain_http=plain_http)), reference.name, read)

    async def documents(
        self,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        plain_http: bool = False,
        max_config_bytes: int = MAX_MANIFEST_BYTES,
    ) -> tuple[Manifest, bytes]:
        """Read a manifest and its config, of whatever kind that is, as :meth:`resolve` does; no layer.

        Raises:
            ManifestNotFoundError, BlobNotFoundError, UnsupportedManifestError, MalformedManifestError,
            PlatformNotFoundError, DigestMismatchError, SizeMismatchError: as :meth:`resolve`.
            RegistryProtocolError: the config has more than *max_config_bytes*.
        """

        async def read(endpoint: Endpoint) -> tuple[Manifest, bytes]:
            found = await self._documents_at(
                endpoint, reference, platform, authorizer, max_config_bytes=max_config_bytes
            )
            return found.manifest, found.config_bytes

        return await self._at_first(self.endpoints(reference.handle(plain_http=plain_http)), reference.name, read)

    async def _at_first(
        self, candidates: Sequence[Endpoint], image: str, read: Callable[[Endpoint], Awaitable[T]]
    ) -> T:
        """Return what *read* makes of the first endpoint at which nothing is wrong; the last is the registry itself."""
        for endpoint in candidates:
            try:
                return await read(endpoint)
            except (RegistryError, ContentError, UnavailableError) as exc:
                if not endpoint.is_mirror:
                    raise
                _log.info("mirror.skipped", mirror=endpoint.registry, image=image, error=str(exc))
        raise InternalError("a registry without an endpoint of its own")

    async def _documents_at(
        self,
        endpoint: Endpoint,
        reference: ImageReference,
        platform: Platform,
        authorizer: Authorizer,
        *,
        have: Have | None = None,
        max_config_bytes: int = MAX_MANIFEST_BYTES,
    ) -> _Documents:
        data, found = await self._manifest(endpoint, reference, reference.selector, authorizer)
        listed: Platform | None = None
        if isinstance(found, Index):
            entry = choose(found, platform, reference.name)
            listed = entry.platform
            data, found = await self._listed_manifest(endpoint, reference, entry.manifest, authorizer, have)
        config = await self._had(found.config, have)
        if config is None:
            config = await self._config_blob(endpoint, found.config, authorizer, max_config_bytes)
        return _Documents(manifest=found, manifest_bytes=data, config_bytes=config, listed=listed)

    async def _manifest(
        self, endpoint: Endpoint, reference: ImageReference, selector: str, authorizer: Authorizer
    ) -> tuple[bytes, Manifest | Index]:
        what = f"manifest of {reference.name}"
        answer = await self._read(
            "GET",
            endpoint.manifest_url(selector),
            endpoint,
            authorizer,
            what=what,
            kind=RequestKind.MANIFEST,
            headers=_OF_MANIFESTS,
            max_bytes=MAX_MANIFEST_BYTES,
        )
        if answer.status == NOT_FOUND:
            raise ManifestNotFoundError(reference.name)
        expect(answer, OK, doing=f"reading the {what}")
        parsed = parse_manifest(answer.body, answer.headers.get("Content-Type", ""), reference.name)
        wanted = selector if is_digest(selector) else _claimed_digest(answer)
        if wanted is not None:
            verify(answer.body, wanted, endpoint.source)
        return answer.body, parsed

    async def _listed_manifest(
        self,
        endpoint: Endpoint,
        reference: ImageReference,
        listed: Descriptor,
        authorizer: Authorizer,
        have: Have | None,
    ) -> tuple[bytes, Manifest]:
        had = await self._had(listed, have)
        if had is not None:
            data, found = had, parse_manifest(had, listed.media_type, reference.name)
        else:
            data, found = await self._manifest(endpoint, reference, listed.digest, authorizer)
        if isinstance(found, Index):
            raise RegistryProtocolError(f"reading the manifest of {reference.name}", 0, "its index lists an index")
        return data, found

    async def _config_blob(
        self, endpoint: Endpoint, config: Descriptor, authorizer: Authorizer, max_bytes: int
    ) -> bytes:
        if config.size_bytes > max_bytes:
            raise RegistryProtocolError(f"reading config {config.digest}", 0, f"it is larger than {max_bytes} bytes")
        what, url = f"config {config.digest}", endpoint.blob_url(config.digest)
        answer = await self._read("GET", url, endpoint, authorizer, what=what, max_bytes=config.size_bytes)
        if answer.status == NOT_FOUND:
            raise BlobNotFoundError(config.digest, endpoint.source)
        expect(answer, OK, doing=f"reading {what}")
        verify_descriptor(answer.body, config, endpoint.source)
        return answer.body

    async def _had(self, wanted: Descriptor, have: Have | None) -> bytes | None:
        data = None if have is None else await have(wanted.digest)
        return data if data is not None and digest_of(data) == wanted.digest else None

    # -- what is there -------------------------------------------------------------------------------------

    async def blob_exists(self, handle: ProviderHandle, digest: Digest, authorizer: Authorizer) -> int | None:
        """Return the size in bytes of a blob that the registry itself has, or None; one HEAD.

        None also where a registry redirects to a store that doesn't answer HEAD: not known to be there. Of a
        foreign layer's own addresses each is asked, without credentials, until one has it.
        """
        if handle.kind != "urls":
            return await self._size_at(origin(self._config, handle), digest, authorizer)
        refusal: RegistryError | None = None
        for endpoint in self.endpoints(handle):
            try:
                size = await self._size_at(endpoint, digest, authorizer)
            except RegistryError as exc:
                refusal = exc
                continue
            if size is not None:
                return size
        if refusal is not None:
            raise refusal
        return None

    async def _size_at(self, endpoint: Endpoint, digest: Digest, authorizer: Authorizer) -> int | None:
        answer = await self._read("HEAD", endpoint.blob_url(digest), endpoint, authorizer, what=f"blob {digest}")
        if answer.status == NOT_FOUND or (answer.crossed and answer.status != OK):
            return None
        expect(answer, OK, doing=f"looking for blob {digest} in {endpoint.source}")
        length = answer.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None

    # -- push --------------------------------------------------------------------------------------------

    async def mount_blob(
        self, target: ProviderHandle, digest: Digest, from_repository: str, authorizer: Authorizer
    ) -> bool:
        """Make a blob of another repository of the same registry appear in *target*, without its bytes.

        Returns:
            False where the registry doesn't: it has no such blob there, can't mount, or (401, 403) won't
            for this caller. Nothing is left behind, and an upload may be tried.
        """
        return await self._uploader.mount(origin(self._config, target), digest, from_repository, authorizer)

    async def upload_blob(
        self,
        target: ProviderHandle,
        descriptor: Descriptor,
        open_stream: Callable[[], AbstractContextManager[ByteStream]],
        authorizer: Authorizer,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Upload a blob in one PUT, in bounded memory; from the start again after a transient failure.

        Args:
            target: Where to.
            descriptor: Its digest and size, which the registry checks.
            open_stream: Opens the blob from its first byte; called in a thread, once for each try.
            authorizer: Who uploads.
            on_progress: Called on the event loop with the bytes sent so far; they begin anew with each try.

        Raises:
            SizeMismatchError: the stream had more or fewer bytes than the descriptor says.
            ClusterError: what the stream raised, unchanged.
        """
        await self._uploader.upload(
            Upload(
                endpoint=origin(self._config, target),
                descriptor=descriptor,
                open_stream=open_stream,
                authorizer=authorizer,
                on_progress=on_progress or _ignore,
            )
        )

    async def forward_blob(
        self,
        target: ProviderHandle,
        descriptor: Descriptor,
        open_stream: Callable[[], AbstractContextManager[ByteStream]],
        authorizer: Authorizer,
        on_progress: Callable[[int], None] | None = None,
        *,
        verified: Callable[[], Awaitable[None]],
    ) -> None:
        """Upload a blob whose bytes still arrive, in pieces, each once it is here. One try, and not every registry.

        No slot of the host's is held while bytes are waited for. The blob is there only once its last piece is,
        which is sent after *verified* returned: what has turned out wrong is dropped, as after any other error.

        Args:
            target: Where to.
            descriptor: Its digest and size, which the registry checks.
            open_stream: Opens the blob from its first byte; called in a thread, once.
            authorizer: Who uploads.
            on_progress: Called on the event loop with the bytes sent so far.
            verified: Returns once the bytes have proven to be right; raises where they haven't.

        Raises:
            ClusterError: what the stream or *verified* raised, unchanged; or this registry doesn't take it so, and
                may well by :meth:`upload_blob`.
        """
        upload = Upload(
            endpoint=origin(self._config, target),
            descriptor=descriptor,
            open_stream=open_stream,
            authorizer=authorizer,
            on_progress=on_progress or _ignore,
        )
        await self._uploader.forward(upload, verified)

    async def push_manifest(
        self, target: ProviderHandle, selector: str, media_type: str, data: bytes, authorizer: Authorizer
    ) -> Digest:
        """Put a manifest under a tag or its digest; return its digest.

        Raises:
            DigestMismatchError: the registry stored something else.
        """
        endpoint = origin(self._config, target)
        what = f"push of manifest {endpoint.source}{'@' if is_digest(selector) else ':'}{selector}"
        answer = await self._calls.make(
            Call(
                method="PUT",
                url=endpoint.manifest_url(selector),
                endpoint=endpoint,
                scopes=(push_scope(endpoint.repository),),
                authorizer=authorizer,
                what=what,
                kind=RequestKind.PUSH,
                headers={"Content-Type": media_type},
                data=data,
            )
        )
        expect(answer, CREATED, doing=what)
        own, claimed = digest_of(data), _claimed_digest(answer)
        if claimed is not None and claimed != own:
            raise DigestMismatchError(own, claimed, endpoint.source)
        return own


def _claimed_digest(answer: Answer) -> Digest | None:
    """Return the digest that the registry says a manifest has; None where it says none, or no digest."""
    claimed = answer.headers.get("Docker-Content-Digest", "")
    return Digest(claimed) if is_digest(claimed) else None


def _ignore(_: int) -> None:
    """Take no notice of progress."""
