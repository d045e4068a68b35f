"""What callers were authorized with, kept in memory for as long as it may be used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from cluster.errors import AccessDeniedError
from cluster.ports import Authorizer, AuthRequest
from storage.registry.challenge import merge_scopes
from storage.registry.endpoint import Endpoint

#: Seconds for which a registry that needed no authorization is not asked about it again.
_UNCHALLENGED_S = 60.0


@dataclass(slots=True)
class _Held:
    """One authorization; *header* None means that nothing is sent. Its repr shows nothing of it."""

    header: str | None = field(repr=False)
    until_s: float


@dataclass(slots=True)
class _Slot:
    held: _Held | None = None
    #: Callers that were refused together ask for a new token once.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


_Key = tuple[str, str, bool, tuple[str, ...]]


class AuthorizationPool:
    """Authorizations by caller, identity, registry and scopes. One event loop; nothing is persisted.

    A caller is the authorizer object itself, held weakly: two sessions never share what is here, and
    what a session got goes with it. (Two sessions of one identity each ask their own driver, whose own
    cache answers.) Authorizers must therefore be hashable and allow weak references.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slots: WeakKeyDictionary[Authorizer, dict[_Key, _Slot]] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<AuthorizationPool of {len(self._slots)} callers>"

    async def header(self, authorizer: Authorizer, endpoint: Endpoint, scopes: tuple[str, ...]) -> str | None:
        """Return what to send first as ``Authorization``; None for nothing.

        Raises:
            SessionGoneError: the caller is not there any more.
            UnavailableError: the caller did not answer.
        """
        if endpoint.url is not None:
            return None
        slot = self._slot(authorizer, endpoint, scopes)
        async with slot.lock:
            if slot.held is None or slot.held.until_s <= self._clock():
                await self._ask(slot, authorizer, endpoint, scopes, challenge=None, was_refused=False)
            return None if slot.held is None else slot.held.header

    async def renew(
        self, authorizer: Authorizer, endpoint: Endpoint, scopes: tuple[str, ...], *, challenge: str, sent: str | None
    ) -> str:
        """Return what to send after a 401 to a request that was sent with *sent*.

        Raises:
            AccessDeniedError: there is nothing else to send, or the token server refuses.
            SessionGoneError: the caller is not there any more.
            UnavailableError: the caller or the token server did not answer.
        """
        slot = self._slot(authorizer, endpoint, scopes)
        async with slot.lock:
            held = slot.held
            if held is not None and held.header not in (None, sent) and held.until_s > self._clock():
                return str(held.header)  # Another caller was refused as well and has renewed it.
            await self._ask(slot, authorizer, endpoint, scopes, challenge=challenge, was_refused=sent is not None)
            header = None if slot.held is None else slot.held.header
            if header is None or header == sent:
                slot.held = None
                reason = "it wants a login and there are no credentials for it" if sent is None else "HTTP 401"
                raise AccessDeniedError(endpoint.repository, endpoint.registry, reason)
            return header

    def drop(self, authorizer: Authorizer) -> None:
        """Forget what a caller was authorized with."""
        self._slots.pop(authorizer, None)

    def _slot(self, authorizer: Authorizer, endpoint: Endpoint, scopes: tuple[str, ...]) -> _Slot:
        slots = self._slots.setdefault(authorizer, {})
        identity = authorizer.identity(endpoint.registry)
        key = (identity, endpoint.registry, endpoint.plain_http, merge_scopes(scopes))
        found = slots.get(key)
        if found is None:
            self._tidy(slots)
            found = slots[key] = _Slot()
        return found

    def _tidy(self, slots: dict[_Key, _Slot]) -> None:
        """Forget what is over: a session that lives long pulls from many repositories."""
        now_s = self._clock()
        for key, slot in list(slots.items()):
            # One that is being asked for has nothing yet, and somebody who waits for it.
            if not slot.lock.locked() and (slot.held is None or slot.held.until_s <= now_s):
                del slots[key]

    async def _ask(
        self,
        slot: _Slot,
        authorizer: Authorizer,
        endpoint: Endpoint,
        scopes: tuple[str, ...],
        *,
        challenge: str | None,
        was_refused: bool,
    ) -> None:
        slot.held = None
        asked_s = self._clock()
        answer = await authorizer.authorize(
            AuthRequest(
                registry=endpoint.registry,
                plain_http=endpoint.plain_http,
                scopes=merge_scopes(scopes),
                challenge=challenge,
                was_refused=was_refused,
            )
        )
        if answer is None:
            slot.held = _Held(None, asked_s + _UNCHALLENGED_S)
        else:
            for_s = float("inf") if answer.expires_in_s is None else answer.expires_in_s
            slot.held = _Held(answer.header, asked_s + for_s)
