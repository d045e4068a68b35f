"""Where a scheduler puts ops: by what all say of the nodes, and by what it has itself put there just now."""

import asyncio
import contextlib

import pytest

from actors import placement as placement_module
from actors import workers as workers_module
from actors.placement import Placement
from cluster.digest import digest_of
from cluster.errors import ActorLostError, NodeDrainingError, NodeNotFoundError, UnavailableError
from cluster.ref import RefRecord, RefState
from storage.memory_solver import MemoryWhereabouts, SolverMemory
from tests.doubles.fetch import layer_of
from tests.doubles.stores import FakeClock, eventually
from tests.doubles.workers import FakePresence, FakeWorkers

V = digest_of(b"vertex")
BIG = RefState(record=RefRecord.over(layer_of(b"big"), None), present=None, providers=())


class Hints(MemoryWhereabouts):
    """Whereabouts whose notes can be held up, or get lost."""

    def __init__(self, memory):
        super().__init__(memory)
        self.error = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()
        self.told = []
        self.ended = asyncio.Queue()

    async def begin_op(self, node, run_id, *, ttl_s):
        self.arrived.set()
        self.told.append(node)
        if self.error is not None:
            raise self.error
        await self.gate.wait()
        await super().begin_op(node, run_id, ttl_s=ttl_s)

    async def find(self, chains, nodes):
        located = await super().find(chains, nodes)
        await asyncio.sleep(0)  # the answer is as old as its way
        return located

    async def end_op(self, node, run_id):
        if self.error is not None:
            raise self.error
        await super().end_op(node, run_id)
        self.ended.put_nowait(node)


class Bench:
    def __init__(self, *nodes):
        self.clock = FakeClock()
        self.presence = FakePresence(*nodes)
        self.hints = Hints(SolverMemory(self.clock))
        self.placement = Placement(self.presence, self.hints, ops_per_node=1)

    def placed(self, chains=(), avoided=()):
        return self.placement.placed(V, chains, avoided)

    async def running(self):
        """Return which nodes all are told to run ops, and how many."""
        found = await self.hints.find([], list(self.presence.alive))
        return {node: count for node, count in found.running.items() if count}


@pytest.fixture
def bench():
    return Bench("n0", "n1", "n2")


@contextlib.asynccontextmanager
async def renewing(placement):
    task = asyncio.create_task(placement.renew_forever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_ops_placed_at_once_see_one_another(bench):
    """Three equal ops begin together: each of three idle nodes gets one."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = await asyncio.gather(*(stack.enter_async_context(bench.placed()) for _ in range(3)))
        assert sorted(nodes) == ["n0", "n1", "n2"]
        assert await bench.running() == {"n0": 1, "n1": 1, "n2": 1}
    assert await bench.running() == {}


async def test_an_op_goes_where_its_layers_are(bench):
    """Or are arriving, where nobody has them."""
    for note in (bench.hints.note_arriving, bench.hints.note_here):
        await note("n1", [BIG.record.chain])
        async with bench.placed([[BIG]]) as node:
            assert node == "n1"


async def test_dead_nodes_get_nothing(bench):
    """Whatever they have."""
    await bench.hints.note_here("n1", [BIG.record.chain])
    bench.presence.alive |= {"n0": False, "n1": False}
    async with bench.placed([[BIG]]) as node:
        assert node == await bench.placement.any_node() == "n2"


async def test_nodes_that_drain_get_nothing(bench):
    """Whatever they have; an op avoids what it must, and would rather fail where it was than go there."""
    await bench.hints.note_here("n1", [BIG.record.chain])
    await bench.presence.drain("n1")
    async with bench.placed([[BIG]]) as node:
        assert node != "n1"
    async with bench.placed([[BIG]], {"n0", "n2"}) as node:
        assert node != "n1"
    assert "n1" not in {await bench.placement.any_node() for _ in range(30)}
    for other in ("n0", "n2"):
        await bench.presence.drain(other)
    with pytest.raises(NodeDrainingError):
        await bench.placement.any_node()
    await bench.presence.undrain("n1")
    async with bench.placed([[BIG]]) as node:
        assert node == "n1"


async def test_avoided_nodes_get_an_op_only_where_there_is_no_other(bench):
    """Where one failed, another is tried, however well the first would suit; better that one again than none."""
    await bench.hints.note_here("n1", [BIG.record.chain])
    async with bench.placed([[BIG]], {"n1", "n0", ""}) as node:
        assert node == "n2"
    async with bench.placed([[BIG]], {"n0", "n1", "n2"}) as node:
        assert node == "n1"


@pytest.mark.parametrize("nodes", [(), ("n0",)])
async def test_no_live_node_is_said_so(nodes):
    """And nothing is taken to run."""
    bench = Bench(*nodes)
    bench.presence.alive = dict.fromkeys(nodes, False)
    with pytest.raises(NodeNotFoundError):
        async with bench.placed():
            pytest.fail("it was placed")
    with pytest.raises(NodeNotFoundError):
        await bench.placement.any_node()


async def test_hints_that_cant_be_told_fail_no_op(bench):
    """Nothing rests on them but speed; and what an op raises comes through."""
    bench.hints.error = UnavailableError("redis", "gone")
    with pytest.raises(ZeroDivisionError):
        async with bench.placed():
            raise ZeroDivisionError


async def test_what_runs_is_told_again_and_again(bench, monkeypatch):
    """It counts for as long as it runs, past the time that one telling is believed."""
    monkeypatch.setattr(placement_module, "_TTL_S", 0.003)
    async with bench.placed() as node, renewing(bench.placement):
        for _ in range(3):
            bench.clock.advance(1)
            told = len(bench.hints.told)
            await eventually(lambda told=told: len(bench.hints.told) > told)
            assert await bench.running() == {node: 1}


async def test_what_ends_while_it_is_told_again_has_ended(bench, monkeypatch):
    """The renewal is the later word: it is taken back."""
    monkeypatch.setattr(placement_module, "_TTL_S", 0.003)
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(10):
        op = contextlib.AsyncExitStack()
        await op.enter_async_context(bench.placed())
        bench.hints.arrived.clear()
        bench.hints.gate.clear()
        await stack.enter_async_context(renewing(bench.placement))
        await bench.hints.arrived.wait()
        await op.aclose()
        bench.hints.gate.set()
        await bench.hints.ended.get()
        await bench.hints.ended.get()
        assert await bench.running() == {}


async def test_an_op_that_is_cancelled_while_it_is_placed_runs_nowhere(bench, monkeypatch):
    """Else its node would be told to run it for as long as this scheduler lives."""
    monkeypatch.setattr(placement_module, "_TTL_S", 0.003)
    bench.hints.gate.clear()

    async def place():
        async with bench.placed():
            pytest.fail("it was placed")

    placing = asyncio.create_task(place())
    await bench.hints.arrived.wait()
    placing.cancel()
    await asyncio.wait([placing])
    bench.hints.gate.set()
    assert await bench.running() == {}
    async with bench.placed() as node, renewing(bench.placement):
        told = len(bench.hints.told)
        await eventually(lambda: len(bench.hints.told) > told + 2)
        assert set(bench.hints.told[told:]) == {node}
        assert await bench.running() == {node: 1}


# -- workers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def workers(bench, monkeypatch):
    monkeypatch.setattr(workers_module, "RETRY_PAUSE_S", 0)
    return FakeWorkers(bench.placement)


async def test_a_call_at_any_node_is_made_again_while_a_worker_is_restarted(bench, workers):
    """Also while there is no node at all for a moment; whatever else goes wrong is the call's own."""
    failures = [ActorLostError("worker", "killed"), NodeNotFoundError("any"), None]
    called = []

    async def call(worker):
        called.append(worker.name)
        failure = failures.pop(0)
        if failure is not None:
            raise failure
        return "done"

    assert await workers.on_any(call) == "done"
    assert len(called) == 3
    failures[:] = [UnavailableError("registry", "gone")]
    with pytest.raises(UnavailableError, match="registry"):
        await workers.on_any(call)


@pytest.mark.parametrize("error", [ActorLostError("worker", "killed"), NodeNotFoundError("any")])
async def test_a_call_at_any_node_is_given_up_in_the_end(workers, monkeypatch, error):
    """The last error says why."""
    monkeypatch.setattr(workers_module, "RETRY_S", 0.01)

    async def call(worker):
        raise error

    with pytest.raises(type(error)):
        await workers.on_any(call)
