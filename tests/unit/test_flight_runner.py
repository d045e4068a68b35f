"""Flights of one process on a real event loop: who shares what, who ends how."""

import asyncio
import contextvars
import pickle
import traceback

import pytest
from structlog.testing import capture_logs

from cluster.errors import (
    BlobNotFoundError,
    ClusterError,
    DeadlineExceededError,
    InternalError,
    RateLimitedError,
    UnavailableError,
)
from cluster.flight.runner import Flights

K = "blob:sha256:aa"


class Work:
    """Scripted work: counts its runs, tells when it has begun, goes on when it is told to."""

    def __init__(self, result="done", error=None):
        self.runs = 0
        self.result = result
        self.error = error
        self.arrived = asyncio.Event()
        self.proceed = asyncio.Event()
        self.context = None
        self.cancellations = 0

    async def __call__(self, context):
        self.runs += 1
        self.context = context
        self.arrived.set()
        try:
            await self.proceed.wait()
        except asyncio.CancelledError:
            self.cancellations += 1
            raise
        if self.error is not None:
            raise self.error
        return self.result


class StubbornWork(Work):
    """Work that notices its cancellation and goes on until it is told to end."""

    def __init__(self, *, ends_with="cancellation", **kwargs):
        super().__init__(**kwargs)
        self.ends_with = ends_with
        self.was_cancelled = asyncio.Event()

    async def __call__(self, context):
        self.runs += 1
        self.context = context
        self.arrived.set()
        while True:
            try:
                await self.proceed.wait()
                break
            except asyncio.CancelledError:
                self.cancellations += 1
                self.was_cancelled.set()
        if self.ends_with == "cancellation":
            raise asyncio.CancelledError
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
async def flights():
    """Flights that hold nothing at the end of each test."""
    flights = Flights("test")
    yield flights
    flights._state.validate()
    statistics = flights.statistics()
    assert (statistics.flying, statistics.aborting, statistics.callers) == (0, 0, 0), flights
    assert flights._running == {}
    await flights.aclose(1.0)


async def start(flights, work, key=K, **kwargs):
    """Start a caller, and return its task once it waits (its flight's work may not have begun)."""
    task = asyncio.create_task(flights.run(key, work, **kwargs))
    await asyncio.sleep(0)  # one step: it joins without giving way
    return task


async def ended(task):
    """Wait for a task's end without raising; tell how it ended."""
    await asyncio.wait({task}, timeout=10)
    assert task.done(), "still waiting"
    return task


# -- sharing ---------------------------------------------------------------------------------------------


async def test_two_callers_share_one_run(flights):
    """TestNoCancel: the work runs once, both get its result, one of them by joining."""
    work, unused = Work(), Work()
    first = await start(flights, work)
    second = await start(flights, unused)
    work.proceed.set()
    outcomes = await asyncio.gather(first, second)
    assert [outcome.value for outcome in outcomes] == ["done", "done"]
    assert [outcome.joined for outcome in outcomes] == [False, True]
    assert (work.runs, unused.runs) == (1, 0)
    assert flights.statistics().joined == 1


async def test_keys_run_independently(flights):
    """A key that is stuck or cancelled does not hold another up."""
    work, other = Work(), Work("other")
    first = await start(flights, work)
    second = await start(flights, other, key="blob:sha256:bb")
    other.proceed.set()
    assert (await second).value == "other"
    first.cancel()
    assert (await ended(first)).cancelled()


async def test_nothing_is_remembered_after_the_end(flights):
    """A call after the end runs the work anew."""
    work = Work()
    work.proceed.set()
    assert (await flights.run(K, work)).joined is False
    assert (await flights.run(K, work)).joined is False
    assert work.runs == 2


async def test_work_runs_in_the_context_variables_of_the_caller_who_brought_it(flights):
    """Launched at once or after a standby, work sees its own caller's context, not another's."""
    request = contextvars.ContextVar("request")
    seen = []

    class Asking(StubbornWork):
        async def __call__(self, context):
            seen.append(request.get())
            return await super().__call__(context)

    work, fresh = Asking(), Asking(ends_with="result")
    request.set("first")
    first = await start(flights, work)
    await work.arrived.wait()
    first.cancel()
    await work.was_cancelled.wait()
    request.set("second")
    second = await start(flights, fresh)
    work.proceed.set()
    fresh.proceed.set()
    await second
    await ended(first)
    assert seen == ["first", "second"]


# -- leaving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaver", [0, 1])
async def test_one_callers_cancellation_does_not_reach_the_other(flights, leaver):
    """TestCancelOne: the cancelled one is cancelled at once, the other gets the result of the one run (I6)."""
    work = Work()
    callers = [await start(flights, work), await start(flights, work)]
    await work.arrived.wait()
    callers[leaver].cancel()
    assert (await ended(callers[leaver])).cancelled()
    assert not callers[1 - leaver].done()
    work.proceed.set()
    assert (await callers[1 - leaver]).value == "done"
    assert (work.runs, work.cancellations) == (1, 0)


async def test_caller_that_comes_during_an_abort_succeeds(flights):
    """TestCancelRace: whoever joins work that is being aborted gets a run of its own, never the cancellation (I6)."""
    work, fresh = StubbornWork(), Work("fresh")
    first = await start(flights, work)
    await work.arrived.wait()
    first.cancel()
    await work.was_cancelled.wait()
    late = await start(flights, fresh)
    assert flights.statistics().standby == 1
    assert fresh.runs == 0, "launched beside the work that it waits for"
    work.proceed.set()
    fresh.proceed.set()
    outcome = await late
    assert (outcome.value, outcome.joined) == ("fresh", False)
    assert (await ended(first)).cancelled()


@pytest.mark.parametrize("rounds", range(20))
async def test_caller_that_comes_right_after_a_cancellation_succeeds(flights, rounds):
    """However few turns of the loop lie between the cancellation and the late caller, it succeeds (I6)."""
    work, fresh = Work(), Work("fresh")
    fresh.proceed.set()
    first = await start(flights, work)
    first.cancel()
    for _ in range(rounds):
        await asyncio.sleep(0)
    late = asyncio.create_task(flights.run(K, fresh))
    assert (await late).value == "fresh"
    assert (await ended(first)).cancelled()


async def test_when_all_are_cancelled_the_work_is_cancelled(flights):
    """TestCancelBoth: the last to go takes the work along; a later call runs anew; other keys don't notice."""
    work, other, again = Work(), Work("other"), Work("again")
    first = await start(flights, work)
    second = await start(flights, work)
    bystander = await start(flights, other, key="blob:sha256:bb")
    await work.arrived.wait()
    first.cancel()
    second.cancel()
    assert (await ended(first)).cancelled()
    assert (await ended(second)).cancelled()
    assert (work.runs, work.cancellations) == (1, 1)
    again.proceed.set()
    other.proceed.set()
    assert (await flights.run(K, again)).value == "again"
    assert (await bystander).value == "other"
    assert flights.statistics().launched == 3


async def test_work_cancelled_before_its_first_step_settles():
    """Work that is cancelled before its body was ever entered ends its flight all the same (I5)."""
    flights = Flights("test")
    work = Work()
    caller = asyncio.create_task(flights.run(K, work))
    closing = asyncio.create_task(flights.aclose(10.0))  # its first step comes before the work's
    with pytest.raises(UnavailableError):
        await caller
    await closing
    assert work.runs == 0
    assert (flights.statistics().cancelled, flights.statistics().aborting) == (1, 0)


async def test_last_canceller_waits_for_the_works_end(flights):
    """When the last one's call ends, the work has ended: nothing runs on behind its back."""
    work = StubbornWork()
    first = await start(flights, work)
    await work.arrived.wait()
    first.cancel()
    await work.was_cancelled.wait()
    assert not first.done()
    work.proceed.set()
    assert (await ended(first)).cancelled()
    assert flights.statistics().cancelled == 1


async def test_last_canceller_gets_a_result_that_came_first(flights):
    """Work that finished in spite of its abort is handed over, and the cancellation is taken back."""
    work = StubbornWork(ends_with="result")
    cancelling = []

    async def caller():
        outcome = await flights.run(K, work)
        cancelling.append(asyncio.current_task().cancelling())
        return outcome

    first = asyncio.create_task(caller())
    await work.arrived.wait()
    first.cancel()
    await work.was_cancelled.wait()
    work.proceed.set()
    assert (await first).value == "done"
    assert cancelling == [0]


async def test_last_canceller_does_not_get_the_works_error(flights):
    """Whoever asked to be cancelled is cancelled, even if the work dies of something else meanwhile."""
    work = StubbornWork(ends_with="error", error=UnavailableError("registry", "reset"))
    first = await start(flights, work)
    await work.arrived.wait()
    first.cancel()
    await work.was_cancelled.wait()
    work.proceed.set()
    assert (await ended(first)).cancelled()


async def test_standby_gets_a_result_of_the_aborted_work(flights):
    """Work that finished in spite of its abort serves those who came meanwhile too: it is not run again (I1)."""
    work, fresh = StubbornWork(ends_with="result"), Work("fresh")
    first = await start(flights, work)
    await work.arrived.wait()
    first.cancel()
    await work.was_cancelled.wait()
    late = await start(flights, fresh)
    work.proceed.set()
    outcome = await late
    assert (outcome.value, outcome.joined, fresh.runs) == ("done", True, 0)
    await ended(first)


async def test_impatient_last_canceller_goes_at_once(flights):
    """Cancelled twice, the last one waits for nothing (I5); the abort goes on."""
    work = StubbornWork()
    first = await start(flights, work)
    await work.arrived.wait()
    first.cancel()
    await work.was_cancelled.wait()
    first.cancel()
    assert (await ended(first)).cancelled()
    assert flights.statistics().aborting == 1
    work.proceed.set()
    await asyncio.wait({flights._running[K].task})


async def test_timeout_of_one_caller_is_its_own(flights):
    """A caller's deadline ends its own wait and is seen as TimeoutError; the other goes on."""
    work = Work()
    patient = await start(flights, work)

    async def impatient():
        async with asyncio.timeout(0):
            await flights.run(K, work)

    with pytest.raises(TimeoutError):
        await impatient()
    work.proceed.set()
    assert (await patient).value == "done"


async def test_stuck_work_lets_its_callers_go():
    """Work that ignores its abort holds neither its last leaver nor those who came later for ever (I5)."""
    flights = Flights("test", abort_s=0.01)
    work, fresh = StubbornWork(), Work()
    first = await start(flights, work)
    await work.arrived.wait()
    with capture_logs() as logs:
        first.cancel()
        await work.was_cancelled.wait()
        late = await start(flights, fresh)
        with pytest.raises(DeadlineExceededError, match=r"did not end within 0\.01 s"):
            await late
        assert (await ended(first)).cancelled()
    assert fresh.runs == 0
    assert work.cancellations >= 2
    assert logs[0]["event"] == "flight.overdue"
    work.proceed.set()
    await flights.aclose(5.0)


# -- failing -----------------------------------------------------------------------------------------------


async def test_those_who_wait_share_the_error_as_copies_of_their_own(flights):
    """Each waiter gets the typed error with all it says; raising one adds nothing to another's traceback."""
    cause = OSError("reset by peer")
    original = RateLimitedError("registry", "busy", 7.0)
    original.__cause__ = cause
    original.add_note("while fetching layer 3")
    work = Work(error=original)
    callers = [await start(flights, work) for _ in range(3)]
    work.proceed.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert len({id(error) for error in errors} | {id(original)}) == 4
    depths = [len(traceback.extract_tb(error.__traceback__)) for error in errors]
    assert len(set(depths)) == 1
    for error in errors:
        assert type(error) is RateLimitedError
        assert error.retry_after_s == 7.0
        assert error.__cause__ is cause
        assert error.__notes__ == ["while fetching layer 3"]
        assert any(frame.name == "__call__" for frame in traceback.extract_tb(error.__traceback__))
    errors[0].add_note("mine")
    assert errors[1].__notes__ == ["while fetching layer 3"]


async def test_caller_that_comes_after_a_failure_starts_afresh(flights):
    """An error is not remembered."""
    failing, fresh = Work(error=BlobNotFoundError(K, "registry")), Work("fresh")
    failing.proceed.set()
    fresh.proceed.set()
    with pytest.raises(BlobNotFoundError):
        await flights.run(K, failing)
    assert (await flights.run(K, fresh)).value == "fresh"


async def test_caller_that_comes_between_the_failure_and_its_news_starts_afresh(flights):
    """Work that has failed, but whose end was not told yet, is not joined: late arrivals inherit no error."""
    failing, fresh = Work(error=UnavailableError("registry", "reset")), Work("fresh")
    fresh.proceed.set()
    first = await start(flights, failing)
    await failing.arrived.wait()
    failing.proceed.set()
    await asyncio.sleep(0)
    assert flights._running[K].task.done(), "the race is not the one that this test is about"
    assert (await flights.run(K, fresh)).value == "fresh"
    with pytest.raises(UnavailableError):
        await first


@pytest.mark.parametrize("foreign", [ValueError("boom"), SystemExit(3), BaseException("worse"), KeyError("x")])
async def test_a_foreign_exception_is_our_bug_for_every_waiter(flights, foreign):
    """Whatever the work raises ends its callers with a typed error; a SystemExit ends neither loop nor process (I5)."""
    work = Work(error=foreign)
    callers = [await start(flights, work) for _ in range(2)]
    work.proceed.set()
    for error in await asyncio.gather(*callers, return_exceptions=True):
        assert type(error) is InternalError
        assert type(foreign).__name__ in str(error)
        assert error.__cause__ is foreign


async def test_work_that_cancels_itself_does_not_cancel_its_callers(flights):
    """A CancelledError that no caller asked for is an error, or callers would be taken for cancelled (I6)."""
    work = Work(error=asyncio.CancelledError())
    work.proceed.set()
    with pytest.raises(InternalError):
        await flights.run(K, work)


async def test_work_that_is_not_awaitable_fails_its_caller(flights):
    """Work that raises before it is even awaited fails its callers like any other."""

    def broken(context):
        raise UnavailableError("registry", "reset")

    with pytest.raises(UnavailableError):
        await flights.run(K, broken)


async def test_error_that_can_not_be_copied_is_named_as_our_bug(flights):
    """An error class that breaks ``args == signature`` still ends every caller, and says what is wrong."""

    class OddError(ClusterError):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    work = Work(error=OddError(1, 2))
    work.proceed.set()
    with pytest.raises(InternalError, match="OddError can't be copied"):
        await flights.run(K, work)


async def test_errors_pickle_on(flights):
    """A caller's copy crosses an actor boundary as the original would."""
    work = Work(error=BlobNotFoundError(K, "registry"))
    work.proceed.set()
    with pytest.raises(BlobNotFoundError) as caught:
        await flights.run(K, work)
    assert pickle.loads(pickle.dumps(caught.value)).args == (K, "registry")  # noqa: S301 - made here


# -- many ----------------------------------------------------------------------------------------------------


async def test_ten_thousand_calls_in_a_row(flights):
    """TestContention: each call after another's end runs its own work."""
    runs = 0

    async def work(context):
        nonlocal runs
        runs += 1
        return runs

    for _ in range(10_000):
        await flights.run(K, work)
    assert runs == 10_000


async def test_a_thousand_callers_of_failing_work_all_end_with_its_error(flights):
    """TestMassiveParallel: under contention every caller gets the work's error, and none a timeout (I5)."""
    runs = 0

    async def failing(context):
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        raise UnavailableError("registry", str(runs))

    async def caller(delay):
        for _ in range(delay):
            await asyncio.sleep(0)
        await flights.run(K, failing)

    errors = await asyncio.gather(*(caller(i % 17) for i in range(1000)), return_exceptions=True)
    assert {type(error) for error in errors} == {UnavailableError}
    assert 1 < runs < 1000


async def test_a_thousand_callers_half_of_them_cancelled(flights):
    """However many go, those who stay get the result of one run (I1, I6)."""
    work = Work()
    callers = [await start(flights, work) for _ in range(1000)]
    for caller in callers[::2]:
        caller.cancel()
    await asyncio.wait(callers[::2])
    work.proceed.set()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    assert all(outcome.value == "done" for outcome in outcomes[1::2])
    assert (work.runs, work.cancellations) == (1, 0)


# -- progress --------------------------------------------------------------------------------------------------


async def test_progress_reaches_every_waiter_and_late_ones_get_the_last(flights):
    """Reports fan out; who joins late is told how far the work is already, then what follows."""
    work = Work()
    told = {"first": [], "late": []}
    first = await start(flights, work, on_progress=lambda *at: told["first"].append(at))
    await work.arrived.wait()
    work.context.report(1, 10)
    work.context.report(5, 10)
    late = await start(flights, work, on_progress=lambda *at: told["late"].append(at))
    work.context.report(10, 10)
    work.proceed.set()
    await asyncio.gather(first, late)
    assert told == {"first": [(1, 10), (5, 10), (10, 10)], "late": [(5, 10), (10, 10)]}


async def test_a_leaver_is_told_no_more(flights):
    """Leaving closes the leaver's own progress only, and so does the end of the work."""
    work = Work()
    told = {"leaver": [], "stays": []}
    leaver = await start(flights, work, on_progress=lambda *at: told["leaver"].append(at))
    stays = await start(flights, work, on_progress=lambda *at: told["stays"].append(at))
    await work.arrived.wait()
    leaver.cancel()
    await ended(leaver)
    work.context.report(1, 2)
    work.proceed.set()
    await stays
    work.context.report(2, 2)
    assert told == {"leaver": [], "stays": [(1, 2)]}


async def test_a_straggler_of_ended_work_does_not_report_to_the_next(flights):
    """What ended work still reports does not reach those who wait for the key's next run."""
    old, new = Work(), Work()
    old.proceed.set()
    await flights.run(K, old)
    told = []
    caller = await start(flights, new, on_progress=lambda *at: told.append(at))
    old.context.report(1, 2)
    assert told == []
    new.proceed.set()
    await caller


async def test_standby_gets_no_progress_of_the_aborted_work(flights):
    """Progress is of the run that one waits for."""
    work, fresh = StubbornWork(), Work()
    told = []
    first = await start(flights, work)
    await work.arrived.wait()
    work.context.report(9, 10)
    first.cancel()
    await work.was_cancelled.wait()
    late = await start(flights, fresh, on_progress=lambda *at: told.append(at))
    work.context.report(10, 10)
    work.proceed.set()
    await fresh.arrived.wait()
    fresh.context.report(1, 10)
    fresh.proceed.set()
    await asyncio.wait({first, late})
    assert told == [(1, 10)]


async def test_progress_callback_that_raises_hurts_nobody_else(flights):
    """A caller's broken callback is logged once and dropped; the work and the others don't notice (I6)."""
    work = Work()
    told = []

    def broken(current, total):
        raise ValueError("broken callback")

    callers = [
        await start(flights, work, on_progress=broken),
        await start(flights, work, on_progress=lambda *at: told.append(at)),
    ]
    await work.arrived.wait()
    with capture_logs() as logs:
        work.context.report(1, 2)
        work.context.report(2, 2)
    work.proceed.set()
    await asyncio.gather(*callers)
    assert told == [(1, 2), (2, 2)]
    assert [entry["event"] for entry in logs] == ["flight.progress_callback_failed"]


# -- callers ---------------------------------------------------------------------------------------------------


async def test_work_sees_the_callers_that_wait_now(flights):
    """The work may ask whoever waits, in join order; those who left and those without an object are not shown."""
    work = Work()
    first = await start(flights, work, caller="session-1")
    second = await start(flights, work, caller="session-2")
    third = await start(flights, work)
    await work.arrived.wait()
    assert work.context.callers == flights.callers(K) == ("session-1", "session-2")
    first.cancel()
    await ended(first)
    assert work.context.callers == ("session-2",)
    second.cancel()
    await ended(second)
    assert work.context.callers == ()
    work.proceed.set()
    await third
    assert flights.callers(K) == ()


# -- the end of the process --------------------------------------------------------------------------------------


async def test_closing_ends_everybody_at_once_and_waits_for_the_works():
    """Callers get a retryable error at once, works are cancelled and awaited, nobody gets in any more."""
    flights = Flights("test")
    work = StubbornWork()
    caller = await start(flights, work)
    await work.arrived.wait()
    closing = asyncio.create_task(flights.aclose(10.0))
    with pytest.raises(UnavailableError):
        await caller
    assert not closing.done()
    with pytest.raises(UnavailableError):
        await flights.run(K, work)
    work.proceed.set()
    await closing
    await flights.aclose(10.0)
    assert flights.statistics().callers == 0


async def test_closing_names_work_that_does_not_end():
    """A close waits no longer than it may, and says what it leaves behind."""
    flights = Flights("test")
    work = StubbornWork()
    caller = await start(flights, work)
    await work.arrived.wait()
    with pytest.raises(DeadlineExceededError, match=K):
        await flights.aclose(0.01)
    with pytest.raises(UnavailableError):
        await caller
    work.proceed.set()
    await flights.aclose(10.0)


async def test_repr_sums_up():
    """The repr and the statistics say what is there now."""
    flights = Flights("blobs")
    work, fresh = StubbornWork(), Work()
    first = await start(flights, work)
    await work.arrived.wait()
    other = await start(flights, fresh, key="blob:sha256:bb")
    first.cancel()
    await work.was_cancelled.wait()
    late = await start(flights, fresh)
    assert repr(flights) == "<Flights blobs: 1 flying, 1 aborting, 3 callers (1 on standby)>"
    statistics = flights.statistics()
    assert (statistics.launched, statistics.standby, statistics.succeeded) == (2, 1, 0)
    work.proceed.set()
    fresh.proceed.set()
    await asyncio.wait({first, other, late})
    await flights.aclose(1.0)
    assert repr(flights) == "<Flights blobs: 0 flying, 0 aborting, 0 callers (0 on standby), closed>"
