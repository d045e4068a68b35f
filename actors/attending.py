"""Being there for what actors ask of a session: by long poll, for as long as their calls run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from actors.handles import SessionServerHandle
from cluster.errors import ClusterError, InternalError
from cluster.messages import SessionAnswer, SessionQuestion
from cluster.ports import Authorizer, AuthRequest
from cluster.wire import encode_error

#: Answers one question. A ClusterError that it raises is the answer.
Answer = Callable[[SessionQuestion], Awaitable[SessionAnswer]]

#: Seconds that one question poll stays open at an actor. While it is, a driver that was killed counts as there:
#: this and the actor's grace bound how long work goes on for nobody.
POLL_S = 5.0
_REOPEN_PAUSE_S = 0.5


async def answer_forever(server: SessionServerHandle, session_id: str, answer: Answer) -> None:
    """Answer *server*'s questions of a session until cancelled; those of one poll side by side."""
    async with asyncio.TaskGroup() as group:
        while True:
            try:
                questions = await server.poll_questions(session_id, POLL_S)
            except ClusterError:
                await asyncio.sleep(_REOPEN_PAUSE_S)  # the actor is being restarted, perhaps
                continue
            for question in questions:
                group.create_task(_answer(server, session_id, question, answer))


async def answer_by(authorizer: Authorizer, question: SessionQuestion) -> SessionAnswer:
    """Return what *authorizer* says to a question about a registry."""
    found = await authorizer.authorize(
        AuthRequest(
            registry=question.registry,
            plain_http=question.plain_http,
            scopes=question.scopes,
            challenge=question.challenge,
            was_refused=question.was_refused,
        )
    )
    return SessionAnswer(
        question_id=question.question_id,
        header=found.header if found else None,
        expires_in_s=found.expires_in_s if found else None,
    )


@contextlib.asynccontextmanager
async def attending(server: SessionServerHandle, session_id: str, answer: Answer) -> AsyncIterator[None]:
    """Answer *server*'s questions while the body runs."""
    task = asyncio.create_task(answer_forever(server, session_id, answer))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _answer(server: SessionServerHandle, session_id: str, question: SessionQuestion, answer: Answer) -> None:
    try:
        answered = await answer(question)
    except ClusterError as exc:
        answered = SessionAnswer(question_id=question.question_id, error=encode_error(exc))
    except Exception as exc:  # noqa: BLE001 - a bug in one answer must not silence all that are still to come
        import structlog  # noqa: PLC0415 - 0.1 s, which drivers are spared

        # By its type alone, here and in the log: who answers has secrets at hand.
        structlog.get_logger().error("session.bug", session=session_id, error_type=type(exc).__name__)
        error = InternalError(f"answering for session {session_id}: {type(exc).__name__}")
        answered = SessionAnswer(question_id=question.question_id, error=encode_error(error))
    with contextlib.suppress(ClusterError):
        server.send_answer(session_id, answered)
