"""Where ops go: to the bytes, unless waiting there costs more than bringing them elsewhere."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InternalError
from cluster.solver.placement import FETCH_BYTES_PER_S, OP_S, NodeLoad, PlacedLayer, choose, cost_s

NODES = ["n0", "n1", "n2", "n3"]
MIB = 2**20


def subsets():
    return st.frozensets(st.sampled_from(NODES))


layers = st.lists(
    st.builds(PlacedLayer, size_bytes=st.integers(0, 2**34), here=subsets(), arriving=subsets()), max_size=6
)
loads = st.builds(NodeLoad, node=st.sampled_from(NODES), running=st.integers(0, 40), slots=st.integers(1, 8))
candidates = st.lists(loads, min_size=1, max_size=4, unique_by=lambda load: load.node)
ops = st.text(max_size=4)


def idle(node, slots=4):
    return NodeLoad(node=node, running=0, slots=slots)


@given(candidates, layers, ops, st.randoms())
def test_some_candidate_is_chosen_whatever_their_order(nodes, inputs, op, rng):
    """Any set of candidates gives one of them, the same one in any order, and none is better."""
    chosen = choose(nodes, inputs, spread=op)
    shuffled = rng.sample(nodes, len(nodes))
    assert choose(shuffled, rng.sample(inputs, len(inputs)), spread=op) == chosen
    (best,) = (load for load in nodes if load.node == chosen)
    assert cost_s(best, inputs) <= min(cost_s(load, inputs) for load in nodes)


def test_no_candidate_is_a_bug():
    """Who places an op has a node for it."""
    with pytest.raises(InternalError):
        choose([], [], spread="op")


@given(candidates, layers, ops)
def test_an_idle_node_with_all_bytes_wins(nodes, inputs, op):
    """Where nothing is to be fetched and nobody is in the way nothing is better."""
    inputs = [replace(layer, here=layer.here | {"all"}) for layer in inputs]
    nodes = [load for load in nodes if load.running] + [idle("all")]
    assert choose(nodes, inputs, spread=op) == "all"


@given(candidates, layers, ops, st.integers(0, 5), st.booleans())
def test_more_bytes_never_lose_an_op(nodes, inputs, op, index, arriving_only):
    """A node that was chosen is chosen too where it has, or is getting, a layer more."""
    chosen = choose(nodes, inputs, spread=op)
    if index < len(inputs):
        layer = inputs[index]
        more = (
            replace(layer, arriving=layer.arriving | {chosen})
            if arriving_only
            else replace(layer, here=layer.here | {chosen})
        )
        inputs = [*inputs[:index], more, *inputs[index + 1 :]]
    assert choose(nodes, inputs, spread=op) == chosen


@given(candidates, layers, ops, st.integers(1, 10))
def test_more_load_never_wins_an_op(nodes, inputs, op, more):
    """A node that was not chosen is not chosen where it runs more, nor one that was where it runs less."""
    chosen = choose(nodes, inputs, spread=op)
    for load in nodes:
        others = [other for other in nodes if other is not load]
        if load.node != chosen:
            busier = replace(load, running=load.running + more)
            assert choose([*others, busier], inputs, spread=op) != load.node
        else:
            idler = replace(load, running=max(0, load.running - more))
            assert choose([*others, idler], inputs, spread=op) == chosen


@given(st.integers(1, 8), st.integers(0, 2**36))
def test_an_overloaded_node_loses_as_soon_as_waiting_costs_more_than_fetching(slots, size_bytes):
    """There is a load at which the bytes are better brought elsewhere, and it is where the one exceeds the other."""
    layer = PlacedLayer(size_bytes=size_bytes, here=frozenset({"full"}))
    for running in range(slots, slots + 50):
        wait_s = (running + 1 - slots) * OP_S / slots
        chosen = choose([NodeLoad(node="full", running=running, slots=slots), idle("idle")], [layer], spread="op")
        if wait_s > size_bytes / FETCH_BYTES_PER_S + 1:
            assert chosen == "idle"
        elif wait_s + 3 < size_bytes / FETCH_BYTES_PER_S:
            assert chosen == "full"


@given(layers, ops)
def test_what_is_arriving_is_less_than_what_is_here_and_more_than_nothing(inputs, op):
    """Of three idle nodes the one with the layers wins, then the one that is getting them."""
    inputs = [replace(layer, here=frozenset({"has"}), arriving=frozenset({"gets"})) for layer in inputs]
    inputs.append(PlacedLayer(size_bytes=1, here=frozenset({"has"}), arriving=frozenset({"gets"})))
    assert choose([idle("has"), idle("gets"), idle("lacks")], inputs, spread=op) == "has"
    assert choose([idle("gets"), idle("lacks")], inputs, spread=op) == "gets"


def test_a_few_bytes_are_not_worth_a_crowded_node():
    """A small layer is brought to where there is room; a big one isn't."""
    nodes = [NodeLoad(node="busy", running=3, slots=4), idle("idle")]
    small, big = (PlacedLayer(size_bytes=size, here=frozenset({"busy"})) for size in (MIB, 500 * MIB))
    assert choose(nodes, [small], spread="op") == "idle"
    assert choose(nodes, [big], spread="op") == "busy"


def test_ops_without_inputs_spread():
    """Among equals every node gets its share, and one op always the same node."""
    nodes = [idle(node) for node in NODES]
    counts = Counter(choose(nodes, [], spread=f"op{i}") for i in range(400))
    assert set(counts) == set(NODES)
    assert max(counts.values()) < 150
