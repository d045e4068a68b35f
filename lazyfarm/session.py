"""A driver's session: its credentials, answered while its calls run, and its lease, renewed while it lives.

Runs on a thread and event loop of its own, so that neither a blocked driver nor a long callback lets the
farm believe that the driver is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from actors.handles import SessionServerHandle
from cluster.config import Config
from cluster.errors import ClusterError, LeaseLostError
from cluster.lease import LeaseId
from cluster.messages import SessionAnswer, SessionInfo, SessionQuestion
from cluster.ports import AuthRequest
from cluster.wire import encode_error
from lazyfarm.lease import renew_until_lost
from storage.connect import connect
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.registry.credentials import CredentialSource
from storage.registry.identity import identity_of

if TYPE_CHECKING:
    from storage.registry.auth import CredentialAuthorizer

T = TypeVar("T")

#: Seconds that one question poll stays open at an actor. While it is, a driver that was killed counts as there:
#: this and the actor's grace bound how long work goes on for nobody.
POLL_S = 5.0
_REOPEN_PAUSE_S = 0.5


class Session:
    """One driver's presence at the farm."""

    def __init__(self, config: Config, credentials: CredentialSource, *, keep_s: float | None) -> None:
        self.session_id = secrets.token_hex(8)
        self.lease_id = LeaseId(f"driver-{self.session_id}")
        self._config = config
        self._credentials = credentials
        self._identity_key = _identity_key(config)
        self._authorizer: CredentialAuthorizer | None = None
        self._keep_s = keep_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="lazyfarm-session", daemon=True)
        self._attended: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self._lost: LeaseLostError | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._thread.start()
        self._link = connect(config.redis)
        self._leases = RedisLeaseStore(self._link, Keys(config.farm.name))

    def __repr__(self) -> str:
        return f"<Session {self.session_id}>"

    # -- opening and closing -----------------------------------------------------------------------------

    def open(self) -> None:
        """Take the session's lease and keep it."""
        self._call(self._open())

    def close(self, *, discard: bool = False) -> None:
        """Stop, and give the lease back; where it is to be kept for a while and not *discard*, keep it so long."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(ClusterError, TimeoutError):
            self._call(self._close(discard=discard))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        if not self._loop.is_running():
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, work: Coroutine[object, object, T], timeout_s: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _open(self) -> None:
        # Short, also where it is to be kept: a driver that is killed holds nothing for days.
        ttl_s = self._config.cache.lease_ttl_s
        labels = {"owner": "driver", "host": socket.gethostname(), "pid": str(os.getpid())}
        await self._leases.create(self.lease_id, ttl_s=ttl_s, labels=labels)
        self._renewal = asyncio.create_task(self._keep_lease())

    async def _close(self, *, discard: bool) -> None:
        tasks = [task for _count, task in self._attended.values()]
        if self._renewal is not None:
            tasks.append(self._renewal)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(ClusterError):
            if self._keep_s is None or discard:
                await self._leases.delete(self.lease_id)
            else:
                await self._leases.renew(self.lease_id, ttl_s=self._keep_s)
        await self._link.close()
        if self._authorizer is not None:
            await self._authorizer.aclose()

    # -- the lease -----------------------------------------------------------------------------------------

    def raise_if_lost(self) -> None:
        """Raise LeaseLostError once the session's lease is gone: what it held may be collected."""
        if self._lost is not None:
            raise self._lost

    async def _keep_lease(self) -> None:
        self._lost = await renew_until_lost(self._leases, self.lease_id, ttl_s=self._config.cache.lease_ttl_s)

    # -- credentials ---------------------------------------------------------------------------------------

    def info(
        self, registries: Iterable[str], *, progress: str | None, deadline_s: float, trace: str = ""
    ) -> SessionInfo:
        """Return what a call says of its caller; identities are of those *registries* that may matter."""
        return SessionInfo(
            session_id=self.session_id,
            identities={registry: self._identity(registry) for registry in set(registries)},
            progress=progress,
            deadline_s=deadline_s,
            trace=trace or secrets.token_hex(6),
        )

    @contextlib.asynccontextmanager
    async def attending(self, server: SessionServerHandle) -> AsyncIterator[None]:
        """Answer *server*'s questions while the body runs."""
        self._loop.call_soon_threadsafe(self._attend, server)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._release, server)

    def _attend(self, server: SessionServerHandle) -> None:
        count, task = self._attended.get(server.name, (0, None))
        if task is None or task.done():
            task = self._loop.create_task(self._answer_forever(server))
        self._attended[server.name] = (count + 1, task)

    def _release(self, server: SessionServerHandle) -> None:
        count, task = self._attended[server.name]
        if count > 1:
            self._attended[server.name] = (count - 1, task)
        else:
            del self._attended[server.name]
            task.cancel()

    async def _answer_forever(self, server: SessionServerHandle) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    questions = await server.poll_questions(self.session_id, POLL_S)
                except ClusterError:
                    await asyncio.sleep(_REOPEN_PAUSE_S)  # the actor is being restarted, perhaps
                    continue
                for question in questions:
                    group.create_task(self._answer(server, question))

    async def _answer(self, server: SessionServerHandle, question: SessionQuestion) -> None:
        request = AuthRequest(
            registry=question.registry,
            plain_http=question.plain_http,
            scopes=question.scopes,
            challenge=question.challenge,
            was_refused=question.was_refused,
        )
        try:
            found = await self._authorizing().authorize(request)
            answer = SessionAnswer(
                question_id=question.question_id,
                header=found.header if found else None,
                expires_in_s=found.expires_in_s if found else None,
            )
        except ClusterError as exc:
            answer = SessionAnswer(question_id=question.question_id, error=encode_error(exc))
        with contextlib.suppress(ClusterError):
            server.send_answer(self.session_id, answer)

    def _identity(self, registry: str) -> str:
        return identity_of(registry, self._credentials.lookup(registry), key=self._identity_key)

    def _authorizing(self) -> CredentialAuthorizer:
        """Return what authorizes requests: made at the first question, for it speaks HTTP, which most never need."""
        if self._authorizer is None:
            from storage.registry.auth import CredentialAuthorizer  # noqa: PLC0415  # aiohttp is slow to import

            self._authorizer = CredentialAuthorizer(self._credentials, self._config, identity_key=self._identity_key)
        return self._authorizer


def _identity_key(config: Config) -> bytes:
    """Return the key under which identities are hashed: known to this farm's drivers, kept nowhere of its own."""
    secret = Path(config.redis.password_file).read_bytes() if config.redis.password_file else b""
    return hashlib.sha256(b"identity\0" + config.farm.name.encode() + b"\0" + secret.strip()).digest()
