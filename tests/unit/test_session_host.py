"""Sessions as an actor serves them: questions reach the driver, answers come back, a silent driver is gone."""

import asyncio
from dataclasses import replace

import pytest

from actors import attending, handles, session_host
from actors.session_host import SessionHost
from cluster.errors import AccessDeniedError, SessionGoneError
from cluster.messages import SessionAnswer, SessionInfo
from cluster.ports import AuthRequest
from cluster.wire import encode_error

SESSION = "s1"
CHALLENGE = 'Bearer realm="https://auth.example/token"'
REQUEST = AuthRequest(registry="r.example", scopes=("repository:app:pull",), challenge=CHALLENGE)


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    """Moves the host's clock by hand."""
    clock = Clock()
    monkeypatch.setattr(session_host, "time", clock)
    return clock


@pytest.fixture
async def host(monkeypatch):
    """A host that looks for silence often, and holds nothing at the end of each test."""
    monkeypatch.setattr(session_host, "_WATCH_S", 0.005)
    host = SessionHost()
    yield host
    await asyncio.sleep(0)
    assert host.statistics() == {"sessions": 0}


async def silence(clock, seconds):
    """Let time go by, and the host look as often as it does."""
    for _ in range(int(seconds)):
        clock.now_s += 1.0
        await asyncio.sleep(0.01)


class Call:
    """One call of the driver at the actor."""

    def __init__(self, host, work, info=None):
        self.arrived = asyncio.Event()
        self.task = asyncio.create_task(self._run(host, work, info or SessionInfo(session_id=SESSION)))

    async def _run(self, host, work, info):
        async with host.serving(info) as authorizer:
            self.arrived.set()
            return await work(authorizer)


async def asks(authorizer):
    return await authorizer.authorize(REQUEST)


def answer(question, header="Bearer secret-token", expires_in_s=300.0):
    return SessionAnswer(question_id=question.question_id, header=header, expires_in_s=expires_in_s)


async def poll(host, wait_s=5.0):
    return await host.next_questions(SESSION, wait_s=wait_s)


async def test_a_question_goes_out_and_its_answer_comes_back(host):
    """What the call asks leaves with the driver's poll; what the driver answers is what the call gets."""
    call = Call(host, asks)
    (question,) = await poll(host)
    assert (question.registry, question.scopes, question.challenge) == ("r.example", REQUEST.scopes, CHALLENGE)
    host.answer(SESSION, answer(question))
    assert (await call.task).header == "Bearer secret-token"


async def test_a_poll_may_overtake_the_call_it_serves(host):
    """The driver's poll comes first, and gets the question of the call that comes after it."""
    polling = asyncio.create_task(poll(host))
    await asyncio.sleep(0)
    call = Call(host, asks)
    (question,) = await polling
    host.answer(SESSION, answer(question))
    assert (await call.task).header == "Bearer secret-token"


async def test_a_poll_that_outlives_its_call_serves_the_next(host):
    """One poll stays open over two calls: the second's question goes out with it, at once."""
    polling = asyncio.create_task(poll(host))
    first = Call(host, lambda _authorizer: asyncio.sleep(0))
    await first.task
    second = Call(host, asks)
    (question,) = await asyncio.wait_for(polling, 1.0)
    host.answer(SESSION, answer(question))
    await second.task


async def test_a_poll_ends_empty_where_nobody_asks(host):
    """A long poll without a question ends with nothing, and leaves nothing."""
    assert await poll(host, wait_s=0.01) == []


async def test_a_newer_poll_ends_an_older_one(host):
    """A driver keeps one poll open: of two, the older has nobody at its end, and must not take questions."""
    stale = asyncio.create_task(poll(host))
    await asyncio.sleep(0)
    live = asyncio.create_task(poll(host))
    assert await asyncio.wait_for(stale, 1.0) == []
    call = Call(host, asks)
    (question,) = await live
    host.answer(SESSION, answer(question))
    await call.task


async def test_a_question_that_was_taken_and_not_answered_is_put_again(host, monkeypatch):
    """A poll whose reply got lost costs a pause, never the call."""
    monkeypatch.setattr(session_host, "_PUT_AGAIN_S", 0.02)
    call = Call(host, asks)
    (lost,) = await poll(host)
    (question,) = await poll(host)
    assert question == lost
    host.answer(SESSION, answer(question))
    host.answer(SESSION, answer(question, header="Bearer too-late"))
    assert (await call.task).header == "Bearer secret-token"


async def test_a_silent_driver_is_gone_and_its_call_is_cancelled(host, clock):
    """No poll for the grace: the call ends with SessionGoneError, whatever it was doing."""
    call = Call(host, lambda _authorizer: asyncio.Event().wait())
    await call.arrived.wait()
    await silence(clock, session_host.SESSION_GRACE_S + 1)
    with pytest.raises(SessionGoneError):
        await asyncio.wait_for(call.task, 5.0)
    assert call.task.cancelling() == 0


async def test_who_asks_a_driver_that_goes_is_told(host, clock):
    """A question under way ends with SessionGoneError, not with a bare cancellation."""
    call = Call(host, asks)
    await poll(host)
    await silence(clock, session_host.SESSION_GRACE_S + 1)
    with pytest.raises(SessionGoneError):
        await asyncio.wait_for(call.task, 5.0)
    assert call.task.cancelling() == 0


async def test_a_host_that_stood_still_gives_a_driver_the_grace_anew(host, clock):
    """Paused, or short of a processor, it has heard nobody: that is no silence of the driver's."""
    call = Call(host, lambda _authorizer: asyncio.Event().wait())
    await call.arrived.wait()
    clock.now_s += 3 * session_host.SESSION_GRACE_S
    await silence(clock, session_host.SESSION_GRACE_S - 2)
    assert not call.task.done()
    assert host.is_live(SESSION)
    await silence(clock, 4)
    with pytest.raises(SessionGoneError):
        await asyncio.wait_for(call.task, 5.0)


async def test_an_open_poll_keeps_a_session_alive(host, clock):
    """While a poll is open its driver is there, however long it says nothing."""
    call = Call(host, lambda _authorizer: asyncio.sleep(0.05, "done"))
    polling = asyncio.create_task(poll(host))
    await call.arrived.wait()
    clock.now_s += 100 * session_host.SESSION_GRACE_S
    assert host.is_live(SESSION)
    assert await call.task == "done"
    polling.cancel()
    await asyncio.wait({polling})


async def test_a_cancelled_call_is_cancelled(host):
    """Somebody else's cancellation is no SessionGoneError."""
    call = Call(host, lambda _authorizer: asyncio.Event().wait())
    await call.arrived.wait()
    call.task.cancel()
    await asyncio.wait({call.task})
    assert call.task.cancelled()


async def test_answers_are_kept_until_they_expire(host, clock):
    """A second question for the same scopes is answered from here; after nine tenths of its life it is put."""
    asked = []

    async def works(authorizer):
        for step in range(3):
            if step == 2:
                clock.now_s += 271.0
            asked.append(await authorizer.authorize(REQUEST))
        return await authorizer.authorize(AuthRequest(registry="r.example", scopes=REQUEST.scopes))

    call = Call(host, works)
    (first,) = await poll(host)
    host.answer(SESSION, answer(first, header="Bearer one"))
    (second,) = await poll(host)
    host.answer(SESSION, answer(second, header="Bearer two"))
    last = await call.task
    assert [a.header for a in asked] == ["Bearer one", "Bearer one", "Bearer two"]
    assert last.header == "Bearer two"


async def test_what_was_refused_is_not_answered_from_the_cache(host):
    """A refused token is asked for anew, and the new one replaces it."""
    refused = AuthRequest(registry="r.example", scopes=REQUEST.scopes, challenge=CHALLENGE, was_refused=True)

    async def works(authorizer):
        await authorizer.authorize(REQUEST)
        await authorizer.authorize(refused)
        return await authorizer.authorize(REQUEST)

    call = Call(host, works)
    (first,) = await poll(host)
    host.answer(SESSION, answer(first, header="Bearer one"))
    (second,) = await poll(host)
    assert second.was_refused
    host.answer(SESSION, answer(second, header="Bearer two"))
    assert (await call.task).header == "Bearer two"


async def test_nothing_is_asked_without_a_challenge(host):
    """What is cached is all that can be said before the registry asks: nothing, at first."""
    call = Call(host, lambda a: a.authorize(AuthRequest(registry="r.example", scopes=REQUEST.scopes)))
    assert await call.task is None


async def test_an_error_of_the_driver_is_raised_here(host):
    """The driver's token server refuses: the call gets that very error."""
    call = Call(host, asks)
    (question,) = await poll(host)
    error = AccessDeniedError("app", "r.example", "wrong password")
    host.answer(SESSION, SessionAnswer(question_id=question.question_id, error=encode_error(error)))
    with pytest.raises(AccessDeniedError, match="wrong password"):
        await call.task


async def test_sessions_do_not_share_answers(host):
    """What one driver may do never serves another."""
    first = Call(host, asks)
    (question,) = await poll(host)
    host.answer(SESSION, answer(question))
    await first.task
    other = Call(host, asks, SessionInfo(session_id="s2"))
    (question,) = await host.next_questions("s2", wait_s=5.0)
    host.answer("s2", answer(question, header="Bearer other"))
    assert (await other.task).header == "Bearer other"


async def test_asking_without_a_session_says_that_it_is_gone(host):
    """After its call has ended, an authorizer has nobody to ask."""
    kept = []

    async def keeps(authorizer):
        kept.append(authorizer)

    await Call(host, keeps).task
    assert not kept[0].is_live
    with pytest.raises(SessionGoneError):
        await kept[0].authorize(REQUEST)


async def test_no_repr_shows_a_secret(host):
    """Authorizers, answers and authorizations may be logged."""
    shown = []

    async def works(authorizer):
        shown.extend([repr(authorizer), repr(await authorizer.authorize(REQUEST)), repr(host)])
        shown.extend(map(repr, host._sessions.values()))

    call = Call(host, works)
    (question,) = await poll(host)
    given = answer(question)
    shown.append(repr(given))
    host.answer(SESSION, given)
    await call.task
    assert "secret-token" not in "".join(shown)


async def test_identities_are_the_drivers_own(host):
    """An identity comes with the call. Where it doesn't say who the driver is, what is shown is shown to its session.

    It would be asked for credentials there: were it called anonymous, it would open that registry to who has none.
    """

    async def works(authorizer):
        return [authorizer.identity(f"{name}.example") for name in ("r", "public", "elsewhere")]

    info = SessionInfo(session_id=SESSION, identities={"r.example": "hash-of-alice", "public.example": "anonymous"})
    assert await Call(host, works, info).task == ["hash-of-alice", "anonymous", f"session {SESSION}"]
    part = replace(info, session_id="worker.1", part_of=SESSION)
    assert await Call(host, works, part).task == ["hash-of-alice", "anonymous", f"session {SESSION}"]


def test_a_poll_that_is_lost_is_given_up_before_the_session_is():
    """Sent to an actor that dies, it may hang for as long as it may take: the next one must still be in time."""
    assert attending.POLL_S + handles._POLL_SLACK_S + attending._REOPEN_PAUSE_S < session_host.SESSION_GRACE_S
