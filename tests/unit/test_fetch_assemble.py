"""Images of builds: documents kept and held, the image recorded, access to the whole chain proven first."""

import json
from dataclasses import replace

import pytest

from cluster.cache.runner import CacheManager
from cluster.digest import Digest
from cluster.errors import LeaseLostError, MalformedManifestError, NeedsRemoteProvidersError, RefNotFoundError
from cluster.fetch.access import AccessControl
from cluster.fetch.assemble import Assembler
from cluster.fetch.keep import Keeper
from cluster.lease import LeaseId, blob_resource, image_resource, ref_resource
from cluster.origin import OPEN
from cluster.ports import ObjectInfo
from cluster.provider import FARM, DescHandler
from cluster.ref import BlobRecord, RefId, RefRecord
from cluster.reference import Platform, parse_reference
from storage.memory import Memory, MemoryFlightStore, MemoryLeaseStore, MemoryProofStore, MemoryRefStore
from tests.doubles.fetch import FakeAuthorizer, FakeProber, ManualRenewer, handle, layer_of
from tests.doubles.stores import FakeClock

BASE, BUILT = layer_of(b"a"), layer_of(b"b")
APP = handle("app")
ALICE, MALLORY = FakeAuthorizer("alice"), FakeAuthorizer("mallory")
LEASE = LeaseId("l1")
NAME = "r.example/built:1"


class FakeSmall:
    """The content store's small blobs."""

    def __init__(self):
        self.objects = {}

    async def read(self, blob):
        return self.objects[blob.digest]

    async def write(self, digest, data):
        assert digest not in self.objects, "written twice"
        self.objects[digest] = data
        return ObjectInfo(key=f"k/{digest}", size_bytes=len(data), etag="e")


class Bench:
    """A chain of a private base and a layer that a build made."""

    def __init__(self):
        self.memory = Memory(FakeClock())
        self.refs, self.leases = MemoryRefStore(self.memory), MemoryLeaseStore(self.memory)
        flights, self.small, self.prober = MemoryFlightStore(self.memory), FakeSmall(), FakeProber()
        self.access = AccessControl(MemoryProofStore(self.memory), self.prober, proof_ttl_s=100.0)
        self.prober.add(APP, BASE.digest, readers={"alice"})
        tokens = iter(range(1000))
        keeper = Keeper(
            worker="w",
            leases=self.leases,
            flights=flights,
            renewer=ManualRenewer(flights),
            small=self.small,
            new_token=lambda: f"t{next(tokens)}",
            flight_ttl_s=6.0,
        )
        self.assembler = Assembler(
            refs=self.refs,
            leases=self.leases,
            access=self.access,
            keeper=keeper,
            platform=Platform(os="linux", architecture="riscv64"),
        )

    async def build(self):
        """Record the chain as a pull and an op worker do."""
        (base,) = await CacheManager(self.refs, self.access).get_by_blob(
            [BASE],
            parent=None,
            handlers=[DescHandler(digest=BASE.digest, provider=APP)],
            authorizer=ALICE,
            lease_id=LEASE,
        )
        self.memory.blobs[BUILT.digest] = BlobRecord(digest=BUILT.digest, key="k", size_bytes=1, etag="e", fence=1)
        record = replace(RefRecord.over(BUILT, base.record), origins=(OPEN,))
        await self.refs.get_or_create([record], {BUILT.digest: [FARM]}, lease_id=LEASE)
        return record.id

    async def assemble(self, ref_id, config=b"", *, who=ALICE, lease=LEASE, name=NAME):
        return await self.assembler.assemble(
            parse_reference(name), ref_id, config, who, handlers=(), lease_id=lease, created_s=None
        )


@pytest.fixture
async def bench():
    bench = Bench()
    await bench.leases.create(LEASE, ttl_s=60.0)
    return bench


async def test_an_assembled_image_is_recorded_and_held(bench):
    """By the caller's lease, refs and documents; the documents also by the image's own, for as long as it is one."""
    top = await bench.build()
    image = await bench.assemble(top)
    assert (image.name, image.ref, image.layers, image.platform) == (NAME, top, (BASE, BUILT), "linux/riscv64")
    assert await bench.refs.image(NAME) == image
    documents = {blob_resource(image.manifest.digest), blob_resource(image.config.digest)}
    chain = {ref_resource(state.record.id) for state in await bench.refs.chain(top)}
    assert set((await bench.leases.get(LEASE)).resources) == {image_resource(NAME), *documents, *chain}
    assert set((await bench.leases.get(LeaseId(f"image:{image.manifest.digest}"))).resources) == documents
    manifest = json.loads(bench.small.objects[image.manifest.digest])
    assert manifest["config"]["digest"] == image.config.digest
    assert image.config.digest in bench.small.objects


async def test_to_assemble_moves_no_layer_and_asks_once(bench):
    """I7: what was proven is not asked again, what a build made never."""
    await bench.build()
    bench.prober.asked.clear()
    top = await bench.build()
    await bench.assemble(top)
    assert bench.prober.asked == []
    (state, _built) = await bench.refs.chain(top)
    assert state.is_lazy


async def test_the_same_again_is_the_same_image(bench):
    """A rebuild that is cached: same digest, nothing written (the fake refuses a second writing)."""
    top = await bench.build()
    assert (await bench.assemble(top)).manifest == (await bench.assemble(top)).manifest


async def test_an_image_is_had_only_by_who_may_use_its_chain(bench):
    """Else a name of one's own would be a way around the base's registry. Nothing has changed."""
    top = await bench.build()
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.assemble(top, who=MALLORY)
    assert caught.value.digests == (BASE.digest,)
    assert (bench.small.objects, await bench.refs.images()) == ({}, [])


async def test_an_image_without_layers_can_be_assembled(bench):
    """It has no ref."""
    image = await bench.assemble(None)
    assert (image.ref, image.layers) == (None, ())


@pytest.mark.parametrize("has_layers", [False, True])
async def test_without_a_live_lease_nothing_is_made(bench, has_layers):
    """No document, and no lease of the image's that nobody would end."""
    top = await bench.build() if has_layers else None
    with pytest.raises(LeaseLostError):
        await bench.assemble(top, lease=LeaseId("gone"))
    assert bench.small.objects == {}
    assert [lease.id for lease in await bench.leases.leases()] == [LEASE]


async def test_a_chain_that_is_unknown_is_named(bench):
    """Collected meanwhile, or never there."""
    unknown = RefId(Digest("sha256:" + "0" * 64))
    with pytest.raises(RefNotFoundError):
        await bench.assemble(unknown)


async def test_what_is_no_config_is_refused_before_anything_is_written(bench):
    """The image's own lease would never end."""
    with pytest.raises(MalformedManifestError):
        await bench.assemble(await bench.build(), b"no config")
    assert [lease.id for lease in await bench.leases.leases()] == [LEASE]
