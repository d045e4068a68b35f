"""Import: manifest and config are read and nothing else; what can't be read is a miss with a warning."""

import json

import pytest

from cluster.cache_options import CacheKind, CacheSource
from cluster.descriptor import MANIFEST_OCI
from cluster.digest import digest_of
from cluster.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    ManifestNotFoundError,
    NeedsRemoteProvidersError,
    SessionGoneError,
    UnavailableError,
)
from cluster.fetch.access import AccessControl, Wanted
from cluster.fetch.cache_import import CacheImporter, results_of
from cluster.image import parse_manifest
from cluster.provider import DescHandler
from cluster.ref import RefRecord
from cluster.reference import parse_platform
from cluster.remote_cache import CacheEntry, RemoteCache, encode
from cluster.solver.values import Result
from storage.memory import Memory, MemoryProofStore
from tests.doubles.fetch import FakeAuthorizer, FakeProber, handle, layer_of
from tests.doubles.stores import FakeClock

CACHE = handle("cache")
A, B = layer_of(b"A"), layer_of(b"B")
K1, K2 = (digest_of(f"key {n}".encode()) for n in range(2))
HELD = RemoteCache.of([CacheEntry(keys=(K1,), layers=(A,), config=b"{}"), CacheEntry(keys=(K2,), layers=(A, B))])
SOURCE = CacheSource(kind=CacheKind.REGISTRY, ref="r.example/cache:1")


class FakeDocuments:
    """A registry as far as one manifest and its config go."""

    def __init__(self):
        stored = encode(HELD, "c")
        #: Returned, or raised.
        self.answer = (parse_manifest(stored.manifest, MANIFEST_OCI, "c"), stored.config)
        self.asked = []

    async def documents(self, reference, platform, authorizer, *, plain_http=False, max_config_bytes=0):
        self.asked.append((reference.name, plain_http, max_config_bytes))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class ImportBench:
    def __init__(self):
        self.registry, self.prober = FakeDocuments(), FakeProber()
        self.access = AccessControl(MemoryProofStore(Memory(FakeClock())), self.prober, proof_ttl_s=100.0)
        self.importer = CacheImporter(registry=self.registry, buckets=None, access=self.access)

    async def read(self, source=SOURCE, name="alice"):
        return await self.importer.read(source, parse_platform("linux/amd64"), FakeAuthorizer(name))


@pytest.fixture
def bench():
    return ImportBench()


async def test_an_import_yields_what_is_held_with_a_handler_for_each_layer(bench):
    """Of that registry; and no layer is asked for."""
    imported = await bench.read()
    assert imported.cache == HELD
    assert imported.handlers == (
        DescHandler(digest=A.digest, provider=CACHE),
        DescHandler(digest=B.digest, provider=CACHE),
    )
    assert (imported.warning, bench.prober.asked) == ("", [])


async def test_an_import_names_its_layers_to_who_read_it(bench):
    """What was read opens lazy layers there to this caller; another has to prove its access anew."""
    await bench.read()
    wanted = [Wanted(blob=layer, passed=(CACHE,)) for layer in (A, B)]
    await bench.access.prove(FakeAuthorizer("alice"), wanted)
    assert bench.prober.asked == []
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.access.prove(FakeAuthorizer("mallory"), wanted)
    assert {source for source, _digest in bench.prober.asked} == {"r.example/cache"}


async def test_a_name_opens_nothing_that_came_from_elsewhere(bench):
    """A forged cache that names a private layer's digest: its repository is asked for the layer, and lacks it."""
    await bench.read()
    present = Wanted(blob=A, passed=(CACHE,), came_from="private.example/app")
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.access.prove(FakeAuthorizer("alice"), [present])


@pytest.mark.parametrize(
    "error",
    [
        ManifestNotFoundError("r.example/cache:1"),
        AccessDeniedError("cache", "r.example", "403"),
        BlobNotFoundError(digest_of(b"config"), "r.example/cache"),
        UnavailableError("r.example", "no answer"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_cache_that_can_t_be_read_is_a_miss(bench, error):
    """Deleted, denied, half deleted, away: nothing, with a warning that says where and why."""
    bench.registry.answer = error
    imported = await bench.read()
    assert (imported.cache, imported.handlers) == (RemoteCache(), ())
    assert imported.warning == f"nothing is cached in r.example/cache:1: {error}"


async def test_what_is_no_cache_is_a_miss(bench):
    """An image without an inline cache, and a cache that is damaged."""
    manifest, config = bench.registry.answer
    for damaged in (b"{}", json.dumps({**json.loads(config), "nodes": [[0, 0]]}).encode()):
        bench.registry.answer = (manifest, damaged)
        assert (await bench.read()).warning


async def test_a_caller_that_is_gone_is_no_miss(bench):
    """Nobody is left for whom there could be one."""
    bench.registry.answer = SessionGoneError("s")
    with pytest.raises(SessionGoneError):
        await bench.read()


async def test_what_the_solver_finds_is_named_as_its_refs_will_be(bench):
    """A result before its ref is made: the ID is known from the layers, and each has its own layers' handlers."""
    (first, second) = results_of(await bench.read())
    below = RefRecord.over(A, None)
    assert first[:2] == ((K1,), Result(ref=below.id, config=b"{}"))
    assert second[:2] == ((K2,), Result(ref=RefRecord.over(B, below).id))
    assert first[2].entry == CacheEntry(keys=(K1,), layers=(A,), config=b"{}")
    assert first[2].handlers == (DescHandler(digest=A.digest, provider=CACHE),)
    assert [handler.digest for handler in second[2].handlers] == [A.digest, B.digest]
