"""Flights on a real event loop under random schedules of joins, cancellations, ends and turns of the loop."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InternalError, UnavailableError
from cluster.flight.runner import Flights

KEYS = ("a", "b")

STEP = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(KEYS)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("end"), st.sampled_from(KEYS), st.sampled_from(["value", "error", "cancelled"])),
    st.tuples(st.just("turns"), st.integers(1, 4)),
)


class Works:
    """The works of all keys: at most one a key at a time, ended by the script only."""

    def __init__(self):
        self.gates = {}
        self.running = set()
        self.overlaps = []

    async def run(self, key, *, stubborn):
        if key in self.running:
            self.overlaps.append(key)
        self.running.add(key)
        gate = self.gates[key] = asyncio.get_running_loop().create_future()
        try:
            while True:
                try:
                    how = await asyncio.shield(gate)
                    break
                except asyncio.CancelledError:
                    if not stubborn:
                        raise
        finally:
            self.running.discard(key)
        if how == "error":
            raise UnavailableError("work", key)
        if how == "cancelled" and stubborn:
            raise asyncio.CancelledError
        return object()

    def end(self, key, how):
        gate = self.gates.get(key)
        if gate is not None and not gate.done():
            gate.set_result(how)


async def play(script, *, stubborn):
    """Play *script*; return (each caller's task, the callers that were cancelled, the works, the flights)."""
    flights = Flights("test")
    works = Works()
    callers = []
    cancelled = set()

    async def work(context):
        return await works.run(context.key, stubborn=stubborn)

    for step in script:
        match step:
            case ("call", key):
                callers.append(asyncio.create_task(flights.run(key, work, caller=len(callers))))
            case ("cancel", index):
                if index < len(callers) and callers[index].cancel():
                    cancelled.add(callers[index])
            case ("end", key, how):
                works.end(key, how if stubborn or how != "cancelled" else "value")
            case ("turns", count):
                for _ in range(count):
                    await asyncio.sleep(0)
        flights._state.validate()
    # Everything that still runs is ended, and what is launched by that as well.
    async with asyncio.timeout(20):
        while not all(caller.done() for caller in callers):
            for key in KEYS:
                works.end(key, "value")
            await asyncio.sleep(0)
    await flights.aclose(5.0)
    return callers, cancelled, works, flights


@given(script=st.lists(STEP, max_size=40), stubborn=st.booleans())
@settings(max_examples=300, deadline=None)
def test_whatever_the_schedule_every_caller_ends_as_it_should(script, stubborn):
    """No work runs beside itself (I1), every caller ends (I5), only the cancelled ones are cancelled (I6)."""
    callers, cancelled, works, flights = asyncio.run(play(script, stubborn=stubborn))
    assert works.overlaps == []
    for caller in callers:
        assert caller.done()
        if caller.cancelled():
            assert caller in cancelled, "cancelled by somebody else's going"
        elif caller.exception() is not None:
            # Only a script's own cancellation of the work, which stubborn work can have, is our bug to its callers.
            expected = {UnavailableError, InternalError} if stubborn else {UnavailableError}
            assert type(caller.exception()) in expected
    now = flights.statistics()
    assert (now.flying, now.aborting, now.callers, now.standby) == (0, 0, 0, 0)
    assert now.launched == now.succeeded + now.failed + now.cancelled
