"""What a process decides about its flights: events in, instructions out."""

import pytest

from cluster.errors import DeadlineExceededError, InternalError, InvalidTransitionError, UnavailableError
from cluster.flight.state import (
    MOVES,
    Abort,
    Close,
    FlightPhase,
    FlightState,
    Join,
    Launch,
    Leave,
    Overdue,
    Resolve,
    Settle,
    WaiterLeft,
    WorkCancelled,
    WorkFailed,
    WorkSucceeded,
)

K = "blob:sha256:aa"
OTHER = "blob:sha256:bb"
ERROR = UnavailableError("registry", "reset")
SUCCESS = WorkSucceeded("bytes")
FAILURE = WorkFailed(ERROR)


@pytest.fixture
def state():
    """An empty state; every invariant is checked at the end of each test."""
    state = FlightState()
    yield state
    state.validate()


def feed(state, *events):
    """Apply events, checking the invariants after each; return the instructions of the last."""
    instructions = []
    for event in events:
        instructions = state.handle(event)
        state.validate()
    return instructions


# -- joining -----------------------------------------------------------------------------------------


def test_first_caller_launches_the_work(state):
    """The work is launched by the first who wants it, and is that caller's."""
    assert feed(state, Join(K, 1)) == [Launch(K, 1)]


def test_later_callers_join_the_running_work(state):
    """Whoever comes while the work runs waits for it and launches nothing."""
    assert feed(state, Join(K, 1), Join(K, 2)) == []
    assert state.waiters(K) == (1, 2)


def test_success_reaches_every_waiter_in_join_order(state):
    """One success ends the wait of all."""
    feed(state, Join(K, 1), Join(K, 2), Join(K, 3))
    assert feed(state, Settle(K, SUCCESS)) == [Resolve(1, SUCCESS), Resolve(2, SUCCESS), Resolve(3, SUCCESS)]


def test_keys_are_independent(state):
    """What happens to one key leaves the others alone."""
    assert feed(state, Join(K, 1), Join(OTHER, 2)) == [Launch(OTHER, 2)]
    assert feed(state, Settle(K, FAILURE)) == [Resolve(1, FAILURE)]
    assert state.waiters(OTHER) == (2,)


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE, WorkCancelled()])
def test_nothing_is_remembered_after_the_end(state, outcome):
    """Who comes after the end, whatever it was, gets a launch of its own."""
    feed(state, Join(K, 1), Settle(K, outcome))
    assert state.running_keys() == ()
    assert state.phase(K) is FlightPhase.IDLE
    assert feed(state, Join(K, 2)) == [Launch(K, 2)]


# -- failing -----------------------------------------------------------------------------------------


def test_those_who_wait_share_the_error(state):
    """One failure is everybody's who waits for it."""
    feed(state, Join(K, 1), Join(K, 2))
    assert feed(state, Settle(K, FAILURE)) == [Resolve(1, FAILURE), Resolve(2, FAILURE)]


def test_a_cancellation_by_nobody_is_an_error_not_a_cancellation(state):
    """Work that is cancelled under its waiters fails them with a bug; they never asked to be cancelled."""
    feed(state, Join(K, 1))
    [resolve] = feed(state, Settle(K, WorkCancelled()))
    assert resolve.waiter == 1
    assert isinstance(resolve.outcome.error, InternalError)


# -- leaving -----------------------------------------------------------------------------------------


def test_a_waiter_leaves_by_itself_at_once(state):
    """Leaving concerns the leaver alone while others wait: no abort, no other's end."""
    feed(state, Join(K, 1), Join(K, 2))
    assert feed(state, Leave(K, 1)) == [Resolve(1, WaiterLeft())]
    assert feed(state, Settle(K, SUCCESS)) == [Resolve(2, SUCCESS)]


def test_the_last_to_leave_aborts_the_work_and_waits(state):
    """Nobody wants it any more: the work is told to stop, and the last leaver sees to its end."""
    feed(state, Join(K, 1), Join(K, 2), Leave(K, 2))
    assert feed(state, Leave(K, 1)) == [Abort(K)]
    assert feed(state, Settle(K, WorkCancelled())) == [Resolve(1, WaiterLeft())]


def test_the_last_leaver_gets_a_success_that_came_first(state):
    """Work that finished before the abort reached it is not thrown away."""
    feed(state, Join(K, 1), Leave(K, 1))
    assert feed(state, Settle(K, SUCCESS)) == [Resolve(1, SUCCESS)]


def test_the_last_leaver_does_not_get_an_error(state):
    """A leaver that asked to be cancelled is cancelled, whatever the work died of."""
    feed(state, Join(K, 1), Leave(K, 1))
    assert feed(state, Settle(K, FAILURE)) == [Resolve(1, WaiterLeft())]


def test_the_last_leaver_may_leave_again(state):
    """Cancelled a second time, it waits for nothing more; the abort goes on without it."""
    feed(state, Join(K, 1), Leave(K, 1))
    assert feed(state, Leave(K, 1)) == [Resolve(1, WaiterLeft())]
    assert feed(state, Settle(K, WorkCancelled())) == []


# -- joining an abort ----------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [FAILURE, WorkCancelled()])
def test_late_waiter_does_not_inherit_the_abort(state, outcome):
    """Who joins while an abort is on its way gets a launch of its own, once the old work has ended."""
    feed(state, Join(K, 1), Leave(K, 1))
    assert feed(state, Join(K, 2)) == []
    assert feed(state, Settle(K, outcome)) == [Resolve(1, WaiterLeft()), Launch(K, 2)]
    assert feed(state, Settle(K, SUCCESS)) == [Resolve(2, SUCCESS)]


def test_those_on_standby_share_one_launch(state):
    """Standbys are launched once for all of them, with the work of the first."""
    feed(state, Join(K, 1), Leave(K, 1), Join(K, 2), Join(K, 3))
    assert feed(state, Settle(K, WorkCancelled()))[-1] == Launch(K, 2)
    assert state.waiters(K) == (2, 3)


def test_standby_gets_a_success_that_came_first(state):
    """Work that succeeded although it was aborted serves those on standby: its bytes move once."""
    feed(state, Join(K, 1), Leave(K, 1), Join(K, 2))
    assert feed(state, Settle(K, SUCCESS)) == [Resolve(1, SUCCESS), Resolve(2, SUCCESS)]


def test_a_standby_leaves_by_itself(state):
    """Leaving the standby needs no abort, and the last one's leaving leaves nothing to launch."""
    feed(state, Join(K, 1), Leave(K, 1), Join(K, 2))
    assert feed(state, Leave(K, 2)) == [Resolve(2, WaiterLeft())]
    assert feed(state, Settle(K, WorkCancelled())) == [Resolve(1, WaiterLeft())]
    assert state.running_keys() == ()


# -- work that does not stop, and the end of the process --------------------------------------------------


def test_overdue_work_lets_everybody_go_and_is_cancelled_again(state):
    """Work that ignores its abort holds nobody for ever; it is never run beside itself either."""
    feed(state, Join(K, 1), Leave(K, 1), Join(K, 2))
    abort, leaver, standby = feed(state, Overdue(K, 30.0))
    assert abort == Abort(K)
    assert leaver == Resolve(1, WaiterLeft())
    assert standby.waiter == 2
    assert isinstance(standby.outcome.error, DeadlineExceededError)
    assert feed(state, Join(K, 3)) == []
    assert feed(state, Settle(K, WorkCancelled())) == [Launch(K, 3)]


def test_closing_fails_those_who_wait_and_aborts(state):
    """Whoever waits for a closed flight is told why, at once."""
    feed(state, Join(K, 1), Join(K, 2))
    assert feed(state, Close(K, ERROR)) == [Abort(K), Resolve(1, FAILURE), Resolve(2, FAILURE)]
    assert feed(state, Settle(K, WorkCancelled())) == []


def test_closing_does_not_cancel_a_second_time(state):
    """Work that is stopping already keeps the time it needs for cleaning up."""
    feed(state, Join(K, 1), Leave(K, 1), Join(K, 2))
    assert feed(state, Close(K, ERROR)) == [Resolve(2, FAILURE)]
    assert feed(state, Settle(K, WorkCancelled())) == [Resolve(1, WaiterLeft())]


# -- what can't happen ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "event"),
    [
        ([], Leave(K, 1)),
        ([], Settle(K, SUCCESS)),
        ([], Overdue(K, 1.0)),
        ([], Close(K, ERROR)),
        ([Join(K, 1)], Overdue(K, 1.0)),
        ([Join(K, 1)], Join(K, 1)),
        ([Join(K, 1)], Leave(K, 2)),
        ([Join(K, 1), Leave(K, 1)], Join(K, 1)),
        ([Join(K, 1), Leave(K, 1)], Leave(K, 2)),
        ([Join(K, 1), Join(K, 2), Leave(K, 1)], Leave(K, 1)),
    ],
    ids=str,
)
def test_an_impossible_event_is_refused_and_changes_nothing(state, history, event):
    """An event that can't happen is our bug, named as such; the state stays as it was."""
    feed(state, *history)
    before = (state.phase(K), state.waiters(K), state.standby_count())
    with pytest.raises(InvalidTransitionError):
        state.handle(event)
    assert (state.phase(K), state.waiters(K), state.standby_count()) == before


def test_every_phase_can_be_left_and_reached():
    """The table of moves has no phase without a way in or a way out."""
    assert {phase for phase, _ in MOVES} == set(FlightPhase)
    assert {phase for targets in MOVES.values() for phase in targets} == set(FlightPhase)
