"""Control traffic: one HTTP exchange at a time over aiohttp, its redirects, and its retries."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from cluster.config import Config, RegistryConfig
from cluster.errors import ClusterError, RegistryProtocolError, UnavailableError
from cluster.fetch.retry import RetryPolicy
from storage.registry.answers import count_answer, of_redirect_target, raise_if_transient, translate_network_error
from storage.registry.endpoint import MAX_REDIRECTS, REDIRECTS, USER_AGENT, Trust, next_hop, registry_config
from storage.registry.spans import STATUS, request_span

#: Longest answer that is read where the caller names no limit.
_MAX_BODY_BYTES = 1024**2
_FOLLOWED_METHODS = frozenset({"GET", "HEAD"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, read whole."""

    status: int
    #: Case-insensitive.
    headers: Mapping[str, str]
    #: At most the limit that was given, and one byte more where there is more than that.
    body: bytes
    #: Where it came from in the end.
    url: str
    #: True where a redirect left the scheme, host or port that was asked: its 401 or 403 isn't about us.
    crossed: bool
    #: Every ``WWW-Authenticate`` header, joined.
    challenge: str = ""


class Transport:
    """Sends requests for one event loop. Statuses that may change at the next try are raised as errors."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._trust = Trust(config)
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<Transport {'open' if self._session else 'idle'}>"

    async def exchange(
        self,
        method: str,
        url: str,
        *,
        host: str,
        what: str,
        authorization: str | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | AsyncIterator[bytes] | None = None,
        max_bytes: int = _MAX_BODY_BYTES,
        limits: aiohttp.ClientTimeout | None = None,
    ) -> Answer:
        """Send a request and read the answer; GET and HEAD follow redirects.

        Args:
            method: The HTTP method.
            url: The whole address, encoded already.
            host: The registry on whose behalf it is sent: its trust and its time limits hold.
            what: What is being asked for; for messages.
            authorization: The ``Authorization`` header; not sent on where a redirect crosses to another
                scheme, host or port.
            headers: Further headers.
            data: The body.
            max_bytes: Bytes of the answer's body that are wanted at most.
            limits: The limits on connecting, reading and all; the registry's ``timeout_s`` for each if
                None. It holds for each redirect anew.

        Raises:
            UnavailableError: no answer, a broken one, or a status that may change (RateLimitedError: 429;
                RedirectTargetError: of a host that a redirect led to).
            UntrustedCertificateError: the host's certificate doesn't verify.
            InsecureRegistryError: the host speaks plain HTTP, or redirects to it.
            RegistryProtocolError: it redirects for ever or to nowhere.
        """
        crossed = False
        for _ in range(MAX_REDIRECTS + 1):
            sent = {**(headers or {})}
            if authorization is not None:
                sent["Authorization"] = authorization
            try:
                answer = await self._once(
                    method,
                    url,
                    host=host,
                    what=what,
                    headers=sent,
                    data=data,
                    max_bytes=max_bytes,
                    limits=limits,
                    crossed=crossed,
                )
            except UnavailableError as exc:
                if not crossed:
                    raise
                raise of_redirect_target(exc) from exc
            if answer.status not in REDIRECTS or method not in _FOLLOWED_METHODS:
                return answer
            hop = next_hop(self._config, url, answer.headers.get("Location", ""), doing=what)
            if hop.crosses:
                # Not sent again even where a later redirect leads back: who redirects chooses the address.
                authorization, crossed = None, True
            url = hop.url
        raise RegistryProtocolError(what, 0, f"redirected more than {MAX_REDIRECTS} times")

    async def aclose(self) -> None:
        """Close every connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _once(
        self,
        method: str,
        url: str,
        *,
        host: str,
        what: str,
        headers: Mapping[str, str],
        data: bytes | AsyncIterator[bytes] | None,
        max_bytes: int,
        limits: aiohttp.ClientTimeout | None,
        crossed: bool,
    ) -> Answer:
        parts = urlsplit(url)
        tls = self._trust.context(parts.netloc, redirected_from=host) if parts.scheme == "https" else True
        try:
            with request_span(method, url, registry=host) as span:
                async with self._open().request(
                    method,
                    URL(url, encoded=True),
                    headers=headers,
                    data=data,
                    allow_redirects=False,
                    ssl=tls,
                    timeout=limits or control_timeout(registry_config(self._config, host)),
                ) as response:
                    count_answer(host, response.status)
                    span.put({STATUS: response.status})
                    raise_if_transient(response.status, response.headers, what=what)
                    body = await _read(response, max_bytes)
                    challenge = ", ".join(response.headers.getall("WWW-Authenticate", []))
                    return Answer(response.status, response.headers, body, url, crossed, challenge)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            count_answer(host, None)
            raise translate_network_error(exc, host=parts.netloc, what=what) from exc

    def _open(self) -> aiohttp.ClientSession:
        # Made at the first request: a session belongs to the loop that it is made in.
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # The limit on concurrency is the cluster's, not this process's.
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                # A layer that a server "helpfully" encodes again has another digest.
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        return self._session


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > max_bytes:
            response.close()
            return bytes(body[: max_bytes + 1])
    return bytes(body)


def control_timeout(config: RegistryConfig) -> aiohttp.ClientTimeout:
    """Return the limits of a control request: connecting, and connecting and answering in all."""
    return aiohttp.ClientTimeout(total=2 * config.timeout_s, sock_connect=config.timeout_s, sock_read=config.timeout_s)


def control_policy(config: RegistryConfig) -> RetryPolicy:
    """Return how often and how long a control request is tried."""
    return RetryPolicy(attempts=config.attempts, budget_s=config.retry_budget_s)


async def retrying(policy: RetryPolicy, attempt: Callable[[], Awaitable[T]]) -> T:
    """Run *attempt* until it succeeds, fails for good, or the policy gives up; raise its last error."""
    started_s = time.monotonic()
    tries = 0
    while True:
        tries += 1
        try:
            return await attempt()
        except ClusterError as exc:
            delay_s = policy.next_delay_s(exc, tries, time.monotonic() - started_s, random.random())  # noqa: S311 -- jitter
            if delay_s is None:
                raise
        await asyncio.sleep(delay_s)
