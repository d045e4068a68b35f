"""The byte path out of registries: ranges of blobs, read by threads into buffers that the caller owns.

Synchronous, on :mod:`http.client`: its ``readinto`` goes from the socket to the caller's buffer without
a copy in between. Nothing is retried here, and nobody is asked for credentials: each failure is raised
as what it is, and who fetches decides (:class:`cluster.fetch.retry.RetryPolicy`).
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from cluster.config import Config
from cluster.digest import Digest
from cluster.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    ChallengedError,
    ClusterError,
    InsecureRegistryError,
    RangeRefusedError,
    RegistryProtocolError,
    SizeMismatchError,
    UnavailableError,
)
from cluster.metrics import READ_BYTES
from cluster.provider import ProviderHandle
from storage.registry.answers import (
    FORBIDDEN,
    NOT_FOUND,
    UNAUTHORIZED,
    count_answer,
    of_redirect_target,
    quotas,
    raise_if_transient,
    translate_network_error,
)
from storage.registry.connections import ConnectionPool
from storage.registry.endpoint import (
    MAX_REDIRECTS,
    REDIRECTS,
    USER_AGENT,
    Endpoint,
    Trust,
    endpoints,
    next_hop,
    origin,
    registry_config,
)

_OK, _PARTIAL, _GONE, _RANGE_NOT_SATISFIABLE = 200, 206, 410, 416
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")
#: Bytes of an answer without use that are read to keep its connection.
_DRAINED_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ask:
    endpoint: Endpoint
    digest: Digest
    offset: int
    length: int | None
    size_bytes: int | None

    @property
    def is_range(self) -> bool:
        return self.offset > 0 or self.length is not None

    @property
    def what(self) -> str:
        return f"blob {self.digest} from {self.endpoint.source}"

    @property
    def range_header(self) -> str:
        last = "" if self.length is None else str(self.offset + self.length - 1)
        return f"bytes={self.offset}-{last}"


@dataclass(frozen=True, slots=True)
class _Link:
    connection: HTTPConnection
    #: The connection lets go of it where the server wants to close after its answer.
    socket: socket.socket | None
    response: HTTPResponse


class BlobResponse:
    """A blob, or a range of it, as it arrives. One thread reads; any may :meth:`abort`."""

    def __init__(
        self,
        ask: _Ask,
        *,
        pool: ConnectionPool,
        url: str,
        link: _Link,
        offset: int,
        total_bytes: int | None,
        crossed: bool,
    ) -> None:
        #: 206: the range that was asked for; 200: the whole blob, from its first byte, whatever was asked.
        self.status = link.response.status
        #: Where in the blob the first byte of this answer is.
        self.offset = offset
        #: Size of the whole blob; None where the registry doesn't say.
        self.total_bytes = total_bytes
        #: Bytes of this answer; None where the registry doesn't say.
        self.length_bytes = link.response.length
        #: Bytes read so far.
        self.read_bytes = 0
        #: What the registry says is left of what it allows; nothing where a redirect led to another host.
        self.quotas = () if crossed else quotas(link.response.headers)
        self._ask = ask
        self._pool = pool
        self._url = url
        self._connection: HTTPConnection | None = link.connection
        self._response = link.response
        self._socket = link.socket
        self._crossed = crossed
        self._aborted = False

    def __repr__(self) -> str:
        return f"<BlobResponse {self.status} {self._ask.what} {self.read_bytes}/{self.length_bytes}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def readinto(self, buffer: memoryview) -> int:
        """Fill *buffer*, or as much of it as there are bytes left; return how many, 0 at the end.

        Raises:
            UnavailableError: the connection broke, stalled, ended before all bytes came, or was aborted.
        """
        if self._connection is None:
            return 0
        try:
            count = self._response.readinto(buffer)
        except (HTTPException, OSError, ValueError) as exc:
            raise self._broken(exc) from exc
        if self._aborted:
            raise UnavailableError(self._ask.what, "the read was aborted")
        self.read_bytes += count
        if count == 0 and len(buffer):
            if self.length_bytes is not None and self.read_bytes < self.length_bytes:
                raise self._of_its_host(
                    UnavailableError(self._ask.what, f"it ended after {self.read_bytes} of {self.length_bytes} bytes")
                )
            self._finish()
        elif self.read_bytes == self.length_bytes:
            self._finish()
        return count

    def abort(self) -> None:
        """Make a read that blocks in another thread fail at once, and every later one."""
        self._aborted = True
        if self._socket is not None:
            # Not SSLSocket.shutdown: it would take TLS away under the reading thread. It may be closed already.
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back where the answer was read to its end; else close it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            READ_BYTES.add(self.read_bytes, source="registry")
            self._response.close()
            connection.close()

    def _finish(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        READ_BYTES.add(self.read_bytes, source="registry")
        if self._response.will_close or self._aborted:
            connection.close()
        else:
            self._response.close()
            self._pool.give_back(self._url, connection)

    def _broken(self, exc: Exception) -> ClusterError:
        if self._aborted:
            return UnavailableError(self._ask.what, "the read was aborted")
        error = translate_network_error(exc, host=urlsplit(self._url).netloc, what=self._ask.what)
        return self._of_its_host(
            error if isinstance(error, UnavailableError) else UnavailableError(self._ask.what, str(error))
        )

    def _of_its_host(self, error: UnavailableError) -> ClusterError:
        return of_redirect_target(error) if self._crossed else error


class BlobSource:
    """Opens blobs at registries. Thread-safe; keeps connections alive for all who read."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pool = ConnectionPool(Trust(config))

    def __repr__(self) -> str:
        return f"<BlobSource {self._pool!r}>"

    def endpoints(self, handle: ProviderHandle) -> list[Endpoint]:
        """Return where the blob may be had, in order: see :func:`storage.registry.endpoint.endpoints`."""
        return endpoints(self._config, handle)

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()

    def open(
        self,
        source: Endpoint | ProviderHandle,
        digest: Digest,
        *,
        offset: int = 0,
        length: int | None = None,
        authorization: str | None = None,
        size_bytes: int | None = None,
    ) -> BlobResponse:
        """Ask for a blob or a range of it; returns when the answer's head is there.

        Connecting and the head may take the registry's ``timeout_s``, each read after that
        ``fetch.stall_timeout_s``.

        Args:
            source: Where; a handle means the registry itself (the first address of a foreign layer), as
                *authorization* may not be shown to a mirror.
            digest: Which.
            offset: First byte wanted.
            length: How many bytes are wanted, > 0; None for all to the end.
            authorization: The ``Authorization`` header; not sent on where a redirect crosses to another
                scheme, host or port.
            size_bytes: The blob's size by its descriptor; an answer for another size is refused.

        Raises:
            ChallengedError: 401; *authorization* is missing or has expired.
            AccessDeniedError: 403, or 401 after a redirect.
            BlobNotFoundError: 404.
            RangeRefusedError: 416; the whole blob may still be had.
            SizeMismatchError: the blob has another size than *size_bytes*.
            RateLimitedError: 429.
            UnavailableError: 5xx, no connection, no answer in time (RedirectTargetError: of a host that a redirect
                led to).
            RegistryProtocolError: an answer that makes no sense.
            InsecureRegistryError, UntrustedCertificateError: no connection that may be used.
        """
        endpoint = source if isinstance(source, Endpoint) else self._own(source)
        ask = _Ask(endpoint=endpoint, digest=digest, offset=offset, length=length, size_bytes=size_bytes)
        url, crossed = endpoint.blob_url(digest), False
        if endpoint.url is not None:
            authorization = None
        for _ in range(MAX_REDIRECTS + 1):
            try:
                link = self._send(url, ask, authorization)
                if link.response.status not in REDIRECTS:
                    return self._accepted(ask, url, link, crossed=crossed)
            except UnavailableError as exc:
                if not crossed:
                    raise
                raise of_redirect_target(exc) from exc
            location = link.response.headers.get("Location", "")
            self._discard(url, link)
            hop = next_hop(self._config, url, location, doing=f"reading {ask.what}")
            if hop.crosses:
                # Not sent again even where a later redirect leads back: who redirects chooses the address.
                authorization, crossed = None, True
            url = hop.url
        raise RegistryProtocolError(f"reading {ask.what}", 0, f"redirected more than {MAX_REDIRECTS} times")

    def _own(self, handle: ProviderHandle) -> Endpoint:
        if handle.kind != "urls":
            return origin(self._config, handle)
        found = endpoints(self._config, handle)
        if not found:
            raise InsecureRegistryError(handle.registry)
        return found[0]

    def _send(self, url: str, ask: _Ask, authorization: str | None) -> _Link:
        host = urlsplit(url).netloc
        kept = self._pool.take(url)
        if kept is not None:
            try:
                return self._exchange(kept, url, ask, authorization)
            except (ConnectionError, HTTPException):
                # The server closed it while it was idle; that says nothing about the server.
                kept.close()
            except (OSError, ValueError) as exc:
                kept.close()
                count_answer(ask.endpoint.registry, None)
                raise translate_network_error(exc, host=host, what=ask.what) from exc
        timeout_s = registry_config(self._config, ask.endpoint.registry).timeout_s
        fresh = self._pool.make(url, timeout_s=timeout_s, redirected_from=ask.endpoint.registry)
        try:
            return self._exchange(fresh, url, ask, authorization)
        except (HTTPException, OSError, ValueError) as exc:
            fresh.close()
            count_answer(ask.endpoint.registry, None)
            raise translate_network_error(exc, host=host, what=ask.what) from exc

    def _exchange(self, connection: HTTPConnection, url: str, ask: _Ask, authorization: str | None) -> _Link:
        parts = urlsplit(url)
        if connection.sock is not None:
            connection.sock.settimeout(registry_config(self._config, ask.endpoint.registry).timeout_s)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.putrequest("GET", target, skip_accept_encoding=True)
        # A layer that a server "helpfully" encodes again has another digest.
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("User-Agent", USER_AGENT)
        if ask.is_range:
            connection.putheader("Range", ask.range_header)
        if authorization is not None:
            connection.putheader("Authorization", authorization)
        connection.endheaders()
        live: socket.socket | None = connection.sock
        response = connection.getresponse()
        count_answer(ask.endpoint.registry, response.status)
        if live is not None:
            live.settimeout(self._config.fetch.stall_timeout_s)
        return _Link(connection, live, response)

    def _accepted(self, ask: _Ask, url: str, link: _Link, *, crossed: bool) -> BlobResponse:
        try:
            return self._accept(ask, url, link, crossed=crossed)
        except BaseException:
            self._discard(url, link)
            raise

    def _accept(self, ask: _Ask, url: str, link: _Link, *, crossed: bool) -> BlobResponse:
        status, headers, registry = link.response.status, link.response.headers, ask.endpoint.registry
        raise_if_transient(status, headers, what=ask.what)
        if status == UNAUTHORIZED and not crossed and ask.endpoint.url is None:
            challenge = ", ".join(headers.get_all("WWW-Authenticate", []))
            raise ChallengedError(f"blob {ask.digest}", registry, challenge)
        if status in (UNAUTHORIZED, FORBIDDEN):
            raise AccessDeniedError(f"blob {ask.digest}", urlsplit(url).netloc, f"HTTP {status}")
        if status in (NOT_FOUND, _GONE):
            raise BlobNotFoundError(ask.digest, ask.endpoint.source)
        if status == _RANGE_NOT_SATISFIABLE:
            raise RangeRefusedError(f"blob {ask.digest}", ask.endpoint.source, ask.offset)
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RegistryProtocolError(f"reading {ask.what}", status, "it is encoded although that was not accepted")
        if status == _PARTIAL and ask.is_range:
            offset, total_bytes = _partial(ask, headers.get("Content-Range", ""))
        elif status == _OK:
            offset, total_bytes = 0, link.response.length
        else:
            raise RegistryProtocolError(f"reading {ask.what}", status, "neither the blob nor a known error")
        if ask.size_bytes is not None and total_bytes is not None and total_bytes != ask.size_bytes:
            raise SizeMismatchError(ask.digest, ask.size_bytes, total_bytes, ask.endpoint.source)
        return BlobResponse(
            ask,
            pool=self._pool,
            url=url,
            link=link,
            offset=offset,
            total_bytes=total_bytes,
            crossed=crossed,
        )

    def _discard(self, url: str, link: _Link) -> None:
        response = link.response
        try:
            whole = response.length is not None and response.length <= _DRAINED_BYTES
            if whole and not response.will_close and response.status not in (_OK, _PARTIAL):
                response.read()
                response.close()
                self._pool.give_back(url, link.connection)
                return
        except (HTTPException, OSError):
            pass  # It is closed below: nothing of it was wanted.
        response.close()
        link.connection.close()


def _partial(ask: _Ask, content_range: str) -> tuple[int, int | None]:
    found = _CONTENT_RANGE.match(content_range.strip())
    if found is None:
        raise RegistryProtocolError(f"reading {ask.what}", _PARTIAL, "its Content-Range can't be read")
    first, last = int(found[1]), int(found[2])
    total = None if found[3] == "*" else int(found[3])
    wanted_last = None if ask.length is None else ask.offset + ask.length - 1
    if total is not None:
        wanted_last = total - 1 if wanted_last is None else min(wanted_last, total - 1)
    if first != ask.offset or (wanted_last is not None and last != wanted_last):
        raise RegistryProtocolError(
            f"reading {ask.what}", _PARTIAL, f"asked for {ask.range_header}, answered {content_range}"
        )
    return first, total
