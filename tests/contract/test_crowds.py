"""Ten thousand callers at one worker: all of them end, in memory that grows as their number and no faster.

The real runner over a real Redis; what is measured is what is held while everybody waits.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import secrets
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack

import pytest

from cluster.config import Config
from cluster.lease import LeaseId, blob_resource
from cluster.provider import ProviderHandle
from storage.blobs import S3ContentStore
from storage.bucket_caches import BucketCaches
from storage.fetching import ThreadedTransfers
from storage.local_blobs import NodeBlobs
from storage.memory_blobs import MemoryContentStore
from storage.node_cache import NodeCache
from storage.registry.blob import BlobSource
from storage.transfer import TransferLimits
from tests.doubles.fetch import FakeTransfers, caller_of, layer_of
from tests.doubles.registry_faults import Hang
from tests.doubles.stores import eventually
from tests.doubles.unlazier import unlazier_over

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(300)]

KIB = 1024
REPOSITORY = "crowds/app"
SLOTS = 4
#: What a caller may hold while it waits: its task, its call, its place in a flight or in line, and what goes to Redis.
MOST_BYTES_A_CALLER = 24 * KIB


class Worker:
    """A fetch worker's parts, as far as they bring blobs into the store."""

    def __init__(self, stack, redis_farm, store, root, transfers=None):
        self.stores = stores = redis_farm.stores()
        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(32)
        stack.callback(threads.shutdown)
        sources = BlobSource(Config())
        stack.callback(sources.close)
        renewer = stores.new_renewer()
        stack.callback(renewer.close)
        cache = NodeCache(root, 10**9, headroom_bytes=0)
        limits = TransferLimits(
            part_bytes=5 * KIB * KIB, parallel_from_bytes=10**9, ranges=1, attempts=3, retry_budget_s=60.0
        )
        transfers = transfers or ThreadedTransfers(
            store=store,
            flights=stores.flights,
            sources=sources,
            limiter=stores.limiter,
            buckets=BucketCaches(store),
            blobs=NodeBlobs(cache, store, stores.refs, loop=loop, threads=threads, downloads=SLOTS),
            threads=threads,
            limits=limits,
            buffers=8,
        )
        self.unlazier = unlazier_over(stores, renewer, transfers, poll_s=5.0, deadline_s=280.0, max_transfers=SLOTS)

    async def caller(self, tenant, registry, *digests):
        """Return a caller with a lease of its own."""
        await self.stores.leases.create(LeaseId(tenant), ttl_s=None)
        handle = ProviderHandle(registry=registry, repository=REPOSITORY)
        return caller_of(tenant, tenant=tenant, providers={digest: [handle] for digest in digests})

    @property
    def waiting(self):
        """Return how many callers wait for a flight."""
        return self.unlazier._flights.statistics().callers

    @property
    def in_line(self):
        """Return how many layers wait for a slot."""
        return self.unlazier._slots.waiting


@pytest.fixture
async def start(redis_farm, tmp_path):
    """Start a worker over a store, with transfers other than the real ones if need be."""
    numbers = itertools.count()
    async with AsyncExitStack() as stack:
        with ExitStack() as threads:

            def make(store, transfers=None):
                worker = Worker(threads, redis_farm, store, tmp_path / str(next(numbers)), transfers)
                stack.push_async_callback(worker.unlazier.aclose)
                return worker

            yield make
            await stack.aclose()


class Held:
    """Bytes that Python holds more than when it was begun; counting them makes everything slower."""

    def __init__(self):
        tracemalloc.start()
        gc.collect()
        self._before = tracemalloc.get_traced_memory()[0]

    def now(self):
        """Return how many."""
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - self._before


@pytest.fixture(autouse=True)
def _untraced():
    yield
    tracemalloc.stop()


# -- one digest ---------------------------------------------------------------------------------------------


async def one_crowd(worker, proxy, layer, count):
    """Have *count* callers of ten drivers ask for one layer; return bytes held by each while they wait, and after."""
    hang = Hang()
    proxy.script(hang)
    callers = [await worker.caller(f"{layer.digest[-8:]}-{n}", proxy.host, layer.digest) for n in range(10)]
    held = Held()
    tasks = [asyncio.create_task(worker.unlazier.unlazy(layer, callers[n % 10])) for n in range(count)]
    await eventually(lambda: worker.waiting == count and hang.arrived.is_set(), timeout_s=100)
    waiting = held.now() / count
    hang.proceed.set()
    joined = Counter(fetch.joined for fetch in await asyncio.gather(*tasks))
    assert joined == {False: 1, True: count - 1}
    assert len(proxy.blob_gets(layer.digest)) == 1
    for caller in callers:
        assert blob_resource(layer.digest) in (await worker.stores.leases.get(caller.lease_id)).resources
    tasks.clear()
    return waiting, held.now() / count


@pytest.mark.s3
@pytest.mark.registry
async def test_ten_thousand_callers_of_one_layer_cost_one_fetch(start, s3_config, registry_proxy, registry):
    """They share one flight and one GET; each costs as little as each of a thousand, and nothing once it is over."""
    store = S3ContentStore(s3_config)
    worker = start(store)
    datas = [secrets.token_bytes(64 * KIB) for _ in range(3)]
    for data in datas:
        registry.push_blob(REPOSITORY, data)
    warm, few, many = [
        await one_crowd(worker, registry_proxy, layer_of(data), count)
        for data, count in zip(datas, (100, 1000, 10_000), strict=True)
    ]
    store.close()
    print(f"a caller holds {few[0]:.0f} bytes of 1,000, {many[0]:.0f} of 10,000; after that {many[1]:.0f}")
    assert warm
    assert many[0] < MOST_BYTES_A_CALLER
    assert many[0] < 1.5 * few[0]
    assert many[1] < KIB


# -- many digests -------------------------------------------------------------------------------------------


async def flood(worker, transfers, layers, late):
    """Have one driver ask for all *layers*, then another for *late*; return bytes held by each, and how many ended."""
    one, two = await worker.caller("flood", "r.example"), await worker.caller("late", "r.example")
    held = Held()
    tasks = [asyncio.create_task(worker.unlazier.unlazy(layer, one)) for layer in layers]
    await eventually(lambda: worker.in_line == len(layers) - SLOTS, timeout_s=100)
    waiting = held.now() / len(layers)
    tracemalloc.stop()
    alone = asyncio.create_task(worker.unlazier.unlazy(late, two))
    await eventually(lambda: worker.in_line == len(layers) - SLOTS + 1)
    transfers.open()
    await alone
    ended = sum(task.done() for task in tasks)
    assert {(await task).joined for task in tasks} == {False}
    return waiting, ended


async def test_ten_thousand_layers_end_and_a_late_caller_has_its_own_long_before(start):
    """Each of ten thousand that wait holds as little as each of a thousand; who comes last is among the first."""
    costs = []
    for number, count in enumerate((100, 1000, 10_000)):
        transfers = FakeTransfers()
        worker = start(MemoryContentStore(), transfers)
        layers = [layer_of(b"%d of %d" % (one, number)) for one in range(count)]
        waiting, ended = await flood(worker, transfers, layers, layer_of(b"late, %d" % number))
        costs.append(waiting)
        # A hundred are for what is made once, and few: all but the slots' own may be done in one turn of the loop.
        assert ended < count / 2 or count == 100
        fetched = Counter(fetch.descriptor.digest for fetch in transfers.fetches)
        assert len(fetched) == fetched.total() == count + 1
    print(f"a layer that waits holds {costs[1]:.0f} bytes of 1,000, {costs[2]:.0f} of 10,000")
    assert costs[2] < MOST_BYTES_A_CALLER
    assert costs[2] < 1.5 * costs[1]
