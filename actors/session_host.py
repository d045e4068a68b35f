"""The worker's end of driver sessions: asks the driver for credentials, by long poll, when they are used.

Credentials stay with the driver. While a driver has calls in flight at an actor it keeps one
``session_next`` call open there; a question goes out as that call's reply, the answer comes back in a
``session_answer`` call. Nothing of it touches Redis, S3 or Ray's store: method calls only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping

from actors.replies import RESULT
from cluster.errors import SessionGoneError
from cluster.messages import SessionAnswer, SessionInfo, SessionQuestion
from cluster.ports import Authorization, AuthRequest
from cluster.wire import decode, decode_error, encode

#: Seconds without an open poll after which a session counts as gone. A poll is reopened at once, from a
#: thread of the driver's own, so only a dead or cut-off driver is silent for so long.
SESSION_GRACE_S = 10.0
#: Seconds between looks at whether a session is silent.
_WATCH_S = 1.0
#: Seconds between two looks from which on it was this process that stood still: it has heard nobody meanwhile.
_STALL_S = 3.0
#: Seconds that a driver may take to answer: a token server is asked meanwhile.
ANSWER_TIMEOUT_S = 60.0
#: Seconds without an answer after which a question is put again: the poll that took it may have had nobody
#: at its other end any more. A driver that is asked twice answers twice, and the first answer counts.
_PUT_AGAIN_S = 1.0


class _Asked:
    """A question that waits for its answer."""

    def __init__(self, question: SessionQuestion) -> None:
        self.question = question
        self.answer: asyncio.Future[SessionAnswer] = asyncio.get_running_loop().create_future()
        #: When it may be put (again).
        self.due_s = -math.inf


class _Session:
    def __init__(self) -> None:
        self.pending: dict[str, _Asked] = {}
        #: Set, and replaced, when a poll has to look again.
        self.changed = asyncio.Event()
        #: Counts polls; a driver keeps one open, so all but the latest are stale.
        self.latest_poll = 0
        self.polls = 0
        self.calls = 0
        self.seen_s = time.monotonic()
        self.gone = asyncio.Event()
        self.cached: dict[tuple[str, tuple[str, ...]], tuple[Authorization | None, float]] = {}

    @property
    def is_live(self) -> bool:
        return self.polls > 0 or time.monotonic() - self.seen_s < SESSION_GRACE_S

    def wake(self) -> None:
        """Make polls look again."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def take_due(self) -> list[SessionQuestion]:
        """Return the questions that are to be put now, and note that they are."""
        now_s = time.monotonic()
        due = [asked for asked in self.pending.values() if asked.due_s <= now_s and not asked.answer.done()]
        for asked in due:
            asked.due_s = now_s + _PUT_AGAIN_S
        return [asked.question for asked in due]

    async def wait_due(self) -> None:
        """Wait until something changes or a question is due again."""
        due_s = min((asked.due_s for asked in self.pending.values()), default=math.inf)
        changed = self.changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due_s == math.inf else max(0.01, due_s - time.monotonic())):
                await changed.wait()


class SessionHost:
    """All sessions that one actor serves at the moment."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._ids = itertools.count()

    @contextlib.asynccontextmanager
    async def serving(self, info: SessionInfo) -> AsyncIterator[SessionAuthorizer]:
        """Serve a call of that session; the caller's task is cancelled if the session goes away meanwhile.

        Raises:
            SessionGoneError: the driver is gone: nobody waits for this call any more.
        """
        session = self._sessions.get(info.session_id)
        if session is None or session.gone.is_set():
            session = self._sessions[info.session_id] = _Session()
        session.calls += 1
        session.seen_s = time.monotonic()
        task = asyncio.current_task()
        watch = asyncio.create_task(self._watch(session, task))
        try:
            yield SessionAuthorizer(self, info)
        except (asyncio.CancelledError, SessionGoneError):
            # The watch ends by itself only where it has cancelled this task: that request is taken back.
            if watch.done() and task is not None and task.uncancel() == 0:
                raise SessionGoneError(info.session_id) from None
            raise
        finally:
            watch.cancel()
            session.calls -= 1
            self._forget_if_idle(info.session_id, session)

    async def _watch(self, session: _Session, task: asyncio.Task[object] | None) -> None:
        looked_s = time.monotonic()
        while session.is_live:
            await asyncio.sleep(_WATCH_S)
            before_s, looked_s = looked_s, time.monotonic()
            if looked_s - before_s > _STALL_S:
                session.seen_s = looked_s
        session.gone.set()
        for asked in session.pending.values():
            asked.answer.cancel()
        if task is not None:
            task.cancel()

    def is_live(self, session_id: str) -> bool:
        """Tell whether the session's driver is there."""
        session = self._sessions.get(session_id)
        return session is not None and session.is_live

    async def next_questions(self, session_id: str, *, wait_s: float) -> list[SessionQuestion]:
        """Wait up to *wait_s* seconds for questions to the driver; the driver's long poll."""
        # The poll may overtake the call that it serves, and outlive one call to serve the next.
        session = self._sessions.setdefault(session_id, _Session())
        session.polls += 1
        session.latest_poll += 1
        this_poll = session.latest_poll
        session.wake()
        try:
            async with asyncio.timeout(wait_s):
                while this_poll == session.latest_poll:
                    if questions := session.take_due():
                        return questions
                    await session.wait_due()
        except TimeoutError:
            pass
        finally:
            session.polls -= 1
            session.seen_s = time.monotonic()
            self._forget_if_idle(session_id, session)
        return []

    def answer(self, session_id: str, answer: SessionAnswer) -> None:
        """Take the driver's answer; dropped where nobody waits for it any more."""
        session = self._sessions.get(session_id)
        asked = session.pending.get(answer.question_id) if session is not None else None
        if asked is not None and not asked.answer.done():
            asked.answer.set_result(answer)

    def _forget_if_idle(self, session_id: str, session: _Session) -> None:
        """Forget a session, and the answers it keeps, once it has neither calls nor polls."""
        if not session.calls and not session.polls and self._sessions.get(session_id) is session:
            del self._sessions[session_id]

    async def ask(self, info: SessionInfo, request: AuthRequest) -> Authorization | None:
        """Put a question to the driver and wait for its answer; answers are reused until they expire."""
        session = self._live(info)
        cache_key = (request.registry, request.scopes)
        known = session.cached.get(cache_key)
        if known is not None and not request.was_refused and time.monotonic() < known[1]:
            return known[0]
        if request.challenge is None and not request.was_refused:
            return None
        answer = await self._put(
            session,
            info,
            SessionQuestion(
                question_id=str(next(self._ids)),
                registry=request.registry,
                plain_http=request.plain_http,
                scopes=request.scopes,
                challenge=request.challenge,
                was_refused=request.was_refused,
            ),
        )
        authorization = None if answer.header is None else Authorization(answer.header, answer.expires_in_s)
        lifetime_s = 3600.0 if answer.expires_in_s is None else answer.expires_in_s
        session.cached[cache_key] = (authorization, time.monotonic() + 0.9 * lifetime_s)
        return authorization

    async def ask_secret(self, info: SessionInfo, secret_id: str) -> bytes | None:
        """Ask the driver for a secret; None where it gives none. Kept nowhere here."""
        question = SessionQuestion(
            question_id=str(next(self._ids)),
            registry="",
            plain_http=False,
            scopes=(),
            challenge=None,
            was_refused=False,
            secret=secret_id,
        )
        return (await self._put(self._live(info), info, question)).secret

    def _live(self, info: SessionInfo) -> _Session:
        session = self._sessions.get(info.session_id)
        if session is None or not session.is_live:
            raise SessionGoneError(info.session_id)
        return session

    async def _put(self, session: _Session, info: SessionInfo, question: SessionQuestion) -> SessionAnswer:
        """Put a question to a session's driver and wait for its answer; raises the error that it answers with."""
        asked = session.pending[question.question_id] = _Asked(question)
        session.wake()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await asked.answer
        except TimeoutError:
            raise SessionGoneError(info.session_id) from None
        except asyncio.CancelledError:
            if session.gone.is_set() and asked.answer.cancelled():
                raise SessionGoneError(info.session_id) from None
            raise
        finally:
            session.pending.pop(question.question_id, None)
        if answer.error is not None:
            raise decode_error(answer.error)
        return answer

    @contextlib.contextmanager
    def keeping(self, session_id: str) -> Iterator[None]:
        """Keep a session and its answers for as long as the body runs, whether its driver is there or not."""
        session = self._sessions.setdefault(session_id, _Session())
        session.calls += 1
        try:
            yield
        finally:
            session.calls -= 1
            self._forget_if_idle(session_id, session)

    def statistics(self) -> Mapping[str, int]:
        """Return how many sessions are served."""
        return {"sessions": len(self._sessions)}


class SessionAuthorizer:
    """:class:`cluster.ports.Authorizer` for one call: asks the driver that made it."""

    def __init__(self, host: SessionHost, info: SessionInfo) -> None:
        self._host = host
        self._info = info

    def __repr__(self) -> str:
        return f"<SessionAuthorizer of {self._info.session_id}>"

    @property
    def is_live(self) -> bool:
        """Tell whether the driver is still there."""
        return self._host.is_live(self._info.session_id)

    def identity(self, registry: str) -> str:
        """Return who the driver says it is at *registry*.

        Where it says nothing it may be anybody: it does answer with its credentials when it is asked. What that shows
        is shown to this session alone, and never to whoever is anonymous there.
        """
        known = self._info.identities.get(registry)
        return f"session {self._info.tenant}" if known is None else known

    async def authorize(self, request: AuthRequest) -> Authorization | None:
        """Ask the driver; see :class:`cluster.ports.Authorizer`."""
        return await self._host.ask(self._info, request)


class SessionServer:
    """The two calls by which an actor serves drivers; on their side, :class:`actors.handles.SessionServerHandle`."""

    def __init__(self) -> None:
        self._sessions = SessionHost()

    async def session_next(self, session_id: str, wait_s: float) -> bytes:
        """Return questions for the driver of that session, at the latest after *wait_s* seconds."""
        return RESULT + encode("session-next-result", await self._sessions.next_questions(session_id, wait_s=wait_s))

    async def session_answer(self, session_id: str, payload: bytes) -> None:
        """Take the driver's answer."""
        self._sessions.answer(session_id, decode("session-answer", SessionAnswer, payload))
