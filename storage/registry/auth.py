"""Answers registries' challenges with the driver's credentials: basic, and bearer tokens.

Follows distribution's token authentication specification (``docs/spec/auth/token.md``, ``oauth.md``).
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode, urlsplit

from cluster.config import Config
from cluster.errors import AccessDeniedError, InsecureRegistryError, RegistryProtocolError
from cluster.ports import Authorization, AuthRequest
from storage.registry.answers import FORBIDDEN, UNAUTHORIZED
from storage.registry.challenge import Challenge, covers, merge_scopes, parse_challenges
from storage.registry.credentials import Credential, CredentialSource
from storage.registry.endpoint import may_use_plain_http, registry_config, web_address
from storage.registry.identity import identity_of
from storage.registry.transport import Answer, Transport, control_policy, retrying

#: Seconds that a token holds whose server doesn't say, or says 0 (distribution's default; Quay says nothing).
DEFAULT_EXPIRES_IN_S = 60.0
#: Part of a token's life for which it is used: the rest is for requests under way and clocks that drift.
USED_PART = 0.9
_OK = 200
#: What token servers without the OAuth2 form answer to POST.
_NO_POST = frozenset({404, 405})
_CLIENT_ID = "lazyfarm"


@dataclass(frozen=True, slots=True)
class _Token:
    header: str = field(repr=False)
    #: Monotonic seconds until which it is used; None: it has no end (basic).
    until_s: float | None


@dataclass(frozen=True, slots=True)
class _Key:
    """What a token is good for, and for whom."""

    identity: str
    registry: str
    realm: str
    service: str
    scopes: tuple[str, ...]


class CredentialAuthorizer:
    """Implements :class:`cluster.ports.Authorizer` with credentials of this process. One event loop.

    Tokens are cached in memory by realm, service, scopes and identity; callers that need the same one
    at the same time share one request for it, and one that is cancelled doesn't take it from the others.
    """

    def __init__(
        self,
        credentials: CredentialSource,
        config: Config,
        *,
        identity_key: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an authorizer.

        Args:
            credentials: Where they come from.
            config: For trust, time limits and retries.
            identity_key: Secret of the farm under which :meth:`identity` is computed: without it nobody
                can try passwords on an identity.
            clock: Monotonic seconds.
        """
        self._credentials = credentials
        self._config = config
        self._identity_key = identity_key
        self._clock = clock
        self._transport = Transport(config)
        self._tokens: dict[_Key, _Token] = {}
        self._under_way: dict[_Key, asyncio.Task[_Token]] = {}

    def __repr__(self) -> str:
        return f"<CredentialAuthorizer {len(self._tokens)} tokens, {self._credentials!r}>"

    async def aclose(self) -> None:
        """Forget every token and close every connection."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tokens.clear()
        await self._transport.aclose()

    def identity(self, registry: str) -> str:
        """Return who the caller is there; see :func:`storage.registry.identity.identity_of`.

        Blocks where files are read or a credential helper is run, at most once in five minutes.

        Raises:
            ConfigError, CredentialHelperError: the credentials can't be read.
        """
        return identity_of(registry, self._credentials.lookup(registry), key=self._identity_key)

    async def authorize(self, request: AuthRequest) -> Authorization | None:
        """Return what to send; see :meth:`cluster.ports.Authorizer.authorize`.

        Raises:
            AccessDeniedError: the token server refuses the credentials, or the scopes.
            RateLimitedError: the token server answers 429, also after retries.
            UnavailableError: the token server does not answer, also after retries.
            RegistryProtocolError: the token server's answer can't be used.
            InsecureRegistryError: credentials would be sent over plain HTTP.
            ConfigError, CredentialHelperError: the credentials can't be read.
        """
        if request.was_refused:
            self._credentials.forget(request.registry)
        credential = await asyncio.to_thread(self._credentials.lookup, request.registry)
        identity = identity_of(request.registry, credential, key=self._identity_key)
        if request.challenge is None:
            return self._cached(identity, request)
        challenges = {challenge.scheme: challenge for challenge in reversed(parse_challenges(request.challenge))}
        if "bearer" in challenges:
            key = self._key(identity, request, challenges["bearer"])
            return self._usable(await self._bearer(key, request, credential))
        if "basic" in challenges and credential is not None and credential.secret:
            token = _Token(_basic(credential), None)
            self._tokens[_basic_key(identity, request.registry)] = token
            return self._usable(token)
        return None

    # -- what is there -----------------------------------------------------------------------------------

    def _cached(self, identity: str, request: AuthRequest) -> Authorization | None:
        now_s = self._clock()
        for key, token in self._tokens.items():
            is_meant = (key.identity, key.registry) == (identity, request.registry)
            suffices = token.until_s is None or covers(key.scopes, request.scopes)
            if is_meant and suffices and not _is_over(token, now_s):
                return self._usable(token)
        return None

    def _usable(self, token: _Token) -> Authorization:
        left_s = None if token.until_s is None else max(0.0, token.until_s - self._clock())
        return Authorization(token.header, left_s)

    # -- bearer ------------------------------------------------------------------------------------------

    def _key(self, identity: str, request: AuthRequest, challenge: Challenge) -> _Key:
        realm = challenge.parameters.get("realm", "")
        parts = web_address(realm)
        if parts is None:
            raise RegistryProtocolError(f"authorizing at {request.registry}", UNAUTHORIZED, "its realm is no address")
        same_host = parts.hostname == urlsplit(f"//{request.registry}").hostname
        if parts.scheme == "http" and not (
            may_use_plain_http(self._config, parts.netloc) or (request.plain_http and same_host)
        ):
            raise InsecureRegistryError(parts.netloc)
        return _Key(
            identity=identity,
            registry=request.registry,
            realm=realm,
            service=challenge.parameters.get("service", ""),
            scopes=merge_scopes((*request.scopes, *challenge.parameters.get("scope", "").split())),
        )

    async def _bearer(self, key: _Key, request: AuthRequest, credential: Credential | None) -> _Token:
        # A request that is under way brings a token newer than the one that was refused: it is joined.
        task = self._under_way.get(key)
        if task is None:
            held = self._tokens.get(key)
            if held is not None and not request.was_refused and not _is_over(held, self._clock()):
                return held
            self._tokens.pop(key, None)
            task = asyncio.create_task(self._fetch(key, credential), name=f"token for {key.registry}")
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._settle(key, done))
        return await asyncio.shield(task)

    def _settle(self, key: _Key, done: asyncio.Task[_Token]) -> None:
        self._under_way.pop(key, None)
        if not done.cancelled():
            # Looked at, for when everybody who waited was cancelled: asyncio logs errors that nobody saw.
            done.exception()

    async def _fetch(self, key: _Key, credential: Credential | None) -> _Token:
        async def attempt() -> tuple[float, Answer]:
            # A token's life counts from when it was asked for: it was made at some time after that.
            return self._clock(), await self._ask(key, credential)

        asked_s, answer = await retrying(control_policy(registry_config(self._config, key.registry)), attempt)
        text, expires_in_s = _parse_token(answer, key.realm)
        token = _Token(f"Bearer {text}", asked_s + USED_PART * expires_in_s)
        now_s = self._clock()
        self._tokens = {known: held for known, held in self._tokens.items() if not _is_over(held, now_s)}
        self._tokens[key] = token
        return token

    async def _ask(self, key: _Key, credential: Credential | None) -> Answer:
        if credential is not None and credential.identity_token:
            answer = await self._post(key, credential)
            if answer.status not in _NO_POST or not credential.secret:
                return _granted(answer, key)
        return _granted(await self._get(key, credential), key)

    async def _get(self, key: _Key, credential: Credential | None) -> Answer:
        query = [("service", key.service)] if key.service else []
        query += [("scope", scope) for scope in key.scopes]
        authorization = None
        if credential is not None and credential.secret:
            query += [("account", credential.username), ("client_id", _CLIENT_ID)]
            authorization = _basic(credential)
        joint = "&" if urlsplit(key.realm).query else "?"
        return await self._transport.exchange(
            "GET",
            f"{key.realm}{joint}{urlencode(query, quote_via=quote, safe=':/,')}" if query else key.realm,
            host=_host(key),
            what=f"token server {_host(key)}",
            authorization=authorization,
        )

    async def _post(self, key: _Key, credential: Credential) -> Answer:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": credential.identity_token,
            "service": key.service,
            "client_id": _CLIENT_ID,
            "scope": " ".join(key.scopes),
        }
        return await self._transport.exchange(
            "POST",
            key.realm,
            host=_host(key),
            what=f"token server {_host(key)}",
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            data=urlencode(form).encode(),
        )


def _granted(answer: Answer, key: _Key) -> Answer:
    if answer.status in (UNAUTHORIZED, FORBIDDEN):
        # The body is left out here and below: it is the one place where servers might repeat a secret.
        what = ", ".join(key.scopes) or "a login"
        raise AccessDeniedError(what, key.registry, f"token server {_host(key)} answered HTTP {answer.status}")
    if answer.status != _OK:
        raise RegistryProtocolError(f"asking token server {_host(key)}", answer.status, "no token")
    return answer


def _parse_token(answer: Answer, realm: str) -> tuple[str, float]:
    doing = f"asking token server {urlsplit(realm).netloc}"
    try:
        document = json.loads(answer.body)
        text = document.get("token") or document.get("access_token")
        expires_in = document.get("expires_in") or DEFAULT_EXPIRES_IN_S
        expires_in_s = float(expires_in)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        # Without its cause: that quotes the answer.
        raise RegistryProtocolError(doing, answer.status, "its answer can't be read") from None
    if not isinstance(text, str) or not text.isascii() or not text.isprintable():
        raise RegistryProtocolError(doing, answer.status, "its answer has no token")
    return text, expires_in_s if 0 < expires_in_s < math.inf else DEFAULT_EXPIRES_IN_S


def _host(key: _Key) -> str:
    return urlsplit(key.realm).netloc


def _basic(credential: Credential) -> str:
    pair = f"{credential.username}:{credential.secret}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _basic_key(identity: str, registry: str) -> _Key:
    return _Key(identity=identity, registry=registry, realm="", service="", scopes=())


def _is_over(token: _Token, now_s: float) -> bool:
    return token.until_s is not None and token.until_s <= now_s
