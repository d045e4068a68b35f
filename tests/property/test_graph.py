"""Definitions of random graphs: what comes back from payloads, in what order, under which digests."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.digest import Digest
from cluster.errors import ClusterError, GraphError, WireError
from cluster.graph import (
    CopyAction,
    Definition,
    DiffOp,
    FileOp,
    ImageOp,
    MergeOp,
    RunOp,
    Vertex,
    decode_definition,
    encode_definition,
)
from lazyfarm.graph import State, bind, image, merge, resolve, scratch


@st.composite
def definitions(draw) -> Definition:
    """A graph of up to 13 vertices, each over earlier ones, with targets that need them all."""
    made: list[Vertex] = [Vertex(ImageOp(reference="base"))]
    for number in range(draw(st.integers(0, 12))):
        inputs = draw(st.lists(st.sampled_from([None, *(vertex.digest for vertex in made)]), min_size=2, max_size=4))
        op = draw(st.sampled_from(["run", "file", "merge", "diff"]))
        match op:
            case "run":
                made.append(Vertex(RunOp(args=("step", str(number))), tuple(inputs[:1])))
            case "file":
                copies = (
                    CopyAction(input=index, sources=(f"/{number}",), destination="/") for index in range(1, len(inputs))
                )
                made.append(Vertex(FileOp(actions=tuple(copies)), tuple(inputs)))
            case "merge":
                made.append(Vertex(MergeOp(), tuple(inputs)))
            case _:
                made.append(Vertex(DiffOp(), tuple(inputs[:2])))
    vertices = {vertex.digest: vertex for vertex in made}
    needed = {below for vertex in vertices.values() for below in vertex.inputs}
    targets = draw(st.permutations([digest for digest in vertices if digest not in needed]))
    named = draw(st.lists(st.sampled_from(sorted(vertices)), unique=True))
    return Definition(vertices, tuple(targets), {digest: f"name of {digest}" for digest in named})


@given(definitions())
def test_a_definition_comes_back(definition):
    """A payload is read as what was written, and written again as it was."""
    payload = encode_definition(definition)
    back = decode_definition(payload)

    assert back == definition
    assert back.order == definition.order
    assert encode_definition(back) == payload


@given(definitions())
def test_order_is_topological(definition):
    """Every vertex is in the order once, after all of its inputs."""
    place = {digest: index for index, digest in enumerate(definition.order)}

    assert sorted(place) == sorted(definition.vertices)
    for digest, vertex in definition.vertices.items():
        assert all(place[below] < place[digest] for below in vertex.inputs if below is not None)


@given(definitions(), st.data())
def test_a_missing_vertex_is_always_noticed(definition, data):
    """Whatever vertex is taken out, the definition is refused by type."""
    gone = data.draw(st.sampled_from(sorted(definition.vertices)))
    rest = {digest: vertex for digest, vertex in definition.vertices.items() if digest != gone}

    with pytest.raises(GraphError):
        Definition(rest, definition.targets, definition.names)


@given(definitions(), st.data())
def test_damage_is_refused_by_type_or_harmless(definition, data):
    """A payload with one byte changed, or cut, is an error of ours, or a definition whose digests are true."""
    payload = bytearray(encode_definition(definition))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(payload[: data.draw(st.integers(0, len(payload)))])

    try:
        back = decode_definition(damaged)
    except (GraphError, WireError):
        return
    except ClusterError as exc:
        assert type(exc).__name__ == "EmptyGraphError"  # noqa: PT017 - which class it is, is the point
        return
    assert all(vertex.digest == digest for digest, vertex in back.vertices.items())


@given(definitions(), st.sampled_from(["digest", "input"]), st.data())
def test_vertices_cant_be_swapped(definition, what, data):
    """A vertex under another's digest, or over another input than its digest says, is refused."""
    version, kind, body = msgpack.unpackb(encode_definition(definition), strict_map_key=False)
    row = data.draw(st.sampled_from(body["vertices"]))
    if what == "digest":
        row[0] = data.draw(st.sampled_from([other[0] for other in body["vertices"]]))
    else:
        row[4] = data.draw(st.lists(st.sampled_from([None, *(other[0] for other in body["vertices"])]), max_size=3))

    try:
        back = decode_definition(msgpack.packb([version, kind, body]))
    except GraphError:
        return
    assert back == definition  # what was drawn changed nothing


@st.composite
def states(draw) -> list[State]:
    """States over one another, in every way that there is."""
    made = [scratch(), image("debian"), image("alpine")]
    for number in range(draw(st.integers(0, 10))):
        one, other = draw(st.sampled_from(made)), draw(st.sampled_from(made))
        match draw(st.sampled_from(["run", "bind", "copy", "merge", "diff", "named"])):
            case "run":
                made.append(one.run(f"step {number}"))
            case "bind":
                made.append(one.run("true", mounts=[bind(other, "/mnt")]))
            case "copy":
                made.append(one.copy(other, "/a", "/b"))
            case "merge":
                made.append(merge(draw(st.lists(st.sampled_from(made), min_size=1, max_size=3))))
            case "diff":
                made.append(one.diff(other))
            case _:
                made.append(one.named(f"name {number}"))
    return made


def digest_of_state(state: State) -> Digest | None:
    """The digest of one state alone; None for what is scratch."""
    try:
        return state.definition().targets[0]
    except ClusterError:
        return None


@given(states())
def test_states_together_are_the_states_alone(made):
    """A state's digest doesn't depend on what is resolved beside it, and each has a name."""
    alone = {id(state): digest_of_state(state) for state in made}
    targets = [state for state in made if alone[id(state)] is not None]

    definition = resolve(targets).definition

    assert definition.targets == tuple(alone[id(state)] for state in targets)
    assert set(definition.names) == set(definition.vertices)
    assert decode_definition(encode_definition(definition)) == definition
