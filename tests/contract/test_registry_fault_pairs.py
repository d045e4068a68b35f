"""Two faults of a registry at once, every pair of them in either order, on the real byte path.

Four parts of one layer are read by two readers; the first two GETs meet one fault each. What comes of it is the whole
layer or a typed error, and never other bytes (I2); where nothing was lost, no byte is read twice, else a part (I1).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from cluster.config import Config, FetchConfig, RegistryConfig
from cluster.digest import digest_of
from cluster.errors import DigestMismatchError
from cluster.lease import LeaseId
from cluster.ports import Authorization
from cluster.provider import ProviderHandle
from storage.bucket_caches import BucketCaches
from storage.fetching import ThreadedTransfers
from storage.local_blobs import NodeBlobs
from storage.memory import Memory
from storage.memory_blobs import MemoryContentStore
from storage.node_cache import NodeCache
from storage.registry.blob import BlobSource
from storage.transfer import TransferLimits
from tests.doubles.fetch import FakeAuthorizer, caller_of, layer_of
from tests.doubles.registry_faults import (
    Hang,
    IgnoreRange,
    Lie,
    RedirectTo,
    RefuseRange,
    Reset,
    Respond,
    Slow,
    Truncate,
    registry_fault_proxy,
)
from tests.doubles.stores import FakeClock, memory_stores
from tests.doubles.unlazier import unlazier_over

pytestmark = [pytest.mark.registry, pytest.mark.timeout(120)]

KIB = 1024
PART_BYTES = 64 * KIB
PARTS = 4
REPOSITORY = "fault/pairs"
DATA = random.Random(5).randbytes(PARTS * PART_BYTES)  # noqa: S311 - test data
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="http://tokens.example/token",service="r"'}

#: Each fault, given another address of the registry. Those that break an answer off leave some of its part to be read.
FAULTS = {
    "429": lambda _other: Respond(429),
    "429 with Retry-After": lambda _other: Respond(429, {"Retry-After": "1"}),
    "401 midway": lambda _other: Respond(401, CHALLENGE),
    "500": lambda _other: Respond(500),
    "503 with Retry-After": lambda _other: Respond(503, {"Retry-After": "1"}),
    "reset": lambda _other: Reset(),
    "reset midway": lambda _other: Reset(40 * KIB),
    "short body": lambda _other: Truncate(40 * KIB),
    "wrong bytes": lambda _other: Lie(),
    "hang": lambda _other: Hang(),
    "hang midway": lambda _other: Hang(40 * KIB),
    "slow": lambda _other: Slow(200 * KIB),
    "no ranges": lambda _other: IgnoreRange(),
    "range refused": lambda _other: RefuseRange(),
    "redirect": RedirectTo,
}
#: Faults after which what is here is read again: it may be wrong, or what lacks can't be asked for alone.
_LOSING = {"wrong bytes", "no ranges", "range refused"}
#: Faults that cost no further GET, or one for which a part may be read again: what was on its way is thrown away.
_COSTLESS = {"slow", "redirect", "hang midway", "reset midway"}


class Caller(FakeAuthorizer):
    """Answers every challenge."""

    async def authorize(self, request):
        return Authorization("Bearer token") if request.challenge else None


class Lab:
    """What all pairs share: a registry that has the layer, threads, connections."""

    def __init__(self, stack, registry, root):
        config = Config(
            fetch=FetchConfig(stall_timeout_s=1.5),
            registries={"default": RegistryConfig(timeout_s=1.5)},
        )
        self.registry, self.root = registry, root
        self.stack = stack
        self.sources = BlobSource(config)
        stack.callback(self.sources.close)
        self.threads = ThreadPoolExecutor(64)
        stack.callback(self.threads.shutdown)

    async def outcome(self, first, second):
        """Have the layer fetched while the registry does *first* and *second*; return what is wrong with its end."""
        with ExitStack() as stack:
            proxy = stack.enter_context(registry_fault_proxy(self.registry.url))
            faults = [FAULTS[name](self.registry.url) for name in (first, second)]
            for fault in faults:
                proxy.script(fault)
                if isinstance(fault, Hang):
                    stack.callback(fault.proceed.set)
            stores, store = memory_stores(Memory(time.monotonic), FakeClock()), MemoryContentStore()
            stack.callback((renewer := stores.new_renewer()).close)
            error = None
            try:
                await self._unlazier(stores, store, renewer).unlazy(LAYER, await self._caller(proxy, stores))
            except DigestMismatchError as exc:
                error = exc
            (blob,) = await stores.refs.blobs([LAYER.digest])
            wrong = list(_wrong_end({first, second}, error, blob, store))
            served, gets = proxy.blob_bytes[LAYER.digest], len(proxy.blob_gets())
            if gets < 2:
                wrong.append("the second fault was never met")
            # On a machine that stands still for a while, an answer may be given up that was all right.
            further = gets - PARTS - sum(name not in _COSTLESS for name in (first, second))
            if served > len(DATA) + PART_BYTES * max(0, further) and not _LOSING & {first, second}:
                wrong.append(f"{served} bytes were read for {len(DATA)} in {gets} GETs")
            return wrong

    async def _caller(self, proxy, stores):
        await stores.leases.create(LeaseId("l1"), ttl_s=None)
        handle = ProviderHandle(registry=proxy.host, repository=REPOSITORY)
        caller = caller_of("l1", providers={LAYER.digest: [handle]})
        object.__setattr__(caller, "authorizer", Caller())
        return caller

    def _unlazier(self, stores, store, renewer):
        cache = NodeCache(self.root / secrets.token_hex(4), 10**9, headroom_bytes=0)
        loop = asyncio.get_running_loop()
        blobs = NodeBlobs(cache, store, stores.refs, loop=loop, threads=self.threads, downloads=1)
        transfers = ThreadedTransfers(
            store=store,
            flights=stores.flights,
            sources=self.sources,
            limiter=stores.limiter,
            buckets=BucketCaches(store),
            blobs=blobs,
            threads=self.threads,
            limits=TransferLimits(
                part_bytes=PART_BYTES, parallel_from_bytes=1, ranges=2, attempts=5, retry_budget_s=60.0
            ),
            buffers=4,
        )
        return unlazier_over(stores, renewer, transfers, deadline_s=60.0, max_transfers=1)


def _wrong_end(faults, error, blob, store):
    if blob is None:
        # Wrong bytes are found out at the end, when all of them are here: nobody else has them.
        if error is None or "wrong bytes" not in faults:
            yield f"not present, and {error!r}"
        return
    if error is not None:
        yield f"present, and {error!r}"
    buffer = memoryview(bytearray(len(DATA) + 1))
    with store.open(blob.key) as stream:
        if buffer[: stream.readinto(buffer)] != DATA:
            yield "other bytes are present"


LAYER = layer_of(DATA)


@pytest.fixture
def lab(registry_server, tmp_path, monkeypatch):
    # S3 takes no smaller part than 5 MiB, of which 225 pairs would be too many.
    monkeypatch.setattr("storage.transfer.part_size", lambda _size_bytes, configured_bytes: configured_bytes)
    assert registry_server.push_blob(REPOSITORY, DATA) == digest_of(DATA)
    with ExitStack() as stack:
        yield Lab(stack, registry_server, tmp_path)


@pytest.mark.parametrize("first", FAULTS)
async def test_two_faults_at_once_end_in_the_whole_layer_or_a_typed_error(lab, first):
    """One fault meets the first GET and every other one, at once, the second: nothing wrong is ever present."""
    wrong = await asyncio.gather(*(lab.outcome(first, second) for second in FAULTS))
    assert {second: found for second, found in zip(FAULTS, wrong, strict=True) if found} == {}
