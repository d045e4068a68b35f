"""The cache manager: one record a blob chain, every layer with a provider of its own, no byte moved."""

from dataclasses import replace

import pytest

from cluster.cache.names import find_ref
from cluster.cache.origins import origin_of
from cluster.cache.runner import CacheManager
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import blob_chain_id, chain_id, digest_of
from cluster.errors import (
    AmbiguousRefError,
    InvalidDescriptorError,
    LeaseLostError,
    LeaseRequiredError,
    NeedsRemoteProvidersError,
    NonAddressableParentError,
    RefNotFoundError,
)
from cluster.fetch.access import AccessControl
from cluster.lease import LeaseId, ref_resource
from cluster.origin import OPEN
from cluster.provider import FARM, DescHandler
from cluster.ref import BlobRecord, ImageRecord, RefId, RefRecord
from storage.memory import Memory, MemoryLeaseStore, MemoryProofStore, MemoryRefStore
from tests.doubles.fetch import FakeAuthorizer, FakeProber, handle, layer_of
from tests.doubles.stores import FakeClock

A, B, C, D = (layer_of(name.encode()) for name in "ABCD")
APP, OTHER = handle("app"), handle("other")
ALICE, MALLORY = FakeAuthorizer("alice"), FakeAuthorizer("mallory")
LEASE = LeaseId("l1")


class Bench:
    def __init__(self):
        self.memory = Memory(FakeClock())
        self.refs = MemoryRefStore(self.memory)
        self.leases = MemoryLeaseStore(self.memory)
        self.prober = FakeProber()
        self.prober.add(APP, *(layer.digest for layer in (A, B, C, D)), readers={"alice"})
        self.access = AccessControl(MemoryProofStore(self.memory), self.prober, proof_ttl_s=100.0)
        self.manager = CacheManager(self.refs, self.access)

    async def make(self, *layers, parent=None, handled=None, who=ALICE, lease=LEASE, image_ref=None):
        handlers = [
            DescHandler(digest=layer.digest, provider=APP) for layer in (layers if handled is None else handled)
        ]
        return await self.manager.get_by_blob(
            layers, parent=parent, handlers=handlers, authorizer=who, lease_id=lease, image_ref=image_ref
        )

    async def get(self, ref_id, *handled, who=ALICE, lease=LEASE):
        handlers = [DescHandler(digest=layer.digest, provider=APP) for layer in handled]
        return await self.manager.get(ref_id, handlers=handlers, authorizer=who, lease_id=lease)

    def make_present(self, layer):
        self.memory.blobs[layer.digest] = BlobRecord(
            digest=layer.digest, key="k", size_bytes=layer.size_bytes, etag="e", fence=1
        )

    async def build(self, *layers, on, origins=(OPEN,)):
        """Record *layers* on top of a ref as an op worker does, and make them present."""
        records = []
        for layer in layers:
            record = RefRecord.over(layer, records[-1] if records else on)
            records.append(replace(record, origins=tuple(origins)))
            self.make_present(layer)
        known = {layer.digest: (FARM,) for layer in layers}
        return await self.refs.get_or_create(records, known, lease_id=LEASE)


@pytest.fixture
async def bench():
    bench = Bench()
    await bench.leases.create(LEASE, ttl_s=60.0)
    return bench


async def test_chain_and_blob_chain_follow_their_formulas(bench):
    """TestSetBlob: both recurrences, literally."""
    a, b = await bench.make(A, B)
    assert a.record.chain == A.diff_id
    assert a.record.id == digest_of(f"{A.digest} {A.diff_id}".encode())
    assert b.record.chain == chain_id(A.diff_id, B.diff_id)
    assert b.record.id == blob_chain_id(a.record.id, B.digest, B.diff_id)
    assert (b.record.parent, b.record.parent_chain, b.record.depth) == (a.record.id, a.record.chain, 2)
    assert a.is_lazy
    assert b.is_lazy


async def test_the_same_layer_on_the_same_parent_is_the_same_ref(bench):
    """Idempotent by blob chain ID; the names it came from add up."""
    (first,) = await bench.make(A, image_ref="r.example/app:1")
    (again,) = await bench.make(A, image_ref="r.example/app:2")
    assert again.record.id == first.record.id
    assert again.record.image_refs == ("r.example/app:1", "r.example/app:2")


async def test_another_compression_is_another_ref_of_the_same_chain(bench):
    """Other blob, same diff ID: other ref, same snapshot; neither stands in the other's way."""
    packed = layer_of(b"A, packed otherwise", diff=None)
    packed = replace(packed, diff_id=A.diff_id)
    bench.prober.add(APP, packed.digest)
    bench.prober.sizes[packed.digest] = packed.size_bytes
    (one,), (two,) = await bench.make(A), await bench.make(packed)
    assert one.record.id != two.record.id
    assert one.record.chain == two.record.chain


async def test_one_digest_in_two_chains_is_two_refs(bench):
    """A→B→C and A→D→C: C's digest says nothing of what is below it."""
    over_b, over_d = await bench.make(A, B, C), await bench.make(A, D, C)
    assert over_b[0].record.id == over_d[0].record.id
    assert over_b[2].record.id != over_d[2].record.id
    assert over_b[2].record.blob.digest == over_d[2].record.blob.digest


async def test_each_layer_of_a_chain_needs_a_provider_of_its_own(bench):
    """A handler for C covers C; a lazy ancestor without one is named, and nothing has changed."""
    bench.prober.blobs.clear()
    bench.prober.add(APP, C.digest)
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.make(A, D, C, handled=[C])
    assert caught.value.digests == (A.digest, D.digest)
    assert bench.memory.records == {}
    assert (await bench.leases.get(LEASE)).resources == ()


async def test_lazy_ancestors_of_the_parent_are_named_too(bench):
    """Who builds on a parent must be able to use all of it: every lazy ancestor is listed, present ones are not."""
    below = await bench.make(A, B)
    bench.make_present(A)
    bench.prober.add(APP, C.digest, readers={"mallory"})
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.make(C, parent=below[-1].record.id, who=MALLORY)
    assert caught.value.digests == (B.digest,)
    assert len(bench.memory.records) == 2


async def test_what_is_made_on_a_parent_by_id_is_the_same_chain(bench):
    """In one call or in two: the same refs."""
    whole = await bench.make(A, B, C)
    (top,) = await bench.make(C, parent=whole[1].record.id)
    assert top.record.id == whole[2].record.id


async def test_stored_providers_serve_who_passes_none(bench):
    """The first caller's provider is kept with the digest; a second caller uses it with its own credentials."""
    await bench.make(A, B)
    again = await bench.make(A, B, handled=[])
    assert [state.providers for state in again] == [(APP,), (APP,)]


async def test_providers_add_up(bench):
    """Handlers merge, they never replace what is known."""
    await bench.make(A)
    bench.prober.add(OTHER, A.digest)
    await bench.manager.get_by_blob(
        [A],
        parent=None,
        handlers=[DescHandler(digest=A.digest, provider=OTHER)],
        authorizer=ALICE,
        lease_id=LEASE,
    )
    (state,) = await bench.refs.get([(await bench.make(A))[0].record.id])
    assert state.providers == (APP, OTHER)


async def test_a_present_blob_is_no_way_around_its_registry(bench):
    """It is in the content store; who may not read it at the registry may not have it here."""
    (state,) = await bench.make(A)
    bench.make_present(A)
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.make(A, who=MALLORY)
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.get(state.record.id, who=MALLORY)
    assert not (await bench.get(state.record.id))[0].is_lazy


async def test_a_built_chain_is_open_to_who_may_use_its_base(bench):
    """By ID or by its descriptors, on the base or from the bottom; the base's registry decides."""
    (base,) = await bench.make(A)
    (top,) = await bench.build(B, on=base.record)
    await bench.get(top.record.id)
    assert (await bench.make(A, B, handled=[]))[-1].record.id == top.record.id
    assert (await bench.make(B, parent=base.record.id, handled=[]))[0].record.id == top.record.id
    bench.make_present(A)
    for use in (
        bench.get(top.record.id, who=MALLORY),
        bench.make(A, B, handled=[], who=MALLORY),
        bench.make(B, parent=base.record.id, handled=[], who=MALLORY),
    ):
        with pytest.raises(NeedsRemoteProvidersError) as caught:
            await use
        assert caught.value.digests == (A.digest,)


async def test_a_built_layer_is_not_had_by_putting_it_on_something_else(bench):
    """Its digest and diff ID are known: in a chain that no build made they open nothing."""
    (base,) = await bench.make(A)
    await bench.build(B, on=base.record)
    bench.prober.blobs.pop((APP.source, B.digest))
    bench.prober.add(OTHER, C.digest)
    for layers in ([B], [C, B]):
        handlers = [DescHandler(digest=C.digest, provider=OTHER)]
        with pytest.raises(NeedsRemoteProvidersError) as caught:
            await bench.manager.get_by_blob(layers, parent=None, handlers=handlers, authorizer=MALLORY, lease_id=LEASE)
        assert caught.value.digests == (B.digest,)


async def test_a_built_layer_that_was_pulled_on_nothing_is_no_built_chain(bench):
    """Alice pulled it as an image of its own: that it was built upon her base opens the image to nobody."""
    (base,) = await bench.make(A)
    await bench.build(B, on=base.record)
    (alone,) = await bench.make(B)
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.get(alone.record.id, who=MALLORY)
    assert caught.value.digests == (B.digest,)


async def test_what_was_copied_out_of_a_private_base_needs_that_base(bench):
    """By ID and by its descriptor; alice, who may read the base, has it, also when the base's ref is collected."""
    (base,) = await bench.make(A)
    bench.make_present(A)
    origin = await origin_of(bench.access, ALICE, await bench.refs.get([base.record.id]), beside=())
    (copied,) = await bench.build(B, on=None, origins=[origin])
    del bench.memory.records[base.record.id], bench.memory.providers[A.digest]
    bench.prober.blobs.pop((APP.source, B.digest))
    for use in (bench.get(copied.record.id, who=MALLORY), bench.make(B, handled=[], who=MALLORY)):
        with pytest.raises(NeedsRemoteProvidersError) as caught:
            await use
        assert caught.value.digests == (A.digest,)
    assert (await bench.get(copied.record.id))[0].record.id == copied.record.id
    assert (await bench.make(B, handled=[]))[0].record.id == copied.record.id


async def test_another_way_to_what_it_was_made_of_will_do(bench):
    """Bob reads the base at a mirror that the farm didn't know when the layer was made, and says so."""
    (base,) = await bench.make(A)
    origin = await origin_of(bench.access, ALICE, [base], beside=())
    (copied,) = await bench.build(B, on=None, origins=[origin])
    bench.prober.add(OTHER, A.digest, readers={"bob"})
    bob = FakeAuthorizer("bob")
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.get(copied.record.id, who=bob)
    handlers = [DescHandler(digest=A.digest, provider=OTHER)]
    await bench.manager.get(copied.record.id, handlers=handlers, authorizer=bob, lease_id=LEASE)


async def test_only_the_farm_says_that_a_build_made_a_layer(bench):
    """A caller who says so is not believed, and it is not kept for the next."""
    handlers = [DescHandler(digest=A.digest, provider=provider) for provider in (FARM, APP)]
    bench.make_present(A)
    (state,) = await bench.manager.get_by_blob([A], parent=None, handlers=handlers, authorizer=ALICE, lease_id=LEASE)
    assert state.providers == (APP,)
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.manager.get_by_blob([A], parent=None, handlers=handlers, authorizer=MALLORY, lease_id=LEASE)


async def test_a_descriptor_without_a_diff_id_is_refused(bench):
    """TestManager: its chain can't be named; nothing is created."""
    with pytest.raises(InvalidDescriptorError):
        await bench.make(replace(A, diff_id=None))
    assert bench.memory.records == {}


@pytest.mark.parametrize(("lease", "error"), [("", LeaseRequiredError), ("gone", LeaseLostError)])
async def test_a_ref_needs_a_live_lease(bench, lease, error):
    """Nothing is made that nobody holds."""
    with pytest.raises(error):
        await bench.make(A, lease=LeaseId(lease))
    assert bench.memory.records == {}
    (state,) = await bench.make(A)
    with pytest.raises(error):
        await bench.get(state.record.id, lease=LeaseId(lease))


async def test_an_unknown_parent_is_refused(bench):
    """Nothing can be put on top of what isn't known."""
    with pytest.raises(NonAddressableParentError):
        await bench.make(A, parent=RefId("sha256:" + "0" * 64))


async def test_refs_are_held_by_the_callers_lease(bench):
    """Made or found, a chain is the caller's to keep: all of it."""
    states = await bench.make(A, B)
    await bench.leases.create(LeaseId("l2"), ttl_s=60.0)
    await bench.get(states[-1].record.id, lease=LeaseId("l2"))
    for lease in (LEASE, LeaseId("l2")):
        assert set((await bench.leases.get(lease)).resources) == {ref_resource(s.record.id) for s in states}


async def test_get_names_every_digest_that_is_lacking(bench):
    """The whole chain is checked before anything is said."""
    states = await bench.make(A, B, C)
    bench.prober.add(APP, B.digest)
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.get(states[-1].record.id, who=MALLORY)
    assert caught.value.digests == (A.digest, C.digest)


async def test_get_of_an_unknown_ref_says_so(bench):
    """RefNotFoundError, not a missing provider."""
    with pytest.raises(RefNotFoundError):
        await bench.get(RefId("sha256:" + "0" * 64))


async def test_lookups_ask_registries_only_for_what_is_not_proven(bench):
    """I7: a second lookup of the same chain asks nobody."""
    states = await bench.make(A, B, C)
    asked = len(bench.prober.asked)
    await bench.make(A, B, C)
    await bench.get(states[-1].record.id)
    assert len(bench.prober.asked) == asked == 3


# -- names -----------------------------------------------------------------------------------------------


async def put_image(bench, name, *layers):
    states = await bench.make(*layers)
    manifest = digest_of(f"manifest of {name}".encode())
    image = ImageRecord(
        name=name,
        manifest=Descriptor(media_type=MANIFEST_OCI, digest=manifest, size_bytes=1),
        config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(b"config"), size_bytes=1),
        platform="linux/amd64",
        layers=layers,
        ref=states[-1].record.id,
    )
    return await bench.refs.put_image(image, lease_id=LEASE)


async def test_a_ref_goes_by_its_id_its_first_digits_and_its_image(bench):
    """ID, short ID, manifest digest, full and short image name: one ref."""
    image = await put_image(bench, "docker.io/library/debian:12", A, B)
    hexes = image.ref.removeprefix("sha256:")
    for name in (image.ref, hexes, hexes[:12], image.manifest.digest, "debian:12", "docker.io/library/debian:12"):
        assert (await find_ref(bench.refs, name))[1] == image.ref, name


async def test_an_inner_ref_has_no_image(bench):
    """The base below an image's top is a ref of its own."""
    await put_image(bench, "docker.io/library/debian:12", A, B)
    (base,) = await bench.make(A)
    assert await find_ref(bench.refs, base.record.id) == (None, base.record.id)


@pytest.mark.parametrize("name", ["debian:13", "0123456789ab", "sha256:" + "0" * 64, "Not A Name", "ab"])
async def test_an_unknown_name_says_so(bench, name):
    """Whatever it looks like: RefNotFoundError."""
    await put_image(bench, "docker.io/library/debian:12", A)
    with pytest.raises(RefNotFoundError):
        await find_ref(bench.refs, name)


async def test_digits_of_several_refs_are_ambiguous(bench):
    """Never a guess."""
    (state,) = await bench.make(A)
    twin = RefId(state.record.id[:-1] + ("0" if state.record.id[-1] != "0" else "1"))
    bench.memory.records[twin] = replace(state.record, id=twin)
    with pytest.raises(AmbiguousRefError):
        await find_ref(bench.refs, state.record.id[7:19])
