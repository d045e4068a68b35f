"""What a process decides about its flights: one run of some work a key, however many wait for it.

Follows BuildKit's ``util/flightcontrol`` by its meaning, without its polling retry: who has to start
afresh stands by and is launched by the settling of what was in the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NewType, assert_never

from cluster.errors import ClusterError, DeadlineExceededError, InternalError, InvalidTransitionError

WaiterId = NewType("WaiterId", int)


class FlightPhase(Enum):
    """The lifecycle of a key: idle → flying → (aborting →) idle, or flying again for those on standby."""

    #: Nothing is known of the key; this phase is never stored.
    IDLE = "idle"
    #: The work runs and somebody waits for it.
    FLYING = "flying"
    #: The work was told to stop, for want of waiters, and has not ended yet.
    ABORTING = "aborting"


# -- outcomes -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkSucceeded:
    """The work returned."""

    value: object


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """The work raised; those who waited share the error, late arrivals never see it."""

    error: ClusterError


@dataclass(frozen=True, slots=True)
class WorkCancelled:
    """The work ended by its cancellation. Not to be confused with :class:`WaiterLeft`."""


@dataclass(frozen=True, slots=True)
class WaiterLeft:
    """The waiter gets what it asked for by leaving: its own cancellation."""


WorkOutcome = WorkSucceeded | WorkFailed | WorkCancelled
WaiterOutcome = WorkSucceeded | WorkFailed | WaiterLeft


# -- events: what happened --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Join:
    """*waiter*, of an ID never used before, wants the result for *key*."""

    key: str
    waiter: WaiterId


@dataclass(frozen=True, slots=True)
class Leave:
    """*waiter*, who is not resolved yet, was cancelled. A second one ends the last leaver's wait."""

    key: str
    waiter: WaiterId


@dataclass(frozen=True, slots=True)
class Settle:
    """The work of *key* has ended."""

    key: str
    outcome: WorkOutcome


@dataclass(frozen=True, slots=True)
class Overdue:
    """The work of *key* was told to stop *after_s* seconds ago (or that long after the last of these) and goes on."""

    key: str
    after_s: float


@dataclass(frozen=True, slots=True)
class Close:
    """The process gives the flight of *key* up; all who wait get *error*, but a last leaver."""

    key: str
    error: ClusterError


Event = Join | Leave | Settle | Overdue | Close


# -- instructions: what to do ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launch:
    """Start the work that *waiter* brought; ends in one :class:`Settle`."""

    key: str
    waiter: WaiterId


@dataclass(frozen=True, slots=True)
class Abort:
    """Cancel the running work; it still ends in its :class:`Settle`."""

    key: str


@dataclass(frozen=True, slots=True)
class Resolve:
    """End *waiter*'s wait. Each waiter is resolved exactly once, and is forgotten by then."""

    waiter: WaiterId
    outcome: WaiterOutcome


Instruction = Launch | Abort | Resolve


#: Every legal move: the phases that an event may lead to. What is not listed can't happen.
MOVES: Mapping[tuple[FlightPhase, type[Event]], frozenset[FlightPhase]] = MappingProxyType(
    {
        (FlightPhase.IDLE, Join): frozenset({FlightPhase.FLYING}),
        (FlightPhase.FLYING, Join): frozenset({FlightPhase.FLYING}),
        (FlightPhase.FLYING, Leave): frozenset({FlightPhase.FLYING, FlightPhase.ABORTING}),
        (FlightPhase.FLYING, Settle): frozenset({FlightPhase.IDLE}),
        (FlightPhase.FLYING, Close): frozenset({FlightPhase.ABORTING}),
        (FlightPhase.ABORTING, Join): frozenset({FlightPhase.ABORTING}),
        (FlightPhase.ABORTING, Leave): frozenset({FlightPhase.ABORTING}),
        (FlightPhase.ABORTING, Settle): frozenset({FlightPhase.IDLE, FlightPhase.FLYING}),
        (FlightPhase.ABORTING, Overdue): frozenset({FlightPhase.ABORTING}),
        (FlightPhase.ABORTING, Close): frozenset({FlightPhase.ABORTING}),
    }
)


@dataclass(slots=True)
class _Flight:
    """One key's running work and who is concerned by it. The three collections are disjoint."""

    #: FLYING or ABORTING.
    phase: FlightPhase
    #: In join order (a dict as an ordered set). Not empty while FLYING, empty while ABORTING.
    waiters: dict[WaiterId, None] = field(default_factory=dict)
    #: Who left last, and waits for the work's end; None while FLYING.
    leaver: WaiterId | None = None
    #: Who joined while ABORTING, in join order; empty while FLYING.
    standby: dict[WaiterId, None] = field(default_factory=dict)


class FlightState:
    """All flights of one process. Changed through :meth:`handle` only.

    The rules:

    - the work runs once a key, for all who wait;
    - a waiter may leave by itself, at once, and fails nobody;
    - when the last one leaves, the work is aborted; that leaver waits for the work's end, and gets its
      success if it happened to finish;
    - who joins while an abort is on its way stands by: it gets the success if there is one after all
      (else the same bytes would move twice), and otherwise shares a fresh launch;
    - those who wait when the work fails share its error; late arrivals inherit neither an error nor a
      cancellation;
    - nothing is remembered after the end.
    """

    __slots__ = ("_flights",)

    def __init__(self) -> None:
        self._flights: dict[str, _Flight] = {}

    def handle(self, event: Event) -> list[Instruction]:
        """Apply *event* and return what must be done, in order.

        Raises:
            InvalidTransitionError: the event can't happen in the key's phase, or to that waiter; nothing
                has changed.
        """
        before = self.phase(event.key)
        legal = MOVES.get((before, type(event)))
        if legal is None:
            raise InvalidTransitionError(f"flight {event.key}", before.value, type(event).__name__)
        match event:
            case Join():
                instructions = self._join(event)
            case Leave():
                instructions = self._leave(event)
            case Settle():
                instructions = self._settle(event)
            case Overdue():
                instructions = self._overdue(event)
            case Close():
                instructions = self._close(event)
            case _:
                assert_never(event)
        after = self.phase(event.key)
        if after not in legal:
            raise InvalidTransitionError(f"flight {event.key}", before.value, f"{type(event).__name__} → {after.value}")
        return instructions

    # -- questions -----------------------------------------------------------------------------------------

    def phase(self, key: str) -> FlightPhase:
        """Return where *key* stands."""
        flight = self._flights.get(key)
        return FlightPhase.IDLE if flight is None else flight.phase

    def waiters(self, key: str) -> tuple[WaiterId, ...]:
        """Return who waits for the running work of *key*, in join order; leavers and standbys don't."""
        flight = self._flights.get(key)
        return () if flight is None else tuple(flight.waiters)

    def running_keys(self) -> tuple[str, ...]:
        """Return the keys whose work runs."""
        return tuple(self._flights)

    def count(self, phase: FlightPhase) -> int:
        """Return how many flights are in *phase*."""
        return sum(flight.phase is phase for flight in self._flights.values())

    def standby_count(self) -> int:
        """Return how many waiters stand by for the end of an abort."""
        return sum(len(flight.standby) for flight in self._flights.values())

    def validate(self) -> None:
        """Check every invariant; for tests and for those who debug.

        Raises:
            InternalError: one is broken; says which.
        """
        seen: set[WaiterId] = set()
        for key, flight in self._flights.items():
            concerned = [*flight.waiters, *flight.standby]
            if flight.leaver is not None:
                concerned.append(flight.leaver)
            _require(len(set(concerned)) == len(concerned), f"flight {key}: a waiter is in two places")
            _require(seen.isdisjoint(concerned), f"flight {key}: a waiter is in two flights")
            seen.update(concerned)
            match flight.phase:
                case FlightPhase.FLYING:
                    _require(bool(flight.waiters), f"flight {key} flies for nobody")
                    _require(flight.leaver is None, f"flight {key} flies, yet somebody left last")
                    _require(not flight.standby, f"flight {key} flies, yet somebody stands by")
                case FlightPhase.ABORTING:
                    _require(not flight.waiters, f"flight {key} is aborted under its waiters")
                case FlightPhase.IDLE:
                    raise InternalError(f"flight {key} is remembered after its end")
                case _:
                    assert_never(flight.phase)

    # -- events ----------------------------------------------------------------------------------------------

    def _join(self, event: Join) -> list[Instruction]:
        flight = self._flights.get(event.key)
        if flight is None:
            return self._launch(event.key, {event.waiter: None})
        if event.waiter in flight.waiters or event.waiter in flight.standby or event.waiter == flight.leaver:
            raise InvalidTransitionError(f"waiter {event.waiter} of flight {event.key}", "waiting", "Join")
        (flight.standby if flight.phase is FlightPhase.ABORTING else flight.waiters)[event.waiter] = None
        return []

    def _leave(self, event: Leave) -> list[Instruction]:
        flight = self._flights[event.key]
        waiter = event.waiter
        if waiter == flight.leaver:
            # Cancelled once more while it waits for the abort: somebody is in a hurry, let go.
            flight.leaver = None
        elif waiter in flight.standby:
            del flight.standby[waiter]
        elif waiter in flight.waiters:
            del flight.waiters[waiter]
            if not flight.waiters:
                flight.phase = FlightPhase.ABORTING
                flight.leaver = waiter
                return [Abort(event.key)]
        else:
            raise InvalidTransitionError(f"waiter {waiter} of flight {event.key}", "not waiting", "Leave")
        return [Resolve(waiter, WaiterLeft())]

    def _settle(self, event: Settle) -> list[Instruction]:
        flight = self._flights.pop(event.key)
        outcome = event.outcome
        if isinstance(outcome, WorkSucceeded):
            leavers = [] if flight.leaver is None else [flight.leaver]
            return [Resolve(waiter, outcome) for waiter in [*leavers, *flight.waiters, *flight.standby]]
        instructions: list[Instruction] = []
        if flight.leaver is not None:
            instructions.append(Resolve(flight.leaver, WaiterLeft()))
        if flight.waiters:
            error = outcome.error if isinstance(outcome, WorkFailed) else _uncalled_for(event.key)
            instructions += [Resolve(waiter, WorkFailed(error)) for waiter in flight.waiters]
        if flight.standby:
            instructions += self._launch(event.key, flight.standby)
        return instructions

    def _overdue(self, event: Overdue) -> list[Instruction]:
        flight = self._flights[event.key]
        instructions: list[Instruction] = [Abort(event.key)]
        if flight.leaver is not None:
            instructions.append(Resolve(flight.leaver, WaiterLeft()))
            flight.leaver = None
        error = DeadlineExceededError(f"flight {event.key}", f"aborted work did not end within {event.after_s:g} s")
        instructions += [Resolve(waiter, WorkFailed(error)) for waiter in flight.standby]
        flight.standby.clear()
        return instructions

    def _close(self, event: Close) -> list[Instruction]:
        flight = self._flights[event.key]
        # Work that is stopping already is not cancelled again: that would cut its cleaning up short.
        instructions: list[Instruction] = [Abort(event.key)] if flight.phase is FlightPhase.FLYING else []
        flight.phase = FlightPhase.ABORTING
        instructions += [Resolve(waiter, WorkFailed(event.error)) for waiter in [*flight.waiters, *flight.standby]]
        flight.waiters.clear()
        flight.standby.clear()
        return instructions

    # -- steps ------------------------------------------------------------------------------------------------

    def _launch(self, key: str, waiters: dict[WaiterId, None]) -> list[Instruction]:
        self._flights[key] = _Flight(phase=FlightPhase.FLYING, waiters=waiters)
        return [Launch(key, next(iter(waiters)))]


def _require(holds: bool, story: str) -> None:  # noqa: FBT001 - an assertion reads best this way
    if not holds:
        raise InternalError(story)


def _uncalled_for(key: str) -> InternalError:
    """Name the end of work that was cancelled by nobody of ours: not its waiters' cancellation, so an error."""
    return InternalError(f"the work of flight {key} was cancelled while callers waited for it")
