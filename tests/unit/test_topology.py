"""Reconciling actors with nodes: whatever is there, a few rounds make it right, and then nothing is done."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import ActorRecord
from cluster.topology import (
    ActorView,
    Kind,
    NodeView,
    Retire,
    Spawn,
    op_worker_name,
    reconcile,
    scheduler_name,
    shard_name,
    supervisor_name,
    unlike,
    worker_name,
)

VERSION = "1"
N1, N2, N3 = (NodeView(name=f"n{i}", ray_id=f"ray{i}") for i in (1, 2, 3))


def numbers(shards):
    """Return how many numbered actors there are to be."""
    return {Kind.CACHE_SHARD: shards, Kind.SCHEDULER: 1}


class World:
    """Ray as far as names and places go."""

    def __init__(self, actors=()):
        self.actors = {a.name: a for a in actors}

    def round(self, nodes, shards):
        """Perform one round's steps; return them."""
        steps = reconcile(nodes, list(self.actors.values()), numbers=numbers(shards), version=VERSION)
        for step in steps:
            match step:
                case Retire(name=name):
                    del self.actors[name]
                case Spawn(name=name, node=node):
                    assert name not in self.actors, "a name was taken twice"
                    self.actors[name] = ActorView(name=name, ray_id=node.ray_id)
        return steps

    def settle(self, nodes, shards):
        """Go on until nothing is done; return how many rounds did something."""
        for rounds in range(4):
            if not self.round(nodes, shards):
                return rounds
        raise AssertionError("it never comes to rest")


node_sets = st.lists(
    st.builds(
        NodeView,
        name=st.sampled_from([f"n{i}" for i in range(6)]),
        ray_id=st.sampled_from([f"ray{i}" for i in range(9)]),
    ),
    max_size=6,
    unique_by=(lambda n: n.name, lambda n: n.ray_id),
)
names = st.one_of(
    st.builds(worker_name, st.sampled_from([f"n{i}" for i in range(8)]), st.sampled_from(["0", VERSION])),
    st.builds(op_worker_name, st.sampled_from([f"n{i}" for i in range(8)]), st.sampled_from(["0", VERSION])),
    st.builds(scheduler_name, st.integers(0, 3), st.sampled_from(["0", VERSION])),
    st.builds(shard_name, st.integers(0, 8), st.sampled_from(["0", VERSION])),
    st.just(supervisor_name(VERSION)),
    st.just("somebody-elses"),
)
actor_sets = st.lists(
    st.builds(ActorView, name=names, ray_id=st.sampled_from(["", *(f"ray{i}" for i in range(9))])),
    unique_by=lambda a: a.name,
)


@given(nodes=node_sets, actors=actor_sets, shards=st.integers(1, 5))
def test_it_comes_to_rest_with_everything_in_its_place(nodes, actors, shards):
    """At most two rounds; then one worker on each node, each shard on some live node, and nothing to do."""
    world = World(actors)
    assert world.settle(nodes, shards) <= 2
    assert world.round(nodes, shards) == []
    known = {name: a.ray_id for name, a in world.actors.items() if a.ray_id}
    unknown = {name for name, a in world.actors.items() if not a.ray_id}
    live = {n.ray_id for n in nodes}
    for node in nodes:
        for name in (worker_name(node.name, VERSION), op_worker_name(node.name, VERSION)):
            assert name in unknown or known[name] == node.ray_id
    ours = {n: r for n, r in known.items() if n.endswith(f"@{VERSION}")}
    workers = [r for n, r in ours.items() if n.startswith(Kind.FETCH_WORKER.value)]
    assert len(workers) == len(set(workers)), "two workers on one node"
    assert set(workers) <= live
    if nodes:
        for index in range(shards):
            name = shard_name(index, VERSION)
            assert name in unknown or known[name] in live
    assert not [
        n
        for n in ours
        if n.startswith(Kind.CACHE_SHARD.value) and n not in {shard_name(i, VERSION) for i in range(shards)}
    ]


@given(nodes=node_sets, actors=actor_sets, shards=st.integers(1, 5))
def test_what_is_not_ours_is_left_alone(nodes, actors, shards):
    """Other versions, the supervisor and strangers: a rolling upgrade runs both."""
    world = World(actors)
    world.settle(nodes, shards)
    for actor in actors:
        if not actor.name.endswith(f"@{VERSION}") or actor.name == supervisor_name(VERSION):
            assert world.actors[actor.name] == actor


def test_a_node_that_lacks_the_upgrade_is_found_and_nobody_else():
    """What serves this release must run its code; what serves the older one may run either, as it was restarted."""
    started = [(worker_name("n1", "2"), "2"), (worker_name("n2", "2"), "1")]
    restarted = [(worker_name("n1", "1"), "2"), (worker_name("n2", "1"), "1")]
    actors = [
        ActorRecord(name=name, kind=Kind.FETCH_WORKER.value, node="", pid=1, state="ready", version=version, ray_id="")
        for name, version in (*started, *restarted)
    ]
    assert [actor.name for actor in unlike(actors, "2")] == [worker_name("n2", "2")]


def test_a_new_cluster_gets_workers_and_shards():
    """A fetch worker and an op worker a node, the shards and schedulers spread over them."""
    steps = reconcile([N2, N1], [], numbers=numbers(3), version=VERSION)
    assert [(s.name, s.node.name) for s in steps] == [
        (worker_name("n1", VERSION), "n1"),
        (worker_name("n2", VERSION), "n2"),
        (op_worker_name("n1", VERSION), "n1"),
        (op_worker_name("n2", VERSION), "n2"),
        (shard_name(0, VERSION), "n1"),
        (shard_name(1, VERSION), "n2"),
        (shard_name(2, VERSION), "n1"),
        (scheduler_name(0, VERSION), "n1"),
    ]


def test_a_dead_nodes_actors_are_retired_before_they_are_spawned_anew():
    """A name is free only once its actor has ended: the spawn is the next round's."""
    world = World()
    world.settle([N1, N2], 2)
    steps = world.round([N1], 2)
    assert steps == [
        Retire(name=shard_name(1, VERSION)),
        Retire(name=worker_name("n2", VERSION)),
        Retire(name=op_worker_name("n2", VERSION)),
    ]
    (spawn,) = world.round([N1], 2)
    assert (spawn.name, spawn.node) == (shard_name(1, VERSION), N1)


def test_a_node_that_comes_back_gets_a_new_worker():
    """Same name, new Ray ID: the old worker is pinned to a node that is gone."""
    world = World()
    world.settle([N1, N2], 1)
    back = NodeView(name="n2", ray_id="ray2b")
    assert world.round([N1, back], 1) == [
        Retire(name=worker_name("n2", VERSION)),
        Retire(name=op_worker_name("n2", VERSION)),
    ]
    assert {spawn.node for spawn in world.round([N1, back], 1)} == {back}


def test_a_new_node_moves_no_shard():
    """Shards stay where they are while their node lives."""
    world = World()
    world.settle([N2, N3], 2)
    steps = world.round([N1, N2, N3], 2)
    assert [s.name for s in steps] == [worker_name("n1", VERSION), op_worker_name("n1", VERSION)]


def test_fewer_shards_retire_the_surplus():
    """What the ring no longer names is ended."""
    world = World()
    world.settle([N1], 3)
    assert world.round([N1], 2) == [Retire(name=shard_name(2, VERSION))]


def test_no_nodes_means_nothing_to_spawn():
    """A cluster that is starting has none yet."""
    assert reconcile([], [], numbers=numbers(2), version=VERSION) == []


def test_an_actor_whose_place_is_not_known_yet_is_waited_for():
    """It is being created: neither retired nor made twice."""
    world = World([ActorView(name=worker_name("n1", VERSION), ray_id="")])
    steps = world.round([N1], 1)
    assert [s.name for s in steps] == [
        op_worker_name("n1", VERSION),
        shard_name(0, VERSION),
        scheduler_name(0, VERSION),
    ]


def test_nothing_new_that_is_numbered_comes_to_a_node_that_drains():
    """Its own workers do; where all drain, one is better than none. What is there stays."""

    def placed(draining, actors=()):
        steps = reconcile([N1, N2], actors, numbers=numbers(4), version=VERSION, draining=draining)
        assert all(isinstance(step, Spawn) for step in steps)
        ours = {step.node.name for step in steps if step.kind in (Kind.CACHE_SHARD, Kind.SCHEDULER)}
        assert {step.node.name for step in steps if step.kind is Kind.FETCH_WORKER} == {"n1", "n2"}
        return ours

    assert placed([]) == {"n1", "n2"}
    assert placed(["n1"]) == {"n2"}
    assert placed(["n1", "n2"]) == {"n1", "n2"}
    there = [ActorView(name=shard_name(n, VERSION), ray_id="ray1") for n in range(4)]
    assert placed(["n1"], there) == {"n2"}, "the scheduler"
