"""Pull: manifest and config are read, refs are made, no layer moves."""

import asyncio

import pytest

from cluster.cache.runner import CacheManager
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.errors import BlobDamagedError, LeaseLostError, NeedsRemoteProvidersError, UnavailableError
from cluster.faultpoints import FaultPlan, armed
from cluster.fetch.access import AccessControl, Wanted
from cluster.fetch.keep import Keeper
from cluster.fetch.pull import Puller, providers_of
from cluster.image import ResolvedImage
from cluster.lease import LeaseId, blob_resource, image_resource, ref_resource
from cluster.ports import ObjectInfo
from cluster.ref import BlobRecord
from cluster.reference import Platform, parse_reference
from storage.memory import Memory, MemoryFlightStore, MemoryLeaseStore, MemoryProofStore, MemoryRefStore
from tests.doubles.fetch import FakeAuthorizer, FakeProber, ManualRenewer, handle, layer_of
from tests.doubles.stores import FakeClock

NAME = "r.example/app:1"
COPY_NAME = "elsewhere.example/copy:1"
APP, COPY = handle("app"), handle("copy", "elsewhere.example")
ALICE, MALLORY = FakeAuthorizer("alice"), FakeAuthorizer("mallory")
LEASE = LeaseId("l1")
AMD64 = Platform(os="linux", architecture="amd64")
MANIFEST, CONFIG = b'{"the": "manifest"}', b'{"the": "config"}'
A, B = layer_of(b"A"), layer_of(b"B")
FOREIGN = layer_of(
    b"windows",
    media_type="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    urls=("https://elsewhere.example/blob",),
)


class FakeManifests:
    """A registry's one image."""

    def __init__(self, layers):
        self.layers = tuple(layers)
        self.config_reads = 0

    async def resolve(self, reference, platform, authorizer, *, plain_http=False, have=None):
        config = await have(digest_of(CONFIG))
        if config is None:
            self.config_reads += 1
            config = CONFIG
        return ResolvedImage(
            reference=reference,
            manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(MANIFEST), size_bytes=len(MANIFEST)),
            manifest_bytes=MANIFEST,
            config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(CONFIG), size_bytes=len(CONFIG)),
            config_bytes=config,
            platform=platform,
            layers=self.layers,
        )


class FakeSmall:
    """The content store's small blobs, each write under a key of its own."""

    def __init__(self):
        self.objects = {}
        self.writes = []
        self.error = None

    async def read(self, blob):
        if self.objects.get(blob.key) is None:
            raise BlobDamagedError(blob.digest, "its object is gone")
        return self.objects[blob.key]

    async def write(self, digest, data):
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        key = f"{digest}/{len(self.writes)}"
        self.writes.append(digest)
        self.objects[key] = data
        return ObjectInfo(key=key, size_bytes=len(data), etag="e")


class Bench:
    def __init__(self, *layers):
        self.clock = FakeClock()
        self.memory = Memory(self.clock)
        self.refs, self.leases = MemoryRefStore(self.memory), MemoryLeaseStore(self.memory)
        self.flights = MemoryFlightStore(self.memory)
        self.manifests, self.small, self.prober = FakeManifests(layers), FakeSmall(), FakeProber()
        self.access = AccessControl(MemoryProofStore(self.memory), self.prober, proof_ttl_s=100.0)
        self.tokens = iter(range(1000))

    def puller(self, worker="w"):
        manager = CacheManager(self.refs, self.access)

        async def get_by_blob(descriptors, handlers, *, authorizer, lease_id, image_ref):
            return await manager.get_by_blob(
                descriptors,
                parent=None,
                handlers=handlers,
                authorizer=authorizer,
                lease_id=lease_id,
                image_ref=image_ref,
            )

        keeper = Keeper(
            worker=worker,
            leases=self.leases,
            flights=self.flights,
            renewer=ManualRenewer(self.flights),
            small=self.small,
            new_token=lambda: f"t{next(self.tokens)}",
            flight_ttl_s=6.0,
        )
        return Puller(
            manifests=self.manifests,
            access=self.access,
            refs=self.refs,
            small=self.small,
            keeper=keeper,
            get_by_blob=get_by_blob,
        )

    def make_present(self, layer, source):
        """Make a layer present, its bytes from *source*."""
        self.memory.blobs[layer.digest] = BlobRecord(
            digest=layer.digest, key="k", size_bytes=layer.size_bytes, etag="e", fence=1, source=source
        )

    async def pull(self, lease=LEASE, *, live=True, worker="w", who=ALICE, name=NAME):
        if live:
            await self.leases.create(lease, ttl_s=60.0)
        return await self.puller(worker).pull(parse_reference(name), AMD64, who, plain_http=False, lease_id=lease)


async def test_a_pull_makes_lazy_refs_and_holds_them():
    """Every layer is a lazy ref with its provider; refs, image, manifest and config are the caller's to keep."""
    bench = Bench(A, B)
    result = await bench.pull()
    assert all(state.is_lazy and state.providers == (APP,) for state in result.layers)
    assert result.image.ref == result.layers[-1].record.id
    assert result.layers[0].record.image_refs == (NAME,)
    held = set((await bench.leases.get(LEASE)).resources)
    assert held == {
        image_resource(NAME),
        blob_resource(digest_of(MANIFEST)),
        blob_resource(digest_of(CONFIG)),
        *(ref_resource(state.record.id) for state in result.layers),
    }
    assert not bench.memory.flights


async def test_the_manifest_opens_its_layers():
    """I7: no HEAD for any layer, and what was opened is the puller's alone."""
    bench = Bench(A, B)
    await bench.pull()
    await bench.access.prove(ALICE, [Wanted(blob=A, stored=(APP,)), Wanted(blob=B, stored=(APP,))])
    assert bench.prober.asked == []
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.access.prove(MALLORY, [Wanted(blob=A, stored=(APP,))])


@pytest.mark.parametrize("is_present", [False, True])
async def test_a_second_pull_from_the_same_repository_asks_nothing_more(is_present):
    """Lazy or fetched from there meanwhile, by the same caller or another: no HEAD."""
    bench = Bench(A, B)
    await bench.pull()
    if is_present:
        bench.make_present(A, APP.source)
    await bench.pull()
    await bench.pull(LeaseId("l2"), who=FakeAuthorizer("bob"))
    assert bench.prober.asked == []


@pytest.mark.parametrize("is_present", [False, True])
async def test_a_copy_in_another_repository_costs_one_question_a_layer_once(is_present):
    """The layers are known from where this caller can't read: the second repository is asked for each, once."""
    bench = Bench(A, B)
    await bench.pull()
    if is_present:
        bench.make_present(A, APP.source)
        bench.make_present(B, APP.source)
    bench.prober.add(COPY, A.digest, B.digest, readers={"bob"})
    for _ in range(2):
        result = await bench.pull(LeaseId("l2"), who=FakeAuthorizer("bob"), name=COPY_NAME)
    assert sorted(bench.prober.asked) == sorted((COPY.source, layer.digest) for layer in (A, B))
    assert all(set(state.providers) == {APP, COPY} for state in result.layers)


async def test_a_copy_in_another_repository_costs_nothing_who_may_read_the_first():
    """Access is there already: what the second manifest says of it doesn't matter."""
    bench = Bench(A, B)
    await bench.pull()
    bench.make_present(A, APP.source)
    await bench.pull(name=COPY_NAME)
    assert bench.prober.asked == []


@pytest.mark.parametrize("is_present", [False, True])
async def test_a_manifest_that_names_anothers_private_layer_opens_nothing(is_present):
    """BuildKit's testValidateDigestOrigin: the layer's digest and diff ID are known, the repository hasn't got it."""
    bench = Bench(A)
    bench.prober.add(APP, A.digest, readers={"alice"})
    (state,) = (await bench.pull()).layers
    if is_present:
        bench.make_present(A, APP.source)
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.pull(LeaseId("l2"), who=MALLORY, name=COPY_NAME)
    assert caught.value.digests == (A.digest,)
    assert await bench.refs.providers([A.digest]) == [(APP,)]
    assert ref_resource(state.record.id) not in (await bench.leases.get(LeaseId("l2"))).resources


async def test_a_manifest_that_names_anothers_config_does_not_get_it_from_the_store():
    """A config that never came from this repository is read there, as if it were not in the content store."""
    bench = Bench(A)
    bench.prober.add(COPY, A.digest)
    await bench.pull()
    await bench.pull(name=COPY_NAME)
    assert bench.manifests.config_reads == 2
    await bench.pull(name=COPY_NAME)
    assert bench.manifests.config_reads == 2


async def test_to_resolve_makes_no_ref_and_keeps_what_was_read():
    """The caller's lease holds manifest and config, nothing is recorded, and the layers are open to the caller."""
    bench = Bench(A, FOREIGN)
    await bench.leases.create(LEASE, ttl_s=60.0)
    resolved = await bench.puller().resolve(parse_reference(NAME), AMD64, ALICE, plain_http=False, lease_id=LEASE)
    assert (bench.memory.records, await bench.refs.images()) == ({}, [])
    assert [lease.id for lease in await bench.leases.leases() if lease.id.startswith("image:")] == []
    assert set((await bench.leases.get(LEASE)).resources) == {
        blob_resource(digest_of(MANIFEST)),
        blob_resource(digest_of(CONFIG)),
    }
    own, repository = providers_of(FOREIGN, APP)
    assert [(h.digest, h.provider) for h in resolved.handlers] == [
        (A.digest, APP),
        (FOREIGN.digest, own),
        (FOREIGN.digest, repository),
    ]
    record = resolved.record(None)
    assert (record.name, record.layers, record.ref) == (NAME, (A, FOREIGN), None)
    await bench.access.prove(ALICE, [Wanted(blob=A, passed=(APP,))])
    assert bench.prober.asked == []


async def test_a_pull_after_a_resolve_reads_no_config_again():
    """What was kept serves the pull."""
    bench = Bench(A)
    await bench.leases.create(LEASE, ttl_s=60.0)
    await bench.puller().resolve(parse_reference(NAME), AMD64, ALICE, plain_http=False, lease_id=LEASE)
    await bench.pull()
    assert bench.manifests.config_reads == 1
    assert len(bench.small.writes) == 2


async def test_to_resolve_needs_a_live_lease():
    """Else nothing would hold what was read."""
    bench = Bench(A)
    with pytest.raises(LeaseLostError):
        await bench.puller().resolve(parse_reference(NAME), AMD64, ALICE, plain_http=False, lease_id=LEASE)


async def test_an_image_without_layers_has_no_ref():
    """Scratch: an image all the same."""
    result = await Bench().pull()
    assert result.layers == ()
    assert result.image.ref is None


async def test_a_foreign_layer_has_its_own_addresses_first():
    """Non-distributable: fetched from its URLs, or from the repository should it have it."""
    bench = Bench(A, FOREIGN)
    result = await bench.pull()
    own, repository = providers_of(FOREIGN, APP)
    assert (own.kind, own.urls, repository) == ("urls", FOREIGN.urls, APP)
    assert set(result.layers[1].providers) == {own, repository}
    assert bench.prober.asked == []


async def test_a_second_pull_reads_no_config_and_writes_nothing():
    """What is present is not read or written again."""
    bench = Bench(A)
    await bench.pull()
    await bench.pull(LeaseId("l2"))
    assert bench.manifests.config_reads == 1
    assert sorted(bench.small.writes) == sorted([digest_of(MANIFEST), digest_of(CONFIG)])
    assert blob_resource(digest_of(CONFIG)) in (await bench.leases.get(LeaseId("l2"))).resources


async def test_a_config_whose_object_is_lost_is_read_and_written_again():
    """The record was wrong: it is marked absent, and made true."""
    bench = Bench(A)
    await bench.pull()
    (blob,) = await bench.refs.blobs([digest_of(CONFIG)])
    del bench.small.objects[blob.key]
    await bench.pull()
    assert bench.manifests.config_reads == 2
    (again,) = await bench.refs.blobs([digest_of(CONFIG)])
    assert again.key != blob.key
    assert await bench.small.read(again) == CONFIG


async def test_pulls_at_once_write_each_small_blob_once():
    """Four workers, one image: one flight a blob, one record a layer."""
    bench = Bench(A, B)
    results = await asyncio.gather(*(bench.pull(LeaseId(f"l{n}"), worker=f"w{n}") for n in range(4)))
    assert len({result.image.ref for result in results}) == 1
    assert sorted(bench.small.writes) == sorted([digest_of(MANIFEST), digest_of(CONFIG)])
    assert len(bench.memory.records) == 2


async def test_a_lost_fence_is_looked_at_again():
    """The lease of a small blob's flight lapsed while it was written: another try, not an error."""
    bench = Bench(A)
    write = bench.small.write
    lapses = iter([True])

    async def slow(digest, data):
        info = await write(digest, data)
        if next(lapses, False):
            bench.clock.advance(7.0)
        return info

    bench.small.write = slow
    await bench.pull()
    assert await bench.refs.blobs([digest_of(MANIFEST), digest_of(CONFIG)]) != [None, None]
    assert not bench.memory.flights


async def test_a_store_that_fails_leaves_no_flight():
    """The content store is away: a typed error, and the next call may try at once."""
    bench = Bench(A)
    bench.small.error = UnavailableError("the content store", "no answer")
    with pytest.raises(UnavailableError):
        await bench.pull()
    await asyncio.sleep(0.01)
    assert not bench.memory.flights
    assert bench.memory.records == {}
    bench.small.error = None
    await bench.pull()


async def test_where_the_refs_are_recorded_the_image_is_not():
    """The fault point pull.recorded lies between the two: what it promises is what a kill there leaves."""
    bench = Bench(A)
    with armed(FaultPlan.parse("pull.recorded=error:UnavailableError"), None), pytest.raises(UnavailableError):
        await bench.pull()
    (ref_id,) = bench.memory.records
    assert ref_resource(ref_id) in (await bench.leases.get(LEASE)).resources
    assert bench.memory.images == {}


async def test_a_pull_needs_a_live_lease():
    """Nothing is recorded that nobody holds."""
    bench = Bench(A)
    with pytest.raises(LeaseLostError):
        await bench.pull(live=False)
    assert bench.memory.records == {}
    assert bench.memory.images == {}
