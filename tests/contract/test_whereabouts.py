"""What every Whereabouts promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import pytest

from cluster.digest import digest_of
from cluster.solver_ports import ARRIVING_S, HERE_S, Located

A, B = digest_of(b"a"), digest_of(b"b")
NODES = ["n0", "n1", "n2"]
NONE = frozenset()


@pytest.fixture
def whereabouts(solver_stores):
    return solver_stores.whereabouts


async def here(whereabouts, chain=A):
    return (await whereabouts.find([chain], NODES)).here[chain]


async def arriving(whereabouts, chain=A):
    return (await whereabouts.find([chain], NODES)).arriving[chain]


async def running(whereabouts, node="n0"):
    return (await whereabouts.find([], NODES)).running[node]


async def test_all_is_found_at_once(whereabouts):
    """One call tells of every chain and node asked for, and of no other."""
    await whereabouts.note_here("n0", [A, B])
    await whereabouts.note_here("n1", [A])
    await whereabouts.note_here("elsewhere", [A])
    await whereabouts.note_arriving("n2", [A])
    await whereabouts.begin_op("n1", "run-1", ttl_s=1000.0)
    await whereabouts.begin_op("n1", "run-2", ttl_s=1000.0)

    assert await whereabouts.find([A, B], NODES) == Located(
        here={A: frozenset({"n0", "n1"}), B: frozenset({"n0"})},
        arriving={A: frozenset({"n2"}), B: NONE},
        running={"n0": 0, "n1": 2, "n2": 0},
    )


async def test_nothing_is_known_at_first(whereabouts):
    """What nobody noted is nowhere; who asks for no node or no chain gets none."""
    assert await whereabouts.find([A], ["n0"]) == Located(here={A: NONE}, arriving={A: NONE}, running={"n0": 0})
    assert await whereabouts.find([A], []) == Located(here={A: NONE}, arriving={A: NONE}, running={})
    assert await whereabouts.find([], []) == Located(here={}, arriving={}, running={})
    await whereabouts.note_here("n0", [])


async def test_what_is_gone_is_neither_here_nor_arriving(whereabouts):
    """On that node; elsewhere it is as it was, and it may come again."""
    for node in ("n0", "n1"):
        await whereabouts.note_here(node, [A])
        await whereabouts.note_arriving(node, [B])

    await whereabouts.note_gone("n0", [A, B])
    await whereabouts.note_gone("n0", [A, B])

    assert (await here(whereabouts), await arriving(whereabouts, B)) == ({"n1"}, {"n1"})
    await whereabouts.note_here("n0", [A])
    assert await here(whereabouts) == {"n0", "n1"}


async def test_what_was_arriving_is_here_and_the_other_way_about(whereabouts):
    """A node has a snapshot or is getting it, as it was noted last."""
    await whereabouts.note_arriving("n0", [A])
    await whereabouts.note_here("n0", [A])
    assert (await here(whereabouts), await arriving(whereabouts)) == ({"n0"}, NONE)
    await whereabouts.note_arriving("n0", [A])
    assert (await here(whereabouts), await arriving(whereabouts)) == (NONE, {"n0"})


async def test_what_does_not_arrive_is_believed_for_a_while(whereabouts, solver_stores):
    """A node that dies over an extraction doesn't draw ops for ever."""
    await whereabouts.note_arriving("n0", [A])
    solver_stores.pass_time(ARRIVING_S / 2)
    await whereabouts.note_arriving("n1", [A])
    solver_stores.pass_time(ARRIVING_S / 2 + 1)
    assert await arriving(whereabouts) == {"n1"}
    solver_stores.pass_time(ARRIVING_S / 2 + 1)
    assert await arriving(whereabouts) == NONE


async def test_a_snapshot_is_believed_in_for_a_week_after_its_use(whereabouts, solver_stores):
    """Each note counts from its own time: one node's use of a snapshot says nothing of another's."""
    await whereabouts.note_here("n0", [A])
    await whereabouts.note_here("n1", [A])
    solver_stores.pass_time(HERE_S - 100)
    await whereabouts.note_here("n1", [A])
    assert await here(whereabouts) == {"n0", "n1"}
    solver_stores.pass_time(200)
    assert await here(whereabouts) == {"n1"}
    solver_stores.pass_time(HERE_S)
    assert await here(whereabouts) == NONE


async def test_a_node_that_starts_anew_is_forgotten(whereabouts):
    """What it had may be gone; what is noted from then on counts, and other nodes keep theirs."""
    await whereabouts.note_here("n0", [A])
    await whereabouts.note_arriving("n0", [B])
    await whereabouts.note_here("n1", [A])
    await whereabouts.forget_node("n0")
    assert (await here(whereabouts), await arriving(whereabouts, B)) == ({"n1"}, NONE)
    await whereabouts.note_here("n0", [B])
    await whereabouts.note_arriving("n0", [A])
    assert (await here(whereabouts, B), await arriving(whereabouts)) == ({"n0"}, {"n0"})


async def test_many_snapshots_are_noted_at_once(whereabouts):
    """A node that starts notes all that it has."""
    chains = [digest_of(str(i).encode()) for i in range(2500)]
    await whereabouts.note_here("n0", chains)
    located = await whereabouts.find(chains, NODES)
    assert set(located.here.values()) == {frozenset({"n0"})}
    assert list(located.here) == chains


async def test_an_op_counts_until_it_ends(whereabouts):
    """Begun twice it is one; its end may be told twice, or of what was never begun."""
    for _ in range(2):
        await whereabouts.begin_op("n0", "run-1", ttl_s=1000.0)
    await whereabouts.begin_op("n0", "run-2", ttl_s=1000.0)
    assert await running(whereabouts) == 2
    for _ in range(2):
        await whereabouts.end_op("n0", "run-1")
    await whereabouts.end_op("n1", "run-2")
    assert await running(whereabouts) == 1


async def test_an_op_lapses_unless_it_is_begun_again(whereabouts, solver_stores):
    """A scheduler that died doesn't keep a node busy, and one that lives says so again."""
    await whereabouts.begin_op("n0", "renewed", ttl_s=30.0)
    await whereabouts.begin_op("n0", "lost", ttl_s=30.0)
    solver_stores.pass_time(20)
    await whereabouts.begin_op("n0", "renewed", ttl_s=30.0)
    await whereabouts.begin_op("n0", "short", ttl_s=1.0)
    solver_stores.pass_time(15)
    assert await running(whereabouts) == 1
    solver_stores.pass_time(20)
    assert await running(whereabouts) == 0
