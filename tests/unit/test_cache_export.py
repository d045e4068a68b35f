"""Export: results that are there cost nothing, results that are gone are left out, and failures are one error."""

import asyncio
import json

import pytest

from cluster.cache_options import CacheKind, CacheMode, CacheTarget
from cluster.descriptor import MANIFEST_OCI
from cluster.digest import digest_of
from cluster.errors import AccessDeniedError, CacheTooLargeError, NeedsRemoteProvidersError, UnavailableError
from cluster.fetch.access import AccessControl, Wanted
from cluster.fetch.cache_export import CacheExporter, RegistryPlace
from cluster.image import parse_manifest
from cluster.lease import LeaseId
from cluster.provider import DescHandler
from cluster.ref import RefRecord
from cluster.reference import parse_reference
from cluster.remote_cache import ExportCandidate, decode
from storage.memory import MemoryProofStore
from tests.doubles.fetch import caller_of, handle, layer_of
from tests.unit.test_fetch_push import Bench

SOURCE, AFAR = handle("app"), handle("app", "afar.example")
A, B, C = layer_of(b"A"), layer_of(b"B"), layer_of(b"C")
K1, K2, K3 = (digest_of(f"key {n}".encode()) for n in range(3))


class ExportBench(Bench):
    """An exporter over fakes, whose farm knows chains of A, B and C from a repository."""

    def __init__(self):
        super().__init__()
        #: What the source repository has; asked where no proof is kept.
        self.source = self.target.__class__()
        access = AccessControl(MemoryProofStore(self.memory), self.source, proof_ttl_s=100.0)
        self.exporter = CacheExporter(refs=self.refs, access=access)
        for layer in (A, B, C):
            self.source.sizes[layer.digest] = layer.size_bytes
            self.source.add(SOURCE, layer.digest)
            self.source.add(AFAR, layer.digest)

    async def chain(self, *layers, provider=SOURCE):
        """Record a chain; return its refs' IDs, lowest first."""
        await self.leases.create(LeaseId("l1"), ttl_s=None)
        records, top = [], None
        for layer in layers:
            top = RefRecord.over(layer, top)
            records.append(top)
        await self.refs.get_or_create(records, {layer.digest: [provider] for layer in layers}, lease_id=LeaseId("l1"))
        return [record.id for record in records]

    async def export(self, *candidates, mode=CacheMode.MAX, handlers=(), **options):
        reference = "r.example/cache:1"
        target = CacheTarget(kind=CacheKind.REGISTRY, ref=reference, mode=mode, **options)
        place = RegistryPlace(self.pusher, self.target, parse_reference(reference))
        return await self.exporter.export(place, target, candidates, handlers, caller_of("l1", progress=("s",)))

    def exported(self):
        """Return what lies under the tag: (keys, layers) of each entry."""
        manifest = parse_manifest(self.target.manifests["r.example/cache", "1"], MANIFEST_OCI, "c")
        cache = decode(manifest, self.documents[manifest.config.digest], "c")
        return [
            (entry.keys, [layer.digest for layer in entry.layers])
            for entry in (cache.entry(number) for number in range(len(cache.entries)))
        ]


@pytest.fixture
def bench():
    bench = ExportBench()
    upload, bench.documents = bench.target.upload_blob, {}

    async def upload_blob(target, descriptor, open_stream, authorizer, on_progress=None):
        with open_stream() as stream:
            buffer = bytearray(descriptor.size_bytes)
            stream.readinto(memoryview(buffer))
            bench.documents[descriptor.digest] = bytes(buffer)
        await upload(target, descriptor, open_stream, authorizer, on_progress or (lambda _: None))

    bench.target.upload_blob = upload_blob
    return bench


def how(result):
    return sorted((layer.how for layer in result.layers), reverse=True)


async def test_lazy_results_are_mounted(bench):
    """I7: across repositories of one registry no layer moves, and nothing is fetched."""
    (a, b) = await bench.chain(A, B)
    result = await bench.export(ExportCandidate(keys=(K1,), ref=a), ExportCandidate(keys=(K2,), ref=b, is_target=True))
    assert how(result) == ["mounted", "mounted"]
    assert bench.transfers.fetches == []
    assert bench.exported() == [((K1,), [A.digest]), ((K2,), [A.digest, B.digest])]
    assert (result.results, result.left_out, result.warning) == (2, 0, "")
    assert result.digest == digest_of(bench.target.manifests["r.example/cache", "1"])


async def test_what_the_target_has_costs_one_head_each(bench):
    """No mount, no byte; and a layer of several results is asked for once."""
    (a, b) = await bench.chain(A, B)
    bench.target.add(handle("cache"), A.digest, B.digest)
    candidates = (ExportCandidate(keys=(K1,), ref=a), ExportCandidate(keys=(K2,), ref=b))
    assert how(await bench.export(*candidates)) == ["exists", "exists"]
    heads = [digest for _source, digest in bench.target.asked]
    assert (heads.count(A.digest), heads.count(B.digest), bench.target.mounts) == (1, 1, [])


async def test_all_heads_are_asked_at_once(bench):
    """None waits for another's answer."""
    refs = await bench.chain(A, B, C)
    asked, proceed, head = [], asyncio.Event(), bench.target.blob_exists

    async def blob_exists(target, digest, authorizer):
        asked.append(digest)
        if len(asked) == 3:
            proceed.set()
        async with asyncio.timeout(5):
            await proceed.wait()
        return await head(target, digest, authorizer)

    bench.target.blob_exists = blob_exists
    await bench.export(ExportCandidate(keys=(K1,), ref=refs[-1]))
    assert set(asked[:3]) == {A.digest, B.digest, C.digest}


async def test_another_registrys_layers_are_fetched_and_uploaded(bench):
    """Only those, and only now."""
    (a,) = await bench.chain(A, provider=AFAR)
    assert how(await bench.export(ExportCandidate(keys=(K1,), ref=a))) == ["uploaded"]
    assert len(bench.transfers.fetches) == 1


async def test_min_is_what_targets_consist_of(bench):
    """A result whose layers go along is exported, another's layers are not even looked for."""
    (a, b) = await bench.chain(A, B)
    (c,) = await bench.chain(C)
    await bench.export(
        ExportCandidate(keys=(K1,), ref=a),
        ExportCandidate(keys=(K2,), ref=b, is_target=True),
        ExportCandidate(keys=(K3,), ref=c),
        mode=CacheMode.MIN,
    )
    assert bench.exported() == [((K1,), [A.digest]), ((K2,), [A.digest, B.digest])]
    assert C.digest not in [digest for _source, digest in bench.target.asked]


async def test_deleted_content_is_left_out_and_told(bench):
    """A layer that nobody has any more: what stands on it goes too, the rest is exported."""
    (a, b, c) = await bench.chain(A, B, C)
    del bench.source.blobs[SOURCE.source, B.digest]
    bench.transfers.plan = [NeedsRemoteProvidersError((layer.digest,)) for layer in (B, C)]
    result = await bench.export(*(ExportCandidate(keys=(key,), ref=ref) for key, ref in ((K1, a), (K2, b), (K3, c))))
    assert bench.exported() == [((K1,), [A.digest])]
    assert (result.results, result.left_out) == (1, 2)
    assert result.warning == "2 of 3 results can't be had any more and are not in the cache"


async def test_a_record_that_is_gone_is_left_out(bench):
    """As deleted content is."""
    (a,) = await bench.chain(A)
    gone = RefRecord.over(B, None).id
    result = await bench.export(ExportCandidate(keys=(K1,), ref=a), ExportCandidate(keys=(K2,), ref=gone))
    assert (bench.exported(), result.left_out) == ([((K1,), [A.digest])], 1)


async def test_an_export_of_nothing_leaves_the_old_cache(bench):
    """An empty cache in its place would be of no use to anybody."""
    gone = RefRecord.over(B, None).id
    result = await bench.export(ExportCandidate(keys=(K1,), ref=gone))
    assert (result.digest, result.left_out, bench.target.manifests) == (None, 1, {})
    assert result.warning


async def test_what_the_target_has_needs_no_source(bench):
    """The layer is gone from where it came from, and there already."""
    (a,) = await bench.chain(A)
    del bench.source.blobs[SOURCE.source, A.digest]
    bench.target.add(handle("cache"), A.digest)
    assert how(await bench.export(ExportCandidate(keys=(K1,), ref=a))) == ["exists"]


async def test_an_empty_result_is_exported(bench):
    """Without a layer."""
    await bench.chain(A)
    await bench.export(ExportCandidate(keys=(K1,), ref=None, is_target=True), mode=CacheMode.MIN)
    assert bench.exported() == [((K1,), [])]


async def test_a_target_that_fails_is_one_error(bench):
    """Typed, and nothing is left under the tag; a source that doesn't answer is one too."""
    (a,) = await bench.chain(A)
    bench.target.silent.add("r.example/cache")
    with pytest.raises(UnavailableError):
        await bench.export(ExportCandidate(keys=(K1,), ref=a))
    assert bench.target.manifests == {}


async def test_an_error_that_may_be_is_a_warning(bench):
    """ignore-error: whatever it is, the build goes on, and is told."""
    (a,) = await bench.chain(A)

    async def denied(*_):
        raise AccessDeniedError("cache", "r.example", "read only")

    bench.target.push_manifest = denied
    result = await bench.export(ExportCandidate(keys=(K1,), ref=a), ignores_error=True)
    assert result.digest is None
    assert "read only" in result.warning


async def test_a_cache_that_is_too_large_moves_nothing(bench):
    """It is known before the first HEAD."""
    (a,) = await bench.chain(A)
    keys = tuple(digest_of(str(number).encode()) for number in range(120_000))
    with pytest.raises(CacheTooLargeError):
        await bench.export(ExportCandidate(keys=keys, ref=a))
    assert bench.target.asked == []


async def test_passed_handlers_are_ways_to_get_layers(bench):
    """The farm knows no provider any more; the job does."""
    (a,) = await bench.chain(A)
    bench.memory.providers.clear()
    handlers = (DescHandler(digest=A.digest, provider=SOURCE),)
    assert how(await bench.export(ExportCandidate(keys=(K1,), ref=a), handlers=handlers)) == ["mounted"]


async def test_an_export_makes_the_cache_a_source(bench):
    """Of its layers, for who exported it, without asking again."""
    (a,) = await bench.chain(A)
    await bench.export(ExportCandidate(keys=(K1,), ref=a))
    assert handle("cache") in bench.memory.providers[A.digest]
    await bench.access.prove(caller_of("l1").authorizer, [Wanted(blob=A, passed=(handle("cache"),))])


async def test_two_exports_of_the_same_results_are_one_cache(bench):
    """So that a second one costs no upload, and tags of one content have one digest."""
    (a, b) = await bench.chain(A, B)
    candidates = (ExportCandidate(keys=(K1,), ref=a), ExportCandidate(keys=(K2,), ref=b, config=b"{}"))
    first = await bench.export(*candidates)
    document = json.loads(bench.target.manifests["r.example/cache", "1"])
    bench.target.add(handle("cache"), A.digest, B.digest, document["config"]["digest"])
    bench.target.uploads.clear()
    assert (await bench.export(*candidates)).digest == first.digest
    assert bench.target.uploads == []
