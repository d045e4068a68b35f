"""Flights of one process: callers of the same key share one run of the work.

Performs what :class:`cluster.flight.state.FlightState` decides, and decides nothing itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, assert_never, cast

import structlog

from cluster.errors import ClusterError, DeadlineExceededError, InternalError, UnavailableError
from cluster.flight.state import (
    Abort,
    Close,
    Event,
    FlightPhase,
    FlightState,
    Instruction,
    Join,
    Launch,
    Leave,
    Overdue,
    Resolve,
    Settle,
    WaiterId,
    WaiterLeft,
    WaiterOutcome,
    WorkCancelled,
    WorkFailed,
    WorkOutcome,
    WorkSucceeded,
)

T = TypeVar("T")
C = TypeVar("C")

_log = structlog.get_logger(__name__)

#: Told (current, total) on the event loop. Must not block; if it raises, it is told no more.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FlightOutcome(Generic[T]):
    """What a caller of :meth:`Flights.run` gets."""

    value: T
    #: True where the work that ran is another caller's.
    joined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FlightStatistics:
    """A snapshot: what is there now, and totals since the start."""

    flying: int
    aborting: int
    #: Callers whose call has not ended: those who wait, who left last, who stand by.
    callers: int
    standby: int
    launched: int
    #: Callers that ended with the result of another's work.
    joined: int
    succeeded: int
    failed: int
    #: Works that ended by their cancellation.
    cancelled: int
    #: Times that aborted work was found not to have ended in time.
    overdue: int


class FlightContext(Generic[C]):
    """What running work knows of those it runs for. Belongs to the event loop; not thread-safe.

    A thread reports by ``loop.call_soon_threadsafe(context.report, current, total)``.
    """

    __slots__ = ("_callers", "_fan_out", "_progress", "key")

    def __init__(
        self,
        key: str,
        *,
        callers: Callable[[], tuple[C, ...]],
        fan_out: Callable[[FlightContext[C], int, int], None],
    ) -> None:
        self.key = key
        self._callers = callers
        self._fan_out = fan_out
        self._progress: tuple[int, int] | None = None

    @property
    def callers(self) -> tuple[C, ...]:
        """The ``caller`` objects of those who wait now, in join order; empty once the work is aborted."""
        return self._callers()

    @property
    def progress(self) -> tuple[int, int] | None:
        """What was last reported, as (current, total)."""
        return self._progress

    def report(self, current: int, total: int) -> None:
        """Tell every waiter how far the work is; who joins later is told the last report at once."""
        self._progress = (current, total)
        self._fan_out(self, current, total)

    def __repr__(self) -> str:
        return f"<FlightContext {self.key}: {len(self.callers)} callers, progress {self._progress}>"


Work = Callable[[FlightContext[C]], Awaitable[T]]


@dataclass(slots=True, eq=False)
class _Waiter(Generic[T, C]):
    """One call of :meth:`Flights.run`."""

    work: Work[C, T]
    caller: C | None
    #: None where nobody listens (any more).
    on_progress: OnProgress | None
    #: The caller's context variables: its own work runs in them, at once or after a standby.
    context: contextvars.Context
    #: Carries every outcome as a result: an exception that nobody awaits would be complained of.
    resolved: asyncio.Future[WaiterOutcome]
    #: True once its own work was launched.
    was_launched: bool = False


@dataclass(slots=True, eq=False)
class _Flight(Generic[C]):
    """One running work. The reference keeps its task from being collected."""

    context: FlightContext[C]
    task: asyncio.Task[WorkOutcome]
    #: Set while the work is being aborted.
    overdue_timer: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        if self.overdue_timer is not None:
            self.overdue_timer.cancel()
            self.overdue_timer = None


@dataclass(slots=True)
class _Totals:
    launched: int = 0
    joined: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    overdue: int = 0


class Flights(Generic[T, C]):
    """Runs work once a key for all its callers, on one event loop. ``T``: result; ``C``: caller object.

    A key names everything that the result depends on: one parameter left out of it gives one caller
    another's result (moby/buildkit 23ec51611).

    Args:
        name: What these flights are of, for messages.
        abort_s: Seconds that cancelled work may take to end, > 0. After that its last leaver goes, those
            who stand by for its end get DeadlineExceededError, and it is cancelled again.
    """

    def __init__(self, name: str = "flights", *, abort_s: float = 30.0) -> None:
        self._name = name
        self._abort_s = abort_s
        self._state = FlightState()
        self._waiters: dict[WaiterId, _Waiter[T, C]] = {}
        #: All and only the works that have not settled, by key.
        self._running: dict[str, _Flight[C]] = {}
        self._ids = itertools.count(1)
        self._totals = _Totals()
        #: Set once closed: what everybody gets.
        self._closed: UnavailableError | None = None

    async def run(
        self,
        key: str,
        work: Work[C, T],
        *,
        caller: C | None = None,
        on_progress: OnProgress | None = None,
    ) -> FlightOutcome[T]:
        """Return the result of the one run of *key*'s work that its callers share.

        The work runs in a task of its own, never in a caller's, so no caller's cancellation or deadline
        ends it for the others. A caller that is cancelled leaves at once and fails nobody. The last one
        to leave aborts the work and waits for its end; if it succeeded nevertheless, its result is
        returned and the request to cancel is taken back (:meth:`asyncio.Task.uncancel`). Cancelled a
        second time, the last one goes at once too.

        Args:
            key: Names the work and all that its result depends on.
            work: Called unless a run of *key* can be joined; runs in this caller's context variables.
            caller: Shown to the work as one of its callers while this call waits.
            on_progress: Told of reports, beginning with the last one so far; never after this call's end.

        Raises:
            ClusterError: what the work raised, as this caller's own copy.
            InternalError: the work raised something else, or was cancelled by nobody of ours.
            DeadlineExceededError: work that was aborted before this call does not end.
            UnavailableError: these flights are closed.
        """
        if self._closed is not None:
            raise _copy(self._closed)
        # Work that has ended while its callback is still to run is settled first:
        # t=0  the work raises; its callback is scheduled
        # t=1  this caller joins
        # t=2  the callback hands the error to all who wait: this caller came after the end
        ended = self._running.get(key)
        if ended is not None and ended.task.done():
            self._on_done(key, ended.task)

        waiter_id = WaiterId(next(self._ids))
        waiter = _Waiter[T, C](
            work=work,
            caller=caller,
            on_progress=on_progress,
            context=contextvars.copy_context(),
            resolved=asyncio.get_running_loop().create_future(),
        )
        self._waiters[waiter_id] = waiter
        self._apply(Join(key, waiter_id))
        if self._state.phase(key) is FlightPhase.FLYING:
            _tell(self._running[key].context.progress, waiter)
        outcome = await self._wait(key, waiter_id, waiter.resolved)
        if isinstance(outcome, WorkFailed):
            raise _copy(outcome.error)
        self._totals.joined += not waiter.was_launched
        return FlightOutcome(cast("T", outcome.value), joined=not waiter.was_launched)

    def callers(self, key: str) -> tuple[C, ...]:
        """Return the caller objects that wait for *key* now, in join order."""
        waiting = (self._waiters[waiter].caller for waiter in self._state.waiters(key))
        return tuple(caller for caller in waiting if caller is not None)

    def statistics(self) -> FlightStatistics:
        """Return a snapshot."""
        totals = self._totals
        return FlightStatistics(
            flying=self._state.count(FlightPhase.FLYING),
            aborting=self._state.count(FlightPhase.ABORTING),
            callers=len(self._waiters),
            standby=self._state.standby_count(),
            launched=totals.launched,
            joined=totals.joined,
            succeeded=totals.succeeded,
            failed=totals.failed,
            cancelled=totals.cancelled,
            overdue=totals.overdue,
        )

    async def aclose(self, deadline_s: float) -> None:
        """End every flight: callers get UnavailableError at once, works are cancelled and awaited. Idempotent.

        Raises:
            DeadlineExceededError: some works did not end within *deadline_s* seconds; they were cancelled
                once more and are left alone.
        """
        if self._closed is None:
            self._closed = UnavailableError(self._name, "it is being closed")
        for key in self._state.running_keys():
            self._apply(Close(key, self._closed))
        if not self._running:
            return
        await asyncio.wait({flight.task for flight in self._running.values()}, timeout=deadline_s)
        stuck = {key: flight for key, flight in self._running.items() if not flight.task.done()}
        for key, flight in stuck.items():
            self._apply(Overdue(key, deadline_s))
            flight.stop_timer()
        if stuck:
            keys = ", ".join(sorted(stuck))
            raise DeadlineExceededError(self._name, f"work did not end within {deadline_s:g} s: {keys}")

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<Flights {self._name}: {now.flying} flying, {now.aborting} aborting, "
            f"{now.callers} callers ({now.standby} on standby){', closed' if self._closed else ''}>"
        )

    # -- a caller's wait -----------------------------------------------------------------------------------

    async def _wait(
        self, key: str, waiter_id: WaiterId, resolved: asyncio.Future[WaiterOutcome]
    ) -> WorkSucceeded | WorkFailed:
        """Wait until the waiter is resolved; the caller's cancellation becomes its leaving."""
        try:
            return _not_left(await asyncio.shield(resolved))
        except asyncio.CancelledError:
            if resolved.done():
                raise  # resolved and cancelled in one turn of the loop: the cancellation wins
            self._apply(Leave(key, waiter_id))
            if resolved.done():
                raise
            # It was the last: the work's end is waited for.
            try:
                outcome = await asyncio.shield(resolved)
            except asyncio.CancelledError:
                if not resolved.done():
                    self._apply(Leave(key, waiter_id))
                raise
            if not isinstance(outcome, WorkSucceeded):
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            return outcome

    # -- events and instructions ----------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        """Feed *event* to the state and perform what it instructs."""
        for instruction in self._state.handle(event):
            self._perform(event.key, instruction)

    def _perform(self, key: str, instruction: Instruction) -> None:
        match instruction:
            case Launch(_, waiter_id):
                self._launch(key, self._waiters[waiter_id])
            case Abort():
                flight = self._running[key]
                flight.task.cancel()
                flight.stop_timer()
                flight.overdue_timer = asyncio.get_running_loop().call_later(
                    self._abort_s, self._on_overdue, key, flight.task
                )
            case Resolve(waiter_id, outcome):
                self._waiters.pop(waiter_id).resolved.set_result(outcome)
            case _:
                assert_never(instruction)

    def _launch(self, key: str, waiter: _Waiter[T, C]) -> None:
        waiter.was_launched = True
        self._totals.launched += 1
        context = FlightContext[C](key, callers=partial(self.callers, key), fan_out=self._fan_out)
        task = asyncio.get_running_loop().create_task(
            _run_work(waiter.work, context), name=f"{self._name} {key}", context=waiter.context
        )
        self._running[key] = _Flight(context, task)
        # A callback, not a `finally` in the coroutine: a task that is cancelled before its first step
        # never enters its body, and would never settle.
        task.add_done_callback(partial(self._on_done, key))

    def _on_done(self, key: str, task: asyncio.Task[WorkOutcome]) -> None:
        flight = self._running.get(key)
        if flight is None or flight.task is not task:
            return  # a caller that came after its end has settled it
        flight.stop_timer()
        del self._running[key]
        outcome = _outcome_of(key, task)
        match outcome:
            case WorkSucceeded():
                self._totals.succeeded += 1
            case WorkFailed():
                self._totals.failed += 1
            case WorkCancelled():
                self._totals.cancelled += 1
            case _:
                assert_never(outcome)
        self._apply(Settle(key, outcome))

    def _on_overdue(self, key: str, task: asyncio.Task[WorkOutcome]) -> None:
        if task.done():
            return  # its callback is about to run
        self._totals.overdue += 1
        _log.warning("flight.overdue", flights=self._name, key=key, abort_s=self._abort_s)
        self._apply(Overdue(key, self._abort_s))

    def _fan_out(self, context: FlightContext[C], current: int, total: int) -> None:
        flight = self._running.get(context.key)
        if flight is None or flight.context is not context:
            return  # a straggler of work that has ended; the key may be flying anew
        for waiter_id in self._state.waiters(context.key):
            waiter = self._waiters.get(waiter_id)
            if waiter is not None:
                _tell((current, total), waiter)


async def _run_work(work: Work[C, T], context: FlightContext[C]) -> WorkOutcome:
    """Run *work*; whatever it does becomes an outcome, so that it neither ends the loop nor hangs a caller."""
    try:
        return WorkSucceeded(await work(context))
    except ClusterError as exc:
        return WorkFailed(exc)
    except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):
        raise
    except BaseException as exc:  # noqa: BLE001 - a SystemExit in a task would end the whole loop
        return WorkFailed(_foreign(context.key, exc))


def _outcome_of(key: str, task: asyncio.Task[WorkOutcome]) -> WorkOutcome:
    if task.cancelled():
        return WorkCancelled()
    exc = task.exception()
    return task.result() if exc is None else WorkFailed(_foreign(key, exc))


def _foreign(key: str, exc: BaseException) -> InternalError:
    """Turn what is not of our tree into the bug that it is; the cause keeps its traceback."""
    error = InternalError(f"the work of flight {key} raised {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error


def _not_left(outcome: WaiterOutcome) -> WorkSucceeded | WorkFailed:
    if isinstance(outcome, WaiterLeft):
        raise InternalError("a caller that never left was told that it left")
    return outcome


def _tell(progress: tuple[int, int] | None, waiter: _Waiter[T, C]) -> None:
    """Tell one waiter; a callback that raises is its own affair, not the work's nor the other waiters'."""
    if progress is None or waiter.on_progress is None:
        return
    try:
        waiter.on_progress(*progress)
    except Exception:  # noqa: BLE001 - the callback is not ours; its traceback is logged
        waiter.on_progress = None
        _log.exception("flight.progress_callback_failed")


def _copy(error: ClusterError) -> ClusterError:
    """Copy an error for one caller: raised in many, a shared one would grow a traceback with each.

    The copy's traceback starts with the work's frames, and its cause is the original's.
    """
    try:
        twin = copy.copy(error)
    except Exception as exc:  # noqa: BLE001 - a class of ours that breaks `args == signature`
        twin = InternalError(f"{type(error).__name__} can't be copied ({exc}): {error}")
    twin.__cause__ = error.__cause__
    twin.__context__ = error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    if hasattr(error, "__notes__"):
        twin.__notes__ = list(error.__notes__)
    return twin.with_traceback(error.__traceback__)
