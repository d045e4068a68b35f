"""What verifying is made of: the rate, the rounds, and how the work is shared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.collect.pace import Pace
from cluster.collect.rounds import Round, due_round
from cluster.collect.verify import Verified, batches
from cluster.digest import digest_of
from cluster.errors import ActorLostError, NodeDrainingError, UnavailableError
from cluster.messages import NodeRecord
from cluster.ref import BlobRecord
from lazyfarm.verify import FarmVerify, _shared

DAY_S = 86400.0


def blob(name, size=10):
    return BlobRecord(digest=digest_of(name.encode()), key=f"blobs/{name}", size_bytes=size, etag="e", fence=1)


def test_a_pace_is_kept_and_no_time_is_made_up_for():
    """Ten a second: half a second for five; what was not done in a pause is not done at once afterwards."""
    pace = Pace(10.0)
    assert pace.wait_s(5, 100.0) == pytest.approx(0.5)
    assert pace.wait_s(5, 100.1) == pytest.approx(0.9)
    assert pace.wait_s(5, 500.0) == pytest.approx(0.5)
    assert Pace(0.0).wait_s(10**12, 0.0) == 0.0


def test_a_round_begins_when_it_is_due_and_goes_on_where_it_was():
    """A first one at once; one that was stopped goes on, however old; a next one not before its time."""
    first = due_round(None, now_wall_s=50.0, every_s=DAY_S)
    assert first == Round(began_wall_s=50.0)
    stopped = Round(began_wall_s=50.0, after="b")
    assert due_round(stopped, now_wall_s=9 * DAY_S, every_s=DAY_S) == stopped
    done = Round(began_wall_s=50.0, after="z", is_done=True)
    assert due_round(done, now_wall_s=DAY_S + 49.0, every_s=DAY_S) is None
    assert due_round(done, now_wall_s=DAY_S + 50.0, every_s=DAY_S) == Round(began_wall_s=DAY_S + 50.0)


def test_batches_hold_every_blob_once_within_both_limits():
    """In order; a blob that is more than a batch may be is one alone."""
    blobs = [blob(str(n), size) for n, size in enumerate((40, 40, 40, 500, 1, 1, 1, 1))]
    found = batches(blobs, most=3, most_bytes=100)
    assert [[b.size_bytes for b in batch] for batch in found] == [[40, 40], [40], [500], [1, 1, 1], [1]]
    assert [b for batch in found for b in batch] == blobs
    assert batches([], most=3, most_bytes=100) == []


async def test_what_a_lost_node_had_the_others_do():
    """Each batch is read once in the bucket, and every node's copies once, whoever is lost."""
    done = []

    async def call(node, batch, *, copies):
        if node == "n1" and not copies:
            raise ActorLostError("actor n1", "killed")
        done.append((node if copies else "bucket", batch))

    work = [[blob(str(n))] for n in range(5)]
    await _shared(["n0", "n1", "n2"], work, call)
    assert sorted(b[0].key for where, b in done if where == "bucket") == [f"blobs/{n}" for n in range(5)]
    assert all(sum(where == node for where, _ in done) == 5 for node in ("n0", "n1", "n2"))
    with pytest.raises(ActorLostError):
        await _shared(["n1"], work, call)


async def test_a_node_that_drains_is_left_alone():
    """It gets nothing new to read, neither of the bucket nor of its own copies; where all drain, that is the error."""
    asked = []

    async def on_node(node, _call):
        asked.append(node)
        return Verified()

    def verifying(*draining):
        async def nodes():
            return [
                NodeRecord(id=name, ray_id=name, address="", alive=True, draining=name in draining)
                for name in ("n0", "n1")
            ]

        async def blobs():
            return [blob("a"), blob("b", 10**9)]

        store = SimpleNamespace(blobs=blobs)
        return FarmVerify(refs=None, store=store, nodes=nodes, on_node=on_node, deadline_s=1.0)

    wanted = {"repair": False, "bytes_per_s": 0.0, "on_verified": lambda _: None}
    await verifying("n1").verify((), **wanted)
    assert asked == ["n0"] * 4  # two batches of its own copies, and two of the bucket
    with pytest.raises(NodeDrainingError):
        await verifying("n0", "n1").verify((), **wanted)


async def test_an_error_that_is_no_nodes_own_ends_it():
    """As itself, not as a group."""

    async def away(_node, _batch, *, copies):
        raise UnavailableError("redis", f"away, {copies}")

    with pytest.raises(UnavailableError):
        await _shared(["n0", "n1"], [[blob("a")]], away)
