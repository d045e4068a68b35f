"""The ring of shards: even, stable, and the same in every process."""

from collections import Counter

import pytest

from cluster.cache.ring import ShardRing

CHAINS = [f"sha256:{n:064x}" for n in range(4000)]


@pytest.mark.parametrize("shards", [1, 2, 4, 16])
def test_every_shard_gets_its_share(shards):
    """No shard has more than half again its even share."""
    ring = ShardRing(shards)
    counts = Counter(ring.shard_of(chain) for chain in CHAINS)
    assert set(counts) == set(range(shards))
    assert max(counts.values()) < 1.5 * len(CHAINS) / shards


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_a_new_shard_takes_chains_and_moves_no_others(shards):
    """Chains move to the new shard only, and only about its share of them."""
    before, after = ShardRing(shards), ShardRing(shards + 1)
    moved = [(before.shard_of(c), after.shard_of(c)) for c in CHAINS if before.shard_of(c) != after.shard_of(c)]
    assert all(to == shards for _from, to in moved)
    assert len(moved) < 1.6 * len(CHAINS) / (shards + 1)


def test_two_processes_agree():
    """The ring depends on nothing but the number of shards: these answers are for ever."""
    assert [ShardRing(4).shard_of(c) for c in ("", "a", "b", "c", "d", CHAINS[0])] == [2, 2, 0, 2, 1, 1]
