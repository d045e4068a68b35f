"""Flights under every order of events: a state machine with a model, and mutants that it must catch.

The model knows who waits and which work runs, from the instructions alone; it is written against the
invariants of the design, not against the state's code:

- I1: a key's work runs once for all its callers, and what it brought is not thrown away;
- I5: every caller ends, once, and nothing runs for nobody;
- I6: no caller's going fails another, nor does one caller's error fail those who come later.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.errors import DeadlineExceededError, UnavailableError
from cluster.flight.state import (
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
from tests.doubles.machines import BrokenInvariantError, assert_caught

KEYS = ("a", "b")
CLOSED = UnavailableError("flights", "closed")


@dataclass
class Work:
    """A run of a key's work, as the world sees it."""

    aborted: bool = False
    closed: bool = False
    #: Who waits for it, in join order.
    waiting: list = field(default_factory=list)
    #: Who left last and has not ended.
    leaver: int | None = None
    #: Who joined after it was to stop.
    standby: list = field(default_factory=list)


class FlightMachine(RuleBasedStateMachine):
    """Feeds events to a :class:`FlightState` as a runner would, and checks what it instructs."""

    make_state = FlightState
    #: The invariants that are checked; a mutant's test checks only the one that must catch it.
    checked = frozenset({"I1", "I5", "I6"})

    def __init__(self):
        super().__init__()
        self.state = self.make_state()
        self.works = {}
        self.keys_of = {}
        self.next_waiter = 1
        self.next_value = 1

    def expect(self, name, holds, story):
        if name in self.checked and not holds:
            raise BrokenInvariantError(name, story)

    def unresolved(self):
        return list(self.keys_of)

    # -- performing instructions, as the runner does ------------------------------------------------------

    def perform(self, key, instructions, *, may_resolve):
        """Perform *instructions*; *may_resolve* says who may end now, and how (a predicate each)."""
        resolved = {}
        launches = 0
        aborts = 0
        for instruction in instructions:
            match instruction:
                case Launch(launched, waiter):
                    launches += 1
                    self.expect("I1", launched == key, f"an event of {key} launched {launched}")
                    self.expect("I1", self.works.get(key) is None, f"{key} is launched beside its running work")
                    self.expect("I5", waiter in self.keys_of, f"{key} is launched for {waiter}, who has ended")
                    self.works[key] = Work()
                case Abort(aborted):
                    aborts += 1
                    self.expect("I6", aborted == key, f"an event of {key} aborted {aborted}")
                case Resolve(waiter, outcome):
                    self.expect("I5", waiter in self.keys_of, f"{waiter} ends a second time")
                    allowed = may_resolve.get(waiter)
                    self.expect("I6", allowed is not None, f"{waiter} ends by another's event: {outcome}")
                    if allowed is not None:
                        name, holds = allowed(outcome)
                        self.expect(name, holds, f"{waiter} ends with {outcome}")
                    self.keys_of.pop(waiter, None)
                    resolved[waiter] = outcome
        return resolved, launches, aborts

    # -- rules ------------------------------------------------------------------------------------------------

    @rule(key=st.sampled_from(KEYS))
    def join(self, key):
        waiter = self.next_waiter
        self.next_waiter += 1
        self.keys_of[waiter] = key
        before = self.works.get(key)
        instructions = self.state.handle(Join(key, waiter))
        resolved, launches, aborts = self.perform(key, instructions, may_resolve={})
        self.expect("I6", not resolved, f"{waiter} joins {key} and inherits {resolved}")
        self.expect("I6", not aborts, f"{waiter} joins {key}, and it is aborted")
        self.expect("I1", launches == (before is None), f"{waiter} joins {key}: {launches} launches")
        work = self.works.setdefault(key, Work())
        (work.standby if work.aborted else work.waiting).append(waiter)

    @precondition(lambda self: self.keys_of)
    @rule(data=st.data())
    def leave(self, data):
        waiter = data.draw(st.sampled_from(self.unresolved()), label="waiter")
        key = self.keys_of[waiter]
        work = self.works[key]
        is_last = work.waiting == [waiter]
        instructions = self.state.handle(Leave(key, waiter))
        goes = {waiter: lambda outcome: ("I5", isinstance(outcome, WaiterLeft))}
        resolved, launches, aborts = self.perform(key, instructions, may_resolve=goes)
        self.expect("I1", not launches, f"{waiter} leaves {key}, and it is launched")
        if is_last:
            self.expect("I5", aborts == 1, f"the last one left {key}: {aborts} aborts, it runs on for nobody")
            work.aborted = True
            work.waiting.remove(waiter)
            if waiter not in resolved:
                work.leaver = waiter
            return
        self.expect("I6", not aborts, f"{waiter} leaves {key} and aborts it under the others")
        self.expect("I5", waiter in resolved, f"{waiter} leaves {key} and is held")
        for group in (work.waiting, work.standby):
            if waiter in group:
                group.remove(waiter)
        if waiter == work.leaver:
            work.leaver = None

    @precondition(lambda self: self.works)
    @rule(data=st.data(), how=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def settle(self, data, how):
        key = data.draw(st.sampled_from(sorted(self.works)), label="key")
        self.end(key, how)

    def end(self, key, how):
        work = self.works.pop(key)
        value = self.next_value
        self.next_value += 1
        error = UnavailableError("work", str(value))
        outcome = {"succeeded": WorkSucceeded(value), "failed": WorkFailed(error), "cancelled": WorkCancelled()}[how]

        def shares(got):
            if how == "succeeded":
                return "I1", got == outcome
            if how == "failed":
                return "I5", got == outcome
            return "I6", isinstance(got, WorkFailed)  # cancelled by none of them: never a cancellation

        def leaves(got):
            return ("I1", got == outcome) if how == "succeeded" else ("I5", isinstance(got, WaiterLeft))

        def stands_by(got):
            return "I6", got == outcome and how == "succeeded"

        may = dict.fromkeys(work.waiting, shares) | dict.fromkeys(work.standby, stands_by)
        if work.leaver is not None:
            may[work.leaver] = leaves
        instructions = self.state.handle(Settle(key, outcome))
        resolved, launches, aborts = self.perform(key, instructions, may_resolve=may)
        self.expect("I6", not aborts, f"{key} ended, and is aborted")
        for waiter in work.waiting + ([] if work.leaver is None else [work.leaver]):
            self.expect("I5", waiter in resolved, f"{key} ended, and {waiter} waits on")
        left = [waiter for waiter in work.standby if waiter not in resolved]
        if how == "succeeded":
            self.expect("I1", not left, f"{key} succeeded, and {left} would run it again")
        self.expect("I5", launches >= bool(left), f"{key} ended, and {left} stand by for nothing")
        self.expect("I1", launches <= bool(left), f"{key} ended, and is launched {launches} times for {left}")
        if launches:
            self.works[key].waiting = left

    @precondition(lambda self: any(work.aborted for work in self.works.values()))
    @rule(data=st.data())
    def overdue(self, data):
        key = data.draw(st.sampled_from(sorted(k for k, work in self.works.items() if work.aborted)), label="key")
        work = self.works[key]
        may = dict.fromkeys(
            work.standby,
            lambda got: ("I5", isinstance(got, WorkFailed) and isinstance(got.error, DeadlineExceededError)),
        )
        if work.leaver is not None:
            may[work.leaver] = lambda got: ("I5", isinstance(got, WaiterLeft))
        resolved, launches, aborts = self.perform(key, self.state.handle(Overdue(key, 1.0)), may_resolve=may)
        self.expect("I1", not launches, f"{key} does not stop, and is launched beside itself")
        self.expect("I5", aborts == 1, f"{key} does not stop, and is not told so again")
        self.expect("I5", set(resolved) == set(may), f"{key} does not stop and holds {set(may) - set(resolved)}")
        work.leaver = None
        work.standby = []

    @precondition(lambda self: self.works)
    @rule(data=st.data())
    def close(self, data):
        key = data.draw(st.sampled_from(sorted(self.works)), label="key")
        work = self.works[key]
        may = dict.fromkeys(work.waiting + work.standby, lambda got: ("I5", got == WorkFailed(CLOSED)))
        resolved, launches, aborts = self.perform(key, self.state.handle(Close(key, CLOSED)), may_resolve=may)
        self.expect("I1", not launches, f"{key} is closed, and launched")
        self.expect("I5", aborts == (not work.aborted), f"{key} is closed: {aborts} aborts")
        self.expect("I5", set(resolved) == set(may), f"{key} is closed and holds {set(may) - set(resolved)}")
        work.aborted = True
        work.waiting = []
        work.standby = []

    # -- at all times -------------------------------------------------------------------------------------------

    @invariant()
    def nobody_waits_for_nothing(self):
        """Every caller that has not ended has a running work whose end will end it."""
        for waiter, key in self.keys_of.items():
            work = self.works.get(key)
            concerned = [] if work is None else [*work.waiting, *work.standby, work.leaver]
            self.expect("I5", waiter in concerned, f"{waiter} waits for {key}, which does not run for it")

    @invariant()
    def state_and_world_agree(self):
        """The state is valid and knows exactly the works that run."""
        if type(self.state) is not FlightState:
            return  # a mutant: only what it does counts
        self.state.validate()
        assert set(self.state.running_keys()) == set(self.works)
        for key, work in self.works.items():
            assert self.state.phase(key) is (FlightPhase.ABORTING if work.aborted else FlightPhase.FLYING)
            assert list(self.state.waiters(key)) == work.waiting

    def teardown(self):
        """When every work ends, every caller ends, and nothing is left."""
        while self.works:
            self.end(min(self.works), "failed")
        self.expect("I5", not self.keys_of, f"{self.unresolved()} never end")
        self.expect("I5", not self.state.running_keys(), f"{self.state.running_keys()} are remembered")


TestFlightState = FlightMachine.TestCase
TestFlightState.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFlightState.__doc__ = "No order of joins, leaves, ends, stalls and closes breaks I1, I5 or I6."


# -- mutants: each breaks one rule --------------------------------------------------------------------------


class LaunchesForEveryCaller(FlightState):
    """Coalesces nothing."""

    def _join(self, event):
        return super()._join(event) or [Launch(event.key, event.waiter)]


class LaunchesBesideTheAbort(FlightState):
    """Does not wait for aborted work to end before it runs the work again."""

    def _join(self, event):
        was_aborting = self.phase(event.key) is FlightPhase.ABORTING
        instructions = super()._join(event)
        return [*instructions, Launch(event.key, event.waiter)] if was_aborting else instructions


class LaunchesOnceForEachStandby(FlightState):
    """Gives each standby a run of its own."""

    def _settle(self, event):
        instructions = super()._settle(event)
        return instructions + [Launch(event.key, waiter) for waiter in self.waiters(event.key)[1:]]


class ThrowsTheLeaversSuccessAway(FlightState):
    """Cancels the last leaver although the work has its result."""

    def _settle(self, event):
        flight = self._flights[event.key]
        instructions = super()._settle(event)
        return [
            Resolve(i.waiter, WaiterLeft()) if isinstance(i, Resolve) and i.waiter == flight.leaver else i
            for i in instructions
        ]


class RunsASuccessAgainForStandbys(FlightState):
    """Launches for those on standby although the aborted work succeeded."""

    def _settle(self, event):
        standby = dict(self._flights[event.key].standby)
        instructions = super()._settle(event)
        if not standby or not isinstance(event.outcome, WorkSucceeded):
            return instructions
        kept = [i for i in instructions if not (isinstance(i, Resolve) and i.waiter in standby)]
        return kept + self._launch(event.key, standby)


class ForgetsToAbort(FlightState):
    """Lets work run on when the last one has left."""

    def _leave(self, event):
        return [i for i in super()._leave(event) if not isinstance(i, Abort)]


class ForgetsTheStandbys(FlightState):
    """Drops those on standby when the aborted work ends."""

    def _settle(self, event):
        instructions = super()._settle(event)
        kept = [i for i in instructions if not isinstance(i, Launch)]
        if len(kept) < len(instructions):
            del self._flights[event.key]
        return kept


class TellsOnlyTheFirstOfAnError(FlightState):
    """Lets all but one of those who wait for failing work wait on."""

    def _settle(self, event):
        instructions = super()._settle(event)
        return instructions[:1] if isinstance(event.outcome, WorkFailed) else instructions


class ResolvesALeaver(FlightState):
    """Ends those who left once more at the end of the work."""

    def __init__(self):
        super().__init__()
        self.left = {}

    def _leave(self, event):
        self.left.setdefault(event.key, []).append(event.waiter)
        return super()._leave(event)

    def _settle(self, event):
        left = self.left.pop(event.key, [])
        return super()._settle(event) + [Resolve(waiter, event.outcome) for waiter in left]


class HoldsALeaver(FlightState):
    """Makes every leaver wait for the work, not only the last."""

    def _leave(self, event):
        return [i for i in super()._leave(event) if not isinstance(i, Resolve)]


class HoldsStandbysOfStuckWork(FlightState):
    """Lets those on standby wait for ever for work that ignores its abort."""

    def _overdue(self, event):
        standby = dict(self._flights[event.key].standby)
        instructions = super()._overdue(event)
        self._flights[event.key].standby = standby
        return [i for i in instructions if not (isinstance(i, Resolve) and i.waiter in standby)]


class AbortsWithTheFirstLeaver(FlightState):
    """Takes one caller's going for everybody's."""

    def _leave(self, event):
        instructions = super()._leave(event)
        return instructions if Abort(event.key) in instructions else [Abort(event.key), *instructions]


class CancelsTheOthers(FlightState):
    """Cancels all who wait when one leaves."""

    def _leave(self, event):
        others = [waiter for waiter in self.waiters(event.key) if waiter != event.waiter]
        return super()._leave(event) + [Resolve(waiter, WaiterLeft()) for waiter in others]


class HandsTheAbortToLateWaiters(FlightState):
    """Ends those on standby with the error of the work that was aborted for somebody else (moby/buildkit e56e7ba46)."""

    def _settle(self, event):
        flight = self._flights[event.key]
        standby = list(flight.standby)
        instructions = super()._settle(event)
        if not isinstance(event.outcome, WorkFailed) or not standby:
            return instructions
        del self._flights[event.key]
        kept = [i for i in instructions if not isinstance(i, Launch)]
        return kept + [Resolve(waiter, event.outcome) for waiter in standby]


class HandsACancellationToWaiters(FlightState):
    """Ends those who wait as if they had left when somebody else cancels the work."""

    def _settle(self, event):
        instructions = super()._settle(event)
        if not isinstance(event.outcome, WorkCancelled):
            return instructions
        return [Resolve(i.waiter, WaiterLeft()) if isinstance(i, Resolve) else i for i in instructions]


class RemembersErrors(FlightState):
    """Gives the last error of a key to the next caller."""

    def __init__(self):
        super().__init__()
        self.errors = {}

    def _settle(self, event):
        if isinstance(event.outcome, WorkFailed):
            self.errors[event.key] = event.outcome
        return super()._settle(event)

    def _join(self, event):
        error = self.errors.pop(event.key, None)
        instructions = super()._join(event)
        return instructions if error is None else [*instructions, Resolve(event.waiter, error)]


MUTANTS = [
    (LaunchesForEveryCaller, "I1"),
    (LaunchesBesideTheAbort, "I1"),
    (LaunchesOnceForEachStandby, "I1"),
    (ThrowsTheLeaversSuccessAway, "I1"),
    (RunsASuccessAgainForStandbys, "I1"),
    (ForgetsToAbort, "I5"),
    (ForgetsTheStandbys, "I5"),
    (TellsOnlyTheFirstOfAnError, "I5"),
    (ResolvesALeaver, "I5"),
    (HoldsALeaver, "I5"),
    (HoldsStandbysOfStuckWork, "I5"),
    (AbortsWithTheFirstLeaver, "I6"),
    (CancelsTheOthers, "I6"),
    (HandsTheAbortToLateWaiters, "I6"),
    (HandsACancellationToWaiters, "I6"),
    (RemembersErrors, "I6"),
]


@pytest.mark.parametrize(("mutant", "name"), MUTANTS, ids=[f"{name}-{mutant.__name__}" for mutant, name in MUTANTS])
def test_the_invariant_catches_the_mutant(mutant, name):
    """A state that breaks one rule is caught by the invariant that rule serves, checked alone."""

    class Machine(FlightMachine):
        make_state = mutant

    assert_caught(Machine, name, examples=400, steps=30)
