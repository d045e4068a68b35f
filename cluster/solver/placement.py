"""Placement: on which node an op runs. Decided from hints: wherever it goes, its inputs are brought there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.digest import digest_of
from cluster.errors import InternalError

#: Bytes of compressed layers a second that a node brings from the content store and unpacks, about: unpacking is what
#: takes longer, and one layer is unpacked by one thread.
FETCH_BYTES_PER_S = 50 * 2**20
#: Seconds that a layer costs whatever its size: its request, its snapshot.
LAYER_S = 0.05
#: Of a layer that is arriving, what is taken to be still to come. Less than all, so that ops follow one another to the
#: node that one of them has set going; more than nothing, since it may come late or not at all.
ARRIVING_SHARE = 0.5
#: Seconds that an op is taken to last. How long it will really is not known: commands of builds last from a tenth
#: of a second to an hour, most of them seconds.
OP_S = 10.0
#: Seconds that an op lasts longer on a node whose slots are all taken than on an idle one: ops share its CPUs and its
#: disk. Of two nodes that have the bytes the idler one gets the op, and small layers go where there is room.
CROWDED_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoad:
    """A node that may run an op, and what it runs already."""

    node: str
    #: Ops that run there, or wait there for their turn.
    running: int
    #: Ops that run there at once, > 0.
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLayer:
    """A layer of an op's inputs, and which nodes have it."""

    #: Of its blob.
    size_bytes: int
    #: Nodes that have it unpacked on all that is below it.
    here: frozenset[str] = frozenset()
    #: Nodes that are getting it.
    arriving: frozenset[str] = frozenset()


def choose(candidates: Sequence[NodeLoad], layers: Sequence[PlacedLayer], *, spread: str) -> str:
    """Return the node on which an op over *layers* is likely to end first.

    Args:
        candidates: Not empty, each node once, in any order.
        layers: Each layer of the inputs once.
        spread: Names the op. Between nodes that are equally good it decides, the same way each time, and one way for
            some ops and another for others (rendezvous hashing).
    """
    if not candidates:
        raise InternalError("an op is placed where there is no node")
    return min(candidates, key=lambda load: (cost_s(load, layers), digest_of(f"{spread}\n{load.node}".encode()))).node


def cost_s(load: NodeLoad, layers: Sequence[PlacedLayer]) -> float:
    """Return the seconds by which an op over *layers* ends later there than on an idle node that has them all."""
    # Whole units, added up before anything is divided: nodes that are equally good cost exactly the same.
    missing_bytes = missing = arriving_bytes = arriving = 0
    for layer in layers:
        if load.node in layer.here:
            continue
        if load.node in layer.arriving:
            arriving_bytes += layer.size_bytes
            arriving += 1
        else:
            missing_bytes += layer.size_bytes
            missing += 1
    fetch_s = (missing_bytes + ARRIVING_SHARE * arriving_bytes) / FETCH_BYTES_PER_S
    fetch_s += (missing + ARRIVING_SHARE * arriving) * LAYER_S
    # Of n ops that run side by side one ends every OP_S / n seconds.
    ahead = max(0, load.running + 1 - load.slots)
    wait_s = ahead * OP_S / load.slots
    crowded_s = min(load.running, load.slots) * CROWDED_S / load.slots
    return fetch_s + wait_s + crowded_s
