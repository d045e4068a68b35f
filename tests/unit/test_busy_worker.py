"""Calls that a worker has no room for are made again; a flood of them stays with whoever makes it."""

import asyncio
from contextlib import AsyncExitStack

import pytest

import actors.handles
from actors.boot import Boot
from actors.fetch_worker import FetchWorker
from actors.handles import FetchWorkerHandle
from actors.replies import ERROR, RESULT
from cluster.config import Config, FetchConfig
from cluster.errors import DeadlineExceededError, WorkerBusyError
from cluster.fair.quota import CallQuota
from cluster.fetch.retry import RetryPolicy
from cluster.messages import SessionInfo, UnlazyRequest, UnlazyResult
from cluster.ref import RefId
from cluster.wire import decode, encode, encode_error
from tests.doubles.stores import eventually

REF = RefId("sha256:" + "0" * 64)


class Worker:
    """What a fetch worker does with calls: refuses what is beyond the share, and takes a while for the others."""

    def __init__(self, limit):
        self.quota = CallQuota(limit)
        self.open = asyncio.Event()
        self.refused = 0
        self.most = {}
        self.sent = {}
        self.done = []

    async def unlazy(self, payload):
        request = decode("unlazy", UnlazyRequest, payload)
        tenant = request.session.tenant
        self.sent[tenant] = self.sent.get(tenant, 0) + 1
        try:
            with self.quota.call(tenant):
                self.most[tenant] = max(self.most.get(tenant, 0), self.quota.of(tenant))
                await self.open.wait()
                await asyncio.sleep(0)
                self.done.append(tenant)
                return RESULT + encode("unlazy-result", UnlazyResult(ref_id=request.ref_id, layers=()))
        except WorkerBusyError as exc:
            self.refused += 1
            return ERROR + encode_error(exc)


class Handle(FetchWorkerHandle):
    """A handle whose calls go to a :class:`Worker` of this process."""

    def __init__(self, worker):
        super().__init__("fetch-worker-n0", farm="f")
        self._worker = worker

    async def call_raw(self, method, *args, timeout_s):
        return await getattr(self._worker, method)(*args)

    async def ask(self, tenant, timeout_s=30.0):
        session = SessionInfo(session_id=f"{tenant}.1", part_of=tenant)
        request = UnlazyRequest(session=session, ref_id=REF, handlers=(), lease_id="l1")
        return await self.unlazy(request, timeout_s=timeout_s)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    policy = actors.handles._BUSY
    fast = RetryPolicy(attempts=policy.attempts, budget_s=policy.budget_s, base_s=0.01, cap_s=0.02)
    monkeypatch.setattr(actors.handles, "_BUSY", fast)
    monkeypatch.setattr("cluster.fair.quota._RETRY_AFTER_S", 0.01)


async def test_a_flood_is_served_in_the_end_and_another_at_once():
    """A thousand calls of one driver: the worker has a share of them at a time, and takes another's meanwhile."""
    worker = Worker(40)
    flood, other = Handle(worker), Handle(worker)
    calls = [asyncio.create_task(flood.ask("flood")) for _ in range(1000)]
    await eventually(lambda: worker.refused)
    late = asyncio.create_task(other.ask("late"))
    await eventually(lambda: "late" in worker.sent)
    assert worker.quota.of("late") == 1
    worker.open.set()
    await asyncio.wait_for(asyncio.gather(late, *calls), 60)
    assert worker.done.count("flood") == 1000
    assert worker.most == {"flood": 20, "late": 1}
    assert worker.quota.calls == 0
    assert not flood._slots


async def test_no_more_of_a_tenant_are_sent_than_some():
    """Of a thousand calls most have not left: they cost the worker nothing. Another tenant's of that process have."""
    worker = Worker(2000)
    handle = Handle(worker)
    calls = [asyncio.create_task(handle.ask(tenant)) for tenant in ["flood"] * 1000 + ["late"]]
    await eventually(lambda: "late" in worker.sent)
    assert worker.sent["flood"] == actors.handles._CALLS
    worker.open.set()
    await asyncio.gather(*calls)
    assert worker.refused == 0


async def test_who_gets_no_room_in_time_is_told_so():
    """Busy until the deadline: the error says what to do, and a call that had not even been sent names its deadline."""
    worker = Worker(2)
    handle = Handle(worker)
    held = asyncio.create_task(handle.ask("flood"))
    await eventually(lambda: worker.quota.calls)
    with pytest.raises(WorkerBusyError, match="1 calls are under way, 1 of them yours") as caught:
        await handle.ask("flood", timeout_s=0.1)
    assert caught.value.retryable
    assert "fetch.calls_per_node" in caught.value.hint
    assert worker.refused > 2
    for _ in range(actors.handles._CALLS - 1):
        await handle._slots["flood"].acquire()
    with pytest.raises(DeadlineExceededError, match="no turn"):
        await handle.ask("flood", timeout_s=0.05)
    worker.open.set()
    await held


async def test_a_worker_has_no_more_calls_than_it_is_configured_for():
    """What is refused has begun nothing; who comes late is let in; what ends makes room."""
    config = Config(fetch=FetchConfig(calls_per_node=6))
    worker = FetchWorker(encode("boot", Boot(config=config, state_dir="", name="w", kind="fetch", node="n0")))

    def call(tenant):
        return worker._serving("unlazy", SessionInfo(session_id=tenant))

    async with AsyncExitStack() as calls:
        for _ in range(3):
            await calls.enter_async_context(call("flood"))
        with pytest.raises(WorkerBusyError):
            await calls.enter_async_context(call("flood"))
        await calls.enter_async_context(call("late"))
        assert worker._sessions.statistics() == {"sessions": 2}
    assert worker._quota.calls == 0
    async with call("flood"):
        pass
