"""Draining a node: who gets new work meanwhile, and when it is over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster.digest import digest_of
from cluster.drain import Settling, UnderWay, taking_work, under_way
from cluster.errors import InvalidArgumentError, NodeDrainingError, NodeNotFoundError
from cluster.lease import blob_resource
from cluster.messages import ActorRecord, ExtractResult, NodeRecord
from cluster.ref import RefId
from lazyfarm import drain as farm_drain
from lazyfarm.cli import parts
from lazyfarm.cli.main import app
from lazyfarm.drain import FarmDrain
from lazyfarm.ref import Ref
from storage.memory import Memory, MemoryFlightStore
from storage.memory_solver import MemoryPresence, MemoryWhereabouts, SolverMemory
from tests.doubles.stores import FakeClock

KEY = blob_resource(digest_of(b"layer"))


def node(name, *, alive=True, draining=False):
    return NodeRecord(id=name, ray_id=name, address="127.0.0.1", alive=alive, draining=draining)


def worker(name, calls, state="ready"):
    return ActorRecord(name=f"fetch-worker-{name}", kind="fetch-worker", node=name, pid=1, state=state, calls=calls)


# -- who gets work ----------------------------------------------------------------------------------------------


def test_the_live_that_do_not_drain_take_work():
    """All others are passed over; where nobody is left, that is said, and why."""
    assert taking_work([node("n0"), node("n1", draining=True), node("n2", alive=False)]) == ["n0"]
    with pytest.raises(NodeDrainingError, match="every live node drains"):
        taking_work([node("n1", draining=True), node("n2", alive=False)])
    with pytest.raises(NodeNotFoundError) as found:
        taking_work([node("n2", alive=False, draining=True)])
    assert not isinstance(found.value, NodeDrainingError)


async def test_an_extract_everywhere_is_none_on_a_node_that_drains():
    """It gets nothing new, not even what all others get."""

    class Nodes:
        async def nodes(self):
            return [node("n0"), node("n1", draining=True), node("n2")]

        async def extract_chain(self, ref, at, stream):
            return ExtractResult(ref_id=RefId("sha256:0"), node=at, path="", seconds=0.0, layers=())

        async def states(self, ref_ids):
            return []

    found = await Ref(Nodes(), (), None)._extract_everywhere(None)
    assert [each.node for each in found] == ["n0", "n2"]


# -- what is left -----------------------------------------------------------------------------------------------


def test_only_what_the_node_itself_does_is_under_way_there():
    """Flights of other nodes and of schedulers are not, nor calls of a worker that is gone."""
    actors = [worker("n1", 2), worker("n10", 5), worker("n1", 7, "lost")]
    owners = ["n1/a", "n1/b", "n10/c", "solver-scheduler-0@1"]
    assert under_way("n1", ops=3, owners=owners, actors=actors) == UnderWay(ops=3, fetches=2, calls=2)
    assert not UnderWay(calls=1).is_nothing
    assert UnderWay().is_nothing


def test_one_look_at_an_idle_node_is_not_enough():
    """Who had chosen it a moment before may come yet, and then it begins anew."""
    settling = Settling(6.0)
    assert not settling.saw(UnderWay(), 100.0)
    assert not settling.saw(UnderWay(), 105.9)
    assert not settling.saw(UnderWay(ops=1), 106.0)
    assert not settling.saw(UnderWay(), 107.0)
    assert settling.saw(UnderWay(), 113.0)


class Bench:
    """A farm of two nodes, on which things happen while somebody waits."""

    def __init__(self):
        self.clock = FakeClock()
        solver = SolverMemory(self.clock)
        self.presence, self.hints = MemoryPresence(solver), MemoryWhereabouts(solver)
        self.flights = MemoryFlightStore(Memory(self.clock))
        self.began_s = self.clock()
        #: What happens how many seconds after the beginning.
        self.events = {}
        self.drain = FarmDrain(self.presence, self.flights, self.hints, clock=self.clock, pause=self.pause)

    async def draining(self):
        return [each.id for each in await self.presence.nodes() if each.draining]

    async def pause(self, seconds):
        assert seconds > 0
        self.clock.advance(seconds)
        for at_s in [at_s for at_s in self.events if at_s <= self.clock() - self.began_s]:
            await self.events.pop(at_s)()


@pytest.fixture
async def bench():
    found = Bench()
    await found.presence.announce_nodes([node("n0"), node("n1")])
    return found


async def test_it_waits_until_ops_flights_and_calls_are_over(bench):
    """Whichever is the last; and is told of what is left all along."""
    await bench.hints.begin_op("n1", "run", ttl_s=1000.0)
    owned = await bench.flights.join(KEY, worker="n1/a", token="t", ttl_s=1000.0)
    bench.events = {
        10.0: lambda: bench.hints.end_op("n1", "run"),
        20.0: lambda: bench.flights.vacate(owned.fence),
        # As a worker tells it: later than it began, and until it is over.
        20.5: lambda: bench.presence.announce(worker("n1", 1)),
        22.0: lambda: bench.presence.announce(worker("n1", 1)),
        25.0: lambda: bench.presence.announce(worker("n1", 0)),
    }
    told = []
    assert await bench.drain.drain("n1", on_left=told.append) == UnderWay()
    assert bench.clock() - bench.began_s >= 25.0 + 6.0
    assert list(dict.fromkeys(told)) == [
        UnderWay(ops=1, fetches=1),
        UnderWay(fetches=1),
        UnderWay(),
        UnderWay(calls=1),
    ]
    assert await bench.draining() == ["n1"]


async def test_what_is_left_at_the_timeout_is_told_and_the_node_drains_on(bench):
    """At the timeout, and no later."""
    await bench.hints.begin_op("n1", "run", ttl_s=1000.0)
    assert await bench.drain.drain("n1", timeout_s=7.2) == UnderWay(ops=1)
    assert bench.clock() - bench.began_s == pytest.approx(7.2)
    assert await bench.draining() == ["n1"]
    assert await bench.drain.drain("n1", timeout_s=0.0) == UnderWay(ops=1)
    await bench.drain.undrain("n1")
    assert await bench.draining() == []


async def test_a_node_that_is_none_can_not_drain(bench):
    """Nor take work again; a number that makes no sense changes nothing either."""
    with pytest.raises(NodeNotFoundError):
        await bench.drain.drain("n7")
    with pytest.raises(NodeNotFoundError):
        await bench.drain.undrain("n7")
    with pytest.raises(InvalidArgumentError):
        await bench.drain.drain("n1", timeout_s=-1.0)
    assert await bench.draining() == []


async def test_one_that_is_not_back_yet_can_take_work_again(bench):
    """As its machine says when it starts: before anybody tells of the node."""
    await bench.drain.drain("n1", timeout_s=0.0)
    await bench.presence.announce_nodes([node("n0")])
    await bench.drain.undrain("n1")
    await bench.presence.announce_nodes([node("n0"), node("n1")])
    assert await bench.draining() == []


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """Run the command on a farm whose nodes have *left* under way."""

    class Drained:
        left = UnderWay()
        calls = ()

        async def drain(self, node, *, timeout_s, on_left):
            self.calls = (*self.calls, ("drain", node, timeout_s))
            on_left(self.left)
            return self.left

        async def undrain(self, node):
            self.calls = (*self.calls, ("undrain", node))

    drained = Drained()

    def over(settings, opened, act):
        assert opened is parts.open_drain
        coroutine = act(drained)
        try:
            coroutine.send(None)
        except StopIteration as ended:
            return ended.value
        raise AssertionError("it waits")

    monkeypatch.setattr(parts, "driving_settings", lambda state_dir: SimpleNamespace(gateway=""))
    monkeypatch.setattr(parts, "_over_redis", over)

    def call(*arguments, **left):
        drained.left, drained.calls = UnderWay(**left), ()
        result = CliRunner().invoke(app, ["drain", *arguments], prog_name="lazyfarm")
        return result.exit_code, result.stdout, drained.calls

    return call


def test_the_command_says_what_is_left_and_what_becomes_of_it(run):
    """Exit status 0: nothing; 1: something, which others take over when the node is stopped."""
    code, out, calls = run("n1")
    assert (code, out) == (0, "n1 has drained: nothing is under way there, and nothing new comes\n")
    assert calls == (("drain", "n1", farm_drain.DRAIN_S),)
    code, out, calls = run("n1", "--timeout", "5", ops=2, fetches=1)
    assert code == 1
    assert "after 5.00 s it still has 2 ops, 1 flight, 0 calls" in out
    assert "other nodes take over" in out
    assert calls == (("drain", "n1", 5.0),)
    code, out, calls = run("n1", "--undo")
    assert (code, out, calls) == (0, "n1 takes work again\n", (("undrain", "n1"),))


def test_the_command_has_documents(run):
    """Of what is left, and of what was undone."""
    code, out, _ = run("n1", "--json", calls=3)
    assert (code, out) == (
        1,
        '{"node": "n1", "draining": true, "drained": false, "ops": 0, "fetches": 0, "calls": 3}\n',
    )
    assert run("n1", "--json", "--undo")[1] == '{"node": "n1", "draining": false}\n'


def test_a_machine_without_a_state_directory_names_the_farm_by_a_file(run, tmp_path):
    """As a node of systemd's does when it is stopped; a file that has faults is said to."""
    file = tmp_path / "production.toml"
    file.write_text('[redis]\nurl = "redis://redis.internal:6379/0"\n')
    state = ("--state-dir", str(tmp_path / "none"))
    assert run("n1", *state, "--config", str(file))[0] == 0
    file.write_text("[redis]\nurl = 7\n")
    assert run("n1", *state, "--config", str(file))[::2] == (1, ())
