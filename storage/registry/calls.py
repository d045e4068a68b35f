"""Calls to registries: authorized as one caller, in the cluster's turn, and tried again where that helps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

import aiohttp

from cluster.circuit import is_failure
from cluster.config import Config
from cluster.errors import AccessDeniedError, ClusterError, RateLimitedError, RegistryProtocolError, UnavailableError
from cluster.fetch.retry import RetryPolicy
from cluster.ports import Authorizer, HostLimiter, Slot
from cluster.quota import Budget, Quota, RequestKind
from storage.registry.answers import FORBIDDEN, UNAUTHORIZED, error_detail, quotas
from storage.registry.endpoint import Endpoint, registry_config
from storage.registry.pool import AuthorizationPool
from storage.registry.transport import Answer, Transport, control_policy, retrying

OK, CREATED, ACCEPTED = 200, 201, 202


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as it is meant, whatever it takes to get an answer."""

    method: str
    url: str
    endpoint: Endpoint
    #: What it needs to be allowed to do, as token scopes.
    scopes: tuple[str, ...]
    authorizer: Authorizer
    #: What is being asked for; for messages.
    what: str
    #: What registries count it as.
    kind: RequestKind
    headers: Mapping[str, str] = field(default_factory=dict)
    #: The body: in one, or in pieces that are sent one after the other.
    data: bytes | Sequence[bytes] | None = None
    #: Bytes of the answer that are wanted at most.
    max_bytes: int = 1024**2
    #: None: those of control requests.
    limits: aiohttp.ClientTimeout | None = None


class RegistryCalls:
    """Makes calls for many callers; see :class:`storage.registry.client.RegistryClient` for what is raised."""

    def __init__(
        self, config: Config, *, limiter: HostLimiter, transport: Transport, authorizations: AuthorizationPool
    ) -> None:
        self._config = config
        self._limiter = limiter
        self._transport = transport
        self._authorizations = authorizations

    def __repr__(self) -> str:
        return f"<RegistryCalls over {self._transport!r}>"

    async def make(self, call: Call) -> Answer:
        """Make a call with retries. A mirror gets one try: behind it stands the registry itself."""

        async def attempt() -> Answer:
            return await self.once(call)

        policy = self.policy(call.endpoint)
        return await retrying(replace(policy, attempts=1) if call.endpoint.is_mirror else policy, attempt)

    async def once(self, call: Call) -> Answer:
        """Make a call without retries, but authorized: a 401 is answered with what its challenge asks for."""
        # A foreign layer's address is no registry's: nobody's credentials go there.
        is_foreign = call.endpoint.url is not None
        sent = None if is_foreign else await self._authorizations.header(call.authorizer, call.endpoint, call.scopes)
        # Nothing → what the caller has for this challenge → that, got anew. Where the first was not nothing
        # but came from the pool, what follows it is new already.
        tries_left = 3 if sent is None else 2
        while True:
            answer = await self._exchange(call, sent)
            if answer.status == FORBIDDEN and not answer.crossed:
                raise AccessDeniedError(call.endpoint.repository, call.endpoint.registry, error_detail(answer.body))
            if answer.status != UNAUTHORIZED or answer.crossed:
                return answer
            tries_left -= 1
            if tries_left == 0 or is_foreign:
                raise AccessDeniedError(call.endpoint.repository, call.endpoint.registry, error_detail(answer.body))
            sent = await self._authorizations.renew(
                call.authorizer, call.endpoint, call.scopes, challenge=answer.challenge, sent=sent
            )

    def policy(self, endpoint: Endpoint) -> RetryPolicy:
        """Return how often and how long a call to *endpoint* is tried."""
        return control_policy(registry_config(self._config, endpoint.registry))

    def slot(self, endpoint: Endpoint, authorizer: Authorizer, kind: RequestKind) -> AbstractAsyncContextManager[Slot]:
        """Hold one of the cluster's slots for the endpoint's host."""
        budget_s = registry_config(self._config, endpoint.registry).retry_budget_s
        budget = Budget(kind=kind, account=authorizer.identity(endpoint.registry))
        return self._limiter.slot(endpoint.registry, deadline_s=budget_s, budget=budget)

    async def tell(self, slot: Slot, outcome: Answer | ClusterError) -> None:
        """Tell the cluster how the host bears up: it answered, wants to be asked more slowly, or failed."""
        if isinstance(outcome, ClusterError):
            await tell(self._limiter, slot, outcome)
        else:
            await tell(self._limiter, slot, None, () if outcome.crossed else quotas(outcome.headers))

    async def _exchange(self, call: Call, authorization: str | None) -> Answer:
        async with self.slot(call.endpoint, call.authorizer, call.kind) as slot:
            try:
                answer = await self._transport.exchange(
                    call.method,
                    call.url,
                    host=call.endpoint.registry,
                    what=call.what,
                    authorization=authorization,
                    headers=call.headers,
                    # Anew with each try, as an iterator is read once.
                    data=call.data if isinstance(call.data, bytes | None) else _each(call.data),
                    max_bytes=call.max_bytes,
                    limits=call.limits,
                )
            except ClusterError as exc:
                await self.tell(slot, exc)
                raise
            await self.tell(slot, answer)
            return answer


async def tell(limiter: HostLimiter, slot: Slot, outcome: ClusterError | None, left: Sequence[Quota] = ()) -> None:
    """Tell a limiter what came of a request, and what the answer said is left.

    Nothing where what came of it says nothing of the host.
    """
    if isinstance(outcome, RateLimitedError):
        left = outcome.quotas
        await limiter.throttled(slot, outcome.retry_after_s)
    elif isinstance(outcome, UnavailableError):
        if is_failure(outcome):
            await limiter.failed(slot, outcome.reason)
    else:
        await limiter.succeeded(slot)
    if left:
        await limiter.quoted(slot, left)


async def _each(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def expect(answer: Answer, status: int, *, doing: str) -> None:
    """Check that an answer has the one status that the specification provides for.

    Raises:
        RegistryProtocolError: it has another.
    """
    if answer.status != status:
        raise RegistryProtocolError(doing, answer.status, error_detail(answer.body))
