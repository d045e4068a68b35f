"""Unlazy: one flight for the cluster, seen from several processes over one store."""

import asyncio
from collections import Counter
from itertools import count

import pytest

from cluster import metrics, tracing
from cluster.audit import Operation
from cluster.digest import digest_of
from cluster.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    DeadlineExceededError,
    DigestMismatchError,
    InternalError,
    LeaseLostError,
    NeedsRemoteProvidersError,
    NodeDiskError,
    SessionGoneError,
    UnavailableError,
)
from cluster.fetch.access import AccessControl
from cluster.fetch.runner import Unlazier, progress_of
from cluster.flight.values import Owned, UploadState
from cluster.job import JobId, layer_stream
from cluster.lease import LeaseId, blob_resource
from cluster.progress import LayerPhase
from cluster.provider import DescHandler, ProviderHandle
from storage.memory import (
    Memory,
    MemoryFlightStore,
    MemoryLeaseStore,
    MemoryProgressStore,
    MemoryProofStore,
    MemoryRefStore,
)
from storage.memory_audit import MemoryAudit
from tests.doubles.disks import CrowdedDisk
from tests.doubles.fetch import (
    HANDLE,
    FakeAuthorizer,
    FakeProber,
    FakeTransfers,
    ManualRenewer,
    OpenDoors,
    caller_of,
    handle,
    layer_of,
)
from tests.doubles.stores import AUDIT, FakeClock, eventually
from tests.doubles.tracing import RecordingTracer

LAYER = layer_of(b"the layer's blob")
KEY = f"blob:{LAYER.digest}"
TTL_S = 6.0


class DeafFlights(MemoryFlightStore):
    """A flight store whose messages can get lost."""

    is_deaf = False

    def _publish(self, key, event):
        if not self.is_deaf:
            super()._publish(key, event)


class Process:
    """One process of the cluster."""

    def __init__(self, cluster, name, *, deadline_s=30.0, poll_s=0.5, max_transfers=4, access=None, disk=None):
        self.name = name
        self.cluster = cluster
        self.flights = DeafFlights(cluster.memory, AUDIT)
        self.renewer = ManualRenewer(self.flights)
        self.transfers = FakeTransfers(name)
        tokens = count()
        self.unlazier = Unlazier(
            worker=name,
            refs=cluster.refs,
            flights=self.flights,
            renewer=self.renewer,
            progress=cluster.progress,
            transfers=self.transfers,
            access=access or OpenDoors(),
            audit=MemoryAudit(cluster.memory, AUDIT, by=name),
            new_token=lambda: f"{name}-{next(tokens)}",
            ttl_s=TTL_S,
            poll_s=poll_s,
            deadline_s=deadline_s,
            max_transfers=max_transfers,
            clock=cluster.clock,
            disk=disk,
        )

    async def call(self, lease="l1", **more):
        """Start a caller with a lease of its own; return its task."""
        await self.cluster.leases.create(LeaseId(lease), ttl_s=None)
        caller = caller_of(lease, progress=(f"stream-{lease}",), **more)
        return asyncio.create_task(self.unlazier.unlazy(LAYER, caller))

    async def is_waiting(self):
        """Wait until this process is recorded as a waiter and listens."""
        await eventually(
            lambda: self.name in self.cluster.memory.waiters.get(KEY, {}) and self.cluster.memory.listeners.get(KEY)
        )


class Cluster:
    def __init__(self):
        self.clock = FakeClock()
        self.memory = Memory(self.clock)
        self.refs = MemoryRefStore(self.memory)
        self.leases = MemoryLeaseStore(self.memory)
        self.progress = MemoryProgressStore(self.memory)
        self.processes = []

    def process(self, name, **more):
        self.processes.append(Process(self, name, **more))
        return self.processes[-1]

    async def pinned(self, lease):
        return blob_resource(LAYER.digest) in (await self.leases.get(LeaseId(lease))).resources

    def phases(self, lease):
        return [item.phase for item in self.memory.streams.get(f"stream-{lease}", [])]

    def end_of(self, lease):
        """Return how the caller's item ended: exactly one end, and it is the last."""
        phases = self.phases(lease)
        assert [phase.is_end for phase in phases] == [False] * (len(phases) - 1) + [True], phases
        return phases[-1]


@pytest.fixture
async def cluster():
    """A cluster that holds nothing at the end of each test."""
    cluster = Cluster()
    yield cluster
    for process in cluster.processes:
        assert process.unlazier._flights.statistics().callers == 0
        await process.unlazier.aclose()
        assert not process.unlazier._background or process.renewer.is_dead


async def ended(task, within_s=5.0):
    """Wait for a task's end without raising."""
    await asyncio.wait({task}, timeout=within_s)
    assert task.done(), "still waiting"
    return task


async def failure(task, error_type):
    with pytest.raises(error_type) as caught:
        await asyncio.wait_for(task, 5.0)
    return caught.value


# -- access ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", ["this process", "another process", "afterwards"])
async def test_who_only_named_a_blob_gets_none_of_anothers_bytes(cluster, join):
    """Mallory's own registry named it before anybody had it: she joins Alice's flight and ends with an error."""
    app, evil = handle("app"), handle("bait", "evil.example")
    prober = FakeProber()
    prober.add(app, LAYER.digest, readers={"alice"})
    access = AccessControl(MemoryProofStore(cluster.memory), prober, proof_ttl_s=100.0)
    await access.record_named(FakeAuthorizer("mallory"), evil, [LAYER.digest])
    await access.record_named(FakeAuthorizer("alice"), app, [LAYER.digest])
    owner = cluster.process("a", access=access)
    other = owner if join == "this process" else cluster.process("b", access=access)
    alice = await owner.call("l1", providers={LAYER.digest: [app]})
    fetch = await owner.transfers.arrival()
    fetch.came_from = app.source
    if join == "afterwards":
        fetch.proceed.set()
        await alice
    mallory = await other.call("l2", name="mallory", providers={LAYER.digest: [evil]})
    if join == "another process":
        await other.is_waiting()
    elif join == "this process":
        await eventually(lambda: owner.unlazier._flights.statistics().callers == 2)
    fetch.proceed.set()
    await failure(mallory, NeedsRemoteProvidersError)
    await alice
    assert not await cluster.pinned("l2")
    assert cluster.end_of("l2") is LayerPhase.FAILED
    assert prober.asked == [(evil.source, LAYER.digest)]


# -- sharing ---------------------------------------------------------------------------------------------


async def test_what_is_present_needs_no_flight(cluster):
    """The blob is there: it is pinned, nothing is fetched, no fence is taken."""
    process = cluster.process("a")
    process.transfers.holds = False
    await (await process.call("l1"))
    fences = cluster.memory.last_fence
    fetch = await (await process.call("l2"))
    assert (fetch.source, fetch.bytes_fetched, fetch.joined) == ("present", 0, False)
    assert cluster.memory.last_fence == fences
    assert await cluster.pinned("l2")
    assert cluster.end_of("l2") is LayerPhase.PRESENT


async def test_what_is_collected_before_it_is_pinned_is_fetched_again(cluster, monkeypatch):
    """Present when looked at, gone when pinned: a hold on nothing is no result."""
    process = cluster.process("a")
    process.transfers.holds = False
    await (await process.call("l1"))
    hold, gone = cluster.refs.hold_blobs, []

    async def hold_too_late(digests, *, lease_id):
        if not gone:
            gone.append(cluster.memory.blobs.pop(LAYER.digest))
        return await hold(digests, lease_id=lease_id)

    monkeypatch.setattr(cluster.refs, "hold_blobs", hold_too_late)
    fetch = await (await process.call("l2"))
    assert gone
    assert (fetch.joined, fetch.bytes_fetched) == (False, LAYER.size_bytes)
    assert len(process.transfers.fetches) == 2
    assert LAYER.digest in cluster.memory.blobs
    assert await cluster.pinned("l2")
    assert cluster.end_of("l2") is LayerPhase.DONE


async def test_an_images_layers_are_looked_at_and_pinned_together(cluster, monkeypatch):
    """All that are present: one request to look at them, and one that pins them by the caller's lease."""
    process, asked = cluster.process("a"), []

    def noting(name, step):
        async def noted(digests, **more):
            asked.append((name, len(digests)))
            return await step(digests, **more)

        monkeypatch.setattr(cluster.refs, name, noted)

    noting("blobs", cluster.refs.blobs)
    noting("hold_blobs", cluster.refs.hold_blobs)
    layers = [layer_of(b"layer %d" % number) for number in range(50)]
    for lease in ("l1", "l2"):
        await cluster.leases.create(LeaseId(lease), ttl_s=None)
    process.transfers.open()
    await asyncio.gather(*(process.unlazier.unlazy(layer, caller_of("l1")) for layer in layers))
    asked.clear()
    fetches = await asyncio.gather(*(process.unlazier.unlazy(layer, caller_of("l2")) for layer in layers))
    assert {fetch.source for fetch in fetches} == {"present"}
    assert asked == [("blobs", 50), ("hold_blobs", 50)]
    held = await cluster.leases.get(LeaseId("l2"))
    assert set(held.resources) == {blob_resource(layer.digest) for layer in layers}


async def test_callers_of_one_process_share_one_fetch(cluster):
    """Two callers, one transfer: one did it, the other joined, both have pinned it."""
    process = cluster.process("a")
    tasks = [await process.call(lease) for lease in ("l1", "l2")]
    (await process.transfers.arrival()).proceed.set()
    first, second = await asyncio.gather(*tasks)
    assert (first.joined, first.bytes_fetched) == (False, LAYER.size_bytes)
    assert (second.joined, second.bytes_fetched) == (True, 0)
    assert len(process.transfers.fetches) == 1
    assert process.transfers.settled == [True]
    assert await cluster.pinned("l1")
    assert await cluster.pinned("l2")
    assert (cluster.end_of("l1"), cluster.end_of("l2")) == (LayerPhase.DONE, LayerPhase.JOINED)


async def test_processes_share_one_fetch(cluster):
    """One owns, the other is told at once: each caller pins the blob in its own lease."""
    a, b = cluster.process("a"), cluster.process("b", poll_s=60.0)
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    fetch.proceed.set()
    assert not (await ended(first)).result().joined
    got = (await ended(second)).result()
    assert (got.joined, got.bytes_fetched, got.source) == (True, 0, "flight of a")
    assert b.transfers.fetches == []
    assert await cluster.pinned("l1")
    assert await cluster.pinned("l2")
    assert cluster.end_of("l2") is LayerPhase.JOINED
    assert not b.renewer.waiting
    assert not a.renewer.owned


async def test_the_wait_for_anothers_flight_is_counted(cluster, monkeypatch):
    """By who waits, in seconds of its own clock; the owner waits for nobody."""
    told = []
    monkeypatch.setattr(metrics.Counter, "add", lambda counter, amount=1, **_: told.append((counter, amount)))
    a, b = cluster.process("a"), cluster.process("b", poll_s=60.0)
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    cluster.clock.advance(2.5)
    fetch.proceed.set()
    await asyncio.gather(ended(first), ended(second))
    assert [amount for metric, amount in told if metric is metrics.FLIGHT_WAIT_SECONDS] == [2.5]


async def test_who_joins_links_to_the_span_that_fetched(cluster, monkeypatch):
    """In this process or another: one trace tells the transfer, the others say whose flight they waited for."""
    tracer = RecordingTracer(monkeypatch)
    a, b = cluster.process("a"), cluster.process("b", poll_s=60.0)
    calls = []
    for name, process, lease in (("owner", a, "l1"), ("near", a, "l2"), ("far", b, "l3")):
        with tracing.beginning(name):
            calls.append(await process.call(lease))
        if name == "owner":
            fetch = await a.transfers.arrival()
    await b.is_waiting()
    await eventually(lambda: a.unlazier._flights.statistics().callers == 2)
    fetch.proceed.set()
    await asyncio.gather(*calls)

    spans = {span.path: span for span in tracer.spans}
    owner = spans["owner", "unlazy", "flight"]
    assert spans["near", "unlazy"].links == spans["far", "unlazy", "flight"].links == [owner.traceparent]
    assert [path for path in spans if path[-1] == "transfer"] == [("owner", "unlazy", "flight", "transfer")]
    assert owner.attributes["lazyfarm.flight.role"] == "owner"
    assert spans["far", "unlazy", "flight"].attributes["lazyfarm.flight.role"] == "waiter"
    assert all(span.ends == 1 for span in tracer.spans if span.parent)


async def test_a_cancelled_caller_s_spans_end(cluster, monkeypatch):
    """Who goes away ends its spans, those of the work that it alone wanted among them."""
    tracer = RecordingTracer(monkeypatch)
    process = cluster.process("a")
    with tracing.beginning("caller"):
        call = await process.call("l1")
    await process.transfers.arrival()
    call.cancel()
    await failure(call, asyncio.CancelledError)

    ended_so = {span.name: type(span.error) for span in tracer.spans if span.name in {"unlazy", "flight", "transfer"}}
    assert ended_so == dict.fromkeys(("unlazy", "flight", "transfer"), asyncio.CancelledError)


async def test_progress_crosses_processes(cluster):
    """What the owner reports is seen by who waits elsewhere, and by who comes late."""
    a, b, c = (cluster.process(name) for name in "abc")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    await a.flights.report(fetch.fence, 7, LAYER.size_bytes)
    await eventually(lambda: LayerPhase.FETCHING in cluster.phases("l2"))
    third = await c.call("l3")
    await eventually(lambda: LayerPhase.FETCHING in cluster.phases("l3"))
    fetch.proceed.set()
    await asyncio.gather(first, second, third)


async def test_a_blob_shows_where_its_own_handlers_say(cluster):
    """Its streams take the place of the call's; a blob whose handlers name none shows in the call's."""
    process = cluster.process("a")
    process.transfers.holds = False
    await (await process.call("l1", own_progress={LAYER.digest: ("mine", "its")}))
    for stream in ("mine", "its"):
        assert cluster.memory.streams[stream][-1].phase is LayerPhase.DONE
    assert "stream-l1" not in cluster.memory.streams
    await (await process.call("l2", own_progress={digest_of(b"other"): ("mine",)}))
    assert cluster.memory.streams["stream-l2"][-1].phase is LayerPhase.PRESENT


def test_handlers_say_where_their_digests_show():
    """Each stream once, in order; a digest without any is not there."""
    one, two = LAYER.digest, digest_of(b"two")
    named = [(one, "a"), (two, None), (one, None), (one, "b"), (one, "a")]
    handlers = [DescHandler(digest=digest, provider=HANDLE, progress=stream) for digest, stream in named]
    assert progress_of(handlers) == {one: ("a", "b")}


async def test_a_lost_message_is_found_by_the_slow_poll(cluster):
    """No event ever comes: the poll finds the outcome."""
    a, b = cluster.process("a"), cluster.process("b", poll_s=0.05)
    a.flights.is_deaf = True
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    fetch.proceed.set()
    await ended(first)
    assert (await ended(second)).result().joined


async def test_a_lost_message_of_a_failure_is_found_too(cluster):
    """Who waited shares the error, and leaves nothing that it came to own by asking again."""
    a, b = cluster.process("a"), cluster.process("b", poll_s=0.05)
    a.flights.is_deaf = True
    a.transfers.plan = [BlobNotFoundError(LAYER.digest, "r.example/app")]
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    fetch.proceed.set()
    await failure(first, BlobNotFoundError)
    await failure(second, BlobNotFoundError)
    assert await b.flights.state(KEY) is None
    assert b.transfers.fetches == []


async def test_a_look_at_a_flight_that_goes_on_is_one_question(cluster, monkeypatch):
    """However long it waits, it subscribes once and asks once how the flight ended; then it only joins again."""
    a, b = cluster.process("a"), cluster.process("b", poll_s=0.02)
    asked = Counter()

    def counted(name):
        method = getattr(b.flights, name)

        def call(*args, **kwargs):
            asked[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(b.flights, name, call)

    for name in ("join_another", "outcome", "events"):
        counted(name)
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await eventually(lambda: asked["join_another"] >= 5)
    assert (asked["events"], asked["outcome"]) == (1, 1)
    fetch.proceed.set()
    await asyncio.gather(first, second)


async def test_a_lost_lease_is_the_callers_own_affair(cluster):
    """A caller whose lease is gone gets LeaseLostError; the blob is present, the other has it."""
    process = cluster.process("a")
    first, second = await process.call("l1"), await process.call("l2")
    fetch = await process.transfers.arrival()
    await cluster.leases.delete(LeaseId("l1"))
    fetch.proceed.set()
    await failure(first, LeaseLostError)
    assert (await ended(second)).result().joined
    assert cluster.end_of("l1") is LayerPhase.FAILED


# -- leaving ---------------------------------------------------------------------------------------------


async def test_a_caller_that_leaves_fails_nobody(cluster):
    """One of two is cancelled: it goes at once, the other gets the blob."""
    process = cluster.process("a")
    first, second = await process.call("l1"), await process.call("l2")
    fetch = await process.transfers.arrival()
    first.cancel()
    assert (await ended(first)).cancelled()
    assert not fetch.is_over
    fetch.proceed.set()
    await second
    await eventually(lambda: cluster.end_of("l1") is LayerPhase.CANCELLED)


async def test_the_last_caller_stops_the_work_and_waits_for_that(cluster):
    """Nobody wants it any more: when the cancelled call ends, the transfer has ended and the flight is free."""
    process = cluster.process("a")
    task = await process.call("l1")
    fetch = await process.transfers.arrival()
    task.cancel()
    assert (await ended(task)).cancelled()
    assert fetch.was_cancelled
    assert await process.flights.state(KEY) is None
    assert not process.renewer.owned
    await eventually(lambda: cluster.phases("l1")[-1] is LayerPhase.CANCELLED)
    again = await process.call("l2")
    (await process.transfers.arrival(2)).proceed.set()
    assert not (await again).joined


async def test_the_owner_goes_on_for_a_process_that_waits(cluster):
    """The owner's only caller is cancelled while another process waits: it gets the blob, fetched once."""
    a, b = cluster.process("a"), cluster.process("b")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    first.cancel()
    assert (await ended(first)).cancelled()
    assert not fetch.is_over
    fetch.proceed.set()
    assert (await ended(second)).result().joined
    assert b.transfers.fetches == []


async def test_an_owner_without_callers_stops_once_nobody_waits(cluster):
    """Its caller left first, then the other process's: the work is stopped within a poll."""
    a, b = cluster.process("a", poll_s=0.02), cluster.process("b")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    first.cancel()
    await ended(first)
    second.cancel()
    assert (await ended(second)).cancelled()
    await eventually(lambda: fetch.was_cancelled)
    await eventually(lambda: not cluster.memory.flights)


async def test_a_waiter_that_leaves_does_not_wait_for_the_owner(cluster):
    """The owner has callers of its own and goes on: the cancelled waiter goes at once."""
    a, b = cluster.process("a"), cluster.process("b")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    second.cancel()
    assert (await ended(second, within_s=1.0)).cancelled()
    assert cluster.memory.waiters.get(KEY) in (None, {})
    assert not b.renewer.waiting
    fetch.proceed.set()
    await first


async def test_a_waiter_that_dies_is_not_waited_for(cluster):
    """Its record lapses: an owner without callers stops."""
    a, b = cluster.process("a", poll_s=0.02), cluster.process("b")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    first.cancel()
    await ended(first)
    b.renewer.is_dead = True
    cluster.clock.advance(TTL_S / 2)
    a.renewer.renew()
    cluster.clock.advance(TTL_S / 2 + 0.1)
    await eventually(lambda: fetch.was_cancelled)
    second.cancel()
    await ended(second)


async def test_a_caller_that_comes_back_joins_the_work_it_left(cluster):
    """The process goes on for another; its own new caller waits for that very work."""
    a, b = cluster.process("a", poll_s=0.02), cluster.process("b")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    first.cancel()
    await ended(first)
    third = await a.call("l3")
    await a.is_waiting()
    second.cancel()
    await ended(second)
    for _ in range(5):
        await asyncio.sleep(0.02)
        a.renewer.renew()
    assert not fetch.is_over
    fetch.proceed.set()
    assert (await ended(third)).result().joined
    assert len(a.transfers.fetches) == 1


async def test_a_caller_who_comes_while_the_work_is_stopping_starts_afresh(cluster):
    """Late arrivals never inherit a cancellation, from another process either."""
    a, b = cluster.process("a"), cluster.process("b")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    assert await a.flights.abort_if_unwanted(fetch.fence)
    second = await b.call("l2")
    await eventually(lambda: cluster.memory.listeners.get(KEY))
    first.cancel()
    await ended(first)
    (await b.transfers.arrival()).proceed.set()
    assert not (await ended(second)).result().joined


async def test_closing_hands_the_flight_over(cluster):
    """A process that stops tells its callers, and whoever waits elsewhere takes over."""
    a, b = cluster.process("a"), cluster.process("b")
    first = await a.call("l1")
    await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    await a.unlazier.aclose()
    await failure(first, UnavailableError)
    (await b.transfers.arrival()).proceed.set()
    assert not (await ended(second)).result().joined


# -- owners that are lost --------------------------------------------------------------------------------


async def test_a_waiter_takes_over_from_a_dead_owner_and_resumes(cluster):
    """The owner's process is gone: within a flight lease another owns, with the upload that was left."""
    a, b = cluster.process("a"), cluster.process("b", poll_s=0.05)
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    upload = UploadState(key="blobs/x/1", upload_id="u1", part_bytes=1000)
    await a.flights.begin_upload(fetch.fence, upload)
    await a.flights.record_part(fetch.fence, 1, "etag-1")
    second = await b.call("l2")
    await b.is_waiting()
    a.renewer.is_dead = True
    cluster.clock.advance(TTL_S + 0.1)
    takeover = await b.transfers.arrival()
    assert takeover.upload.upload_id == "u1"
    assert takeover.upload.parts == {1: "etag-1"}
    assert takeover.fence.number > fetch.fence.number
    takeover.proceed.set()
    assert not (await ended(second)).result().joined
    # The dead owner wakes: its commit is refused, and its caller gets what is there.
    fetch.proceed.set()
    got = (await ended(first)).result()
    assert got.joined
    assert a.transfers.settled == [False]
    (blob,) = await cluster.refs.blobs([LAYER.digest])
    assert blob.fence == takeover.fence.number


async def test_an_owner_that_loses_its_flight_joins_again(cluster):
    """The renewer says that it is lost: the work is stopped, and the callers wait for the new owner's."""
    a, b = cluster.process("a"), cluster.process("b")
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    cluster.clock.advance(TTL_S + 0.1)
    second = await b.call("l2")
    takeover = await b.transfers.arrival()
    a.renewer.renew()
    await eventually(lambda: fetch.was_cancelled)
    await a.is_waiting()
    takeover.proceed.set()
    assert (await ended(first)).result().joined
    assert not (await ended(second)).result().joined


async def test_a_flight_that_is_lost_while_it_fails_still_fails_well(cluster):
    """The renewer gives up while Redis is being told of the failure: callers get the failure, not a bug."""
    process = cluster.process("a")
    process.transfers.plan = [BlobNotFoundError(LAYER.digest, "r.example/app")]
    telling, told = asyncio.Event(), asyncio.Event()

    async def fail(fence, error, *, entry):
        telling.set()
        await told.wait()

    process.flights.fail = fail
    task = await process.call("l1")
    (await process.transfers.arrival()).proceed.set()
    await telling.wait()
    process.renewer.lose()
    await asyncio.sleep(0.01)
    told.set()
    await failure(task, BlobNotFoundError)


# -- failures --------------------------------------------------------------------------------------------


async def test_who_waited_shares_the_failure_and_who_comes_later_does_not(cluster):
    """A definite failure reaches every caller of both processes; the next call tries afresh."""
    a, b = cluster.process("a"), cluster.process("b")
    a.transfers.plan = [DigestMismatchError(LAYER.digest, "sha256:" + "0" * 64, "r.example/app")]
    tasks = [await a.call("l1"), await a.call("l2")]
    fetch = await a.transfers.arrival()
    tasks.append(await b.call("l3"))
    await b.is_waiting()
    fetch.proceed.set()
    for task, lease in zip(tasks, ("l1", "l2", "l3"), strict=True):
        error = await failure(task, DigestMismatchError)
        assert (error.expected, error.source) == (LAYER.digest, "r.example/app")
        assert cluster.end_of(lease) is LayerPhase.FAILED
    assert await a.flights.state(KEY) is None
    late = await b.call("l4")
    (await b.transfers.arrival()).proceed.set()
    assert not (await late).joined


@pytest.mark.parametrize(
    ("told", "raised"),
    [
        (AccessDeniedError("app", "r.example", "403"), AccessDeniedError),
        (SessionGoneError("s1"), NeedsRemoteProvidersError),
        (NeedsRemoteProvidersError((LAYER.digest,)), NeedsRemoteProvidersError),
    ],
    ids=["denied", "gone", "no provider"],
)
async def test_what_one_callers_credentials_can_not_do_fails_only_them(cluster, told, raised):
    """The owner's callers aren't let in: their calls fail, and a waiter with other credentials takes over."""
    a, b = cluster.process("a"), cluster.process("b")
    a.transfers.plan = [told]
    first = await a.call("l1", name="mallory")
    fetch = await a.transfers.arrival()
    second = await b.call("l2", name="alice")
    await b.is_waiting()
    fetch.proceed.set()
    await failure(first, raised)
    (await b.transfers.arrival()).proceed.set()
    assert not (await ended(second)).result().joined


@pytest.mark.parametrize("told", [AccessDeniedError("app", "r.example", "403"), SessionGoneError("s1")])
async def test_who_joined_after_the_credentials_were_taken_gets_a_try_of_their_own(cluster, told):
    """The second local caller's credentials were never tried: it must not share what the first's came to."""
    process = cluster.process("a")
    process.transfers.plan = [told]
    first = await process.call("l1", name="mallory")
    fetch = await process.transfers.arrival()
    second = await process.call("l2", name="alice")
    await asyncio.sleep(0.01)
    fetch.proceed.set()
    retry = await process.transfers.arrival(2)
    assert {caller.authorizer.name for caller in retry.asked} == {"mallory", "alice"}
    retry.proceed.set()
    await asyncio.gather(first, second)


async def test_credentials_that_failed_are_not_tried_for_ever(cluster):
    """A live session that can't answer: one try, then an error, not a loop."""
    process = cluster.process("a")
    process.transfers.holds = False
    process.transfers.plan = [SessionGoneError("s1")] * 99
    await failure(await process.call("l1"), NeedsRemoteProvidersError)
    assert len(process.transfers.fetches) == 1


async def test_a_bug_is_not_waited_for(cluster):
    """Work that raises what it must not ends the flight for everybody, at once."""
    a, b = cluster.process("a"), cluster.process("b", poll_s=60.0)
    a.transfers.plan = [RuntimeError("surprise")]
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    second = await b.call("l2")
    await b.is_waiting()
    fetch.proceed.set()
    await failure(first, InternalError)
    await failure(second, InternalError)


async def test_every_call_ends_by_its_deadline(cluster):
    """Nothing comes: DeadlineExceededError, the work is stopped, the flight is free."""
    process = cluster.process("a", deadline_s=0.05)
    task = await process.call("l1")
    fetch = await process.transfers.arrival()
    await failure(task, DeadlineExceededError)
    assert fetch.was_cancelled
    assert cluster.end_of("l1") is LayerPhase.FAILED
    assert await process.flights.state(KEY) is None


async def test_a_deadline_of_one_fails_nobody_else(cluster):
    """Two processes, one impatient: the patient one gets the blob."""
    a, b = cluster.process("a"), cluster.process("b", deadline_s=0.05)
    first = await a.call("l1")
    fetch = await a.transfers.arrival()
    await failure(await b.call("l2"), DeadlineExceededError)
    fetch.proceed.set()
    await first


async def test_transfers_wait_for_their_slot_and_still_can_be_cancelled(cluster):
    """More layers than slots: who waits for a slot leaves like anybody else."""
    process = cluster.process("a", max_transfers=1)
    other = layer_of(b"another blob")
    first = await process.call("l1")
    fetch = await process.transfers.arrival()
    await cluster.leases.create(LeaseId("l2"), ttl_s=None)
    second = asyncio.create_task(process.unlazier.unlazy(other, caller_of("l2")))
    await eventually(lambda: process.unlazier._slots.waiting == 1)
    second.cancel()
    assert (await ended(second)).cancelled()
    assert process.unlazier._slots.waiting == 0
    fetch.proceed.set()
    await first


async def test_what_has_no_slot_is_anothers_to_fetch(cluster):
    """A layer that waits for a slot here is owned by nobody: a node with a free one fetches it, for both."""
    full, roomy = cluster.process("full", max_transfers=1, poll_s=0.02), cluster.process("roomy")
    other = layer_of(b"another blob")
    first = await full.call("l1")
    fetch = await full.transfers.arrival()
    await cluster.leases.create(LeaseId("l2"), ttl_s=None)
    second = asyncio.create_task(full.unlazier.unlazy(other, caller_of("l2")))
    await eventually(lambda: full.unlazier._slots.waiting == 1)
    assert f"blob:{other.digest}" not in cluster.memory.flights

    await cluster.leases.create(LeaseId("l3"), ttl_s=None)
    third = asyncio.create_task(roomy.unlazier.unlazy(other, caller_of("l3")))
    (await roomy.transfers.arrival()).proceed.set()
    joined, fetched = await asyncio.wait_for(asyncio.gather(second, third), 5.0)
    assert (joined.joined, fetched.joined) == (True, False)
    assert not first.done()
    assert full.unlazier._slots.waiting == 0
    fetch.proceed.set()
    await first


async def test_a_slot_that_comes_while_another_is_joined_goes_on(cluster):
    """Who finds another's flight gives its place up, and the slot, where it has just got that."""
    process = cluster.process("a", max_transfers=1)
    await process.flights.join(KEY, worker="other", token="t", ttl_s=TTL_S)
    waiting = await process.call("l1")
    await eventually(lambda: cluster.memory.waiters.get(KEY))
    other = layer_of(b"another blob")
    process.transfers.open()
    await cluster.leases.create(LeaseId("l2"), ttl_s=None)
    await asyncio.wait_for(process.unlazier.unlazy(other, caller_of("l2")), 5.0)
    waiting.cancel()
    await ended(waiting)


async def test_a_flood_lets_a_late_caller_in(cluster):
    """A tenant with two hundred blobs, another with one that comes last: the one is fetched among the first."""
    process = cluster.process("a", max_transfers=2)
    await cluster.leases.create(LeaseId("l1"), ttl_s=None)
    layers = [layer_of(b"blob %d" % number) for number in range(200)]
    tasks = [asyncio.create_task(process.unlazier.unlazy(one, caller_of("l1", tenant="flood"))) for one in layers]
    await eventually(lambda: process.unlazier._slots.waiting == 198)
    late = await process.call("l2", tenant="late")
    await eventually(lambda: process.unlazier._slots.waiting == 199)
    process.transfers.open()
    await asyncio.gather(late, *tasks)
    fetched = [fetch.descriptor.digest for fetch in process.transfers.fetches]
    assert len(fetched) == 201
    assert fetched.index(LAYER.digest) <= 3


async def test_a_late_caller_of_what_a_flood_asked_for_is_not_last(cluster):
    """Its flight is the last in another's line: it comes forward for the one who has nothing else."""
    process = cluster.process("a", max_transfers=2)
    await cluster.leases.create(LeaseId("l1"), ttl_s=None)
    layers = [*(layer_of(b"blob %d" % number) for number in range(200)), LAYER]
    tasks = [asyncio.create_task(process.unlazier.unlazy(one, caller_of("l1", tenant="flood"))) for one in layers]
    await eventually(lambda: process.unlazier._slots.waiting == 199)
    late = await process.call("l2", tenant="late")
    await eventually(lambda: process.unlazier._flights.statistics().callers == 202)
    process.transfers.open()
    await asyncio.gather(late, *tasks)
    fetched = [fetch.descriptor.digest for fetch in process.transfers.fetches]
    assert len(fetched) == 201
    assert fetched.index(LAYER.digest) <= 3


async def test_a_renewal_that_meets_the_commit_is_no_loss(cluster, monkeypatch):
    """It finds the flight gone while the commit's answer is on its way: what was fetched is kept, and the owner's."""
    process = cluster.process("a")
    commit = process.flights.commit

    async def committed_and_renewed(fence, blob, **noted):
        await commit(fence, blob, **noted)
        process.renewer.lose()
        await asyncio.sleep(0)

    monkeypatch.setattr(process.flights, "commit", committed_and_renewed)
    process.transfers.open()
    fetch = await (await process.call("l1"))
    assert not fetch.joined
    assert process.transfers.settled == [True]


FULL = NodeDiskError("/n1", "no room for it")


async def test_a_full_disk_is_waited_for_without_the_flight(cluster):
    """A node that lacks room lets another have the flight, and joins that; with room of its own it may fetch again."""
    disk = CrowdedDisk()
    full, roomy = cluster.process("full", disk=disk), cluster.process("roomy")
    full.transfers.plan = [FULL]
    full.transfers.holds = False
    first = await full.call("l1")
    await eventually(lambda: disk.waiting == [f"fetching {LAYER.digest}"])
    second = await roomy.call("l2")
    fetch = await roomy.transfers.arrival()
    disk.room.set()
    await full.is_waiting()
    fetch.proceed.set()
    await asyncio.wait_for(asyncio.gather(first, second), 5.0)
    assert (len(full.transfers.fetches), len(roomy.transfers.fetches)) == (1, 1)
    assert disk.waiting == []


async def test_who_waits_for_room_sees_that_another_has_brought_the_blob(cluster):
    """No room comes, and none is needed any more."""
    disk = CrowdedDisk()
    full, roomy = cluster.process("full", disk=disk, poll_s=0.02), cluster.process("roomy")
    full.transfers.plan = [FULL]
    full.transfers.holds = roomy.transfers.holds = False
    first = await full.call("l1")
    await eventually(lambda: disk.waiting)
    await asyncio.wait_for(await roomy.call("l2"), 5.0)
    fetch = await asyncio.wait_for(first, 5.0)
    assert fetch.joined
    assert (len(full.transfers.fetches), len(roomy.transfers.fetches)) == (1, 1)
    assert disk.waiting == []


async def test_who_stops_waiting_for_room_leaves_the_line(cluster):
    """A cancelled caller keeps nobody else waiting."""
    disk = CrowdedDisk()
    process = cluster.process("p", disk=disk)
    process.transfers.plan, process.transfers.holds = [FULL], False
    call = await process.call()
    await eventually(lambda: disk.waiting)
    call.cancel()
    await ended(call)
    await eventually(lambda: disk.waiting == [])


async def test_who_has_waited_for_room_fetches(cluster):
    """Nobody else wanted it: the fetch begins anew, once there is room."""
    disk = CrowdedDisk()
    process = cluster.process("p", disk=disk)
    process.transfers.plan, process.transfers.holds = [FULL], False
    call = await process.call()
    await eventually(lambda: disk.waiting)
    disk.room.set()
    await asyncio.wait_for(call, 5.0)
    assert len(process.transfers.fetches) == 2
    assert cluster.end_of("l1") is LayerPhase.DONE


@pytest.mark.parametrize("when", ["no room comes", "it is full again"])
async def test_a_disk_that_stays_full_fails_the_call(cluster, when):
    """The wait for room has its end, and so have the tries."""
    disk = CrowdedDisk()
    disk.error = FULL if when == "no room comes" else None
    disk.room.set()
    process = cluster.process("p", disk=disk)
    process.transfers.plan, process.transfers.holds = [FULL, FULL], False
    await failure(await process.call(), NodeDiskError)
    assert len(process.transfers.fetches) == (1 if when == "no room comes" else 2)
    assert cluster.end_of("l1") is LayerPhase.FAILED
    assert isinstance(await process.flights.join(KEY, worker="next", token="t", ttl_s=TTL_S), Owned)


async def test_the_next_owner_after_a_cancel_gets_the_upload(cluster):
    """A stopped transfer's upload is not lost."""
    process = cluster.process("a")
    task = await process.call("l1")
    fetch = await process.transfers.arrival()
    await process.flights.begin_upload(fetch.fence, UploadState(key="k", upload_id="u9", part_bytes=1000))
    task.cancel()
    await ended(task)
    outcome = await process.flights.join(KEY, worker="z", token="z", ttl_s=TTL_S)
    assert isinstance(outcome, Owned)
    assert outcome.upload.upload_id == "u9"


async def test_a_hundred_callers_of_five_processes_come_and_go(cluster):
    """Half of them cancel at random: all others get the blob, and it is fetched once after the last owner's end."""
    import random  # noqa: PLC0415

    rng = random.Random(3)  # noqa: S311 - a test's schedule
    processes = [cluster.process(f"p{n}", poll_s=0.02) for n in range(5)]
    tasks = [await rng.choice(processes).call(f"l{n}") for n in range(100)]
    doomed = set(rng.sample(range(100), 50))
    for n in doomed:
        tasks[n].cancel()
        if rng.random() < 0.3:
            await asyncio.sleep(0)

    def proceed():
        for process in processes:
            for fetch in process.transfers.fetches:
                fetch.proceed.set()
        return all(task.done() for task in tasks)

    await eventually(proceed)
    for n, task in enumerate(tasks):
        if n in doomed and task.cancelled():
            continue
        assert task.result().digest == LAYER.digest
        assert await cluster.pinned(f"l{n}")
    await eventually(lambda: all(cluster.end_of(f"l{n}") for n in range(100) if cluster.phases(f"l{n}")))


# -- the audit stream ---------------------------------------------------------------------------------------


def audited(cluster, operation):
    return [entry for entry in cluster.memory.audit if entry.operation == operation]


async def test_every_caller_is_noted_and_every_attempt(cluster):
    """Who needed it, for which job and vertex, and how it came; who brought it, as whom; who finds it there."""
    a, b = cluster.process("a"), cluster.process("b")
    providers = {LAYER.digest: (ProviderHandle(registry="r.example", repository="app"),)}
    vertex = digest_of(b"vertex")
    own = {LAYER.digest: (layer_stream(JobId("j1"), vertex),)}
    first = await a.call("l1", tenant="driver-1", providers=providers)
    fetch = await a.transfers.arrival()
    second = await b.call("l2", tenant="s-j1", name="bob", providers=providers, own_progress=own)
    await b.is_waiting()
    cluster.clock.advance(2.0)
    fetch.proceed.set()
    await asyncio.gather(first, second)
    await (await a.call("l3"))
    (fetched,) = audited(cluster, Operation.FETCH)
    assert (fetched.outcome, fetched.who, fetched.by, fetched.source) == ("committed", "driver-1", "a", "registry of a")
    assert (fetched.moved_bytes, fetched.seconds, fetched.fence) == (LAYER.size_bytes, 2.0, fetch.fence.number)
    asked = {entry.who: entry for entry in audited(cluster, Operation.UNLAZY)}
    assert {who: (e.outcome, e.source, e.moved_bytes) for who, e in asked.items()} == {
        "driver-1": ("fetched", "registry of a", 0),
        "s-j1": ("joined", "flight of a", 0),
        "": ("present", "s3", 0),
    }
    assert {e.credential for e in asked.values()} == {"alice@r.exam", "bob@r.exampl", ""}
    assert (asked["s-j1"].job, asked["s-j1"].vertex) == ("j1", vertex)
    assert {e.digest for e in cluster.memory.audit} == {LAYER.digest}


async def test_failures_and_cancellations_are_noted_without_a_word_of_what_they_say(cluster):
    """An error may quote what a registry was sent, or what it answered: its type is all that the stream keeps."""
    process = cluster.process("a")
    process.transfers.plan = [BlobNotFoundError(LAYER.digest, "Bearer s3cr3t")]
    failing = await process.call("l1", tenant="one")
    (await process.transfers.arrival()).proceed.set()
    await failure(failing, BlobNotFoundError)
    leaving = await process.call("l2", tenant="two")
    await process.transfers.arrival(2)
    leaving.cancel()
    await ended(leaving)
    await eventually(lambda: len(audited(cluster, Operation.FETCH)) == 2)
    told = [(e.operation, e.outcome, e.error, e.who) for e in cluster.memory.audit]
    assert sorted(told) == [
        ("fetch", "failed", "BlobNotFoundError", "one"),
        ("fetch", "vacated", "", "two"),
        ("unlazy", "cancelled", "", "two"),
        ("unlazy", "failed", "BlobNotFoundError", "one"),
    ]
    assert "s3cr3t" not in repr(cluster.memory.audit)
