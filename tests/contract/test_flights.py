"""What every FlightStore and FlightRenewer promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from cluster import tracing
from cluster.digest import digest_of
from cluster.errors import InternalError, StaleFenceError
from cluster.flight.values import (
    Aborting,
    Committed,
    Failed,
    Joined,
    Owned,
    Present,
    Progressed,
    UploadState,
    Vacated,
)
from cluster.lease import LeaseId, blob_resource
from cluster.ref import BlobRecord
from tests.doubles.stores import eventually
from tests.doubles.tracing import RecordingTracer

DIGEST = digest_of(b"layer")
KEY = blob_resource(DIGEST)
TTL_S = 6.0
UPLOAD = UploadState(key="blobs/x/1", upload_id="u-1", part_bytes=8 << 20)


async def join(stores, worker="n0", token=None, key=KEY):
    return await stores.flights.join(key, worker=worker, token=token or f"token of {worker}", ttl_s=TTL_S)


async def own(stores, worker="n0", token=None):
    outcome = await join(stores, worker, token)
    assert isinstance(outcome, Owned), outcome
    return outcome.fence


def blob(fence, nonce="1"):
    return BlobRecord(digest=DIGEST, key=f"blobs/x/{nonce}", size_bytes=5, etag='"e"', fence=fence.number)


@pytest.fixture
async def renewer(stores):
    renewer = stores.new_renewer()
    yield renewer
    await asyncio.to_thread(renewer.close)


async def state_until(stores, fact):
    """Ask for the flight's state until *fact* holds of it."""
    async with asyncio.timeout(10):
        while not fact(await stores.flights.state(KEY)):  # noqa: ASYNC110 - the renewer wakes nobody
            await asyncio.sleep(0.005)


# -- join ---------------------------------------------------------------------------------------------


async def test_the_first_owns_and_the_next_join(stores):
    """One owns; whoever comes while it lives joins it, and learns who owns and for how long."""
    fence = await own(stores)

    outcome = await join(stores, "n1")

    assert isinstance(outcome, Joined)
    assert (outcome.fence_number, outcome.owner) == (fence.number, "n0")
    assert 0 < outcome.lease_remaining_s <= TTL_S
    assert (await stores.flights.state(KEY))["waiters"] == 1


async def test_among_many_one_owns(stores):
    """Of many that join at once, each with a client of its own, exactly one owns."""
    others = [stores.other() for _ in range(8)]

    outcomes = await asyncio.gather(*(join(other, f"n{number}") for number, other in enumerate(others)))

    assert sum(isinstance(outcome, Owned) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Joined) for outcome in outcomes) == 7


async def test_keys_fly_apart(stores):
    """Flights of different keys have nothing to do with each other, but their fences rise together."""
    fence = await own(stores)
    other = await join(stores, "n1", key=blob_resource(digest_of(b"other")))

    assert isinstance(other, Owned)
    assert other.fence.number > fence.number
    assert other.fence.epoch == fence.epoch


async def join_another(stores, worker="n1"):
    return await stores.flights.join_another(KEY, worker=worker, ttl_s=TTL_S)


async def test_who_only_joins_waits_as_any_other(stores):
    """It joins a flight that somebody has, and is counted among those who wait for it; or it learns of the blob."""
    fence = await own(stores)
    joined = await join_another(stores)
    assert isinstance(joined, Joined)
    assert (joined.fence_number, joined.owner) == (fence.number, "n0")
    assert (await stores.flights.state(KEY))["waiters"] == 1
    await stores.flights.commit(fence, blob(fence))
    assert await join_another(stores) == Present(blob=blob(fence))


async def test_who_only_joins_meets_an_owner_that_stops(stores):
    """It is told so, as any other."""
    fence = await own(stores)
    assert await stores.flights.abort_if_unwanted(fence)
    outcome = await join_another(stores)
    assert isinstance(outcome, Aborting)
    assert outcome.fence_number == fence.number


async def test_who_only_joins_never_owns(stores):
    """Where nobody has a flight, or its owner's hold has lapsed, nothing comes of it: the next may own as ever."""
    assert await join_another(stores) is None
    assert await stores.flights.state(KEY) is None
    fence = await own(stores)
    stores.pass_time(TTL_S + 0.1)
    assert await join_another(stores) is None
    assert await stores.flights.outcome(KEY, fence.number) is None
    assert (await own(stores, "n2")).number > fence.number


async def test_joining_again_with_the_same_token_is_the_same_ownership(stores):
    """An owner whose answer was lost asks again with its token, and owns under the same fence."""
    fence = await own(stores)

    assert await own(stores) == fence


async def test_a_restarted_owner_waits_for_its_own_lapse(stores):
    """The same worker with another token is somebody else: it waits until the old hold has lapsed."""
    fence = await own(stores, "n0", "before the crash")

    assert isinstance(await join(stores, "n0", "after the crash"), Joined)
    stores.pass_time(TTL_S + 0.1)
    again = await own(stores, "n0", "after the crash")

    assert again.number > fence.number


async def test_a_dead_owner_is_replaced_and_its_upload_resumed(stores):
    """Once an owner's lease lapses whoever joins owns, under a higher fence, with the upload it left."""
    old = await own(stores)
    await stores.flights.begin_upload(old, UPLOAD)
    await stores.flights.record_part(old, 2, '"two"')
    await stores.flights.record_part(old, 1, '"one"')
    await join(stores, "n1")
    stores.pass_time(TTL_S + 0.1)

    taken = await join(stores, "n2")

    assert isinstance(taken, Owned)
    assert taken.fence.number > old.number
    assert taken.upload == replace(UPLOAD, parts={1: '"one"', 2: '"two"'})
    assert await stores.flights.outcome(KEY, old.number) == Vacated(fence_number=old.number)


async def test_a_present_blob_has_no_flight(stores):
    """Where the blob is present there is nothing to own."""
    fence = await own(stores)
    await stores.flights.commit(fence, blob(fence))

    assert await join(stores, "n1") == Present(blob=blob(fence))


# -- fences -------------------------------------------------------------------------------------------

WRITES = {
    "begin_upload": lambda flights, fence: flights.begin_upload(fence, UPLOAD),
    "record_part": lambda flights, fence: flights.record_part(fence, 1, "x"),
    "drop_upload": lambda flights, fence: flights.drop_upload(fence),
    "report": lambda flights, fence: flights.report(fence, 1, 2),
    "commit": lambda flights, fence: flights.commit(fence, blob(fence, "stale")),
    "fail": lambda flights, fence: flights.fail(fence, b"error"),
    "vacate": lambda flights, fence: flights.vacate(fence),
    "abort_if_unwanted": lambda flights, fence: flights.abort_if_unwanted(fence),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("part", ["epoch", "number", "token"])
async def test_any_part_of_a_fence_that_differs_is_refused(stores, write, part):
    """I10: (epoch, number, token) are compared for equality; a write under any other changes nothing."""
    fence = await own(stores)
    await stores.flights.begin_upload(fence, UPLOAD)
    other = replace(fence, number=fence.number + 1) if part == "number" else replace(fence, **{part: "other"})

    with pytest.raises(StaleFenceError):
        await WRITES[write](stores.flights, other)

    assert (await stores.flights.state(KEY))["fence"] == fence.number
    assert await stores.refs.blobs([DIGEST]) == [None]
    again = await join(stores, "n0")
    assert again == Owned(fence=fence, upload=UPLOAD)


@pytest.mark.parametrize("write", WRITES)
async def test_a_lapsed_owner_is_refused(stores, write):
    """I10: an owner whose lease has lapsed changes nothing, even while nobody has taken over."""
    fence = await own(stores)
    await stores.flights.begin_upload(fence, UPLOAD)
    stores.pass_time(TTL_S + 0.1)

    with pytest.raises(StaleFenceError):
        await WRITES[write](stores.flights, fence)

    assert await stores.refs.blobs([DIGEST]) == [None]
    taken = await join(stores, "n1")
    assert taken.upload == UPLOAD
    assert await stores.flights.outcome(KEY, fence.number) == Vacated(fence_number=fence.number)


@pytest.mark.parametrize("write", WRITES)
async def test_a_replaced_owner_is_refused(stores, write):
    """I10: an owner that slept while another took over changes nothing of the other's."""
    old = await own(stores)
    stores.pass_time(TTL_S + 0.1)
    new = await own(stores, "n1")
    await stores.flights.begin_upload(new, UPLOAD)

    with pytest.raises(StaleFenceError):
        await WRITES[write](stores.flights, old)

    assert await join(stores, "n1") == Owned(fence=new, upload=UPLOAD)


# -- the end ------------------------------------------------------------------------------------------


async def test_commit_makes_present_holds_and_ends(stores):
    """commit() makes the blob present, holds it by the flight's own lease, and ends the flight: one step."""
    fence = await own(stores)
    await join(stores, "n1")
    await stores.flights.begin_upload(fence, UPLOAD)

    await stores.flights.commit(fence, blob(fence))

    assert await stores.refs.blobs([DIGEST]) == [blob(fence)]
    assert await stores.leases.holders(KEY) == [LeaseId(f"flight:{DIGEST}")]
    assert await stores.flights.state(KEY) is None
    assert await stores.flights.outcome(KEY, fence.number) == Committed(fence_number=fence.number, blob=blob(fence))
    stores.pass_time(121)
    assert await stores.leases.holders(KEY) == []


async def test_a_commit_may_be_repeated(stores):
    """A commit whose answer was lost is made again, and is content to find itself done."""
    fence = await own(stores)
    await stores.flights.commit(fence, blob(fence))

    await stores.flights.commit(fence, blob(fence))

    with pytest.raises(StaleFenceError):
        await stores.flights.commit(fence, blob(fence, "another upload"))
    assert await stores.refs.blobs([DIGEST]) == [blob(fence)]


async def test_a_commit_of_another_digest_is_our_bug(stores):
    """A flight can only commit the blob of its key."""
    fence = await own(stores)

    with pytest.raises(InternalError):
        await stores.flights.commit(fence, replace(blob(fence), digest=digest_of(b"other")))


async def test_a_committed_upload_is_not_resumed(stores):
    """After a commit there is no upload left to resume, should the blob turn lazy again."""
    fence = await own(stores)
    await stores.flights.begin_upload(fence, UPLOAD)
    await stores.flights.commit(fence, blob(fence))
    await stores.refs.mark_absent(blob(fence), "gone")

    assert (await join(stores, "n1")).upload is None


async def test_a_failure_is_for_those_who_waited(stores):
    """The error is kept under the fence of those who waited; whoever joins later starts afresh, and resumes."""
    fence = await own(stores)
    await stores.flights.begin_upload(fence, UPLOAD)
    await join(stores, "n1")

    await stores.flights.fail(fence, b"error")
    late = await join(stores, "n2")

    assert await stores.flights.outcome(KEY, fence.number) == Failed(fence_number=fence.number, error=b"error")
    assert isinstance(late, Owned)
    assert late.fence.number > fence.number
    assert late.upload == UPLOAD
    assert await stores.flights.outcome(KEY, late.fence.number) is None


async def test_an_outcome_is_forgotten_after_a_minute(stores):
    """Outcomes are kept for 60 s."""
    fence = await own(stores)
    await stores.flights.fail(fence, b"error")

    stores.pass_time(59)
    assert await stores.flights.outcome(KEY, fence.number) is not None
    stores.pass_time(2)
    assert await stores.flights.outcome(KEY, fence.number) is None


async def test_a_running_flight_has_no_outcome(stores):
    """While it runs, and for a fence that never was, the outcome is None."""
    fence = await own(stores)

    assert await stores.flights.outcome(KEY, fence.number) is None
    assert await stores.flights.outcome(KEY, fence.number + 7) is None
    assert await stores.flights.state(blob_resource(digest_of(b"other"))) is None


async def test_a_vacated_flight_is_taken_over_and_resumed(stores):
    """Who vacates leaves its upload to the next, and those who wait wait on."""
    fence = await own(stores)
    await stores.flights.begin_upload(fence, UPLOAD)
    await join(stores, "n1")
    await join(stores, "n2")

    await stores.flights.vacate(fence)
    taken = await join(stores, "n1")

    assert isinstance(taken, Owned)
    assert taken.upload == UPLOAD
    assert await stores.flights.outcome(KEY, fence.number) == Vacated(fence_number=fence.number)
    assert not await stores.flights.abort_if_unwanted(taken.fence)


async def test_an_upload_is_kept_for_a_day(stores):
    """What an owner left can be resumed for a day."""
    fence = await own(stores)
    await stores.flights.begin_upload(fence, UPLOAD)
    await stores.flights.vacate(fence)

    stores.pass_time(23 * 3600)
    second = await join(stores, "n1")
    await stores.flights.vacate(second.fence)
    stores.pass_time(25 * 3600)

    assert second.upload == UPLOAD
    assert (await join(stores, "n2")).upload is None


async def test_a_new_upload_replaces_the_old(stores):
    """begin_upload() forgets the parts of an earlier upload; drop_upload() forgets all."""
    fence = await own(stores)
    await stores.flights.begin_upload(fence, UPLOAD)
    await stores.flights.record_part(fence, 1, "old")
    second = replace(UPLOAD, upload_id="u-2", parts={3: "new"})

    await stores.flights.begin_upload(fence, second)
    assert (await join(stores)).upload == second
    await stores.flights.drop_upload(fence)
    assert (await join(stores)).upload is None


# -- waiting ------------------------------------------------------------------------------------------


async def test_a_late_joiner_gets_the_progress_so_far(stores):
    """Joined says how far the owner is."""
    fence = await own(stores)
    await stores.flights.report(fence, 3, 10)

    outcome = await join(stores, "n1")

    assert (outcome.current_bytes, outcome.total_bytes) == (3, 10)


async def test_an_unwanted_flight_aborts(stores):
    """Once nobody waits the owner may abort; from then on nobody may join, until it has vacated."""
    fence = await own(stores)
    await join(stores, "n1")
    assert not await stores.flights.abort_if_unwanted(fence)
    assert await stores.flights.leave(KEY, worker="n1")

    assert await stores.flights.abort_if_unwanted(fence)
    assert await stores.flights.abort_if_unwanted(fence)

    late = await join(stores, "n2")
    assert isinstance(late, Aborting)
    assert late.fence_number == fence.number
    assert (await stores.flights.state(KEY))["state"] == "aborting"
    await stores.flights.vacate(fence)
    assert isinstance(await join(stores, "n2"), Owned)


async def test_a_joiner_is_never_aborted_under(stores):
    """Whoever has joined is waited for: abort and join are decided in one order by the store."""
    fence = await own(stores)
    await join(stores, "n1")

    assert not await stores.flights.abort_if_unwanted(fence)


async def test_an_aborting_owner_may_still_commit(stores):
    """What happened to be finished while aborting is kept."""
    fence = await own(stores)
    await stores.flights.abort_if_unwanted(fence)

    await stores.flights.commit(fence, blob(fence))

    assert isinstance(await join(stores, "n1"), Present)


async def test_a_dead_waiter_doesnt_count(stores, renewer):
    """A waiter that stops renewing is gone, and keeps no work alive."""
    fence = await own(stores)
    await join(stores, "n1")
    renewer.keep(fence, ttl_s=600.0, on_lost=lambda: None)
    await state_until(stores, lambda state: state["lease_remaining_s"] > TTL_S)
    stores.pass_time(TTL_S + 0.1)

    assert (await stores.flights.state(KEY))["waiters"] == 0
    assert await stores.flights.abort_if_unwanted(fence)


async def test_leave_tells_whether_anybody_is_left(stores):
    """leave() is False while others wait, True for the last; leaving twice does nothing."""
    await own(stores)
    await join(stores, "n1")
    await join(stores, "n2")

    assert not await stores.flights.leave(KEY, worker="n1")
    assert not await stores.flights.leave(KEY, worker="n1")
    assert await stores.flights.leave(KEY, worker="n2")


# -- events -------------------------------------------------------------------------------------------


async def test_those_who_listen_hear_of_progress_and_the_end(stores):
    """Entered means subscribed: whatever is told from then on is heard, by every process."""
    fence = await own(stores)
    other = stores.other()
    async with other.flights.events(KEY) as events, other.flights.events(KEY) as more:
        await stores.flights.report(fence, 1, 5)
        await stores.flights.commit(fence, blob(fence))

        heard = [await anext(events), await anext(events)]
        assert [await anext(more), await anext(more)] == heard

    assert heard == [
        Progressed(fence_number=fence.number, current_bytes=1, total_bytes=5),
        Committed(fence_number=fence.number, blob=blob(fence)),
    ]


async def test_every_end_is_heard(stores):
    """fail() and vacate() are told as events, as is the end of an owner that died."""
    async with stores.flights.events(KEY) as events:
        first = await own(stores)
        await stores.flights.fail(first, b"error")
        assert await anext(events) == Failed(fence_number=first.number, error=b"error")

        second = await own(stores)
        await stores.flights.vacate(second)
        assert await anext(events) == Vacated(fence_number=second.number)

        third = await own(stores)
        stores.pass_time(TTL_S + 0.1)
        await own(stores, "n1")
        assert await anext(events) == Vacated(fence_number=third.number)


async def test_the_owner_is_woken_when_the_last_waiter_leaves(stores):
    """The last leave() is heard by the owner as its own progress, so that it asks whether it is wanted."""
    fence = await own(stores)
    await stores.flights.report(fence, 3, 10)
    await join(stores, "n1")
    async with stores.flights.events(KEY) as events:
        await stores.flights.leave(KEY, worker="n1")

        assert await anext(events) == Progressed(fence_number=fence.number, current_bytes=3, total_bytes=10)


async def test_events_of_other_keys_are_not_heard(stores):
    """A subscription is to one key."""
    other = blob_resource(digest_of(b"other"))
    async with stores.flights.events(KEY) as events:
        fence = (await join(stores, key=other)).fence
        await stores.flights.vacate(fence)
        mine = await own(stores)
        await stores.flights.vacate(mine)

        assert await anext(events) == Vacated(fence_number=mine.number)


# -- renewal ------------------------------------------------------------------------------------------


async def test_an_ownership_is_renewed_until_dropped(stores, renewer):
    """keep() renews an ownership, at once and again and again; after drop() it lapses, and nobody is told."""
    fence = await own(stores)
    lost = threading.Event()
    renewer.keep(fence, ttl_s=0.3, on_lost=lost.set)
    await state_until(stores, lambda state: state["lease_remaining_s"] < TTL_S / 2)
    for _ in range(5):
        stores.pass_time(0.1)
        await state_until(stores, lambda state: state["lease_remaining_s"] > 0.21)

    renewer.drop(fence)
    stores.pass_time(0.5)

    assert isinstance(await join(stores, "n1"), Owned)
    assert not lost.is_set()


async def test_a_lost_ownership_is_told_once(stores, renewer):
    """When the store says that it owns no more, on_lost is called, once."""
    fence = await own(stores)
    calls = []
    renewer.keep(fence, ttl_s=0.15, on_lost=lambda: calls.append(threading.current_thread().name))
    await state_until(stores, lambda state: state["lease_remaining_s"] < TTL_S / 2)
    await stores.flights.vacate(fence)

    await eventually(lambda: calls)
    await asyncio.sleep(0.2)  # some rounds more

    assert calls == ["flight-renewer"]


async def test_a_waiter_is_renewed_until_dropped(stores, renewer):
    """keep_waiting() keeps a waiter on record; after drop_waiting() and leave() it is gone for good."""
    fence = await own(stores)
    await join(stores, "n1")
    renewer.keep_waiting(KEY, worker="n1", ttl_s=0.3)
    renewer.keep(fence, ttl_s=0.3, on_lost=lambda: None)
    await state_until(stores, lambda state: state["lease_remaining_s"] < TTL_S / 2)  # the first has come
    for _ in range(10):
        # Less than its third: the two are renewed side by side, and the other's renewal is what can be seen.
        stores.pass_time(0.05)
        await state_until(stores, lambda state: state["lease_remaining_s"] > 0.26)
    assert (await stores.flights.state(KEY))["waiters"] == 1

    renewer.drop_waiting(KEY)
    await stores.flights.leave(KEY, worker="n1")

    assert await stores.flights.abort_if_unwanted(fence)


async def test_what_is_under_way_is_listed(stores):
    """From the first owner on, whatever becomes of it, to the end; what died unnoticed is not told of."""
    other = blob_resource(digest_of(b"other"))
    assert await stores.flights.under_way() == {}
    fence = await own(stores)
    await join(stores, "n1")
    lost = await join(stores, "n2", key=other)
    assert isinstance(lost, Owned)
    await stores.flights.report(fence, 2, 5)
    listed = await stores.flights.under_way()
    assert listed.keys() == {KEY, other}
    assert listed[KEY] == {**await stores.flights.state(KEY), "lease_remaining_s": listed[KEY]["lease_remaining_s"]}
    assert (listed[KEY]["owner"], listed[KEY]["waiters"], listed[KEY]["current_bytes"]) == ("n0", 1, 2)

    await stores.flights.commit(fence, blob(fence))
    assert (await stores.flights.under_way()).keys() == {other}
    stores.pass_time(2 * TTL_S)
    assert await stores.flights.under_way() == {}
    again = await join(stores, "n3", key=other)
    assert (await stores.flights.under_way()).keys() == {other}
    await stores.flights.fail(again.fence, b"error")
    assert await stores.flights.under_way() == {}


@pytest.mark.redis
async def test_the_list_of_flights_forgets_those_that_died(redis_farm):
    """Nobody need look at it: each new flight lets go of some, so that it does not grow with every death."""
    stores = redis_farm.stores()
    for n in range(20):
        await join(stores, key=blob_resource(digest_of(b"dead %d" % n)))
    stores.pass_time(2 * TTL_S)
    for n in range(20):
        await join(stores, key=blob_resource(digest_of(b"live %d" % n)))
    assert len(await stores.flights.under_way()) == 20
    assert await redis_farm.links[0].execute("SCARD", f"{redis_farm.keys.prefix}:flights") < 30


async def test_who_joins_learns_of_its_owner_s_span(stores, monkeypatch):
    """The span that was current where the owner joined is told to who waits; "" where none was."""
    tracer = RecordingTracer(monkeypatch)
    with tracing.beginning("owner"):
        fence = await own(stores)
    assert (await join(stores, "n1")).trace == tracer.spans[0].traceparent
    await stores.flights.vacate(fence)
    await own(stores)
    assert (await join(stores, "n1")).trace == ""
