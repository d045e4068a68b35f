"""Imports beside the farm's keys: found after them, by everybody, as long as their job lasts."""

import pytest

from cluster.digest import digest_of
from cluster.job import JobId
from cluster.solver.imported import ImportedKeys
from cluster.solver.values import CacheRecord, Result
from storage.memory_solver import MemoryKeyStore, SolverMemory
from tests.doubles.stores import FakeClock

K1, K2, K3 = (digest_of(f"key {n}".encode()) for n in range(3))
FIRST, SECOND = JobId("first:1"), JobId("second")
ONE, TWO = Result(ref="one"), Result(ref="two")


@pytest.fixture
def farm():
    return MemoryKeyStore(SolverMemory(FakeClock()))


@pytest.fixture
def keys(farm):
    return ImportedKeys(farm)


async def results(keys, *wanted):
    return [record.result for record in await keys.lookup(wanted)]


async def test_the_farms_own_records_come_first(keys, farm):
    """What is here needs no registry; and it is the older one that is tried last."""
    keys.add(FIRST, [((K1,), TWO, "source")])
    own = await farm.publish([K1], ONE)
    found = await keys.lookup([K1])
    assert [record.result for record in found] == [ONE, TWO]
    assert found[0] == own
    assert found[1].created_wall_s < own.created_wall_s


async def test_a_record_says_what_it_is_made_of(keys, farm):
    """The source as it was given, and whose import it is; nothing of a record of the farm's own."""
    keys.add(FIRST, [((K1, K2), ONE, "source")])
    (record,) = await keys.lookup([K2])
    assert record.id.startswith(f"import:{FIRST}:")
    found = keys.imported(record)
    assert (found.job, found.record, found.source) == (FIRST, record, "source")
    assert keys.imported(await farm.publish([K3], ONE)) is None


async def test_a_record_is_found_once(keys):
    """Whatever number of its keys are asked for."""
    keys.add(FIRST, [((K1, K2), ONE, None), ((K2,), TWO, None)])
    assert await results(keys, K1, K2) == [ONE, TWO]
    assert await results(keys, K3) == []


async def test_imports_end_with_their_job(keys):
    """Other jobs' stay, and a record that was looked up before is a miss."""
    keys.add(FIRST, [((K1,), ONE, None)])
    keys.add(SECOND, [((K1,), TWO, None)])
    (record, _) = await keys.lookup([K1])
    keys.drop(FIRST)
    keys.drop(FIRST)
    assert await results(keys, K1) == [TWO]
    assert keys.imported(record) is None
    assert keys.is_imported(record)


async def test_a_job_may_import_several_caches(keys):
    """Under one key each may have a result."""
    keys.add(FIRST, [((K1,), ONE, "a")])
    keys.add(FIRST, [((K1,), ONE, "b")])
    assert [keys.imported(record).source for record in await keys.lookup([K1])] == ["a", "b"]


async def test_what_is_published_is_the_farms(keys, farm):
    """So that it outlives the job."""
    keys.add(FIRST, [((K1,), ONE, None)])
    await keys.publish([K2], ONE)
    keys.drop(FIRST)
    assert [record.result for record in await farm.lookup([K2])] == [ONE]
    assert await results(keys, K1) == []


async def test_memory_is_bounded_over_all_jobs(farm):
    """What finds no room is counted; a job that ends makes room."""
    keys = ImportedKeys(farm, max_keys=3)
    assert keys.add(FIRST, [((K1, K2), ONE, None)]) == 0
    assert keys.add(SECOND, [((K1, K2), TWO, None), ((K3,), TWO, None)]) == 1
    assert await results(keys, K1, K2, K3) == [ONE, TWO]
    keys.drop(FIRST)
    assert keys.add(SECOND, [((K1, K2), ONE, None)]) == 0


async def test_a_record_that_only_looks_imported_is_nothing(keys):
    """An ID is not taken apart in trust."""
    for name in ("import:", "import:first:1:7", "import:nobody:0"):
        assert keys.imported(CacheRecord(id=name, result=ONE, created_wall_s=0.0)) is None
