"""What every KeyStore promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio

import pytest

from cluster.digest import digest_of
from cluster.solver.values import Result
from tests.doubles.solver_stores import redis_solver_stores

K, L, M = (digest_of(name) for name in (b"k", b"l", b"m"))
A, B = Result(ref="sha256:a", config=b"{}"), Result(ref="sha256:b")


@pytest.fixture
def keys(solver_stores):
    return solver_stores.keys


async def test_what_is_published_is_found(keys):
    """A result is found under each key that it was published under, as one record, and under no other."""
    record = await keys.publish([K, L], A)

    assert record.result == A
    for asked in ([K], [L], [K, L], [M, K]):
        assert await keys.lookup(asked) == [record]
    assert await keys.lookup([M]) == []
    assert await keys.lookup([]) == []


async def test_an_empty_filesystem_is_a_result(keys):
    """A result without layers is kept as any other."""
    record = await keys.publish([K], Result(ref=None))

    assert await keys.lookup([K]) == [record]


async def test_the_most_recent_comes_first(keys):
    """Records come by their last publication, whichever key they are under."""
    for key, result in ((K, A), (L, B)):
        await keys.publish([key], result)
    assert [record.result for record in await keys.lookup([K, L])] == [B, A]

    await keys.publish([K], A)
    assert [record.result for record in await keys.lookup([K, L])] == [A, B]


async def test_equal_results_are_one_record(keys):
    """Publishing again makes no second record, also where several do so at once; a new key is added."""
    published = await asyncio.gather(*(keys.publish([K], A) for _ in range(5)))
    again = await keys.publish([L], A)

    assert {record.id for record in published} == {again.id}
    assert await keys.lookup([K, L]) == [again]


async def test_a_config_is_part_of_a_result(keys):
    """Results with the same layers and another config are two."""
    await keys.publish([K], A)
    await keys.publish([K], Result(ref=A.ref))

    assert len(await keys.lookup([K])) == 2


async def test_a_key_keeps_its_newest_records(keys):
    """Of more than 16 results under a key the ones published longest ago are dropped, under that key alone."""
    for number in range(20):
        await keys.publish([K, digest_of(b"%d" % number)], Result(ref=f"sha256:{number}"))

    found = await keys.lookup([K])
    assert [record.result.ref for record in found] == [f"sha256:{number}" for number in range(19, 3, -1)]
    assert len(await keys.lookup([digest_of(b"0")])) == 1


async def test_a_vanished_result_is_forgotten(keys):
    """forget() takes a record away under every key; others stay."""
    await keys.publish([K, L], A)
    kept = await keys.publish([K], B)
    (record,) = await keys.lookup([L])

    assert await keys.forget(record)
    assert not await keys.forget(record)
    assert await keys.lookup([K, L]) == [kept]


async def test_what_was_made_again_is_not_forgotten(keys):
    """Who found a result gone takes nothing from whoever made and published it again meanwhile."""
    await keys.publish([K], A)
    (seen,) = await keys.lookup([K])
    anew = await keys.publish([K], A)

    assert not await keys.forget(seen)
    assert await keys.lookup([K]) == [anew]


async def test_keys_go_when_nobody_uses_them(redis_farm):
    """Keys and records live 30 days from their last lookup or publication."""
    redis_farm.stores()
    stores = redis_solver_stores(redis_farm)
    await stores.keys.publish([K, L], A)

    for _ in range(2):
        stores.pass_time(20 * 86400)
        assert len(await stores.keys.lookup([K])) == 1
    assert await stores.keys.lookup([L]) == []

    stores.pass_time(31 * 86400)
    assert await redis_farm.links[0].execute("KEYS", f"{redis_farm.keys.prefix}:*") == []
