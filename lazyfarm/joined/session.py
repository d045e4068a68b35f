"""A driver's session: its credentials, answered while its calls run, and its lease, renewed while it lives.

Runs on a thread and event loop of its own, so that neither a blocked driver nor a long callback lets the
farm believe that the driver is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from actors.attending import answer_by, answer_forever
from actors.handles import SchedulerHandle, SessionServerHandle
from cluster.config import Config
from cluster.errors import ClusterError, LeaseLostError
from cluster.job import JobId
from cluster.lease import LeaseId
from cluster.messages import SessionAnswer, SessionInfo, SessionQuestion
from cluster.solver_ports import ATTENDED_S
from lazyfarm.lease import renew_until_lost
from storage.connect import connect
from storage.jobs import RedisJobStore
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.registry.credentials import CredentialSource
from storage.registry.identity import identity_key, identity_of

if TYPE_CHECKING:
    from storage.registry.auth import CredentialAuthorizer

T = TypeVar("T")


#: Seconds between signs of life for a job: a few within what it allows.
_ATTEND_S = ATTENDED_S / 6
#: Seconds between looks for who has a job that was submitted just now.
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class _Attended:
    """An actor that asks, and for what."""

    server: SessionServerHandle
    session_id: str
    secrets: Mapping[str, bytes] = field(repr=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.server.name, self.session_id


class Session:
    """One driver's presence at the farm."""

    def __init__(
        self, config: Config, credentials: CredentialSource, *, keep_s: float | None, session_id: str = ""
    ) -> None:
        self.session_id = session_id or secrets.token_hex(8)
        self.lease_id = LeaseId(f"driver-{self.session_id}")
        self._config = config
        self._credentials = credentials
        self._identity_key = identity_key(config)
        self._authorizer: CredentialAuthorizer | None = None
        self._keep_s = keep_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="lazyfarm-session", daemon=True)
        self._attended: dict[tuple[str, str], tuple[int, asyncio.Task[None]]] = {}
        self._lost: LeaseLostError | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._thread.start()
        self._link = connect(config.redis)
        self._leases = RedisLeaseStore(self._link, Keys(config.farm.name))
        self._jobs = RedisJobStore(self._link, Keys(config.farm.name))

    def __repr__(self) -> str:
        return f"<Session {self.session_id}>"

    # -- opening and closing -----------------------------------------------------------------------------

    def open(self, *, is_back: bool = False) -> None:
        """Take the session's lease and keep it; where it *is_back*, the one that it had before, or it is lost."""
        self._call(self._open(is_back=is_back))

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

    async def _open(self, *, is_back: bool) -> None:
        # Short, also where it is to be kept: a driver that is killed holds nothing for days.
        ttl_s = self._config.cache.lease_ttl_s
        if is_back:
            try:
                await self._leases.renew(self.lease_id, ttl_s=ttl_s)
            except LeaseLostError as exc:
                self._lost = exc
                return
            self._renewal = asyncio.create_task(self._keep_lease())
            return
        labels = {"owner": "driver", "host": socket.gethostname(), "pid": str(os.getpid())}
        await self._leases.create(self.lease_id, ttl_s=ttl_s, labels=labels)
        self._renewal = asyncio.create_task(self._keep_lease())

    async def _close(self, *, discard: bool) -> None:
        # All that runs here: what attends a job whose caller has just been cancelled has not ended yet.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
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
        self,
        registries: Iterable[str],
        *,
        progress: str | None,
        deadline_s: float,
        trace: str = "",
        session_id: str = "",
    ) -> SessionInfo:
        """Return what a call says of its caller; identities are of those *registries* that may matter.

        *session_id*: as of :meth:`attending`.
        """
        return SessionInfo(
            session_id=session_id or self.session_id,
            identities={registry: self._identity(registry) for registry in set(registries)},
            progress=progress,
            deadline_s=deadline_s,
            trace=trace or secrets.token_hex(6),
        )

    @contextlib.asynccontextmanager
    async def attending(
        self, server: SessionServerHandle, *, session_id: str = "", secrets: Mapping[str, bytes] | None = None
    ) -> AsyncIterator[None]:
        """Answer *server*'s questions while the body runs.

        Args:
            server: Who asks.
            session_id: A session of its own within this one, for a job; "" for this one.
            secrets: What it may ask for, by ID; nothing else of this process can be.
        """
        attended = _Attended(server, session_id or self.session_id, secrets or {})
        self._loop.call_soon_threadsafe(self._attend, attended)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._release, attended)

    def _attend(self, attended: _Attended) -> None:
        count, task = self._attended.get(attended.key, (0, None))
        if task is None or task.done():
            answer = partial(self._answer, attended)
            task = self._loop.create_task(answer_forever(attended.server, attended.session_id, answer))
        self._attended[attended.key] = (count + 1, task)

    def _release(self, attended: _Attended) -> None:
        count, task = self._attended[attended.key]
        if count > 1:
            self._attended[attended.key] = (count - 1, task)
        else:
            del self._attended[attended.key]
            task.cancel()

    async def _answer(self, attended: _Attended, question: SessionQuestion) -> SessionAnswer:
        if question.secret:
            return SessionAnswer(question_id=question.question_id, secret=attended.secrets.get(question.secret))
        return await answer_by(self._authorizing(), question)

    # -- jobs ----------------------------------------------------------------------------------------------

    def id_of_job(self, job: JobId) -> str:
        """Return the ID of the session, within this one, that answers for a job."""
        return f"{self.session_id}-{job}"

    @contextlib.asynccontextmanager
    async def attending_job(self, job: JobId, *, secrets: Mapping[str, bytes]) -> AsyncIterator[None]:
        """Be there for an attached job while the body runs, whichever scheduler has it.

        On this session's own thread: a driver that is busy is not taken for gone.
        """
        running = asyncio.run_coroutine_threadsafe(self._attend_job(job, secrets), self._loop)
        try:
            yield
        finally:
            running.cancel()

    async def _attend_job(self, job: JobId, secrets: Mapping[str, bytes]) -> None:
        owner = ""
        async with contextlib.AsyncExitStack() as attended:
            while True:
                with contextlib.suppress(ClusterError):  # Redis is away: said again in a moment
                    await self._jobs.attend(job)
                    record = await self._jobs.get(job)
                    if record.state.is_end:
                        return
                    if record.owner != owner:
                        await attended.aclose()
                        owner = record.owner
                        scheduler = SchedulerHandle(owner, farm=self._config.farm.name)
                        session_id = self.id_of_job(job)
                        await attended.enter_async_context(
                            self.attending(scheduler, session_id=session_id, secrets=secrets)
                        )
                await asyncio.sleep(_ATTEND_S if owner else _LOOK_S)

    def _identity(self, registry: str) -> str:
        return identity_of(registry, self._credentials.lookup(registry), key=self._identity_key)

    def _authorizing(self) -> CredentialAuthorizer:
        """Return what authorizes requests: made at the first question, for it speaks HTTP, which most never need."""
        if self._authorizer is None:
            from storage.registry.auth import CredentialAuthorizer  # noqa: PLC0415  # aiohttp is slow to import

            self._authorizer = CredentialAuthorizer(self._credentials, self._config, identity_key=self._identity_key)
        return self._authorizer
