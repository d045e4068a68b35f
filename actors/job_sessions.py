"""Who answers for jobs: their drivers, by the scheduler they attend; for detached jobs, the farm itself.

What a worker asks of an op's session is answered here by the session of any job that the op is done for: the job
that began it may have ended. Only by one that is the same to that registry, though: what the worker records as
this caller's access must be this caller's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from actors.attending import answer_by, attending
from actors.handles import SessionServerHandle
from actors.session_host import SessionAuthorizer, SessionHost
from cluster.config import Config
from cluster.errors import SessionGoneError
from cluster.job import JobId, JobSpec
from cluster.messages import SessionAnswer, SessionInfo, SessionQuestion
from cluster.ports import Authorizer
from storage.registry.auth import CredentialAuthorizer
from storage.registry.credentials import CredentialSource
from storage.registry.identity import identity_key

T = TypeVar("T")


class _JobSession(Protocol):
    """Who answers for one job."""

    @property
    def info(self) -> SessionInfo: ...

    @property
    def authorizer(self) -> Authorizer: ...

    async def secret(self, secret_id: str) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class _OfDriver:
    """An attached job's: its driver."""

    host: SessionHost
    info: SessionInfo

    @property
    def authorizer(self) -> Authorizer:
        return SessionAuthorizer(self.host, self.info)

    async def secret(self, secret_id: str) -> bytes | None:
        return await self.host.ask_secret(self.info, secret_id)


@dataclass(frozen=True, slots=True)
class _OfFarm:
    """A detached job's: what the farm is configured with. It has no secrets."""

    info: SessionInfo
    authorizer: Authorizer

    async def secret(self, secret_id: str) -> bytes | None:  # noqa: ARG002 - there are none
        return None


class JobSessions:
    """The sessions of all jobs of one scheduler.

    Args:
        host: Where drivers attend.
        config: The farm's.
        prefix: Begins the IDs of sessions towards workers; no other process's do.
    """

    def __init__(self, host: SessionHost, config: Config, *, prefix: str) -> None:
        self._host = host
        self._prefix = prefix
        self._jobs: dict[JobId, _JobSession] = {}
        self._numbers = itertools.count(1)
        self._own = CredentialAuthorizer(
            CredentialSource(files=[Path(config.build.credentials_file)] if config.build.credentials_file else []),
            config,
            identity_key=identity_key(config),
        )

    async def aclose(self) -> None:
        """Close what the farm's own credentials are asked through."""
        await self._own.aclose()

    @contextlib.contextmanager
    def of(self, spec: JobSpec, registries: Iterable[str]) -> Iterator[None]:
        """Have a job's session for as long as the body runs; *registries* may be asked for its sake."""
        with contextlib.ExitStack() as stack:
            if spec.is_detached:
                identities = {registry: self._own.identity(registry) for registry in registries}
                self._jobs[spec.id] = _OfFarm(replace(spec.session, identities=identities), self._own)
            else:
                stack.enter_context(self._host.keeping(spec.session.session_id))
                self._jobs[spec.id] = _OfDriver(self._host, spec.session)
            try:
                yield
            finally:
                del self._jobs[spec.id]

    def authorizer(self, jobs: Sequence[JobId]) -> Authorizer:
        """Return an authorizer that answers as the first of *jobs* that goes on.

        Raises:
            SessionGoneError: none does.
        """
        return self._first(jobs).authorizer

    def asking(self, jobs: Callable[[], Sequence[JobId]]) -> WorkSession:
        """Return a session towards workers, for something that is done for *jobs*: those at the time of each question.

        Raises:
            SessionGoneError: there is none.
        """
        first = self._first(jobs())
        session_id = f"{self._prefix}.{next(self._numbers)}"
        info = replace(first.info, session_id=session_id, part_of=first.info.session_id, progress=None)
        return WorkSession(info, lambda: self._known(jobs()))

    def _first(self, jobs: Sequence[JobId]) -> _JobSession:
        for found in self._known(jobs):
            return found
        raise SessionGoneError(f"of {', '.join(jobs) or 'no job'}")

    def _known(self, jobs: Sequence[JobId]) -> list[_JobSession]:
        return [self._jobs[job] for job in jobs if job in self._jobs]


class WorkSession:
    """The session of one piece of work at its workers."""

    def __init__(self, info: SessionInfo, sessions: Callable[[], Sequence[_JobSession]]) -> None:
        #: What requests say of their caller.
        self.info = info
        self._sessions = sessions

    @contextlib.asynccontextmanager
    async def at(self, server: SessionServerHandle) -> AsyncIterator[None]:
        """Answer a worker's questions while the body runs."""
        async with attending(server, self.info.session_id, self._answer):
            yield

    async def calling(self, server: SessionServerHandle, call: Awaitable[T]) -> T:
        """Make a call, and answer its questions meanwhile."""
        async with self.at(server):
            return await call

    async def _answer(self, question: SessionQuestion) -> SessionAnswer:
        if question.secret:
            return await self._secret(question)
        known_as = _identity(self.info, question.registry)
        for session in self._sessions():
            if _identity(session.info, question.registry) != known_as:
                continue
            with contextlib.suppress(SessionGoneError):
                return await answer_by(session.authorizer, question)
        raise SessionGoneError(self.info.session_id)

    async def _secret(self, question: SessionQuestion) -> SessionAnswer:
        is_anyone_there = False
        for session in self._sessions():
            with contextlib.suppress(SessionGoneError):
                value = await session.secret(question.secret)
                is_anyone_there = True
                if value is not None:
                    return SessionAnswer(question_id=question.question_id, secret=value)
        if not is_anyone_there:
            raise SessionGoneError(self.info.session_id)
        return SessionAnswer(question_id=question.question_id)


def _identity(info: SessionInfo, registry: str) -> str:
    return info.identities.get(registry, "anonymous")
